"""Text -> a stream that may be missing, replaced, closed or unable to show it: output never ends a run."""

import contextlib
import os
from typing import Any


def is_terminal(stream: Any) -> bool:
    """True if a stream is a terminal; False for None, and for an object in its place that does not say."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError, OSError, TypeError):  # closed streams raise ValueError
        return False


def write_line(text: str, stream: Any) -> None:
    """Write a line, with ? for characters that the stream's encoding lacks. What cannot be written is dropped.

    A pipe that its reader has closed (`| head -1`) is pointed at nothing, so that Python's last flush is silent too.
    """
    if stream is None:
        return
    try:
        try:
            stream.write(text + "\n")
        except UnicodeEncodeError:
            encoding = getattr(stream, "encoding", None) or "ascii"
            stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        stream.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)
    except (OSError, ValueError, AttributeError):
        return
