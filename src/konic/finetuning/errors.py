"""Every error a user can cause. Each message says what happened, where, and what to do about it."""

import difflib
import unicodedata
from collections.abc import Iterable


def printable(text: str) -> str:
    """Text with its control and format characters escaped, so that it cannot steer a terminal; one line."""
    return "".join(
        char if char == " " or unicodedata.category(char)[0] not in "CZ" else char.encode("unicode_escape").decode()
        for char in text
    )


class KonicError(Exception):
    """The parent of every error that a user can cause and mend; its message is safe to show in a terminal."""

    def __init__(self, message: object = "") -> None:
        super().__init__("\n".join(map(printable, str(message).split("\n"))))


class ConfigError(KonicError, ValueError):
    """A setting is missing, misspelt, out of bounds or at odds with another one."""


class ModelError(KonicError):
    """A base model, tokenizer or adapter cannot be loaded or used."""


class DatasetError(KonicError):
    """A dataset cannot be read, or holds rows that cannot be prompts."""


class RewardError(KonicError):
    """A reward is missing, misnamed, raised, or returned something that is not a number."""


class OutputError(KonicError):
    """A folder cannot be written, or does not hold what it should."""


class TrainingError(KonicError):
    """A number of the run broke one of its invariants; the weights are as they were before the step."""


class NotFiniteError(TrainingError):
    """A number is NaN or infinite; with on_nonfinite="skip" what it belongs to is dropped instead."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known name nearest to a misspelt one, or an empty string."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
