"""A row's columns -> the text that a template makes of them, and the error where a column is missing."""

from collections.abc import Mapping
from string import Formatter
from typing import Any

from konic.finetuning.data.chats import is_message, is_missing
from konic.finetuning.errors import DatasetError, did_you_mean

SEPARATORS = (";", "\t", "|", ",")
"""What other programs write between the cells of a row."""


class _Blank(str):
    """The text of a missing value, empty in every format."""

    def __format__(self, spec: str) -> str:
        return ""


class _Template(Formatter):
    """Formats as `str.format_map` does, but no chat, of which Python's notation would become the text."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        messages = value if isinstance(value, list | tuple) else [value]
        if messages and all(map(is_message, messages)):
            raise ValueError(
                "one of its columns is a chat, and a template takes text. Give the chat alone: prompt_column=..., "
                "without prompt_template"
            )
        return value if isinstance(value, _Blank) else super().convert_field(value, conversion)


def fill_template(template: str, index: int, columns: Mapping[str, Any], where: str) -> str:
    """Return the text that a template makes of a row's columns; a missing cell is empty text.

    Raises:
        DatasetError: The row lacks a column of the template, or a cell does not fit it.
    """
    blank = _Blank()
    try:
        cells = {name: blank if is_missing(cell) else cell for name, cell in columns.items()}
        return _Template().vformat(template, (), cells)
    except KeyError as error:
        raise missing_column(error.args[0], index, columns, where, "DatasetConfig(prompt_template=...)") from None
    except Exception as error:  # a user's own class may raise anything
        raise DatasetError(f"{where}: prompt_template={template!r} does not fit row {index}: {error}.") from None


def require_no_other_column(template: str, column: str, index: int, where: str) -> None:
    """Raise DatasetError if a template has other columns than the one that a row without names stands for."""
    names = dict.fromkeys(name for _, name, _, _ in Formatter().parse(template) if name is not None)
    if any(name != column for name in names):
        shown = ", ".join(f"{name!r}: ..." for name in names)
        raise DatasetError(
            f"{where}: row {index} has no columns, and prompt_template={template!r} needs rows with its own: "
            f"[{{{shown}}}]."
        )


def missing_column(name: str, index: int, columns: Mapping[str, Any], where: str, setting: str) -> DatasetError:
    """Return the error of a row without a column, with the nearest name, and the setting to change."""
    hint = did_you_mean(name, map(str, columns))
    if is_message(columns):
        hint = " This is one chat, not a list of chats: give [[{'role': ..., 'content': ...}]]."
    separator = next(
        (sign for sign in SEPARATORS if len(columns) == 1 and name in next(iter(columns)).split(sign)), None
    )
    if separator is not None:
        hint = separated_by(separator)
    present = ", ".join(map(repr, columns)) or "none"
    return DatasetError(
        f"{where}: row {index} has no column {name!r}.{hint} Its columns: {present}. Name the right one in {setting}."
    )


def separated_by(separator: str) -> str:
    """Return the sentence for a csv or tsv file that has another separator than its extension says."""
    return f" Its cells seem to be separated by {separator!r}: save it with commas as .csv, or with tabs as .tsv."
