"""Runs that go on -> a page that follows them, served to this machine alone.

Whoever may read the run gets a URL with a random token. Requests that a page of another site causes name another host
or origin, and are refused.
"""

import errno
import hashlib
import hmac
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any

from markupsafe import escape

from konic.finetuning.errors import ConfigError, OutputError
from konic.output import write_line
from konic.report.page import render
from konic.report.run import Run
from konic.text import describe_error

HOST = "127.0.0.1"
SETTLED = 10.0
"""Seconds without a change after which a file that cannot be read is broken; until then it may be half written."""
_WAITING = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<meta http-equiv="refresh" content="2"><title>{name} – konic report</title>
<p>{name} has not finished an iteration yet. This page looks again every 2 seconds.
"""
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class LivePage:
    """The page of runs that go on. It is made when it is asked for, and only if a run has changed."""

    def __init__(self, runs: Sequence[Path]) -> None:
        self._runs = runs
        self._unfinished = runs[0]
        self._lock = threading.Lock()
        self._page: str | None = None
        self._state = ""
        self._notes: set[str] = set()
        self._seen, self._since = "", 0.0

    def state(self) -> str:
        """Return what changes whenever a run goes on: a hash of the times and sizes of its files."""
        stamps = [_stamp(path) for run in self._runs for path in _changing(run)]
        return hashlib.sha256(" ".join(stamps).encode()).hexdigest()[:16]

    def html(self) -> str:
        """Return the page, or the last one while a file of a run cannot be read.

        Raises:
            OutputError: At first: a folder is not the folder of a run.
        """
        with self._lock:
            state = self.state()
            if state != self._seen:
                self._seen, self._since = state, time.monotonic()
            if state != self._state:
                self._renew(state)
            return self._page or _WAITING.format(name=escape(self._unfinished.resolve().name))

    def _renew(self, state: str) -> None:
        runs: list[Run] = []
        try:
            for run in self._runs:
                self._unfinished = run
                runs.append(Run.read(run))
            page = render(runs, None, state)
        except OutputError:
            if self._page is None and not all((run / "run.json").exists() for run in self._runs):
                raise
            return  # it has not finished an iteration, or is being moved
        except Exception as error:
            if self._page is None:
                raise
            write_line(f"The last page is kept, because a new one cannot be made: {describe_error(error)}", sys.stderr)
            self._state = state
            return
        notes = {note for run in runs for note in run.notes}
        if self._page is None or notes <= self._notes or time.monotonic() - self._since >= SETTLED:
            self._page, self._state, self._notes = page, state, notes


def watch(runs: Sequence[Path], port: int) -> None:
    """Serve a page that follows runs, until Ctrl-C. Port 0 is any free one.

    Raises:
        ConfigError: The port cannot be had.
        OutputError: A folder is not the folder of a run.
    """
    page = LivePage(runs)
    page.html()
    with Server(page, port) as server:
        write_line(f"Open {server.url} in a browser of this machine. Ctrl-C ends it.", sys.stderr)
        server.serve_forever()


class Server(ThreadingHTTPServer):
    """Serves one page, and its state, to those who know the token."""

    allow_reuse_address = os.name != "nt"  # there it would share the port with another program
    daemon_threads = True

    def __init__(self, page: LivePage, port: int) -> None:
        self.page = page
        self.path = f"/{secrets.token_urlsafe(24)}/"
        try:
            super().__init__((HOST, port), _Request)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            reason = "is in use by another program" if taken else f"cannot be had: {describe_error(error)}"
            raise ConfigError(f"Port {port} {reason}. Give another --port, or none for a free one.") from None

    def server_bind(self) -> None:
        """Bind the port, without asking a name server what this machine is called."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}{self.path}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what failed in a line; a browser that left is no failure."""
        error = sys.exception()
        if error is not None and not isinstance(error, (ConnectionError, TimeoutError)):
            write_line(f"A request failed: {describe_error(error)}", sys.stderr)


class _Request(BaseHTTPRequestHandler):
    server: Server
    timeout = 30

    def version_string(self) -> str:
        """Name no versions."""
        return "konic"

    def do_GET(self) -> None:
        if not self._is_from_here():
            return self._answer(HTTPStatus.FORBIDDEN)
        if self._asks_for(self.server.path):
            return self._answer(HTTPStatus.OK, "text/html", self.server.page.html())
        if self._asks_for(f"{self.server.path}state"):
            return self._answer(HTTPStatus.OK, "application/json", json.dumps({"state": self.server.page.state()}))
        return self._answer(HTTPStatus.NOT_FOUND)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _is_from_here(self) -> bool:
        """True if the request names this host and port, and a page of another site did not cause it."""
        port = self.server.server_port
        hosts = [f"{name}:{port}" for name in (HOST, "localhost")]
        hosts += [HOST, "localhost"] if port == 80 else []
        host, origin = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        return len(host) == 1 and host[0] in hosts and origin in ([], [f"http://{host[0]}"])

    def _asks_for(self, path: str) -> bool:
        return hmac.compare_digest(self.path.encode("utf-8", "replace"), path.encode())

    def _answer(self, status: int, kind: str = "text/plain", text: str = "") -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        for name, value in (_HEADERS | {"Content-Type": f"{kind}; charset=utf-8"}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no request, or of another method, without a word of it."""
        self._answer(HTTPStatus.FORBIDDEN if code == HTTPStatus.NOT_IMPLEMENTED else code)

    def log_message(self, *args: Any) -> None:
        """Keep the token out of any log."""


def _changing(run: Path) -> list[Path]:
    """The files and folders that change when a run goes on."""
    folders = [run, run / "evaluations", run / "completions"]
    return [*folders, run / "run.json", run / "metrics.jsonl", *(_last(folder) for folder in folders[1:])]


def _last(folder: Path) -> Path:
    """The last file by name of a folder whose files are numbered."""
    try:
        return folder / max(os.listdir(folder), default="")
    except OSError:
        return folder


def _stamp(path: Path) -> str:
    try:
        now = path.stat()
    except OSError:
        return "-"
    return f"{now.st_mtime_ns}:{now.st_size}"
