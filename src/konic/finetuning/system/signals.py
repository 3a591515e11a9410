"""Ctrl-C and the system's request to end (SIGTERM): held back while a run's state changes, then acted on."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SigtermHandler:
    """Takes the first SIGTERM as a KeyboardInterrupt, and remembers that it came."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt the first time."""
        if not self.came:
            self.came = True
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if it came: a bare `except:` in a user's code may have swallowed the first."""
        if self.came:
            raise KeyboardInterrupt


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within it Ctrl-C and SIGTERM wait; on leaving they come. A second Ctrl-C does not wait. Main thread only.

    Where it is left by an error, the error goes on, and a SIGTERM that came is remembered.
    """
    if not _in_main_thread():
        yield
        return
    waiting: list[int] = []
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def hold(number: int, frame: FrameType | None) -> None:
        handler = before[signal.Signals(number)]
        if number in waiting and number == signal.SIGINT and callable(handler):
            handler(number, frame)
        waiting.append(number)

    for number in _SIGNALS:
        signal.signal(number, hold)
    try:
        yield
    except BaseException:
        _put_back(before)
        handler = before[signal.SIGTERM]
        if signal.SIGTERM in waiting:
            if isinstance(handler, SigtermHandler):
                handler.came = True
            else:
                _deliver(signal.SIGTERM, handler)
        raise
    _put_back(before)
    if waiting:
        last = signal.SIGTERM if signal.SIGTERM in waiting else signal.SIGINT  # one that ends the process is not lost
        _deliver(last, before[last])


@contextmanager
def sigterm_as_interrupt() -> Iterator[SigtermHandler]:
    """Within it SIGTERM is a KeyboardInterrupt; on leaving the process gets it once more, as it would have been taken.

    Main thread only.
    """
    handler = SigtermHandler()
    if not _in_main_thread():
        yield handler
        return
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, handler)
    try:
        yield handler
    finally:
        signal.signal(signal.SIGTERM, before)
        if handler.came:
            os.kill(os.getpid(), signal.SIGTERM)


def _put_back(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _deliver(number: signal.Signals, handler: object) -> None:
    if callable(handler):
        handler(number, None)
    else:
        os.kill(os.getpid(), number)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
