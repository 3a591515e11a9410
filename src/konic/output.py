"""Text -> a stream that may be missing, replaced, closed, full or unable to show it: output never ends a run.

All lines and log records pass here, and show no secret and no control character.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from numbers import Number
from typing import Any, TextIO

from konic.text import printable, printable_lines

RED = "\x1b[31m"


def is_terminal(stream: Any) -> bool:
    """True if a stream is a terminal; False for None, and for an object in its place that does not say."""
    try:
        return bool(stream.isatty())
    except Exception:  # what stands in a stream's place may raise anything
        return False


class Tolerant:
    """A stream that drops what cannot be written, and shows ? for characters that its encoding lacks.

    A pipe that its reader has closed (`| head -1`) is pointed at nothing, so that Python's last flush is silent too.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what can be written; return the number of characters given.

        Raises:
            TypeError: It is no text: by this, libraries find out what kind of stream it is.
        """
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        with self._tolerance():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = getattr(self._stream, "encoding", None) or "ascii"
                self._stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Send on what was written."""
        with self._tolerance():
            self._stream.flush()

    @contextlib.contextmanager
    def _tolerance(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self.discard_rest()
        except Exception:  # noqa: S110 - what stands in a stream's place may raise anything
            pass

    def discard_rest(self) -> None:
        """Point the stream at nothing."""
        with contextlib.suppress(Exception):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)


def write_line(text: str, stream: Any, colour: str = "", end: str = "\n") -> None:
    """Write lines as :class:`Tolerant` does, in a colour on a terminal; nothing where there is no stream."""
    if stream is not None:
        tolerant = Tolerant(stream)
        text = printable_lines(text)
        tolerant.write((f"{colour}{text}\x1b[0m" if colour and is_terminal(stream) else text) + end)
        tolerant.flush()


@contextlib.contextmanager
def tolerant_streams() -> Iterator[None]:
    """Within it, printing to a broken standard output or error raises nothing, also in a user's reward."""
    before = sys.stdout, sys.stderr
    tolerate_broken_streams()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def reserved_output() -> Iterator[TextIO]:
    """Yield standard output; within it, whatever else is printed, also by other processes, goes to standard error."""
    reserved = sys.stdout
    try:
        reserved.flush()
        copy = os.dup(1) if reserved.fileno() == 1 else None
    except Exception:
        copy = None  # an object stands in its place
    with contextlib.redirect_stdout(sys.stderr):
        if copy is None:
            yield reserved
            return
        with open(copy, "w", encoding="utf-8") as stream:
            with contextlib.suppress(OSError):  # standard error may be closed
                os.dup2(2, 1)
            try:
                yield stream
            finally:
                os.dup2(copy, 1)


def tolerate_broken_streams() -> None:
    """From here on, printing to a broken standard output or error raises nothing."""
    sys.stdout, sys.stderr = (
        stream if stream is None or isinstance(stream, Tolerant) else Tolerant(stream)
        for stream in (sys.stdout, sys.stderr)
    )


def end_streams() -> None:
    """Drop what a full disk still refuses, before Python's last flush would turn it into exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except Exception:
            Tolerant(stream).discard_rest()


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module, whose records are printable."""
    logger = logging.getLogger(name)
    logger.addFilter(_make_printable)
    return logger


def _make_printable(record: logging.LogRecord) -> bool:
    """Make the values of a record printable: one line each, and an error has its own lines."""
    if isinstance(record.args, tuple):
        record.args = tuple(map(_shown, record.args))
    return True


def _shown(value: object) -> object:
    if isinstance(value, Number):
        return value
    return printable_lines(str(value)) if isinstance(value, Exception) else printable(str(value))
