"""Requests -> answers: the HTTP client of a vLLM server, with a bound on time and size, and one clear error.

It needs no more than the standard library, uses no proxy, and follows no redirect.
"""

import contextlib
import http.client
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlsplit

from konic.finetuning.errors import ConfigError, SamplerError, safe_cause
from konic.text import describe_error, keep_secret, printable

KEY_VARIABLE = "VLLM_API_KEY"
"""The environment variable from which vLLM, too, takes the key."""
MOST_AT_ONCE = 256
"""Requests on their way at the same time: as many as vLLM computes at once by default. The others wait here."""
CONNECT_SECONDS = 10.0
MOST_BYTES = 2**26
"""The most bytes of one answer; a response of 32,000 tokens takes about 1 MB."""
_SETTLING_SECONDS = 0.5
"""How long it takes at most until a server that has ended is known to have ended."""
_LOOK_SECONDS = 0.2
"""How often a waiting caller looks whether the server still runs."""


class _UnixConnection(http.client.HTTPConnection):
    """A connection to a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        until = time.monotonic() + (self.timeout or 0.0)
        while True:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(self.timeout)
            try:
                self.sock.connect(self._path)
            except BlockingIOError:  # many connect at once, and the server has not accepted the last ones yet
                self.sock.close()
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)
            else:
                return


class _Call:
    """Several requests that are on their way: when their time is up, and their connections."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self._sockets: list[socket.socket] = []
        self._has_ended = threading.Event()

    def add(self, connected: socket.socket) -> None:
        """Take a connection."""
        self._sockets.append(connected)
        if self._has_ended.is_set():
            self.end()

    def end(self) -> None:
        """Let every thread that still waits for an answer stop waiting."""
        self._has_ended.set()
        for connected in self._sockets:
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)


class VllmClient:
    """Talks to the server at an address.

    Args:
        address: `http://HOST:PORT`, `https://HOST:PORT` or `unix:/PATH/OF/A/SOCKET`; a path `/v1` at its end may stay.
        seconds: The most that a call may take.
        key: Sent with every request; None takes the variable VLLM_API_KEY, or sends none.
        require_running: Called again and again during a call; it raises an error if the server has ended.

    Raises:
        ConfigError: The address is not one of these.
    """

    def __init__(
        self,
        address: str,
        seconds: float,
        key: str | None = None,
        require_running: Callable[[], None] = lambda: None,
    ) -> None:
        self._connect, self._base = _read_address(address)
        self._seconds, self._key, self.require_running = seconds, key or _key_of_environment(), require_running
        keep_secret(self._key)
        self.name = f"The vLLM server at {address}"
        """How a message names it."""

    def get(self, path: str) -> Any:
        """Return what the server answers to GET, read from JSON."""
        return self._all("GET", path, [None])[0]

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return what the server answers to POST, read from JSON; its text if it is none."""
        return self._all("POST", path, [body])[0]

    def post_all(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Return the answers to several requests, which are sent at the same time."""
        return self._all("POST", path, bodies)

    def _all(self, method: str, path: str, bodies: Sequence[Mapping[str, Any] | None]) -> list[Any]:
        """Send requests at once and wait for their answers.

        Raises:
            SamplerError: The first of them that fails, or all of them together take too long.
        """
        call, pool = _Call(time.monotonic() + self._seconds), ThreadPoolExecutor(min(len(bodies), MOST_AT_ONCE))
        try:
            futures = [pool.submit(self._ask, method, path, body, call) for body in bodies]
            self._wait(futures, call.deadline)
            return [future.result() for future in futures]
        finally:  # after an error, or Ctrl-C, nobody waits for the other answers
            call.end()
            pool.shutdown(wait=False, cancel_futures=True)

    def _wait(self, futures: Sequence[Future[Any]], deadline: float) -> None:
        left = set(futures)
        while left:
            done, left = wait(left, timeout=_LOOK_SECONDS, return_when="FIRST_EXCEPTION")
            if any(future.exception() for future in done):
                time.sleep(_SETTLING_SECONDS)
                self.require_running()  # a server that has ended is the cause of what its connections say
                next(future for future in futures if future in done and future.exception()).result()
            if left:
                self.require_running()
            if left and time.monotonic() > deadline:
                raise self._late()

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, call: "_Call") -> Any:
        headers = {"Content-Type": "application/json", "Connection": "close"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        left = call.deadline - time.monotonic()
        if left <= 0:
            raise self._late()
        connection = self._connect(min(CONNECT_SECONDS, left))
        try:
            connection.connect()
            connection.sock.settimeout(left)
            call.add(connection.sock)
            connection.request(method, self._base + path, json.dumps(body) if body is not None else None, headers)
            with connection.getresponse() as answer:
                content = answer.read(MOST_BYTES + 1)
                if answer.length and len(content) <= MOST_BYTES:  # `read` is silent about an early end
                    raise http.client.IncompleteRead(b"", answer.length)
        except (ConnectionRefusedError, FileNotFoundError, socket.gaierror, PermissionError) as error:
            raise SamplerError(
                f"{self.name} cannot be reached: {describe_error(error)}. Check vllm_address, and that the server "
                "has started."
            ) from safe_cause(error)
        except TimeoutError as error:
            raise self._late() from safe_cause(error)
        except ssl.SSLError as error:
            raise SamplerError(f"{self.name}: no TLS connection: {describe_error(error)}.") from safe_cause(error)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise SamplerError(
                f"{self.name} broke off before its answer to {path} was complete: {describe_error(error)}. Look at "
                "its log; it may have ended."
            ) from safe_cause(error)
        finally:
            connection.close()
        return self._read(path, answer.status, content)

    def _read(self, path: str, status: int, content: bytes) -> Any:
        text = content[:MOST_BYTES].decode(errors="replace")
        if status in (401, 403):
            raise SamplerError(f"{self.name} refuses the key: set the variable {KEY_VARIABLE} to the server's key.")
        if status != 200:
            raise RequestRefusedError(f"{self.name} answered {path} with the status {status}: {_message(text)}", status)
        if len(content) > MOST_BYTES:
            raise SamplerError(f"{self.name} answered {path} with more than {MOST_BYTES >> 20} MB.")
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text

    def _late(self) -> SamplerError:
        return SamplerError(
            f"{self.name} did not answer within {self._seconds:g} s. Raise vllm_timeout_seconds if it needs longer."
        )


class RequestRefusedError(SamplerError):
    """The server answered with a status other than 200."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


def _key_of_environment() -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"The variable {KEY_VARIABLE} holds characters that no key has: set it to the server's key.")
    return key


def _read_address(address: str) -> tuple[Callable[[float], http.client.HTTPConnection], str]:
    """Return how to connect to an address within so many seconds, and the path before every request's own."""
    wanted = (
        f"GenerationConfig.vllm_address: it must be http://HOST:PORT, https://HOST:PORT or unix:/PATH, got "
        f"{printable(address)!r}."
    )
    try:
        parts = urlsplit(address)
        host, port, base = parts.hostname, parts.port, parts.path.rstrip("/").removesuffix("/v1")
    except ValueError:
        raise ConfigError(wanted) from None
    if parts.username or parts.password:
        raise ConfigError(f"{wanted} A key is not written there: set the variable {KEY_VARIABLE}.")
    if parts.scheme == "unix" and parts.path and not host:
        return lambda seconds: _UnixConnection(parts.path, seconds), ""
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise ConfigError(wanted)
    if parts.scheme == "https":
        return lambda seconds: http.client.HTTPSConnection(host, port, timeout=seconds), base
    return lambda seconds: http.client.HTTPConnection(host, port, timeout=seconds), base


def _message(text: str) -> str:
    """Return what an answer with an error says, on one line, shortened."""
    try:
        answer = json.loads(text)
        inner = answer.get("error", answer)
        text = str(inner.get("message", inner.get("detail", text)) if isinstance(inner, dict) else inner)
    except (ValueError, AttributeError, RecursionError):
        pass
    shown = printable(" ".join(text[:4000].split()))
    return shown if len(shown) < 400 else f"{shown[:400]} …"
