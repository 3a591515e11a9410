"""Ctrl-C, SIGTERM and SIGHUP -> KeyboardInterrupt: held back while a run's state changes, and never lost."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_TERMINATIONS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Requests to end the process: a scheduler's, and that of a terminal that closes."""
SIGNALS = (signal.SIGINT, *_TERMINATIONS)
"""What ends a run."""
QUIET_SIGNALS = tuple(getattr(signal, name) for name in ("SIGPIPE", "SIGXFSZ") if hasattr(signal, name))
"""What Python ignores, so that a closed pipe or a full quota is an OSError; their default would end the process."""


class StopHandler:
    """Turns Ctrl-C and the first termination into a KeyboardInterrupt, and remembers that they came."""

    def __init__(self) -> None:
        self.termination: int | None = None
        """The number of the first SIGTERM or SIGHUP."""
        self.was_interrupted = False
        """True once Ctrl-C came."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Record the signal and raise KeyboardInterrupt: at every Ctrl-C, and at the first termination."""
        if number == signal.SIGINT:
            self.was_interrupted = True
            raise KeyboardInterrupt
        if self.termination is None:
            self.termination = number
            raise KeyboardInterrupt

    def record(self, number: int) -> None:
        """Remember a signal without raising."""
        if number == signal.SIGINT:
            self.was_interrupted = True
        elif self.termination is None:
            self.termination = number

    @property
    def has_come(self) -> bool:
        """True once any of the signals came."""
        return self.was_interrupted or self.termination is not None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C, SIGTERM and SIGHUP inside the block; deliver them on exit. A second Ctrl-C does not wait.

    If the block raises an error, the error propagates and the signals that came are recorded. This works only in the
    main thread; other threads get no protection.
    """
    if not in_main_thread():
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
    except BaseException:
        _put_back(before)
        for number in waiting:
            handler = before[signal.Signals(number)]
            if isinstance(handler, StopHandler):
                handler.record(number)
            elif number != signal.SIGINT:
                _deliver(signal.Signals(number), handler)
        raise
    _put_back(before)
    if waiting:  # a request to end the process must not be lost
        last = next((signal.Signals(number) for number in waiting if number != signal.SIGINT), signal.SIGINT)
        _deliver(last, before[last])


@contextmanager
def stopping_on_signals() -> Iterator[StopHandler]:
    """Turn Ctrl-C, SIGTERM and SIGHUP into a KeyboardInterrupt inside the block.

    A signal that the process ignores, as under nohup, stays ignored. If a SIGTERM or SIGHUP came, the process gets it
    again on exit, with the earlier handler. A closed pipe does not end the process, although the script may have set
    SIGPIPE to its default. This works only in the main thread.
    """
    handler = StopHandler()
    if not in_main_thread():
        yield handler
        return
    before = {number: signal.getsignal(number) for number in (*SIGNALS, *QUIET_SIGNALS)}
    taken = {number: own for number, own in before.items() if own not in (signal.SIG_IGN, None)}
    for number in taken:
        signal.signal(number, signal.SIG_IGN if number in QUIET_SIGNALS else handler)
    try:
        yield handler
    finally:
        _put_back(taken)
        if handler.termination is not None:
            os.kill(os.getpid(), handler.termination)


@contextmanager
def raising_on_signals() -> Iterator[None]:
    """As :func:`stopping_on_signals`; the KeyboardInterrupt is raised again on exit, whatever the block made of it."""
    with stopping_on_signals() as stop:
        try:
            yield
        finally:
            if stop.has_come:
                raise KeyboardInterrupt


def _put_back(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _deliver(number: signal.Signals, handler: object) -> None:
    if callable(handler):
        handler(number, None)
    else:
        os.kill(os.getpid(), number)


def in_main_thread() -> bool:
    """True in the only thread that receives signals and may set their handlers."""
    return threading.current_thread() is threading.main_thread()


class _Masks(threading.local):
    """What the thread that forks had blocked."""

    before: Iterable[int] = ()


_masks = _Masks()


def _hold_for_fork() -> None:
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _release_after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _release_in_child() -> None:
    """Let a child that a reward forks end as any program does: the handlers here would swallow its SIGTERM."""
    for number in SIGNALS:
        if getattr(signal.getsignal(number), "__module__", "") == __name__:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _release_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold_for_fork, after_in_parent=_release_after_fork, after_in_child=_release_in_child)
