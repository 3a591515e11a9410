"""Small files that unpack to gigabytes: how much memory a file may take, and readers that go no further."""

import io
import struct
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.ipc

from konic.finetuning.system.places import open_regular

_ALWAYS = 192 * 10**6
_TIMES = 100
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


def require_honest_metadata(metadata: Any, num_bytes: int) -> int:
    """Return the size of the largest column of a row group of a parquet file, by its metadata, at least 1.

    Raises:
        TooLargeError: A column takes more than a file of this size may.
    """
    largest = 1
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            largest = max(largest, column.total_uncompressed_size, 8 * column.num_values)
            if largest > allowance(num_bytes):
                raise TooLargeError(f"unpacks, in column {column.path_in_schema!r}, to", num_bytes, "save it as jsonl")
    return largest


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
