"""Rows -> one hash of all their values: a run is resumed with the data that it began with."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any


def fingerprint_rows(rows: Iterable[tuple[int, Any, Mapping[str, Any]]]) -> str:
    """Return the SHA-256 of rows, each with its number, its prompt and its other columns."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_row_as_json(*row).encode())
    return digest.hexdigest()


def _row_as_json(row: int, content: Any, columns: Mapping[str, Any]) -> str:
    """Return a row as JSON; a value that JSON cannot hold, such as a list that contains itself, counts by its type."""
    try:
        return _to_json([row, content, columns])
    except Exception:  # a user's own class may raise anything
        return _to_json([row, _writable(content), {name: _writable(cell) for name, cell in columns.items()}])


def _writable(value: Any) -> Any:
    """Return a value that JSON can hold as it is, another one's type."""
    try:
        _to_json(value)
    except Exception:
        return type(value).__name__
    return value


def _to_json(value: Any) -> str:
    return json.dumps(value, default=_as_json, skipkeys=True)


def _as_json(value: Any) -> Any:
    """Return what stands for a value that JSON does not have; of an object that does not show its value, its type."""
    if hasattr(value, "tolist") and type(listed := value.tolist()) is not type(value):  # numpy, pandas
        return listed
    if isinstance(value, bytes | bytearray):
        return value.hex()
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    shown = repr(value)
    return type(value).__name__ if " at 0x" in shown else shown
