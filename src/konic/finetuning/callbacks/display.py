"""Picture of a run -> a terminal or a notebook: it is drawn again about once a second, outside the training's thread.

What is printed meanwhile, by whomever, appears above it. Dumb terminals, pipes and files get no picture.
"""

import io
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, Protocol

from rich.console import Console, ConsoleRenderable
from rich.control import Control
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from konic.finetuning.callbacks.live import LiveState, draw
from konic.output import is_terminal
from konic.text import describe_error

_TAKEN = threading.Lock()
"""Held while a picture is on the terminal: another run of the process, in another thread, shows none."""
_DRAWS_PER_SECOND = 1
_NOTEBOOK_WIDTH, _NOTEBOOK_HEIGHT = 100, 30


class Display(Protocol):
    """Where a picture is shown."""

    def show(self) -> None:
        """Show that the state has changed, now or within a second."""

    def stop(self) -> None:
        """Show it for the last time and put back what showing it has changed."""


def open_display(state: LiveState) -> Display | None:
    """Start to show a state on standard error, or else standard output, or in a notebook; None where neither can."""
    stream = next((stream for stream in (sys.stderr, sys.stdout) if is_terminal(stream)), None)
    if stream is not None:
        console = Console(file=stream, highlight=False)
        usable = console.is_terminal and console.is_interactive and not console.is_dumb_terminal
        return _Terminal(state, console) if usable and _TAKEN.acquire(blocking=False) else None
    return _Notebook(state) if _in_notebook() else None


class _Terminal:
    """The cursor stays visible, so that a process that is stopped or killed leaves the terminal as it was."""

    def __init__(self, state: LiveState, console: Console) -> None:
        self._live = _ResizedLive(
            console=console,
            get_renderable=lambda: _drawn(state, console.width, console.height, console.options.ascii_only),
            refresh_per_second=_DRAWS_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
        )
        self._live.start(refresh=True)
        console.show_cursor()
        self._restored = ExitStack()
        for stream, redirected in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if is_terminal(stream):
                above = _Above(console, stream)
                self._restored.enter_context(redirected(above))
                self._restored.callback(above.end)
        self._restored.enter_context(_logging_above())

    def show(self) -> None:
        """Nothing: the thread draws what has changed."""

    def stop(self) -> None:
        try:
            self._restored.close()
            self._live.stop()
        finally:
            _TAKEN.release()


class _Above(FileProxy):
    """What is printed -> lines above the picture. Of a line that a progress bar rewrites, only its last state."""

    _line = ""
    """The line that has not ended, from its last return to the start on."""

    def write(self, text: str) -> int:
        """See the base class."""
        *lines, last = (self._line + text).split("\n")
        self._line = last[max(0, last.rfind("\r")) :]
        if lines:
            super().write("".join(line.rstrip("\r").rpartition("\r")[2] + "\n" for line in lines))
        return len(text)

    def flush(self) -> None:
        """Print a line that has not ended, unless it may still be rewritten."""
        if "\r" not in self._line:
            self.end()

    def end(self) -> None:
        """Print the line that has not ended."""
        line, self._line = self._line.strip("\r"), ""
        if line.strip():
            super().write(f"{line}\n")


class _ResizedLive(Live):
    """A live picture that leaves no rest behind.

    A terminal that gets narrower wraps each of its lines. The ^C that it shows stands at the start of the last line,
    not behind it, where it would take a line more.
    """

    _drawn_width = 0

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """See the base class."""
        with self._lock:
            width, height = self.console.width, self._live_render.last_render_height
            wrapped = height * (math.ceil(self._drawn_width / max(1, width)) - 1) if self._drawn_width else 0
            self._drawn_width = width
            clear_lines = ((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)) * wrapped
            shown = super().process_renderables(renderables)
            return [Control(*clear_lines), *shown, Control(ControlType.CARRIAGE_RETURN)]


class _Notebook:
    """One output of a cell, replaced at most once a second."""

    def __init__(self, state: LiveState) -> None:
        from IPython.display import display

        self._state, self._last_shown = state, time.monotonic()
        self._handle: Any = display(self._content(), raw=True, display_id=True)

    def show(self) -> None:
        if time.monotonic() - self._last_shown >= 1 / _DRAWS_PER_SECOND:
            self.stop()

    def stop(self) -> None:
        self._last_shown = time.monotonic()
        self._handle.update(self._content(), raw=True)

    def _content(self) -> dict[str, str]:
        console = Console(file=io.StringIO(), width=_NOTEBOOK_WIDTH, force_jupyter=False, color_system=None)
        console.print(_drawn(self._state, _NOTEBOOK_WIDTH, _NOTEBOOK_HEIGHT, ascii_only=False))
        return {"text/plain": console.file.getvalue()}  # type: ignore[attr-defined]


def _drawn(state: LiveState, width: int, height: int, ascii_only: bool) -> Any:
    """The picture. A fault in drawing it is shown in its place: it ends no run."""
    try:
        return draw(state, width, height, time.monotonic(), ascii_only)
    except Exception as error:
        return Text(f"The live view failed: {describe_error(error)}")


@contextmanager
def _logging_above() -> Iterator[None]:
    """Within it, log handlers that kept the terminal's stream write above the picture, as everything else does."""
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    moved = [
        (handler, handler.stream)
        for logger in loggers
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and is_terminal(handler.stream)
        if not isinstance(getattr(type(handler), "stream", None), property)  # logging's last resort asks sys.stderr
    ]
    for handler, _ in moved:
        handler.setStream(sys.stderr if is_terminal(sys.stderr) else sys.stdout)
    try:
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)


def _in_notebook() -> bool:
    """True in a kernel of Jupyter, whose front end shows and replaces outputs."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell" and threading.current_thread() is threading.main_thread()


def peak_memory_bytes() -> int:
    """The most memory that the process, or on a GPU its tensors, has used; 0 where the system does not say."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    if os.name != "posix":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most if sys.platform == "darwin" else most * 1024)
