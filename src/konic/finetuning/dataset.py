"""DatasetConfig -> PromptSet: prompts in an order fixed by a seed, each with its row's index and other columns."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow.csv
import pyarrow.parquet
from pydantic import Field, model_validator

from konic.finetuning.config import Settings
from konic.finetuning.errors import DatasetError, did_you_mean

BUNDLED_SPLITS = {"train": "movie_reviews_train.txt", "held_out": "movie_reviews_held_out.txt"}


class DatasetSource(StrEnum):
    """Where prompts come from."""

    LOCAL = "local"
    """`name` is a csv, json, jsonl, parquet or txt file (one prompt a line, column `text`), or a folder of one kind."""
    MEMORY = "memory"
    """`prompts` holds them: strings, lists of chat messages, or dicts with more columns."""
    BUNDLED = "bundled"
    """Openings of movie reviews that come with the package, split for good into `train` and `held_out`."""


class DatasetConfig(Settings):
    """Which prompts to learn on."""

    source: DatasetSource = DatasetSource.BUNDLED
    """Where they come from."""
    name: str | None = None
    """A file or folder for LOCAL."""
    prompts: tuple[Any, ...] | None = Field(default=None, repr=False)
    """The prompts themselves, for MEMORY."""
    prompt_column: str = "prompt"
    """The column that holds a prompt: a string, or a list of chat messages."""
    split: str = "train"
    """The split to learn on."""
    max_samples: int | None = Field(default=None, ge=1)
    """Rows kept; with `shuffle`, drawn at random."""
    shuffle: bool = True
    """Every pass goes through the rows in a new random order; False keeps the dataset's order."""
    shuffle_seed: int = Field(default=42, ge=0, lt=2**63)
    """Seeds which rows are kept, which are held out, and the order of every pass."""
    held_out: int = Field(default=0, ge=0)
    """Prompts kept aside for evaluation; of BUNDLED, the first ones of its own held-out split."""

    @model_validator(mode="before")
    @classmethod
    def _given_prompts_are_the_source(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("prompts") is not None and "source" not in values:
            return {**values, "source": DatasetSource.MEMORY}
        return values

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.source is DatasetSource.MEMORY and self.prompts is None:
            raise ValueError("source=MEMORY needs prompts=[...]")
        if self.source is not DatasetSource.MEMORY and self.prompts is not None:
            raise ValueError(f"prompts=[...] goes with source=MEMORY, not {self.source.name}")
        if self.source is DatasetSource.LOCAL and not self.name:
            raise ValueError("source=LOCAL needs name=, the path of a file or folder")
        if self.source is DatasetSource.BUNDLED and self.split not in BUNDLED_SPLITS:
            raise ValueError(f"split={self.split!r} is not one of the bundled prompts': {', '.join(BUNDLED_SPLITS)}")
        if self.source is DatasetSource.BUNDLED and self.split == "held_out" and self.held_out:
            raise ValueError("split='held_out' would train on the very prompts that held_out keeps aside")
        return self


@dataclass(frozen=True)
class Prompt:
    """One row of a dataset."""

    row: int
    """Index in the dataset, before any shuffle; random numbers are keyed by it."""
    content: str | list[dict[str, str]]
    """Plain text, or chat messages that end with the user's."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns."""

    @property
    def text(self) -> str:
        """What rewards are given as `prompt`: the plain text, or the text of the last message."""
        return self.content if isinstance(self.content, str) else self.content[-1]["content"]


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a run. Which come when follows from the seed and a running count: there is no state."""

    rows: Sequence[Prompt]
    held_out: Sequence[Prompt]
    shuffle: bool
    shuffle_seed: int

    def batch(self, start: int, size: int) -> list[Prompt]:
        """The `size` prompts after the first `start` of the run; each pass through the rows is a new seeded shuffle."""
        return [self.rows[self._index(position)] for position in range(start, start + size)]

    def _index(self, position: int) -> int:
        pass_number, offset = divmod(position, len(self.rows))
        if not self.shuffle:
            return offset
        return int(_permutation(len(self.rows), self.shuffle_seed, pass_number + 1)[offset])


def load_prompts(config: DatasetConfig) -> PromptSet:
    """Read, check, select and split the prompts that a config names.

    Raises:
        DatasetError: Nothing to read, a column that is not there, rows that are empty or not text (with their
            numbers), or too few rows to hold some out.
    """
    prompts = _LOADERS[config.source](config)
    where = _where(config)
    if not prompts:
        raise DatasetError(f"{where}: there are no rows to learn on.")
    order = _permutation(len(prompts), config.shuffle_seed, 0) if config.shuffle else np.arange(len(prompts))
    kept = [prompts[int(index)] for index in order[: config.max_samples]]
    if config.source is DatasetSource.BUNDLED:
        held_out = _bundled("held_out")[: config.held_out]
        num_to_hold_out, num_available = 0, len(_bundled("held_out"))
    else:
        num_to_hold_out, num_available = config.held_out, len(kept) - 1
        held_out = kept[len(kept) - num_to_hold_out :] if num_to_hold_out else []
    if config.held_out > num_available:
        raise DatasetError(f"{where}: held_out={config.held_out}, but at most {num_available} rows can be held out.")
    return PromptSet(kept[: len(kept) - num_to_hold_out], held_out, config.shuffle, config.shuffle_seed)


def make_prompts(rows: Sequence[Any], column: str, where: str) -> list[Prompt]:
    """Prompts of rows that are strings, lists of chat messages, or mappings with a prompt column.

    Raises:
        DatasetError: A row has no such column (names those it has), or rows whose prompt is empty or not text.
    """
    prompts, bad = [], []
    for index, row in enumerate(rows):
        columns = dict(row) if isinstance(row, Mapping) else {column: row}
        if column not in columns:
            present = ", ".join(map(repr, columns)) or "none"
            hint = did_you_mean(column, map(str, columns))
            raise DatasetError(
                f"{where}: row {index} has no column {column!r}.{hint} "
                f"Its columns: {present}. Name the one that holds prompts with DatasetConfig(prompt_column=...)."
            )
        content = columns.pop(column)
        problem = _problem(content)
        if problem:
            bad.append(f"row {index} ({problem})")
        else:
            prompts.append(Prompt(index, content, columns))
    if bad:
        named = ", ".join(bad[:10]) + (f" and {len(bad) - 10} more" if len(bad) > 10 else "")
        raise DatasetError(f"{where}: {len(bad)} of {len(rows)} prompts in column {column!r} cannot be used: {named}.")
    return prompts


def _problem(content: Any) -> str | None:
    """Why a prompt cannot be used, or None."""
    if isinstance(content, str):
        return None if content.strip() else "empty"
    if content is None or (isinstance(content, float) and math.isnan(content)):
        return "missing"
    if not isinstance(content, list | tuple):
        return f"{type(content).__name__}, not text"
    if not content:
        return "no messages"
    for message in content:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            return "a message without role and content"
        if not isinstance(message["content"], str):
            return "a message whose content is not text"
    if content[-1]["role"] != "user":
        return "the last message is not the user's"
    return None if content[-1]["content"].strip() else "the last message is empty"


def _where(config: DatasetConfig) -> str:
    return f"Dataset {config.name!r}" if config.name else f"Dataset ({config.source.value})"


def _permutation(size: int, seed: int, pass_number: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, pass_number])).permutation(size)


def _load_memory(config: DatasetConfig) -> list[Prompt]:
    return make_prompts(config.prompts or (), config.prompt_column, _where(config))


def _load_bundled(config: DatasetConfig) -> list[Prompt]:
    return _bundled(config.split)


def _bundled(split: str) -> list[Prompt]:
    text = files("konic.data").joinpath(BUNDLED_SPLITS[split]).read_text(encoding="utf-8")
    return make_prompts(text.splitlines(), "prompt", "The bundled prompts")


def _load_local(config: DatasetConfig) -> list[Prompt]:
    path = Path(str(config.name)).expanduser()
    if not path.exists():
        raise DatasetError(f"Dataset {config.name!r}: there is no such file or folder.")
    paths = sorted(file for file in path.iterdir() if not file.name.startswith(".")) if path.is_dir() else [path]
    suffixes = {file.suffix.lower() for file in paths}
    if len(suffixes) != 1 or not suffixes <= _READERS.keys():
        raise DatasetError(
            f"Dataset {config.name!r}: expected one kind of file out of {', '.join(_READERS)}, found "
            f"{', '.join(sorted(suffixes)) or 'nothing'}."
        )
    suffix = suffixes.pop()
    try:
        rows = [row for file in paths for row in _READERS[suffix](file, config.prompt_column)]
    except (OSError, ValueError, UnicodeError) as error:
        raise DatasetError(f"Dataset {config.name!r} cannot be read as {suffix[1:]}: {error}") from None
    column = "text" if suffix == ".txt" and config.prompt_column == "prompt" else config.prompt_column
    return make_prompts(rows, column, _where(config))


def _read_csv(path: Path, prompt_column: str) -> list[Any]:
    table = pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types={prompt_column: pyarrow.string()}),
    )
    repeated = {name for name in table.column_names if table.column_names.count(name) > 1}
    if repeated:
        raise ValueError(f"more than one column is named {', '.join(map(repr, sorted(repeated)))}")
    return table.to_pylist()


def _read_json(path: Path, prompt_column: str) -> list[Any]:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError(f"the top level is a {type(rows).__name__}, not a list of rows")
    return rows


def _read_jsonl(path: Path, prompt_column: str) -> list[Any]:
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    return rows


def _read_parquet(path: Path, prompt_column: str) -> list[Any]:
    return pyarrow.parquet.read_table(path).to_pylist()


def _read_txt(path: Path, prompt_column: str) -> list[Any]:
    return [{"text": line} for line in _lines(path)]


def _lines(path: Path) -> list[str]:
    """The lines of a text file; only a newline ends one, not the other separators of Unicode that text may hold."""
    text = path.read_text(encoding="utf-8-sig").removesuffix("\n")
    return text.split("\n") if text else []


_READERS: dict[str, Callable[[Path, str], list[Any]]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
_LOADERS: dict[DatasetSource, Callable[[DatasetConfig], list[Prompt]]] = {
    DatasetSource.MEMORY: _load_memory,
    DatasetSource.LOCAL: _load_local,
    DatasetSource.BUNDLED: _load_bundled,
}
