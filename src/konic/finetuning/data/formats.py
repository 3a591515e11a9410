"""The bytes of a file -> its rows, for each format."""

import csv
import io
import json
import sys
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from konic.finetuning.data.chats import is_chat, read_json
from konic.finetuning.data.rows import read_cells, require_distinct


def _text(content: bytes) -> str:
    text = content.decode("utf-8-sig")
    zero_at = content.find(0)
    if zero_at >= 0:
        raise UnicodeDecodeError("utf-8", content, zero_at, zero_at + 1, "text holds no zeros")
    return text


def _read_table(content: bytes, delimiter: str) -> list[Any]:
    text = _text(content)
    limit = csv.field_size_limit(sys.maxsize)  # a cell may hold a whole document
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = next((line for line in lines if line), [])
        if not header:
            raise ValueError("the file is empty")
        require_distinct(header)
        rows = []
        for line in lines:
            if len(line) != len(header) and line:
                raise ValueError(f"line {lines.line_num}: it has {len(line)} cells, the header {len(header)}")
            if line or len(header) == 1:
                rows.append(dict(zip(header, line or [""], strict=True)))
        return rows
    finally:
        csv.field_size_limit(limit)


def _read_csv(content: bytes) -> list[Any]:
    return _read_table(content, ",")


def _read_tsv(content: bytes) -> list[Any]:
    return _read_table(content, "\t")


def _read_json(content: bytes) -> list[Any]:
    text = _text(content)
    try:
        rows = read_json(text)
    except json.JSONDecodeError as error:
        hint = ". If each line is a row, rename it to .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{error}{hint}") from None
    if not isinstance(rows, list):
        raise ValueError(f"the top level is a {type(rows).__name__}, not a list of rows")
    return rows


def _read_jsonl(content: bytes) -> list[Any]:
    rows: list[Any] = []
    for number, line in enumerate(_lines(content), start=1):
        if line.strip():
            try:
                row = read_json(line)
            except (ValueError, RecursionError) as error:
                hint = _JSON_LIST if not rows and line.lstrip().startswith("[") else ""
                raise ValueError(f"line {number}: {error}{hint}") from None
            if not rows and isinstance(row, list) and row and not is_chat(row):
                raise ValueError(f"line {number} is a list of rows{_JSON_LIST}")
            rows.append(row)
    return rows


def _read_parquet(content: bytes) -> list[Any]:
    require_distinct(pyarrow.parquet.read_schema(pyarrow.BufferReader(content)).names)
    return _rows(pyarrow.parquet.read_table(pyarrow.BufferReader(content)))


def _read_arrow(content: bytes) -> list[Any]:
    try:
        table = pyarrow.ipc.open_file(content).read_all()
    except pyarrow.ArrowInvalid:
        table = pyarrow.ipc.open_stream(content).read_all()
    require_distinct(table.column_names)
    return _rows(table)


def _rows(table: pyarrow.Table) -> list[Any]:
    """Return a table's rows; offsets that point outside its memory are an error, not a read of that memory."""
    table.validate(full=True)
    return read_cells(table)


def _read_txt(content: bytes) -> list[Any]:
    return [{"text": line, "prompt": line} for line in _lines(content)]


def _lines(content: bytes) -> list[str]:
    """Return the lines of a text file. Only a newline ends a line: text may hold the other Unicode line separators."""
    text = _text(content).replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    return text.split("\n") if text else []


_JSON_LIST = ". If the file is one JSON list, rename it to .json"

READERS: dict[str, Callable[[bytes], list[Any]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_txt,
}
"""By the extension of the format."""
