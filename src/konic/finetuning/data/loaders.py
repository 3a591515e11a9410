"""A source's name -> rows: reads files, folders, and the bundled prompts."""

import csv
import io
import json
import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from konic.finetuning.data.folders import files_of, hint_at_subfolders, kind_of, require_each_once, shown_kinds
from konic.finetuning.data.formats import FORMATS, decode_text, find_other_format, read_rows
from konic.finetuning.data.packed import Content, TooLargeError
from konic.finetuning.data.rows import read_dataset
from konic.finetuning.errors import ConfigError, DatasetError, did_you_mean
from konic.finetuning.system.files import as_path
from konic.finetuning.system.places import find_stray, looks_like_path, read_regular
from konic.output import get_logger
from konic.text import describe_error

logger = get_logger(__name__)

_SAVED_TO_DISK = ("state.json", "dataset_dict.json")
BUNDLED_SPLITS = {"train": "movie_reviews_train.txt", "held_out": "movie_reviews_held_out.txt"}


def read_bundled(split: str) -> list[Any]:
    """Return the bundled prompts of a split, in order."""
    text = files("konic.finetuning.data").joinpath("bundled", BUNDLED_SPLITS[split]).read_text(encoding="utf-8")
    return [{"prompt": line} for line in text.splitlines()]


def is_local(name: str) -> bool:
    """True for a path that exists, and for a name that can only be meant as one: `./rows`, `~/rows`, `rows.csv`."""
    return as_path(name, "name", ConfigError).exists() or looks_like_path(name)


class LocalRows:
    """The rows of a file, of a folder of files of one kind, or of a folder written by `save_to_disk`.

    Files are csv, tsv, json, jsonl, ndjson, parquet, arrow or txt, as they are or compressed with gz or zst. Text files
    must be UTF-8. A csv or tsv file does not declare types, so every cell is text as it was written, and an empty cell
    is empty text. In a folder whose files are named after splits (`train.csv`, `test-00.csv`), only those of `split`
    are read; documents such as README.md are left aside. A folder's files must be regular files inside it.

    Files are read when they are needed, and only the rows that were picked are kept.

    Raises:
        DatasetError: The path does not exist, the folder holds several kinds of files, one file twice (plain and
            compressed), a link to elsewhere or not the split; or, in reading, a file is not in the format of its
            extension, or unpacks to far more than its size.
    """

    def __init__(self, name: str, split: str = "train") -> None:
        self._name, self._split = name, split
        self._path = as_path(name, "DatasetConfig(name)", DatasetError)
        self._kind, self._files = _locate(self._path, name, split)

    def __iter__(self) -> Iterator[Any]:
        if not self._files:
            return iter(self._read_saved())
        return (row for file in self._files for row in self._read(file, None))

    def pick(self, max_samples: int, order: Callable[[int], np.ndarray]) -> tuple[list[int], list[Any]]:
        """Count the rows, and return the first `max_samples` of an order of them: their numbers, and the rows."""
        if not self._files:
            rows = list(self)
            numbers = order(len(rows))[:max_samples].tolist()
            return numbers, [rows[number] for number in numbers]
        counts = [sum(1 for _ in self._read(file, ())) for file in self._files]
        numbers, start = order(sum(counts))[:max_samples].tolist(), 0
        found: dict[int, Any] = {}
        for file, count in zip(self._files, counts, strict=True):
            wanted = {number - start for number in numbers if start <= number < start + count}
            rows_of_file = self._read(file, wanted) if wanted else ()
            found |= {start + number: row for number, row in enumerate(rows_of_file) if number in wanted}
            start += count
        return numbers, [found[number] for number in numbers]

    def _read_saved(self) -> list[Any]:
        """Return the rows of a folder of `save_to_disk`, after a reading that holds no row and has the bounds."""
        _require_inside(_below(self._path), self._path, self._name)
        for file in sorted(self._path.rglob("*.arrow")):
            for _ in self._read(file, None):
                pass
        return _read_saved(self._path, self._name, self._split)

    def _read(self, file: Path, wanted: Container[int] | None) -> Iterator[Any]:
        """Yield the rows of a file; None for those that are not wanted."""
        kind = self._kind or ".arrow"  # of which a folder of save_to_disk is made
        named = f"Dataset {self._name!r}" + (f", file {file.name!r}," if self._path.is_dir() else "")
        try:
            other = find_other_format(file, kind)
            if other is not None:
                raise DatasetError(f"{named} {other}.")
            with Content(file) as content:
                try:
                    yield from read_rows(content, kind, wanted)
                except UnicodeDecodeError as error:
                    raise _in_whole(file, content.num_read, error) from None
        except UnicodeDecodeError as error:
            raise DatasetError(f"{named} is not UTF-8 text: {_explain_encoding(error)}") from None
        except TooLargeError as error:
            raise DatasetError(f"{named} {error}") from None
        except (OSError, ValueError, RecursionError, MemoryError, csv.Error, pyarrow.ArrowException) as error:
            what = str(error).rstrip(".") or type(error).__name__
            raise DatasetError(
                f"{named} cannot be read as {kind[1:]}: {what}. Fix the file, or rename it with the extension of "
                "its real format."
            ) from None


def read_local(name: str, split: str = "train") -> list[Any]:
    """Return all rows of :class:`LocalRows`."""
    return list(LocalRows(name, split))


def _locate(path: Path, name: str, split: str) -> tuple[str, list[Path]]:
    """Return the kind of a dataset's files, and the files; none for a folder of save_to_disk."""
    if not path.exists():
        if "://" in name:
            raise DatasetError(
                f"Dataset {name!r} is an address: download the file and give its path, or give the name of a dataset "
                "on the Hub, such as 'openai/gsm8k'."
            )
        if "*" in path.name:
            raise DatasetError(f"Dataset {name!r}: patterns are not expanded. Name the folder, whose files are read.")
        if path.is_symlink():
            raise DatasetError(f"Dataset {name!r}: there is no such file: it is a link to {os.readlink(path)!r}.")
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, beside)
        raise DatasetError(f"Dataset {name!r}: there is no such file or folder: {str(path)!r}.{hint}")
    if path.is_file() and split != "train":
        raise DatasetError(f"Dataset {name!r}: is one file, so split={split!r} chooses nothing. Leave split out.")
    if path.is_dir() and any((path / marker).is_file() for marker in _SAVED_TO_DISK):
        return "", []
    paths = files_of(path, name, split) if path.is_dir() else [path]
    _require_inside(paths, path, name)
    kinds = {kind_of(file) for file in paths}
    if len(kinds) != 1 or not kinds <= set(FORMATS):
        remedy = hint_at_subfolders(path, name)
        if kinds and not remedy:
            one_kind = " Name one file, or a folder with files of one kind."
            remedy = one_kind if kinds & set(FORMATS) else " Save it as one of these."
        raise DatasetError(
            f"Dataset {name!r}: expected one kind of file ({', '.join(FORMATS)}; also with .gz or .zst), found "
            f"{shown_kinds(paths) or 'nothing'}.{remedy}"
        )
    require_each_once(paths, name)
    return kinds.pop(), paths


def _in_whole(file: Path, num_bytes: int, error: UnicodeDecodeError) -> UnicodeDecodeError:
    """Return the error of a file's text with all bytes before it, of which a reader has only the last few."""
    with Content(file) as content:
        try:
            decode_text(io.BufferedReader(content).read(num_bytes))
        except UnicodeDecodeError as whole:
            return whole
    return error


def _require_inside(paths: Iterable[Path], path: Path, name: str) -> None:
    """Raise DatasetError if a file of a dataset's folder is elsewhere. A file that was named itself may be a link."""
    stray = find_stray(paths, path) if path.is_dir() else None
    if stray is not None:
        raise DatasetError(f"Dataset {name!r}: {stray}.")


def _read_saved(folder: Path, name: str, split: str) -> list[Any]:
    """Return the rows of a folder that `datasets` wrote with `save_to_disk`."""
    import datasets

    try:
        _require_plain_names(folder)
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # of a damaged folder, `datasets` and pyarrow raise anything
        what = describe_error(error)
        raise DatasetError(f"Dataset {name!r} cannot be read as a folder of save_to_disk: {what}.") from None
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DatasetError(f"Dataset {name!r} has no split {split!r}; it has {', '.join(map(repr, saved))}.")
        saved = saved[split]
    elif split not in ("train", str(saved.split)):
        raise DatasetError(f"Dataset {name!r}: is one dataset, so split={split!r} chooses nothing. Leave split out.")
    return rows_of_dataset(saved, f"Dataset {name!r}")


def _below(folder: Path) -> Iterator[Path]:
    """Yield every file and link in a folder and its subfolders."""
    return (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _require_plain_names(folder: Path) -> None:
    """Raise ValueError if a folder of save_to_disk names a split or a file that is not directly inside it."""
    names = []
    for file in (folder / "dataset_dict.json", *folder.rglob("state.json")):
        if file.is_file():
            record = json.loads(read_regular(file))
            data = [part["filename"] for part in record.get("_data_files", ())]
            names += [*record.get("splits", ()), *data]
            if not all(str(name).endswith(".arrow") for name in data):
                raise ValueError(f"its state.json names {data}, and only .arrow files are read")
    for name in names:
        if Path(name).name != name or "\\" in name:
            raise ValueError(f"it names {name!r}, which is not a name inside of the folder")


def rows_of_dataset(table: Any, where: str, numbers: Sequence[int] | None = None) -> list[Any]:
    """Return the rows of a table of `datasets`, whose numbers are given for a selection.

    Raises:
        DatasetError: A row cannot be read.
    """
    try:
        return read_dataset(table, numbers)
    except ValueError as error:
        raise DatasetError(f"{where}: {error}. Change that cell, or remove its column.") from None


def _explain_encoding(error: UnicodeDecodeError) -> str:
    """Return what a text's encoding probably is, where it stops being UTF-8, and the fix."""
    data, at = error.object, error.start
    is_marked = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    guess = "UTF-16" if is_marked else "UTF-16, or damaged" if 0 in data else "Latin-1 or Windows-1252"
    line = data.count(b"\n", 0, at) + 1
    shown = data[max(0, at - 10) : at + 10].decode("latin-1")
    where = "" if is_marked else f" Line {line} holds the byte 0x{data[at]:02x} in {shown!r}."
    return f"it may be {guess}.{where} Save it as UTF-8."
