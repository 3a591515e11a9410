"""A file -> its rows, for each format: read one after the other, so that memory holds only those that are kept."""

import contextlib
import csv
import io
import json
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from functools import lru_cache
from itertools import islice, repeat
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from konic.finetuning.data.chats import is_chat, read_json
from konic.finetuning.data.columns import SEPARATORS, separated_by
from konic.finetuning.data.packed import (
    COMPRESSIONS,
    Content,
    TooLargeError,
    allowance,
    require_few_cells,
    require_few_values,
    require_honest_messages,
    require_honest_metadata,
    require_plain_types,
    require_room_for_texts,
    texts_in_lists,
)
from konic.finetuning.data.rows import read_cells, require_distinct
from konic.finetuning.system.places import find_stray, open_regular
from konic.output import get_logger

logger = get_logger(__name__)

_ROWS_AT_ONCE = 64
"""Of a table; fewer where each of them may be large."""
_MOST_ROWS = 100_000
"""Of a table of a run."""
_BYTES_UNREAD = 200
"""What a row that is not kept counts, so that counting the rows has a bound too."""


def decode_text(content: bytes) -> str:
    """Return the text of a file's bytes; a zero is no text."""
    text = content.decode("utf-8-sig")
    zero_at = content.find(0)
    if zero_at >= 0:
        raise UnicodeDecodeError("utf-8", content, zero_at, zero_at + 1, "text holds no zeros")
    return text


def _text(content: Content, newline: str | None = None) -> Iterator[str]:
    for line in io.TextIOWrapper(io.BufferedReader(content), encoding="utf-8-sig", newline=newline):
        if "\0" in line:
            raise UnicodeDecodeError("utf-8", b"\0", 0, 1, "text holds no zeros")
        yield line


def _read_table(content: Content, delimiter: str) -> Iterator[Any]:
    taken = 0  # by the row that is read

    def text() -> Iterator[str]:
        nonlocal taken
        for line in _text(content, newline=""):
            taken += require_few_cells(line, delimiter, taken, content)
            yield line

    limit = csv.field_size_limit(sys.maxsize)  # a cell may hold a whole document
    try:
        reader = csv.reader(text(), delimiter=delimiter, strict=True)
        lines = _numbered(reader)
        header = next((line for _, line in lines if line), [])
        if not header:
            raise ValueError("the file is empty")
        width = len(header)
        if header[-2:] == ["", ""] and any(header):  # columns without a name, as spreadsheets write them
            header = header[: width - next(index for index, name in enumerate(reversed(header)) if name)]
        require_distinct(header)
        taken, has_warned = 0, False
        for first, line in lines:
            taken = 0
            if len(line) != width and line:
                separator = next((sign for sign in SEPARATORS if width == 1 and sign in header[0]), None)
                hint = separated_by(separator) if separator else ""
                raise ValueError(f"line {reader.line_num}: it has {len(line)} cells, the header {width}.{hint}")
            if any(line[len(header) :]):
                raise ValueError(f"line {reader.line_num}: it has a cell in a column without a name: name it")
            if delimiter == "\t" and not has_warned and any("\t" in cell and "\n" in cell for cell in line):
                has_warned = True
                _warn_of_swallowed(content.file_name, first, reader.line_num)
            if line or width == 1:
                yield dict(zip(header, line or [""], strict=False))
    finally:
        csv.field_size_limit(limit)


def _numbered(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a csv reader, each with the number of its first line."""
    while True:
        first = reader.line_num + 1
        try:
            yield first, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            is_open = "end of data" in str(error)
            what = f"{error}, because no quote ends a cell of the row that begins here" if is_open else str(error)
            raise ValueError(f"line {first if is_open else reader.line_num}: {what}") from None


@lru_cache(maxsize=8)
def _warn_of_swallowed(name: str, first: int, last: int) -> None:
    logger.warning(
        "File %r, lines %d to %d: the quote that begins a cell makes these lines one row, tabs included. If they are "
        "rows of their own, the file quotes no cells: put that cell in quotes and write each quote inside twice, or "
        "save the file as jsonl.",
        name, first, last,
    )  # fmt: skip


def _read_csv(content: Content) -> Iterator[Any]:
    return _read_table(content, ",")


def _read_tsv(content: Content) -> Iterator[Any]:
    return _read_table(content, "\t")


def _read_json(content: Content) -> Iterator[Any]:
    text = decode_text(io.BufferedReader(content).read())
    require_few_values(text, content)
    try:
        rows = read_json(text)
    except json.JSONDecodeError as error:
        hint = ". If each line is a row, rename it to .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{error}{hint}") from None
    if not isinstance(rows, list):
        raise ValueError(
            f"the top level is a {type(rows).__name__}, not a list of rows: write it as [{{'prompt': ...}}, ...]"
        )
    return iter(rows)


def _read_jsonl(content: Content) -> Iterator[Any]:
    is_first = True
    for number, line in enumerate(_lines(content), start=1):
        if line.strip():
            require_few_values(line, content)
            try:
                row = read_json(line)
            except (ValueError, RecursionError) as error:
                hint = _JSON_LIST if is_first and line.lstrip().startswith("[") else ""
                raise ValueError(f"line {number}: {error}{hint}") from None
            if is_first and isinstance(row, list) and row and not is_chat(row):
                raise ValueError(f"line {number} is a list of rows{_JSON_LIST}")
            yield row
            is_first = False


def _read_parquet(file: BinaryIO, num_bytes: int, wanted: Container[int] | None) -> Iterator[Any]:
    file = _seekable(file)
    lists = texts_in_lists(pyarrow.parquet.ParquetFile(file, pre_buffer=False).schema)
    table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, read_dictionary=lists)
    require_distinct(table.schema_arrow.names)
    size, first = _rows_at_once(require_honest_metadata(table.metadata, file, num_bytes), num_bytes), 0
    for index in range(table.num_row_groups):
        num_rows = table.metadata.row_group(index).num_rows
        if _is_any_wanted(range(first, first + num_rows), wanted):
            for batch in table.iter_batches(size, row_groups=[index], use_threads=False):
                yield from _rows(batch, first, wanted, num_bytes)
                first += batch.num_rows
        else:
            yield from repeat(None, num_rows)
            first += num_rows


def _read_arrow(file: BinaryIO, num_bytes: int, wanted: Container[int] | None) -> Iterator[Any]:
    file, start, claimed = _seekable(file), 0, None
    with contextlib.suppress(pyarrow.ArrowInvalid):  # a stream has neither a mark at its start nor a list of batches
        claimed, start = pyarrow.ipc.open_file(file).num_record_batches, len(b"ARROW1\0\0")
    file.seek(start)
    require_honest_messages(file, num_bytes)
    file.seek(start)
    num_batches = first = 0
    stream = pyarrow.ipc.open_stream(file)
    require_distinct(stream.schema.names)
    require_plain_types(stream.schema)
    for batch in stream:
        num_batches += 1
        size = _rows_at_once(batch.nbytes, num_bytes)
        for begin in range(0, batch.num_rows, size):
            part = batch.slice(begin, size)
            yield from _rows(part, first, wanted, num_bytes)
            first += part.num_rows
    if claimed not in (None, num_batches):
        raise ValueError(f"its list of contents names {claimed} batches of rows, and it holds {num_batches}")


def _seekable(file: BinaryIO) -> BinaryIO:
    return file if file.seekable() else io.BytesIO(file.read())


def _rows_at_once(largest: int, num_bytes: int) -> int:
    """Return how many rows to read together, if each of them may be as large as the largest part of a file."""
    return max(1, min(_ROWS_AT_ONCE, allowance(num_bytes) // max(1, largest)))


def _is_any_wanted(numbers: range, wanted: Container[int] | None) -> bool:
    return wanted is None or any(number in wanted for number in numbers)


def _rows(batch: pyarrow.RecordBatch, first: int, wanted: Container[int] | None, num_bytes: int) -> list[Any]:
    """Return the rows of a batch, of which the first has the number `first`; None for each if none is wanted.

    Offsets that point outside the table's memory are an error, not a read of that memory.
    """
    if not _is_any_wanted(range(first, first + batch.num_rows), wanted):
        return [None] * batch.num_rows
    table = pyarrow.Table.from_batches([batch])
    table.validate(full=True)
    require_room_for_texts(batch, num_bytes)
    return read_cells(table, first)


def _read_txt(content: Content) -> Iterator[Any]:
    return ({"text": line, "prompt": line} for line in _lines(content))


def _lines(content: Content) -> Iterator[str]:
    """Yield the lines of a text file. Only a newline ends a line: text may hold the other Unicode line separators."""
    return (line.removesuffix("\n") for line in _text(content))


_JSON_LIST = ". If the file is one JSON list, rename it to .json"

_TEXTS: dict[str, Callable[[Content], Iterator[Any]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".txt": _read_txt,
}
_TABLES: dict[str, Callable[[BinaryIO, int, Container[int] | None], Iterator[Any]]] = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".txt")
"""The extensions of the formats."""


_STARTS = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet", b"ARROW1": ".arrow"}
_START_OF_ZIP = b"PK\x03\x04"
_START_OF_POINTER = b"version https://git-lfs.github.com/spec/"


def find_other_format(file: Path, kind: str) -> str | None:
    """Return what a file is instead of one of its kind, and what to do about it; None if its first bytes do not say.

    Args:
        file: A regular file.
        kind: One of :data:`FORMATS`, by the file's name.
    """
    with open_regular(file) as opened:
        start = opened.read(len(_START_OF_POINTER))
    if start == _START_OF_POINTER:
        return "is a pointer of Git LFS in place of the data: fetch them by `git lfs pull`"
    if kind in _TABLES or file.suffix.lower() in COMPRESSIONS:
        return None
    if start.startswith(_START_OF_ZIP):
        return "is an Excel file or a zip archive: save what is inside as csv or jsonl"
    ending = next((ending for magic, ending in _STARTS.items() if start.startswith(magic)), None)
    if ending in COMPRESSIONS:
        return f"is compressed: rename it to {file.name}{ending}"
    return ending and f"holds a table of {ending[1:]}: rename it to {file.stem}{ending}"


def read_rows(content: Content, kind: str, wanted: Container[int] | None) -> Iterator[Any]:
    """Yield the rows of a file in a format; None in place of a row that is not wanted.

    Args:
        content: The file.
        kind: One of :data:`FORMATS`.
        wanted: Numbers of the rows to keep; None keeps all.

    Raises:
        TooLargeError: The rows take far more memory than the file's size lets expect.
        ValueError: The file is damaged.
    """
    num_bytes = content.num_bytes
    is_table = kind in _TABLES
    rows = _TABLES[kind](io.BufferedReader(content), num_bytes, wanted) if is_table else _TEXTS[kind](content)
    can_grow = content.is_packed or is_table
    taken = 0
    for number, row in enumerate(rows):
        is_wanted = wanted is None or number in wanted
        if can_grow:
            taken += _num_bytes(row) if is_wanted else _BYTES_UNREAD
            if taken > allowance(num_bytes):
                raise TooLargeError("takes, as rows,", num_bytes, "set max_samples, or save it as jsonl")
        yield row if is_wanted else None


def read_table(path: Path, folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a table in a run's folder, at most 100,000. It may be a stranger's.

    Raises:
        ValueError: It is a link out of `folder`, is damaged, or takes far more memory than its size lets expect.
        OSError: It cannot be read.
    """
    stray = find_stray([path], folder)
    if stray is not None:
        raise ValueError(stray)
    with Content(path) as content:
        return list(islice(read_rows(content, ".parquet", None), _MOST_ROWS))


def columns_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return rows as columns; no columns for no rows."""
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def _num_bytes(value: Any) -> int:
    """Return about how much memory a row takes."""
    if isinstance(value, dict):
        return 150 + sum(map(_num_bytes, value.values()))
    if isinstance(value, list):
        return 60 + sum(map(_num_bytes, value))
    return 50 + len(value) if isinstance(value, str | bytes) else 8
