"""A dataset's folder -> its data files of one split, and what their names say."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

from konic.finetuning.data.formats import FORMATS
from konic.finetuning.data.packed import COMPRESSIONS
from konic.finetuning.errors import DatasetError, first_of
from konic.output import get_logger

logger = get_logger(__name__)

_NO_DATA = (".", "README", "LICENSE", "dataset_info", "_SUCCESS")
"""How the names of hidden files and of documents begin."""
_SHOWN = 5
"""Number of subfolders that a message names."""
_SPLIT_WORDS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "validation": "validation",
    "valid": "validation", "val": "validation", "dev": "validation", "eval": "validation", "evaluation": "validation",
    "holdout": "test", "heldout": "test",
}  # fmt: skip
"""How the first word of a file's name says its split."""


def files_of(folder: Path, name: str, split: str) -> list[Path]:
    """Return the data files of a folder; those of one split if their names say so.

    Raises:
        DatasetError: The files are named after splits, but not after this one.
    """
    data = _data_files(folder)
    by_split: dict[str, list[Path]] = {}
    for file in data:
        splits = {_SPLIT_WORDS[word] for word in _words(file) if word in _SPLIT_WORDS}
        if len(splits) == 1:  # a name with two of them says nothing
            by_split.setdefault(splits.pop(), []).append(file)
    wanted = _SPLIT_WORDS.get(re.sub("[ _-]", "", split.lower()), split)
    if not by_split:
        _require_no_hidden_splits(data, name)
        if data and split != "train":
            raise DatasetError(
                f"Dataset {name!r}: none of its files is named after a split, so split={split!r} chooses nothing. "
                "Leave split out, or name the file."
            )
        return _files(folder)
    if wanted not in by_split:
        raise DatasetError(
            f"Dataset {name!r}: its files are named after the splits {', '.join(map(repr, by_split))}, and none after "
            f"split={split!r}. Name one of them, or one file."
        )
    left = [file.name for file in data if not any(file in files for files in by_split.values())]
    if left:
        logger.warning("Dataset %r: %s: not named after a split, so not read.", name, ", ".join(left))
    return by_split[wanted]


def _words(file: Path) -> list[str]:
    """Return the words of a file's name: `gsm8k`, `train` for gsm8kTrain.csv, and `train` for trainset.csv."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", file.name).lower()
    words = re.split(r"[^a-z]+", re.sub(r"(?<![a-z])(held|hold)[^a-z]+out(?![a-z])", "holdout", name))
    return [re.sub(r"(?<=.)(sets?|splits?|files?|data)$", "", word) for word in words]


def _require_no_hidden_splits(data: Sequence[Path], name: str) -> None:
    """Raise DatasetError if names without a split's word have such words inside: `mytrain.csv`, `mytest.csv`."""
    inside = {word: file.name for word in ("train", "test", "valid") for file in data if word in file.name.lower()}
    if "train" in inside and len(set(inside.values())) > 1:
        raise DatasetError(
            f"Dataset {name!r}: {' and '.join(inside.values())} may be different splits. Name the file to train on, or "
            "rename them so that the split is a word of its own, as in a_train.csv."
        )


def require_each_once(paths: list[Path], name: str) -> None:
    """Raise DatasetError if files are the same but for the compression: their rows would be read twice."""
    by_name: dict[str, Path] = {}
    for file in paths:
        plain = (file.stem if file.suffix.lower() in COMPRESSIONS else file.name).lower()
        if plain in by_name:
            raise DatasetError(
                f"Dataset {name!r}: {by_name[plain].name} and {file.name} are one file, plain and compressed, or "
                "compressed twice. Remove one of them, or name one file."
            )
        by_name[plain] = file


def hint_at_subfolders(folder: Path, name: str) -> str:
    """Return a sentence that names the subfolders with data of a folder without, such as a repository of the Hub."""
    if not folder.is_dir() or _data_files(folder):
        return ""
    patterns = ("[!.]*/" * depth for depth in (1, 2, 3))
    below = [sub for pattern in patterns for sub in sorted(folder.glob(pattern)) if sub.is_dir()]
    found = [sub.relative_to(folder) for sub in below if _data_files(sub)]
    shown = first_of([repr(str(Path(name) / sub)) for sub in found], _SHOWN)
    return f" Its subfolders hold data: give the path of one of them, {shown}." if found else ""


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder but for documents and hidden ones; none if the folder cannot be read."""
    with contextlib.suppress(OSError):
        return sorted(file for file in folder.iterdir() if not (file.is_dir() or file.name.startswith(_NO_DATA)))
    return []


def _data_files(folder: Path) -> list[Path]:
    return [file for file in _files(folder) if kind_of(file) in FORMATS]


def shown_kinds(paths: list[Path]) -> str:
    """Return each kind of file once, with the name of a file of that kind."""
    by_kind = {kind_of(file): file.name for file in reversed(paths)}
    return ", ".join(f"{kind or 'no extension'} ({by_kind[kind]})" for kind in sorted(by_kind))


def kind_of(file: Path) -> str:
    """Return the extension of a file's format: `.csv` for `a.csv` and for `a.csv.gz`."""
    inner = file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file
    return inner.suffix.lower()
