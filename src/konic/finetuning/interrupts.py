"""Ctrl-C and the system's request to end (SIGTERM): held back while a run's state changes, then acted on."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within it Ctrl-C and SIGTERM wait; on leaving they come. A second Ctrl-C does not wait. Main thread only."""
    if not _in_main_thread():
        yield
        return
    waiting: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def hold(number: int, frame: FrameType | None) -> None:
        handler = before[signal.Signals(number)]
        if number in waiting and number == signal.SIGINT and callable(handler):
            handler(number, frame)
        waiting.append(number)

    for number in SIGNALS:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number in SIGNALS:
            signal.signal(number, before[number])
    if waiting:
        last = signal.SIGTERM if signal.SIGTERM in waiting else signal.SIGINT  # one that ends the process is not lost
        handler = before[last]
        if callable(handler):
            handler(last, None)
        else:
            os.kill(os.getpid(), last)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Within it SIGTERM is a KeyboardInterrupt; on leaving the process gets it once more, as it would have been taken.

    Main thread only.
    """
    if not _in_main_thread():
        yield
        return
    came = False
    before = signal.getsignal(signal.SIGTERM)

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if not came:
            came = True
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if came:
            os.kill(os.getpid(), signal.SIGTERM)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
