"""The class and the rewards of a composer -> their source, as far as Python finds it in this process.

A process to which they are sent by value finds none, or finds a file that has been edited since.
"""

import hashlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from konic.finetuning.rewards.outcomes import Reward


@dataclass(frozen=True)
class Origin:
    """Where a composer was written."""

    sources: tuple[tuple[str, str], ...]
    """The name of each reward and its source lines; empty where it has none or is a reward model."""
    file: dict[str, str | None]
    """The name of the class, its file, and the SHA-256 of that."""


def find_origin(cls: type, rewards: Iterable[Reward]) -> Origin:
    """Return where a composer's class and its rewards were written; nothing is imported."""
    try:
        path = inspect.getsourcefile(cls)
    except (TypeError, OSError):  # a class of a notebook or an interactive session
        path = None
    return Origin(
        sources=tuple((reward.name, _source_of(reward)) for reward in rewards),
        file={"class": cls.__qualname__, **file_and_hash(Path(path) if path else None)},
    )


def _source_of(reward: Reward) -> str:
    try:
        return "" if reward.is_model else inspect.getsource(inspect.unwrap(reward.call))
    except (OSError, TypeError, ValueError):  # typed into a notebook or interpreter, or not written in Python
        return ""


def file_and_hash(path: Path | None) -> dict[str, str | None]:
    """Return a file's absolute path and its SHA-256; None for both if there is no such file."""
    if path is None or not path.is_file():
        return {"file": None, "sha256": None}
    return {"file": str(path.absolute()), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
