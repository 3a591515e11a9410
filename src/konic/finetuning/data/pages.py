"""A column of a parquet file -> what its pages say that they hold: the footer of a stranger's file may say less.

Page headers: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift, in the encoding of
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md.
"""

from typing import Any, BinaryIO

_USUAL_HEADER, _LARGEST_HEADER = 2**14, 2**24
"""Bytes of a page's header; its statistics may hold long texts."""
_DEEPEST = 8
_UNPACKED, _PACKED, _DATA, _DATA_V2 = 2, 3, 5, 8
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12


def page_claims(file: BinaryIO, column: Any) -> tuple[int, int]:
    """Return the bytes that the pages of a column of a row group unpack to, and how many values they have.

    Args:
        file: The parquet file.
        column: The column's metadata, as pyarrow reads it.

    Raises:
        ValueError: The header of a page is damaged.
    """
    offsets = (column.dictionary_page_offset, column.data_page_offset)
    at = min((offset for offset in offsets if offset), default=0)
    end, num_bytes, num_values = at + column.total_compressed_size, 0, 0
    while at < end and num_values < column.num_values:
        header, size = _read_header(file, at, end)
        num_bytes += _count(header, _UNPACKED)
        num_values += sum(_count(header[kind], 1) for kind in (_DATA, _DATA_V2) if isinstance(header.get(kind), dict))
        at += size + _count(header, _PACKED)
    return num_bytes, num_values


def _count(fields: dict[int, Any], number: int) -> int:
    """Return a field that counts something, 0 where it is not there."""
    value = fields.get(number, 0)
    if type(value) is not int or value < 0:
        raise ValueError("the header of a page is damaged")
    return value


def _read_header(file: BinaryIO, at: int, end: int) -> tuple[dict[int, Any], int]:
    """Return the fields of the header at a place, by their numbers, and its size."""
    for most in (_USUAL_HEADER, _LARGEST_HEADER):
        file.seek(at)
        reader = _Compact(file.read(min(most, end - at)))
        try:
            return reader.struct(), reader.at
        except (IndexError, TypeError):
            continue
    raise ValueError("the header of a page is damaged")


class _Compact:
    """Reads values of Thrift's compact protocol. A value that goes beyond the data is an IndexError."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Return the fields of a struct by their numbers; only numbers and structs have a value."""
        fields: dict[int, Any] = {}
        number = 0
        while kind := self._byte():
            number = number + (kind >> 4) if kind >> 4 else self._number()
            fields[number] = self._value(kind & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _DEEPEST:
            raise IndexError
        if kind in (_TRUE, _FALSE):  # in a struct, the kind is the value
            return kind == _TRUE
        if _BYTE < kind < _DOUBLE:
            return self._number()
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET):
            return self._skip_list(depth)
        sizes = {_BYTE: 1, _DOUBLE: 8}
        self._skip(self._varint() if kind == _BINARY else sizes[kind] if kind in sizes else len(self._data) + 1)
        return None

    def _skip_list(self, depth: int) -> None:
        start = self._byte()
        kind, count = start & 15, start >> 4
        for _ in range(self._varint() if count == 15 else count):
            if kind in (_TRUE, _FALSE):
                self._skip(1)
            else:
                self._value(kind, depth + 1)

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self._data):
            raise IndexError

    def _byte(self) -> int:
        self._skip(1)
        return self._data[self.at - 1]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 64, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise IndexError

    def _number(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
