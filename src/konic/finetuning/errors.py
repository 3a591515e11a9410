"""Every error a user can cause. Each message says what happened, where, and what to do about it."""

import difflib
import unicodedata
from collections.abc import Iterable, Iterator


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


_KINDS = (
    (
        {"GatedRepoError"},
        "it is gated",
        "Accept its terms on its page, then `hf auth login` or give {token}.",
    ),
    ({"RevisionNotFoundError"}, "there is no such revision", "Check revision; without one the main branch is taken."),
    (
        {"RepositoryNotFoundError", "DatasetNotFoundError"},
        "the Hub has nothing public of that name",
        "Check the spelling; for a private one, log in with `hf auth login` or give {token}.",
    ),
    (
        {"RemoteProtocolError", "ReadTimeout", "ReadError"},
        "the download broke off",
        "Run it again: files that arrived whole are kept.",
    ),
    (
        {"ConnectError", "ConnectTimeout", "ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"},
        "the Hub is out of reach, and the cache does not hold it",
        "Check the connection. {offline} needs no Hub.",
    ),
)


def explain_hub_error(error: BaseException, token: str, offline: str) -> str:
    """What happened, and on a new line what to do about it.

    Args:
        error: What `huggingface_hub`, `datasets` or `transformers` raised.
        token: Where a user gives a token.
        offline: What a user can train with instead, without the Hub.
    """
    chain = list(_chain(error))
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    told = " ".join(str(error).split())
    if "is a gated" in told:  # datasets drops the cause
        kinds.add("GatedRepoError")
    for names, what, remedy in _KINDS:
        if kinds & names:
            return f"{what}.\n{remedy.format(token=token, offline=offline)}"
    told = told if len(told) <= 400 else told[:400] + " …"
    return f"{type(error).__name__}: {told}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
