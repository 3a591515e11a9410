"""A number of workers -> a Ray for this process alone: on loopback, for the holder of a token, and gone afterwards."""

import logging
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from konic.finetuning.cluster.ray_inside import one_machine
from konic.finetuning.errors import ConfigError, safe_cause
from konic.finetuning.system.signals import in_main_thread
from konic.text import describe_error

_OBJECT_STORE_BYTES = 100 * 2**20
"""Weights do not pass through it: results and messages are small."""
_OF_TOKENS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_MOST_CHARACTERS = 16
"""Of the folder for temporary files: the system takes 103 to 107 in the name of a socket, and Ray's are long."""


@contextmanager
def embedded(ray: Any, num_workers: int) -> Iterator[None]:
    """Within it a Ray runs on this machine: it listens on loopback only, to the holder of a token."""
    of_user = {name: os.environ[name] for name in _OF_TOKENS if name in os.environ}
    if not of_user:
        os.environ["RAY_AUTH_TOKEN"] = _token()  # Ray asks for one, and would keep its own in a file
    own = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its switch for loopback; it has none for Linux
        # its workers stand behind all other programs by default: on a busy machine a training took seven times as long
        "RAY_worker_niceness": os.environ.get("RAY_worker_niceness", "0"),  # noqa: SIM112  its name
    }
    folder = tempfile.mkdtemp(prefix="konic-ray-", dir=_short_folder())
    try:
        with one_machine():
            try:
                with _environment(own), signals_kept():
                    ray.init(
                        address="local",
                        num_cpus=max(os.cpu_count() or 1, num_workers),
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        object_store_memory=_OBJECT_STORE_BYTES,
                        _node_ip_address="127.0.0.1",
                        _temp_dir=os.path.join(folder, "ray"),  # Ray opens it to everybody, and `folder` is ours alone
                    )
            except Exception as error:
                raise ConfigError(f"Ray cannot start on this machine: {describe_error(error)}") from safe_cause(error)
            yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        for name in _OF_TOKENS:  # a cluster joined later has a token of its own, or none
            os.environ.pop(name, None)
        os.environ.update(of_user)


def _short_folder() -> str | None:
    """Return a folder for temporary files in which the names of Ray's sockets are not too long; None is the usual one.

    Raises:
        ConfigError: There is none.
    """
    usual = tempfile.gettempdir()
    if len(os.path.abspath(usual)) <= _MOST_CHARACTERS:
        return None
    short = "/tmp"  # noqa: S108  what is made in it is ours alone
    if os.access(short, os.W_OK | os.X_OK):
        return short
    raise ConfigError(f"Ray's sockets cannot be in {usual}, whose name is too long: set TMPDIR to a short one.")


@contextmanager
def signals_kept() -> Iterator[None]:
    """Put the handler of SIGTERM back on exit: Ray replaces it by one that ends the process without saving."""
    if not in_main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@cache
def _token() -> str:
    """One for this process, because Ray reads it once."""
    return secrets.token_hex(32)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
