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


def _read_table(content: bytes, delimiter: str) -> list[Any]:
    text = content.decode("utf-8-sig")
    limit = csv.field_size_limit(sys.maxsize)  # a cell may hold a whole document
    try:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = next((line for line in lines if line), [])
        repeated = {name for name in header if header.count(name) > 1}
        if not header:
            raise ValueError("the file is empty")
        if repeated:
            raise ValueError(f"more than one column is named {', '.join(map(repr, sorted(repeated)))}")
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
    rows = json.loads(content.decode("utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError(f"the top level is a {type(rows).__name__}, not a list of rows")
    return rows


def _read_jsonl(content: bytes) -> list[Any]:
    rows = []
    for number, line in enumerate(_lines(content), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from None
    return rows


def _read_parquet(content: bytes) -> list[Any]:
    return _rows(pyarrow.parquet.read_table(pyarrow.BufferReader(content)))


def _read_arrow(content: bytes) -> list[Any]:
    try:
        table = pyarrow.ipc.open_file(content).read_all()
    except pyarrow.ArrowInvalid:
        table = pyarrow.ipc.open_stream(content).read_all()
    return _rows(table)


def _rows(table: pyarrow.Table) -> list[Any]:
    """Return a table's rows; offsets that point outside its memory are an error, not a read of that memory."""
    table.validate(full=True)
    return list(table.to_pylist())


def _read_txt(content: bytes) -> list[Any]:
    return [{"text": line, "prompt": line} for line in _lines(content)]


def _lines(content: bytes) -> list[str]:
    """Return the lines of a text file. Only a newline ends a line: text may hold the other Unicode line separators."""
    text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    return text.split("\n") if text else []


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
