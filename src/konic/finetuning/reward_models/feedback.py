"""A file, folder or Hub dataset -> preference pairs or labelled texts: reads and checks the rows."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from konic.finetuning.data.chats import read_chat
from konic.finetuning.data.hub import read_hub
from konic.finetuning.data.loaders import is_local, read_local, rows_of_dataset
from konic.finetuning.errors import DatasetError, did_you_mean, first_of
from konic.output import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt: `chosen` was preferred to `rejected`."""

    prompt: str
    chosen: str
    rejected: str
    messages: list[dict[str, str]] | None = None
    """The chat whose last message is the prompt; None for plain text."""


@dataclass(frozen=True)
class Labelled:
    """A text and its label."""

    text: str
    label: str


def read_preferences(data: str) -> list[Preference]:
    """Return preference pairs from a csv, json, jsonl or parquet file, a folder of one kind, or a Hub dataset.

    Rows hold `chosen` and `rejected`, as texts next to a `prompt`, or as chats whose last message is the response; a
    chat may be stored as JSON text. Pairs of equal responses are left out with a warning.

    Raises:
        DatasetError: A row holds something else, or two chats that differ before the response, or a `prompt` that is
            not in its chats (the message names the row), or more than half of the pairs are of equal responses.
    """
    rows = _rows(data)
    _require_columns(data, rows, ("chosen", "rejected"))
    pairs = [_preference(row, f"{data}, row {number}") for number, row in enumerate(rows)]
    equal = [number for number, pair in enumerate(pairs) if pair.chosen == pair.rejected]
    if equal:
        named = first_of(equal)
        found = f"{data}: 'chosen' and 'rejected' are equal in {len(equal)} of {len(pairs)} rows"
        if 2 * len(equal) > len(pairs):
            raise DatasetError(f"{found}: rows {named}. Such pairs teach nothing; check the columns.")
        logger.warning("%s, which are left out: rows %s.", found, named)
    return [pair for pair in pairs if pair.chosen != pair.rejected]


def read_labelled(data: str, text: str, label: str) -> list[Labelled]:
    """Return labelled texts from a file, a folder of one kind, or a Hub dataset.

    A label is a word, a number or True or False. 1, 1.0 and "1" are one label, and spaces around a label do not count.

    Raises:
        DatasetError: A column is missing, a row has no text or no label, or the labels mix numbers with True or False.
    """
    rows = _rows(data)
    _require_columns(data, rows, (text, label))
    labels = [_label(row[label]) for row in rows]
    for number, row in enumerate(rows):
        if not isinstance(row[text], str) or not row[text].strip() or labels[number] is None:
            raise DatasetError(
                f"{data}, row {number}: needs a text in {text!r} and a label (a word or a number) in {label!r}."
            )
    if {type(row[label]) for row in rows} & {int, float} and any(isinstance(row[label], bool) for row in rows):
        raise DatasetError(f"{data}: column {label!r} mixes numbers with True or False. Write every label in one way.")
    return [Labelled(row[text], str(name)) for row, name in zip(rows, labels, strict=True)]


def _label(value: Any) -> str | None:
    """Return the name of a label: 1 and 1.0 are both "1". None if the value is missing or no label."""
    is_missing = value is None or (isinstance(value, float) and math.isnan(value))
    if is_missing or isinstance(value, Mapping | list | tuple | bytes):
        return None
    return re.sub(r"^([+-]?\d+)\.0+$", r"\1", str(value).strip()) or None


def _rows(data: str) -> list[Any]:
    if is_local(data):
        return read_local(data)
    return rows_of_dataset(read_hub(data, None, "train", None, None, streaming=False), data)


def _require_columns(data: str, rows: Sequence[Any], names: Sequence[str]) -> None:
    if not rows:
        raise DatasetError(f"{data}: holds no rows. Give examples, with the columns {', '.join(names)}.")
    for name in names:
        missing = next(
            (number for number, row in enumerate(rows) if not isinstance(row, Mapping) or name not in row), None
        )
        if missing is not None:
            known = list(rows[missing]) if isinstance(rows[missing], Mapping) else []
            raise DatasetError(
                f"{data}, row {missing}: there is no column {name!r}.{did_you_mean(name, known)} "
                f"The row has: {', '.join(map(str, known)) or 'none'}."
            )


def _preference(row: Mapping[str, Any], where: str) -> Preference:
    names = ("chosen", "rejected", "prompt")
    try:
        given = {name: read_chat(cell) if isinstance(cell := row.get(name), str) else cell for name in names}
    except ValueError as error:
        raise DatasetError(f"{where}: {error}.") from None
    chosen, rejected, prompt = (_chat(given[name], f"{where}: {name!r}") for name in names)
    if not all(side and side[-1]["content"].strip() for side in (chosen, rejected)):
        raise DatasetError(f"{where}: 'chosen' or 'rejected' holds no response.")
    if chosen[:-1] != rejected[:-1]:
        raise DatasetError(
            f"{where}: the chats in 'chosen' and 'rejected' differ before their last message. A pair is two responses "
            "to the same conversation."
        )
    stray = _find_stray(prompt, chosen[:-1])
    if stray is not None:
        raise DatasetError(
            f"{where}: 'prompt' holds {stray!r:.200}, which is not in the chats in 'chosen' and 'rejected'. Correct "
            "the row, or remove the column 'prompt'."
        )
    before = chosen[:-1] or prompt
    text = before[-1]["content"] if before else ""
    is_chat = not isinstance(given["chosen"], str) or isinstance(given["prompt"], list | tuple)
    return Preference(text, chosen[-1]["content"], rejected[-1]["content"], before if before and is_chat else None)


def _find_stray(prompt: Sequence[Mapping[str, str]], before: Sequence[Mapping[str, str]]) -> str | None:
    """Return a message of the prompt that is not in the chat before the responses; None without such a chat.

    The prompt may also be the text of the whole chat.
    """
    contents = [message["content"].strip() for message in before]
    if not contents or (len(prompt) == 1 and all(text in prompt[0]["content"] for text in contents)):
        return None
    return next((message["content"] for message in prompt if message["content"].strip() not in contents), None)


def _chat(value: Any, where: str) -> list[dict[str, str]]:
    """Return chat messages; a plain text becomes one message."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}] if value.strip() else []
    if value is None:
        return []
    is_chat = isinstance(value, Sequence) and all(
        isinstance(message, Mapping) and isinstance(message.get("content"), str) for message in value
    )
    if not is_chat:
        raise DatasetError(f"{where} is neither a text nor a chat: {value!r:.200}.")
    return [{"role": str(message.get("role", "user")), "content": message["content"]} for message in value]
