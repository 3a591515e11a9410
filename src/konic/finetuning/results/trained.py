"""The line of a model card that says how long the model was trained, and back."""

import re
from pathlib import Path

from konic.finetuning.system.places import read_regular

_LINE = re.compile(r"^Trained with konic .* for ([0-9]{1,9}) iterations$", re.MULTILINE)


def trained_line(version: str, algorithm: str, iterations: int) -> str:
    """The line; `algorithm` as the card shows it."""
    return f"Trained with konic {version} by {algorithm} for {iterations} iterations"


def iterations_in_card(folder: Path) -> int | None:
    """Up to which iteration the weights in a folder were trained; None if there is no card, or it does not say.

    Of `best` it is the iteration that these weights sampled, before its update.
    """
    try:
        found = _LINE.search(read_regular(folder / "README.md").decode("utf-8", errors="replace"))
    except OSError:
        return None
    return int(found[1]) if found else None
