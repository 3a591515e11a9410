"""Ctrl-C and SIGTERM -> KeyboardInterrupt: holds signals back while a run's state changes, then delivers them."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SigtermHandler:
    """Turns the first SIGTERM into a KeyboardInterrupt, and records in `came` that a SIGTERM came."""

    def __init__(self) -> None:
        self.came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Record the signal; raise KeyboardInterrupt the first time."""
        if not self.came:
            self.came = True
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if a SIGTERM came: a bare `except:` in user code may have swallowed the first one."""
        if self.came:
            raise KeyboardInterrupt


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM inside the block, and deliver them on exit. A second Ctrl-C does not wait.

    If the block raises an error, the error propagates and a SIGTERM that came is recorded. This works only in the main
    thread; other threads get no protection.
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
        last = signal.SIGTERM if signal.SIGTERM in waiting else signal.SIGINT  # a request to end must not be lost
        _deliver(last, before[last])


@contextmanager
def sigterm_as_interrupt() -> Iterator[SigtermHandler]:
    """Turn SIGTERM into a KeyboardInterrupt inside the block.

    If a SIGTERM came, the process gets it again on exit, with the earlier handler. This works only in the main thread.
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
