"""An error of the Hugging Face Hub's clients -> what happened and what to do, in a sentence each."""

from collections.abc import Iterator

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
