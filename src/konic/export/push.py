"""An exported folder -> a repo of the Hub: files of known names alone, after a look at what they say, in one commit."""

import contextlib
import hashlib
import logging
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub import utils as hub_utils
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import logging as hub_logging

from konic.export.private import find_place
from konic.finetuning.errors import OutputError, safe_cause
from konic.finetuning.system.places import open_no_link
from konic.output import is_terminal
from konic.text import describe_error, find_secret, keep_secret

_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
_TEXTS = (
    "README.md", "config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "Modelfile",
    *_VOCABULARIES,
)  # fmt: skip
_BINARY = re.compile(
    r"adapter_model\.safetensors|model(-\d{5}-of-\d{5})?\.safetensors|model-\w+\.gguf|(tokenizer|spiece)\.model"
)
_HEAD = 2**24
"""Bytes of a binary file that hold all texts of its header: names, a tokenizer, a chat template."""
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_HUB_SECONDS = 30


@dataclass(frozen=True)
class Repo:
    """Where to send to: a repo of models on the Hub, which may not exist yet."""

    name: str
    is_public: bool
    exists: bool

    @property
    def visibility(self) -> str:
        """Who may read it, in a word."""
        return "public" if self.is_public else "private"

    @property
    def address(self) -> str:
        """Of its page."""
        return f"{constants.ENDPOINT}/{self.name}"


@dataclass(frozen=True)
class Sent:
    """A file to send, as it was when it was looked at: a large one is sent only if its SHA-256 is still the same."""

    name: str
    content: bytes | Path
    size: int
    sha256: bytes


def find_repo(name: str, is_public: bool) -> Repo:
    """Ask the Hub whether files can be sent to a repo. Nothing is made or sent.

    Raises:
        OutputError: It has no valid name, the Hub cannot be asked, or others than asked may read the repo.
    """
    if not _REPO.fullmatch(name) or "--" in name or ".." in name or name.endswith((".git", "-", ".")) or len(name) > 96:
        raise OutputError(f"--push-to-hub {name}: is no name of a repo. Give USER/NAME of letters, digits, -, _ and .")
    if constants.is_offline_mode():
        raise OutputError(
            "--push-to-hub: HF_HUB_OFFLINE is set (or TRANSFORMERS_OFFLINE), so the Hub is not asked. Unset it."
        )
    token = get_token()
    if not token:
        raise OutputError("--push-to-hub: there is no access token. Run `hf auth login`, or set HF_TOKEN.")
    keep_secret(token)
    api = HfApi(token=token)
    with _asking(name):
        api.whoami()
        found = _visibility(api, name)
    repo = Repo(name, is_public, exists=found is not None)
    _require_visibility(repo, found)
    return repo


def files_to_send(folder: Path, places: Iterable[Path]) -> tuple[list[Sent], list[str]]:
    """Return the files of an export that are sent, and the names of everything else in its folder.

    Args:
        folder: What an export filled.
        places: Folders of this machine that no file may name.

    Raises:
        OutputError: A file holds a secret or names one of these folders.
    """
    sent, left = [], []
    for path in sorted(folder.iterdir()):
        is_text = path.name in _TEXTS
        if not stat.S_ISREG(path.lstat().st_mode) or not (is_text or _BINARY.fullmatch(path.name)):
            left.append(path.name)
            continue
        try:
            with open(path, "rb", opener=open_no_link) as file:
                content = file.read() if is_text else file.read(_HEAD)
                is_whole = not file.read(1)
                file.seek(0)
                sha256 = hashlib.file_digest(file, "sha256").digest()
                size = file.tell()
        except OSError as error:
            raise OutputError(f"{path}: cannot be read: {error.strerror}. Nothing was sent.") from None
        _require_nothing_private(path, content.decode("utf-8", "replace"), is_text, list(places))
        sent.append(Sent(path.name, content if is_whole else path, size, sha256))
    return sent, left


def send_files(repo: Repo, files: Iterable[Sent]) -> str:
    """Send files to a repo in one commit, and make the repo first if it is new; return the address of the commit.

    Raises:
        OutputError: The Hub refuses, cannot be reached, or others than asked may read the repo.
    """
    if not is_terminal(sys.stderr):
        hub_utils.disable_progress_bars()  # type: ignore[attr-defined]
    api = HfApi(token=get_token())
    operations = [_to_add(file) for file in files]
    with _asking(repo.name):
        if not repo.exists:
            api.create_repo(repo.name, private=not repo.is_public, repo_type="model")
        found = _visibility(api, repo.name)
    _require_visibility(repo, found)
    with _asking(repo.name):
        return str(api.create_commit(repo.name, operations, commit_message="Add a model trained with konic").commit_url)


def _to_add(file: Sent) -> CommitOperationAdd:
    """Return what the Hub's client sends: it has read the file by then, and the Hub compares what arrives with that."""
    operation = CommitOperationAdd(file.name, file.content)
    if operation.upload_info.sha256 != file.sha256:
        raise OutputError(f"{file.name}: has changed since it was looked at. Nothing was sent. Export again.")
    return operation


def _require_nothing_private(path: Path, text: str, is_text: bool, places: list[Path]) -> None:
    """Check a text. A vocabulary has tokens such as `/root`: of folders, only longer ones count there."""
    is_vocabulary = not is_text or path.name in _VOCABULARIES
    if is_vocabulary:
        places = [place for place in places if len(place.parts) > 2]
    for what, line in (("a secret", find_secret(text, is_vocabulary)), ("a folder of yours", find_place(text, places))):
        if line is not None:
            where = f"{path}, line {line}" if is_text else f"{path}, in its header"
            raise OutputError(
                f"{where}: holds what looks like {what}. Nothing was sent.",
                "Remove it from the run's model or settings, and export again to a new folder.",
            )


def _visibility(api: HfApi, name: str) -> str | None:
    """Return who may read a repo, or None if there is none."""
    try:
        info = api.model_info(name, timeout=_HUB_SECONDS)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None
    if info.id != name:
        raise ValueError(f"it is called {info.id} now")
    return "private" if info.private else "public"


def _require_visibility(repo: Repo, found: str | None) -> None:
    if found not in (None, repo.visibility):
        remedy = "Leave out --public" if repo.is_public else "Pass --public"
        raise OutputError(
            f"--push-to-hub {repo.name}: is {found} already, and konic does not change that. "
            f"{remedy}, or name another repo. Nothing was sent."
        )


@contextlib.contextmanager
def _asking(name: str) -> Iterator[None]:
    """Turn what the Hub's client raises into one error; the client's own warnings show addresses, and stay unseen."""
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    except Exception as error:
        raise OutputError(f"--push-to-hub {name}: {_explain(error)}") from safe_cause(error)
    finally:
        hub_logging.set_verbosity(verbosity)


def _explain(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if status == 401:
        return "the Hub does not know the access token. Run `hf auth login`, or set HF_TOKEN to one that may write."
    if status == 403:
        return "the access token may not write there. Use one with the right to write, and a name of your own."
    if any(kind.__name__ == "TransportError" for kind in type(cause).__mro__):  # httpx's, or its successor's
        return f"the Hub cannot be reached ({describe_error(cause)}). Check the connection, and export again."
    return f"the Hub refused: {describe_error(cause)}"
