"""What a shell offers for the folder of a run, and for the weights in it. Loads no library, and reads names only."""

import os
from collections.abc import Iterable

_FILES_OF_A_RUN = ("run.json", "metrics.jsonl")


def complete_run(incomplete: str) -> list[str]:
    """Return the runs in the folder that the text so far leads to, and those under runs/ where it is empty."""
    parent = os.path.dirname(incomplete) or ("runs" if "runs".startswith(incomplete) else ".")
    found = (os.path.join(parent, name) if parent != "." else name for name in _names_in(parent))
    return sorted(path for path in found if path.startswith(incomplete) and _is_run(path))


def complete_weights(incomplete: str) -> list[str]:
    """Return the folders of weights in the run that stands on the command line."""
    line = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS", "")
    run = next((word for word in line.split() if _is_run(word)), "")
    names = [name for name in _names_in(run) if name in ("best", "final") or name.startswith("checkpoint-")]
    return sorted(name for name in names if name.startswith(incomplete))


def _is_run(path: str) -> bool:
    return any(os.path.isfile(os.path.join(path, name)) for name in _FILES_OF_A_RUN)


def _names_in(folder: str) -> Iterable[str]:
    """Return the names in a folder that a shell can take as they are."""
    try:
        return [name for name in os.listdir(folder or ".") if name.isprintable()] if folder else []
    except OSError:
        return []
