"""Small files that unpack to gigabytes: how much memory a file may take, and readers that go no further."""

import io
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.ipc

from konic.finetuning.data.pages import page_claims
from konic.finetuning.system.places import open_regular

_ALWAYS = 192 * 10**6
_TIMES = 100
_BYTES_OF_VALUE = 40
"""What a number in a list takes in Python."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


class TooLargeError(ValueError):
    """A small file takes far too much memory; the message begins with a verb and ends with what to do."""

    def __init__(self, what: str, num_bytes: int, remedy: str) -> None:
        super().__init__(
            f"{what} more than {allowance(num_bytes) / 1e6:.0f} MB, far more than its {num_bytes} bytes on disk let "
            f"expect. If that is right, {remedy}."
        )


def allowance(num_bytes: int) -> int:
    """Return how many bytes a file of this size may take in memory: 192 MB, or 100 times its size if that is more."""
    return max(_ALWAYS, _TIMES * num_bytes)


class Content(io.RawIOBase):
    """The bytes of a regular file, decompressed, up to a limit if it is compressed.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
        TooLargeError: In reading, that it unpacks to more.
    """

    def __init__(self, file: Path) -> None:
        self._file = open_regular(file)
        self.file_name = file.name
        self.num_bytes = self._file.seek(0, io.SEEK_END)
        """Size of the file on disk."""
        self._file.seek(0)
        kind = COMPRESSIONS.get(file.suffix.lower())
        self._unpacked = pyarrow.input_stream(self._file, compression=kind) if kind else None
        self.is_packed = kind is not None
        self.num_read = 0
        """Bytes that were read so far."""

    def readable(self) -> bool:
        """As the io module asks."""
        return True

    def seekable(self) -> bool:
        """As the io module asks."""
        return not self.is_packed

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place of a file that is not compressed."""
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer, as the io module needs it."""
        read: bytes = (self._unpacked or self._file).read(len(buffer))
        self.num_read += len(read)
        if self.is_packed and self.num_read > allowance(self.num_bytes):
            raise TooLargeError("unpacks to", self.num_bytes, "unpack it first")
        buffer[: len(read)] = read
        return len(read)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def require_few_values(text: str, content: Content) -> None:
    """Check about how much memory the values of JSON take: an empty list has three characters, and takes 60 bytes.

    Raises:
        TooLargeError: That is more than a compressed file of this size may take.
    """
    values = 150 * text.count("{") + 60 * text.count("[") + 50 * text.count(",")
    if content.is_packed and len(text) + values > allowance(content.num_bytes):
        raise TooLargeError("takes, as rows,", content.num_bytes, "unpack it first")


def require_few_cells(line: str, delimiter: str, taken: int, content: Content) -> int:
    """Return about how many bytes the cells of a line of a csv file take, after `taken` bytes of the same row.

    Raises:
        TooLargeError: Together that is more than a compressed file of this size may take.
    """
    size = len(line) + 50 * (1 + line.count(delimiter))
    if content.is_packed and taken + size > allowance(content.num_bytes):
        raise TooLargeError("takes, as rows,", content.num_bytes, "unpack it first")
    return size


def require_honest_metadata(metadata: Any, file: BinaryIO, num_bytes: int) -> int:
    """Return the size of the largest row group of a parquet file, by its footer and its pages, at least 1.

    One row may hold all values of a column of lists, so each of them counts as the object that it becomes.

    Raises:
        TooLargeError: A row group takes more than a file of this size may.
        ValueError: The header of a page is damaged.
    """
    largest = 1
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        total = 0
        for index, column in enumerate(map(group.column, range(group.num_columns))):
            is_list = metadata.schema.column(index).max_repetition_level > 0
            in_footer = column.total_uncompressed_size, column.num_values
            unpacked, num_values = map(max, page_claims(file, column), in_footer)
            total += max(unpacked, _BYTES_OF_VALUE * num_values if is_list else 0)
            if max(total, 8 * num_values) > allowance(num_bytes):
                what = f"unpacks, up to column {column.path_in_schema!r}, to"
                raise TooLargeError(what, num_bytes, "save it as jsonl")
            largest = max(largest, total, 8 * num_values)
    return largest


def texts_in_lists(schema: Any) -> list[str]:
    """Return the columns of a parquet file with lists of texts, to be read so that an equal text is held once."""
    columns = map(schema.column, range(len(schema)))
    return [
        column.path
        for column in columns
        if column.max_repetition_level and column.physical_type == "BYTE_ARRAY" and column.logical_type.type == "STRING"
    ]


def require_room_for_texts(batch: pyarrow.RecordBatch, num_bytes: int) -> None:
    """Check what the cells of a batch take when each of them holds its own copy of a text that several share.

    Raises:
        TooLargeError: That is more than a file of this size may take.
    """
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if _written_out_bytes(column) > allowance(num_bytes):
            raise TooLargeError(f"unpacks, in column {name!r}, to", num_bytes, "save it as jsonl")


def require_plain_types(schema: pyarrow.Schema) -> None:
    """Check that no column is of a type in which a few bytes can stand for any number of values.

    Raises:
        ValueError: One is; the message names it.
    """
    for field in schema:
        if (odd := _find_shared(field.type)) is not None:
            raise ValueError(f"column {field.name!r} is of the type {odd}, which is not read: save it as jsonl")


def _find_shared(kind: Any) -> Any:
    """Return the first type inside of a type, or itself, whose places may share values; None if there is none."""
    types = pyarrow.types
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        return kind
    if types.is_union(kind) or types.is_run_end_encoded(kind):
        return kind
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _find_shared(kind.storage_type)
    if types.is_dictionary(kind):
        return _find_shared(kind.value_type)
    parts = (kind.field(index).type for index in range(kind.num_fields))
    return next((odd for odd in map(_find_shared, parts) if odd is not None), None)


def _written_out_bytes(array: Any) -> int:
    kind, types = array.type, pyarrow.types
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _written_out_bytes(array.storage)
    if types.is_dictionary(kind):
        values = array.dictionary
        if not (types.is_string(values.type) or types.is_large_string(values.type)):
            return int(len(array) * values.nbytes / max(1, len(values)))
        lengths = pyarrow.compute.binary_length(values).take(array.indices)
        return pyarrow.compute.sum(lengths).as_py() or 0
    if types.is_map(kind):
        offsets = array.offsets.to_pylist() or [0]
        return sum(_listed_bytes(part[offsets[0] : offsets[-1]]) for part in (array.keys, array.items))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _listed_bytes(array.flatten())
    if types.is_string_view(kind) or types.is_binary_view(kind):  # a view begins with the length of its text
        start, end = 4 * array.offset, 4 * (array.offset + len(array))
        lengths = np.frombuffer(array.buffers()[1], np.int32)[start:end:4] if len(array) else np.zeros(0)
        return int(lengths[array.is_valid().to_numpy(zero_copy_only=False)].sum(dtype=np.int64))
    return sum(map(_written_out_bytes, array.flatten())) if types.is_struct(kind) else 0


def _listed_bytes(values: Any) -> int:
    each = 8 if pyarrow.types.is_null(values.type) or pyarrow.types.is_boolean(values.type) else _BYTES_OF_VALUE
    return each * len(values) + _written_out_bytes(values)


def require_honest_messages(file: BinaryIO, num_bytes: int) -> None:
    """Check what the messages of an Arrow stream say that their buffers unpack to.

    Raises:
        TooLargeError: That is more than a file of this size may take.
        ValueError: The stream is damaged.
    """
    while True:
        try:
            message = pyarrow.ipc.read_message(file)
            claimed = _unpacked_bytes(memoryview(message.metadata), message.body)
        except EOFError:
            return
        except struct.error:
            raise ValueError("a message is damaged") from None
        if claimed > allowance(num_bytes):
            raise TooLargeError("unpacks, in one batch of rows, to", num_bytes, "save it as jsonl")


_MESSAGE_HEADER, _BATCH_OF_DICTIONARY, _BUFFERS, _COMPRESSION, _DICTIONARY = 2, 1, 2, 3, 2


def _unpacked_bytes(message: memoryview, body: Any) -> int:
    """Return the sum of the sizes that precede the compressed buffers of a batch, 0 for another message.

    The tables of the format: https://github.com/apache/arrow/blob/main/format/Message.fbs
    """

    def number(code: str, at: int) -> int:
        return int(struct.unpack_from(f"<{code}", message, at)[0])

    def field(table: int, index: int) -> int | None:
        layout = table - number("i", table)
        offset = number("H", layout + 4 + 2 * index) if 4 + 2 * index < number("H", layout) else 0
        return table + offset if offset else None

    def follow(at: int) -> int:
        return at + number("I", at)

    root = follow(0)
    kind, batch = field(root, 1), field(root, _MESSAGE_HEADER)
    if kind is None or batch is None:
        return 0
    batch = follow(batch)
    if message[kind] == _DICTIONARY:
        inner = field(batch, _BATCH_OF_DICTIONARY)
        batch = follow(inner) if inner is not None else batch
    elif message[kind] != 3:
        return 0
    buffers = field(batch, _BUFFERS)
    if field(batch, _COMPRESSION) is None or buffers is None:
        return 0
    start, data = follow(buffers), memoryview(body)
    offsets = [number("q", start + 4 + 16 * i) for i in range(number("I", start)) if number("q", start + 12 + 16 * i)]
    return sum(max(0, struct.unpack_from("<q", data, offset)[0]) for offset in offsets)
