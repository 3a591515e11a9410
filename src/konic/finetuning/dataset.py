"""DatasetConfig -> PromptSet: prompts in an order fixed by a seed, each with its row's index and other columns."""

import hashlib
import json
import logging
import math
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from konic.finetuning.config import Settings
from konic.finetuning.errors import ConfigError, DatasetError, did_you_mean
from konic.finetuning.loaders import BUNDLED_SPLITS, read_bundled, read_hub, read_local, stream_rows
from konic.finetuning.paths import as_path

logger = logging.getLogger(__name__)


class DatasetSource(StrEnum):
    """Where prompts come from."""

    HUGGINGFACE = "huggingface"
    """`name` is a dataset of the Hub: `imdb`, `yelp_polarity`, `tatsu-lab/alpaca`."""
    LOCAL = "local"
    """`name` is a csv, json, jsonl, parquet or txt file (one prompt a line, column `text`), or a folder of one kind."""
    MEMORY = "memory"
    """`prompts` holds them: strings, lists of chat messages, or dicts with more columns."""
    BUNDLED = "bundled"
    """Openings of movie reviews that come with the package, split for good into `train` and `held_out`."""


class DatasetConfig(Settings):
    """Which prompts to learn on. Without `source`, a path is LOCAL, another name HUGGINGFACE, prompts are MEMORY."""

    source: DatasetSource = DatasetSource.BUNDLED
    """Where they come from."""
    name: str | None = None
    """A dataset of the Hub, or a file or folder."""
    prompts: tuple[Any, ...] | None = Field(default=None, repr=False)
    """The prompts themselves, for MEMORY."""
    prompt_column: str = "prompt"
    """The column that holds a prompt: a string, or a list of chat messages."""
    split: str = "train"
    """The split to learn on, of HUGGINGFACE and BUNDLED."""
    subset: str | None = None
    """The configuration of a dataset of the Hub that has several."""
    revision: str | None = None
    """A branch, tag or commit of a dataset of the Hub."""
    token: str | None = Field(default=None, repr=False)
    """For gated or private datasets; None takes the one you are logged in with. Never written to a run's files."""
    streaming: bool = False
    """Read a dataset of the Hub row by row as it is used, instead of downloading it first."""
    max_samples: int | None = Field(default=None, ge=1)
    """Rows kept; with `shuffle`, drawn at random."""
    shuffle: bool = True
    """Every pass goes through the rows in a new random order; False keeps the dataset's order."""
    shuffle_seed: int = Field(default=42, ge=0, lt=2**63)
    """Seeds which rows are kept, which are held out, and the order of every pass."""
    held_out: int = Field(default=0, ge=0)
    """Prompts kept aside for evaluation; of BUNDLED, the first ones of its own held-out split."""
    system_prompt: str | None = None
    """A system message put before chat messages that have none."""
    prompt_template: str | None = None
    """Plain text made of a row's columns, `"Review: {text}"`; it takes the place of `prompt_column`."""

    @model_validator(mode="before")
    @classmethod
    def _source_follows_from_what_is_given(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("prompts"), set | frozenset):
            raise ValueError("prompts is a set, which has no order: give a list")
        if not isinstance(values, dict) or values.get("source") is not None:
            return values
        if values.get("prompts") is not None:
            return {**values, "source": DatasetSource.MEMORY}
        if isinstance(values.get("name"), str):
            is_path = as_path(values["name"], "name", ConfigError).exists()
            return {**values, "source": DatasetSource.LOCAL if is_path else DatasetSource.HUGGINGFACE}
        return {name: value for name, value in values.items() if name != "source"}

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        source = self.source
        if source is DatasetSource.MEMORY and self.prompts is None:
            raise ValueError("source=MEMORY needs prompts=[...]")
        if source is not DatasetSource.MEMORY and self.prompts is not None:
            raise ValueError(f"prompts=[...] goes with source=MEMORY, not {source.name}")
        if source in (DatasetSource.LOCAL, DatasetSource.HUGGINGFACE) and not self.name:
            what = "the path of a file or folder" if source is DatasetSource.LOCAL else "a dataset of the Hub"
            raise ValueError(f"source={source.name} needs name=, {what}")
        if source is DatasetSource.BUNDLED and self.name:
            raise ValueError(f"name={self.name!r} goes with source=HUGGINGFACE or LOCAL, not BUNDLED")
        if source is DatasetSource.BUNDLED and self.split not in BUNDLED_SPLITS:
            raise ValueError(f"split={self.split!r} is not one of the bundled prompts': {', '.join(BUNDLED_SPLITS)}")
        if source is DatasetSource.BUNDLED and self.split == "held_out" and self.held_out:
            raise ValueError("split='held_out' would train on the very prompts that held_out keeps aside")
        if source in (DatasetSource.LOCAL, DatasetSource.MEMORY) and self.split != "train":
            raise ValueError(f"split={self.split!r} goes with source=HUGGINGFACE or BUNDLED, not {source.name}")
        if source is not DatasetSource.HUGGINGFACE:
            for name in ("subset", "revision", "token", "streaming"):
                if getattr(self, name):
                    raise ValueError(f"{name} goes with source=HUGGINGFACE, not {source.name}")
        return self

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.prompt_template is not None:
            try:
                fields = [name for _, name, _, _ in string.Formatter().parse(self.prompt_template) if name is not None]
            except ValueError as error:
                raise ValueError(f"prompt_template={self.prompt_template!r}: {error}") from None
            if not fields or not all(name.isidentifier() for name in fields):
                raise ValueError(
                    f"prompt_template={self.prompt_template!r} must name columns in braces, as in '{{text}}'"
                )
            if self.system_prompt is not None:
                raise ValueError(
                    "prompt_template makes plain text, and system_prompt goes with chat messages: give one"
                )
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


@dataclass
class PromptSet:
    """The prompts of a run. Which come when follows from the seed and a running count: a resume needs nothing else."""

    rows: list[Prompt]
    held_out: list[Prompt]
    shuffle: bool
    shuffle_seed: int
    stream: Iterator[Prompt] | None = None
    """More rows, read as they are used; the first pass takes them in the stream's own seeded order."""

    def batch(self, start: int, size: int) -> list[Prompt]:
        """The `size` prompts after the first `start` of the run; each pass through the rows is a new seeded shuffle."""
        if self.stream is not None:
            self.rows.extend(islice(self.stream, max(0, start + size - len(self.rows))))
        return [self.rows[self._index(position)] for position in range(start, start + size)]

    def fingerprint(self) -> str | None:
        """SHA-256 of all rows and the held-out ones; None of a stream, whose rows are not known beforehand."""
        if self.stream is not None:
            return None
        digest = hashlib.sha256()
        for prompt in (*self.rows, *self.held_out):
            values = [prompt.row, prompt.content, prompt.columns]
            digest.update(json.dumps(values, default=lambda value: type(value).__name__, skipkeys=True).encode())
        return digest.hexdigest()

    def _index(self, position: int) -> int:
        pass_number, offset = divmod(position, len(self.rows))
        if not self.shuffle or (self.stream is not None and pass_number == 0):
            return offset
        return int(_permutation(len(self.rows), self.shuffle_seed, pass_number + 1)[offset])


def load_prompts(config: DatasetConfig) -> PromptSet:
    """Read, check, select and split the prompts that a config names.

    Raises:
        DatasetError: Nothing to read, a column that is not there, rows that are empty or not text (with their
            numbers), or too few rows to hold some out.
    """
    if config.streaming:
        return _open_stream(config)
    rows = _read(config)
    if not len(rows):
        raise DatasetError(f"{_where(config)}: there are no rows to learn on.")
    order = _permutation(len(rows), config.shuffle_seed, 0) if config.shuffle else np.arange(len(rows))
    kept = order[: config.max_samples].tolist()
    picked = rows.select(kept) if hasattr(rows, "select") else [rows[index] for index in kept]
    prompts = _prompts(zip(kept, picked, strict=True), config, _where(config))
    if config.source is DatasetSource.BUNDLED:
        aside = make_prompts(read_bundled("held_out"), config, "The bundled prompts")
        held_out, available = aside[: config.held_out], len(aside)
    else:
        available = len(prompts) - 1
        split_at = len(prompts) - min(config.held_out, available)
        prompts, held_out = prompts[:split_at], prompts[split_at:]
    if config.held_out > available:
        raise DatasetError(
            f"{_where(config)}: held_out={config.held_out}, but at most {available} rows can be held out."
        )
    return PromptSet(prompts, held_out, config.shuffle, config.shuffle_seed)


def make_prompts(rows: Sequence[Any], config: DatasetConfig, where: str) -> list[Prompt]:
    """Prompts of rows that are strings, lists of chat messages, or mappings with a prompt column.

    Raises:
        DatasetError: A row has no such column (names those it has), or rows whose prompt is empty or not text.
    """
    return _prompts(enumerate(rows), config, where)


def _prompts(numbered: Iterable[tuple[int, Any]], config: DatasetConfig, where: str) -> list[Prompt]:
    made = [_make_prompt(index, row, config, where) for index, row in numbered]
    bad = sorted((index, problem) for index, problem in made if isinstance(problem, str))
    if bad:
        named = ", ".join(f"row {index} ({problem})" for index, problem in bad[:10])
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        column = config.prompt_column
        raise DatasetError(
            f"{where}: {len(bad)} of {len(made)} prompts in column {column!r} cannot be used: {named}{more}."
        )
    return [prompt for _, prompt in made if isinstance(prompt, Prompt)]


def _make_prompt(index: int, row: Any, config: DatasetConfig, where: str) -> tuple[int, Prompt | str]:
    """The row's number with its prompt, or with the reason why it has none."""
    columns = dict(row) if isinstance(row, Mapping) else {config.prompt_column: row}
    if config.prompt_template is not None:
        content = _fill_template(config.prompt_template, index, columns, where)
    elif config.prompt_column in columns:
        content = columns.pop(config.prompt_column)
    else:
        raise _missing_column(config.prompt_column, index, columns, where, "DatasetConfig(prompt_column=...)")
    problem = _problem(content)
    if problem:
        return index, problem
    if config.system_prompt is not None:
        if isinstance(content, str):
            return index, "plain text: system_prompt goes with chat messages, [{'role': 'user', 'content': ...}]"
        if content[0]["role"] != "system":
            content = [{"role": "system", "content": config.system_prompt}, *content]
    return index, Prompt(index, content if isinstance(content, str) else list(content), columns)


def _fill_template(template: str, index: int, columns: Mapping[str, Any], where: str) -> str:
    try:
        return template.format_map(columns)
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise DatasetError(f"{where}: prompt_template={template!r} does not fit row {index}: {error}.") from None
    except KeyError as error:
        raise _missing_column(error.args[0], index, columns, where, "DatasetConfig(prompt_template=...)") from None


def _missing_column(name: str, index: int, columns: Mapping[str, Any], where: str, setting: str) -> DatasetError:
    hint = did_you_mean(name, map(str, columns))
    present = ", ".join(map(repr, columns)) or "none"
    return DatasetError(
        f"{where}: row {index} has no column {name!r}.{hint} Its columns: {present}. "
        f"Name the one that holds prompts with {setting}."
    )


def _problem(content: Any) -> str | None:
    """Why a prompt cannot be used, or None."""
    if isinstance(content, str):
        return _problem_of_text(content, "empty")
    if content is None or (isinstance(content, float) and math.isnan(content)):
        return "missing"
    if not isinstance(content, list | tuple):
        return f"{type(content).__name__}, not text"
    if not content:
        return "no messages"
    for message in content:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            return "a message without role and content"
        if not isinstance(message["content"], str) or not isinstance(message["role"], str):
            return "a message whose role or content is not text"
    if content[-1]["role"] != "user":
        return "the last message is not the user's"
    return next(filter(None, (_problem_of_text(m["content"]) for m in content)), None) or _problem_of_text(
        content[-1]["content"], "the last message is empty"
    )


def _problem_of_text(text: str, empty: str | None = None) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return "not text: it holds half a character (a lone surrogate)"
    return None if text.strip() else empty


def _where(config: DatasetConfig) -> str:
    return f"Dataset {config.name!r}" if config.name else f"Dataset ({config.source.value})"


def _permutation(size: int, seed: int, pass_number: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, pass_number])).permutation(size)


def _read(config: DatasetConfig) -> Any:
    """All rows of a source, in its order: a list, or a `datasets.Dataset`."""
    if config.source is DatasetSource.MEMORY:
        return config.prompts
    if config.source is DatasetSource.BUNDLED:
        return read_bundled(config.split)
    if config.source is DatasetSource.LOCAL:
        return read_local(str(config.name), config.prompt_column)
    return read_hub(str(config.name), config.subset, config.split, config.revision, config.token, streaming=False)


def _open_stream(config: DatasetConfig) -> PromptSet:
    """A prompt set that reads its rows as they are used; the first `held_out` of the stream are kept aside."""
    where = _where(config)
    dataset = read_hub(str(config.name), config.subset, config.split, config.revision, config.token, streaming=True)
    numbered = stream_rows(dataset, config.shuffle_seed if config.shuffle else None, where)
    rows = (prompt for pair in islice(numbered, config.max_samples) for prompt in _prompts([pair], config, where))
    held_out, first = list(islice(rows, config.held_out)), list(islice(rows, 1))
    if not first:
        raise DatasetError(f"{where}: there are no rows to learn on beside held_out={config.held_out}.")
    return PromptSet(first, held_out, config.shuffle, config.shuffle_seed, rows)
