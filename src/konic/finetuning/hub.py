"""The Hugging Face Hub: whether it answers, and what its errors mean."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from konic.finetuning.errors import safe_cause
from konic.output import get_logger
from konic.text import describe_error

logger = get_logger(__name__)

_PAUSES = (1.0, 2.0)
"""Seconds between the tries to reach the Hub."""
_REMEMBERED = 60.0
"""Seconds for which a Hub that did not answer is not asked again."""
_MOST_SECONDS = 5.0
"""For an answer to one try."""
_lost_at = -_REMEMBERED
_WHILE_OFFLINE = threading.Lock()
"""Held while `huggingface_hub` is told to be offline, by one thread at a time."""

_KINDS = (
    (
        {"GatedRepoError"},
        "it is gated",
        "Accept the terms on its Hub page, then run `hf auth login` or give {token}.",
    ),
    ({"RevisionNotFoundError"}, "there is no such revision", "Check revision; the default is the main branch."),
    (
        {"RepositoryNotFoundError", "DatasetNotFoundError"},
        "the Hub has nothing public with that name",
        "Check the spelling. For a private repository, log in with `hf auth login` or give {token}.",
    ),
    (
        {"RemoteProtocolError", "ReadTimeout", "ReadError"},
        "the download was interrupted",
        "Run it again: completely downloaded files are kept.",
    ),
    (
        {"ConnectError", "ConnectTimeout", "ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"},
        "the Hub cannot be reached, and the cache holds no copy",
        "Check the connection. {offline} needs no Hub.",
    ),
)


def explain_hub_error(error: BaseException, token: str, offline: str) -> str:
    """Return what happened, and what to do about it.

    Args:
        error: What `huggingface_hub`, `datasets` or `transformers` raised.
        token: The setting that takes an access token.
        offline: A setting that works without the Hub.
    """
    kind = _kind_of(error)
    if kind is None:
        return describe_error(error)
    names, what, remedy = kind
    switch = _offline_switch() if "OfflineModeIsEnabled" in names else None
    status = _status_of(error) if "LocalEntryNotFoundError" in names else None
    if status is not None:
        what = f"the Hub answers with HTTP {status}, and the cache holds no copy"
        remedy = "Try again later; if access is refused, check {token}. {offline} needs no Hub."
    elif switch is not None:
        what = f"{switch} is set, so the Hub is not asked, and the cache holds no copy"
        remedy = f"Unset {switch}. {{offline}} needs no Hub."
    return f"{what}. {remedy.format(token=token, offline=offline)}"


def _kind_of(error: BaseException) -> tuple[set[str], str, str] | None:
    """Return the entry of _KINDS for an error or one of its causes; None if there is none."""
    kinds = {kind.__name__ for link in _chain(error) for kind in type(link).__mro__}
    if "is a gated" in str(error):  # `datasets` drops the cause
        kinds.add("GatedRepoError")
    return next((kind for kind in _KINDS if kinds & kind[0]), None)


def _offline_switch() -> str | None:
    """Return the variable that keeps `huggingface_hub` offline, if one does."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), None)


def _status_of(error: BaseException) -> int | None:
    """Return the HTTP status that the Hub answered with, if it answered."""
    responses = (getattr(link, "response", None) for link in _chain(error))
    return next((response.status_code for response in responses if response is not None), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def hub_cause(error: BaseException, location: str | None = None) -> BaseException | None:
    """Return what a traceback may show as the cause of a failed loading: nothing if :func:`explain_hub_error` says it.

    For a file or folder that is here the Hub was not asked. How a connection broke is not said.
    """
    is_here = location is not None and Path(location).exists()
    is_broken = isinstance(error, ConnectionAbortedError | ConnectionResetError | BrokenPipeError)
    return safe_cause(error) if is_here or is_broken or _kind_of(error) is None else None


@contextlib.contextmanager
def hub_or_cache(location: str) -> Iterator[None]:
    """Within it, the files of the Hub come from its cache alone if the Hub does not answer, which is said.

    `huggingface_hub` by itself tries six times for every file, which takes 23 seconds or more.

    Args:
        location: What is read; for a file or folder that is here the Hub is not asked.
    """
    from huggingface_hub import constants

    if Path(location).exists() or constants.is_offline_mode() or _answers():
        yield
        return
    global _lost_at
    with _WHILE_OFFLINE:
        constants.HF_HUB_OFFLINE = True
        try:
            yield
        except BaseException:
            _lost_at = -_REMEMBERED  # the cache is not enough: the next call asks the Hub again
            raise
        finally:
            constants.HF_HUB_OFFLINE = False


def _answers() -> bool:
    """Return True if the Hub answers one of three requests, whatever it says."""
    from huggingface_hub import constants, get_session

    global _lost_at
    if time.monotonic() - _lost_at < _REMEMBERED:
        return False
    for pause in (*_PAUSES, None):
        try:
            get_session().head(constants.ENDPOINT, timeout=_MOST_SECONDS)
            return True
        except Exception as error:
            if pause is not None:
                time.sleep(pause)
                continue
            why = describe_error(error)
    _lost_at = time.monotonic()
    logger.warning("%s does not answer (%s), so only what the cache holds is read.", constants.ENDPOINT, why)
    return False
