"""DatasetConfig -> PromptSet: loads prompts in an order fixed by a seed, each with its row index and other columns."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, assert_never

import numpy as np

from konic.finetuning.data.chats import SKIPPABLE, find_problem, read_chat
from konic.finetuning.data.columns import fill_template, missing_column, require_no_other_column
from konic.finetuning.data.config import DatasetConfig, DatasetSource
from konic.finetuning.data.fingerprint import fingerprint_rows
from konic.finetuning.data.hub import read_hub, stream_rows
from konic.finetuning.data.loaders import LocalRows, read_bundled, read_local, rows_of_dataset
from konic.finetuning.data.rows import copy_columns, without_arrays
from konic.finetuning.errors import DatasetError, first_of
from konic.finetuning.settings import is_bool, short_repr
from konic.output import get_logger

logger = get_logger(__name__)

_SEEN_OF_STREAM = 100
"""Rows of a stream after which empty ones may be too many."""


@dataclass(frozen=True)
class Prompt:
    """One row of a dataset."""

    row: int
    """Index in the dataset, before any shuffle; in a shuffled stream of several files, these count in turns. Random
    numbers are keyed by this index."""
    content: str | list[dict[str, str]]
    """Plain text, or chat messages that end with a user message."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template gets besides the messages."""
    is_among_chats: bool = False
    """True for plain text in a dataset that also holds chats: rewards get its `messages` as None in every batch."""

    @property
    def messages(self) -> list[dict[str, str]] | None:
        """The chat messages; None for plain text."""
        return None if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """The `prompt` that rewards get: the plain text, or the text of the last message."""
        return self.content if isinstance(self.content, str) else self.content[-1]["content"]


@dataclass(kw_only=True)
class PromptSet:
    """The prompts of a run.

    Their order follows from the seed and a running count, and with `prefers_undecided` also from the spreads given.
    """

    rows: list[Prompt]
    held_out: list[Prompt]
    shuffle: bool
    shuffle_seed: int
    stream: Iterator[Prompt] | None = None
    """More rows, read when they are needed. The first pass uses them in the stream's own seeded order."""
    weights: np.ndarray | None = None
    """[N] how often each of `rows` is drawn, relative to the others; None takes each once per pass."""
    prefers_undecided: bool = False
    """Whether rows are drawn more often, the more the scores of their last group differed."""

    def batch(self, start: int, size: int, group_spreads: Mapping[str, float] | None = None) -> list[Prompt]:
        """Return the `size` prompts after the first `start` of the run. Each pass is a new seeded shuffle.

        `group_spreads` are the standard deviations of the scores of the last groups, by dataset row.
        """
        if self.weights is not None or self.prefers_undecided:
            return self._draw(start, size, group_spreads or {})
        if self.stream is not None:
            self.rows.extend(islice(self.stream, max(0, start + size - len(self.rows))))
        return [self.rows[self._index(position)] for position in range(start, start + size)]

    def _draw(self, start: int, size: int, group_spreads: Mapping[str, float]) -> list[Prompt]:
        """Draw rows by their weights, with one random number per position in the run."""
        weights = np.ones(len(self.rows)) if self.weights is None else self.weights
        if self.prefers_undecided and any(group_spreads.values()):
            highest = max(group_spreads.values())
            spreads = np.array([group_spreads.get(str(prompt.row), highest) for prompt in self.rows])
            weights = weights * np.maximum(spreads, 0.1 * spreads.mean())
        ends = np.cumsum(weights)
        below_end = np.nextafter(ends[-1], 0.0)  # the product below may be rounded up to the end
        points = (_uniform(self.shuffle_seed, position) * ends[-1] for position in range(start, start + size))
        return [self.rows[int(np.searchsorted(ends, min(point, below_end), side="right"))] for point in points]

    def fingerprint(self) -> str | None:
        """Return the SHA-256 of all rows, held-out rows too; None for a stream, whose rows are not known in advance."""
        if self.stream is not None:
            return None
        prompts = (*self.rows, *self.held_out)
        return fingerprint_rows((prompt.row, prompt.content, prompt.columns) for prompt in prompts)

    def _index(self, position: int) -> int:
        pass_number, offset = divmod(position, len(self.rows))
        if not self.shuffle or (self.stream is not None and pass_number == 0):
            return offset
        return int(_permutation(len(self.rows), self.shuffle_seed, pass_number + 1)[offset])


def load_prompts(config: DatasetConfig) -> PromptSet:
    """Read, check, select and split the prompts that a config describes.

    Raises:
        DatasetError: There is nothing to read, a column is missing, rows are empty or not text (the message lists their
            numbers), or there are too few rows to hold some out.
    """
    if config.streaming:
        return _open_stream(config)
    kept, picked = _pick(config)
    if not kept:
        raise DatasetError(f"{_where(config)}: there are no rows to train on.")
    prompts = _prompts(zip(kept, picked, strict=True), config, _where(config), leaves_out_empty=True)
    if config.source is DatasetSource.BUNDLED:
        candidates = make_prompts(read_bundled("held_out"), config, "The bundled prompts")
        held_out, available = candidates[: config.held_out], len(candidates)
    else:
        available = len(prompts) - 1
        split_at = len(prompts) - min(config.held_out, available)
        prompts, held_out = prompts[:split_at], prompts[split_at:]
    if config.held_out > available:
        raise DatasetError(
            f"{_where(config)}: held_out={config.held_out}, but at most {available} rows can be held out. "
            "Lower held_out."
        )
    _warn_of_trained(held_out, prompts, _where(config))
    return PromptSet(
        rows=prompts,
        held_out=held_out,
        shuffle=config.shuffle,
        shuffle_seed=config.shuffle_seed,
        weights=_weights(prompts, config) if config.weights_column is not None else None,
        prefers_undecided=config.prefer_undecided,
    )


def _warn_of_trained(held_out: Sequence[Prompt], rows: Sequence[Prompt], where: str) -> None:
    """Warn of held-out prompts that are trained on as well."""
    trained = {repr(prompt.content) for prompt in rows} if held_out else set()
    both = [prompt.row for prompt in held_out if repr(prompt.content) in trained]
    if both:
        logger.warning(
            "%s: held-out prompts that are also trained on, %d of %d: rows %s. A gain on them is not one on unseen "
            "prompts; remove the duplicates.",
            where, len(both), len(held_out), first_of(both),
        )  # fmt: skip


def _pick(config: DatasetConfig) -> tuple[list[int], Any]:
    """Return the numbers of the rows to keep, in the order of the run before its first pass, and the rows."""

    def order(num_rows: int) -> np.ndarray:
        return _permutation(num_rows, config.shuffle_seed, 0) if config.shuffle else np.arange(num_rows)

    if config.source is DatasetSource.LOCAL and config.max_samples is not None:
        return LocalRows(str(config.name), config.split).pick(config.max_samples, order)
    rows = _read(config)
    kept = order(len(rows))[: config.max_samples].tolist()
    is_table = hasattr(rows, "select")
    return kept, rows_of_dataset(rows.select(kept), _where(config), kept) if is_table else [rows[n] for n in kept]


def _weights(prompts: Sequence[Prompt], config: DatasetConfig) -> np.ndarray:
    """Return the numbers of the weights column [N].

    Raises:
        DatasetError: A row has none, or not a number of at least 0, or all are 0.
    """
    name, where = str(config.weights_column), _where(config)
    missing = next((prompt for prompt in prompts if name not in prompt.columns), None)
    if missing is not None:
        raise missing_column(name, missing.row, missing.columns, where, "DatasetConfig(weights_column=...)")
    numbers = [_weight(prompt.columns[name]) for prompt in prompts]
    bad = [prompt for prompt, number in zip(prompts, numbers, strict=True) if number is None]
    if bad:
        shown = first_of([f"row {prompt.row} ({_shown(prompt.columns[name])})" for prompt in bad])
        raise DatasetError(f"{where}: column {name!r} must hold a number of at least 0 in every row: {shown}.")
    weights = np.array(numbers, dtype=float)
    if not weights.any():
        raise DatasetError(f"{where}: column {name!r} holds only zeros: no row could be drawn.")
    return weights / weights.max()  # so that no sum overflows


def _weight(value: Any) -> float | None:
    """Return a number of at least 0 from a cell, which may be text; None if it is not one."""
    try:
        number = math.nan if is_bool(value) else float(value)
    except Exception:  # a user's own class may raise anything
        return None
    return number if 0 <= number < math.inf else None


def _shown(value: Any) -> str:
    """Return a short text for a value; its type if it cannot be shown."""
    try:
        return short_repr(value)
    except ValueError:  # a number of thousands of digits
        return f"of the type {type(value).__name__}"


def make_prompts(
    rows: Sequence[Any], config: DatasetConfig, where: str, leaves_out_empty: bool = False
) -> list[Prompt]:
    """Make prompts from rows that are strings, lists of chat messages, or mappings with a prompt column.

    With `leaves_out_empty`, empty prompts are left out with a warning, as long as they are at most half of all.

    Raises:
        DatasetError: A row lacks the column (the message lists its columns), or prompts are empty or not text.
    """
    return _prompts(enumerate(rows), config, where, leaves_out_empty)


def _prompts(
    numbered: Iterable[tuple[int, Any]], config: DatasetConfig, where: str, leaves_out_empty: bool = False
) -> list[Prompt]:
    if config.prompt_template is not None:
        numbered = _with_all_columns(list(numbered))
    results = [_make_prompt(index, row, config, where) for index, row in numbered]
    bad = sorted((index, problem) for index, problem in results if isinstance(problem, str))
    if leaves_out_empty and 2 * len(bad) <= len(results) and all(problem in SKIPPABLE for _, problem in bad):
        _warn_of_empty(bad, len(results), where)
    elif bad:
        named = first_of([f"row {index} ({problem})" for index, problem in bad])
        is_made = config.prompt_template is not None
        origin, remedy = _origin(config), ""
        if any(problem.endswith("not text") for _, problem in bad):
            remedy = " A prompt is text, or a chat: [{'role': 'user', 'content': ...}]."
        elif all(problem in SKIPPABLE for _, problem in bad):
            remedy = " Remove these rows" + ("." if is_made else ", or name another column in prompt_column.")
        raise DatasetError(f"{where}: {len(bad)} of {len(results)} prompts {origin} cannot be used: {named}.{remedy}")
    return _with_equal_columns([prompt for _, prompt in results if isinstance(prompt, Prompt)])


def _origin(config: DatasetConfig) -> str:
    return "made by prompt_template" if config.prompt_template is not None else f"in column {config.prompt_column!r}"


def _warn_of_empty(bad: Sequence[tuple[int, str]], count: int, where: str) -> None:
    if bad:
        named = first_of([index for index, _ in bad])
        logger.warning("%s: empty prompts are left out, %d of %d: rows %s.", where, len(bad), count, named)


def _not_empty(numbered: Iterable[tuple[int, Any]], config: DatasetConfig, where: str) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a stream that have a prompt; the first that has none is a warning.

    Raises:
        DatasetError: Of the rows so far, 100 or more, more than half have none.
    """
    num_empty = 0
    for count, (index, row) in enumerate(numbered, start=1):
        _, found = _make_prompt(index, row, config, where)
        if found not in SKIPPABLE:
            yield index, row
            continue
        num_empty += 1
        if num_empty == 1:
            logger.warning("%s: the prompt of row %d is %s and left out, as later ones are.", where, index, found)
        if count >= _SEEN_OF_STREAM and 2 * num_empty > count:
            remedy = "" if config.prompt_template is not None else " Name another column in prompt_column."
            raise DatasetError(
                f"{where}: {num_empty} of the first {count} prompts of the stream {_origin(config)} cannot be used: "
                f"the last is row {index} ({found}).{remedy}"
            )


def _with_all_columns(numbered: Sequence[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """Return the rows with the columns of all of them; a value that a row lacks is None."""
    names = dict.fromkeys(name for _, row in numbered if isinstance(row, Mapping) for name in row)
    return [(index, {**names, **row} if isinstance(row, Mapping) else row) for index, row in numbered]


def _with_equal_columns(prompts: list[Prompt]) -> list[Prompt]:
    """Return the prompts with the columns of all of them, `messages` too; a value that a row lacks is None."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    has_chats = any(prompt.messages is not None for prompt in prompts)
    equal = []
    for prompt in prompts:
        if len(prompt.columns) < len(names):
            prompt = replace(prompt, columns={name: prompt.columns.get(name) for name in names})
        equal.append(replace(prompt, is_among_chats=True) if has_chats and prompt.messages is None else prompt)
    return equal


def _make_prompt(index: int, row: Any, config: DatasetConfig, where: str) -> tuple[int, Prompt | str]:
    """Return the row's number with its prompt, or with the reason why the row has no usable prompt."""
    cells = copy_columns(row if isinstance(row, Mapping) else {config.prompt_column: row})
    columns = {str(name): cell for name, cell in cells.items()}  # a table may number its columns
    if len(columns) < len(cells):
        return index, "two of its columns have one name, as a number and as text"
    content: Any
    if config.prompt_template is not None:
        if not isinstance(row, Mapping):
            require_no_other_column(config.prompt_template, config.prompt_column, index, where)
        content = fill_template(config.prompt_template, index, columns, where)
    elif config.prompt_column in columns:
        content = columns.pop(config.prompt_column)
    else:
        raise missing_column(config.prompt_column, index, columns, where, "DatasetConfig(prompt_column=...)")
    try:
        content = read_chat(content) if isinstance(content, str) else without_arrays(content)
    except ValueError as error:
        return index, str(error)
    except RecursionError:
        return index, "a list or dict that contains itself"
    problem = find_problem(content)
    if problem:
        return index, problem
    if isinstance(content, str):
        for_chats = [name for name in ("system_prompt", "chat_template_kwargs") if getattr(config, name) is not None]
        if for_chats:
            return index, f"plain text: {for_chats[0]} goes with chat messages, [{{'role': 'user', 'content': ...}}]"
        return index, Prompt(index, content, columns)
    prompt = Prompt(index, list(content), columns, config.chat_template_kwargs or {})
    return index, with_system_prompt(prompt, config.system_prompt)


def with_system_prompt(prompt: Prompt, system_prompt: str | None) -> Prompt:
    """Return a chat that begins with a system message; as it is if it has one, and plain text as it is."""
    if system_prompt is None or prompt.messages is None or prompt.messages[0]["role"] == "system":
        return prompt
    return replace(prompt, content=[{"role": "system", "content": system_prompt}, *prompt.messages])


def _where(config: DatasetConfig) -> str:
    return f"Dataset {config.name!r}" if config.name else f"Dataset ({config.source.value})"


def _permutation(size: int, seed: int, pass_number: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, pass_number])).permutation(size)


def _uniform(seed: int, position: int) -> float:
    """Return a random number from [0, 1) for one position in a run."""
    return float(np.random.Generator(np.random.Philox(key=[seed, 2**63], counter=[0, 0, 0, position])).random())


def _read(config: DatasetConfig) -> Any:
    """Return all rows of a source, in the source's order: a list, or a `datasets.Dataset`."""
    match config.source:
        case DatasetSource.MEMORY:
            return config.prompts
        case DatasetSource.BUNDLED:
            return read_bundled(config.split)
        case DatasetSource.LOCAL:
            return read_local(str(config.name), config.split)
        case DatasetSource.HUGGINGFACE:
            settings = config.subset, config.split, config.revision, config.token
            return read_hub(str(config.name), *settings, streaming=False)
        case DatasetSource.KONIC_CLOUD:
            raise AssertionError("DatasetConfig refuses this source")
        case _:
            assert_never(config.source)


def _open_stream(config: DatasetConfig) -> PromptSet:
    """Return a prompt set that reads rows when they are needed; the stream's first `held_out` rows are held out."""
    where = _where(config)
    dataset = read_hub(str(config.name), config.subset, config.split, config.revision, config.token, streaming=True)
    numbered = stream_rows(dataset, config.shuffle_seed if config.shuffle else None, where)
    pairs = _not_empty(islice(numbered, config.max_samples), config, where)
    rows = (prompt for pair in pairs for prompt in _prompts([pair], config, where))
    held_out, first = list(islice(rows, config.held_out)), list(islice(rows, 1))
    if not first:
        raise DatasetError(f"{where}: no rows are left to train on after held_out={config.held_out}.")
    return PromptSet(
        rows=first, held_out=held_out, shuffle=config.shuffle, shuffle_seed=config.shuffle_seed, stream=rows
    )
