"""A response -> a terminal, as it grows: plain text token by token."""

from typing import Any

from konic.output import write_line
from konic.text import printable_lines


class Typewriter:
    """Writes a text that grows: what is new of it, each time that it is called with the text so far."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._shown = ""

    def __call__(self, text: str) -> None:
        """Write what the text has more than before; a text that has changed otherwise waits for :meth:`end`."""
        shown = printable_lines(text.strip())
        if shown.startswith(self._shown):
            write_line(shown[len(self._shown) :], self._stream, end="")
            self._shown = shown

    def end(self, text: str) -> None:
        """Write the rest of the whole text and end the line."""
        self(text)
        whole = printable_lines(text.strip())
        write_line("" if whole == self._shown else f"\n{whole}", self._stream)
