"""What people have in hand -> rows: reads tables of other libraries, and chats that are stored as text."""

import ast
import copy
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from konic.finetuning.settings import short_repr

_CHAT_KEY = re.compile(r"""["'](role|from|messages|conversations)["']\s*:""")
_MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})


def rows_of(prompts: Any) -> list[Any]:
    """Return the rows of a list, or of a table in memory (pandas, polars, `datasets`, pyarrow, numpy).

    Raises:
        ValueError: It is something else, or two of its columns have one name.
    """
    if isinstance(prompts, set | frozenset):
        raise ValueError("prompts is a set, which has no order: give a list")
    packages = (base.__module__.partition(".")[0] for base in type(prompts).__mro__)
    read = next((_READERS[package] for package in packages if package in _READERS), None)
    is_one_thing = isinstance(prompts, str | bytes | Mapping) or hasattr(prompts, "_asdict") or hasattr(prompts, "read")
    if is_one_thing and read is not _read_datasets:
        raise _not_rows(prompts)
    if read is None and not isinstance(prompts, Iterable):
        raise _not_rows(prompts)
    rows = prompts if read is None else read(prompts)
    return [row._asdict() if isinstance(row, tuple) and hasattr(row, "_asdict") else row for row in rows]


def _not_rows(prompts: Any) -> ValueError:
    return ValueError(
        f"prompts is of the type {type(prompts).__name__}, which is not a list of rows: {short_repr(prompts)}. Give "
        "a list of strings, of chats or of dicts, or a table"
    )


def _require_distinct(names: Iterable[Any]) -> None:
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"prompts has two columns named {twice!r}: rename one of them")


def _read_pandas(table: Any) -> list[Any]:
    pandas = sys.modules["pandas"]
    is_frame = isinstance(table, pandas.DataFrame)
    if is_frame:
        _require_distinct(table.columns)
    elif isinstance(table, pandas.Series | pandas.Index | pandas.api.extensions.ExtensionArray):
        table = pandas.Series(table)
    else:
        raise _not_rows(table)
    cells = table.astype(object).where(table.notna(), None)  # a missing value is None, as in other tables
    rows: list[Any] = without_arrays(cells.to_dict("records") if is_frame else cells.tolist())
    return rows


def _read_numpy(array: Any) -> list[Any]:
    is_table = hasattr(array, "tolist") and array.ndim > 0 and (array.ndim == 1 or array.dtype.hasobject)
    if not is_table:
        raise _not_rows(array)
    names = array.dtype.names
    rows: list[Any] = array.tolist()
    return [dict(zip(names, row, strict=True)) for row in rows] if names and array.ndim == 1 else rows


def _read_polars(table: Any) -> list[Any]:
    table = table.collect() if hasattr(table, "collect") else table  # a lazy frame
    read = getattr(table, "to_dicts", None) or getattr(table, "to_list", None)
    if read is None:
        raise _not_rows(table)
    return list(read())


def _read_pyarrow(table: Any) -> list[Any]:
    read_whole = getattr(table, "read_all", None) or getattr(table, "to_table", None)  # a reader, or a dataset
    table = read_whole() if read_whole is not None else table
    if not hasattr(table, "to_pylist"):
        raise _not_rows(table)
    _require_distinct(table.schema.names if hasattr(table, "schema") else ())
    return list(table.to_pylist())


def _read_datasets(table: Any) -> list[Any]:
    if hasattr(table, "keys"):
        raise ValueError(f"prompts holds the splits {', '.join(table)}: give one of them, prompts=data['train']")
    return list(table)


_READERS: Mapping[str, Callable[[Any], list[Any]]] = {
    "pandas": _read_pandas, "numpy": _read_numpy, "polars": _read_polars, "pyarrow": _read_pyarrow,
    "datasets": _read_datasets,
}  # fmt: skip


def without_arrays(value: Any) -> Any:
    """Return a value in which numpy arrays are lists, also inside of lists and dicts: parquet files give such cells."""
    if type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
        value = list(value) if value.dtype.kind in "mM" else value.tolist()
    if isinstance(value, dict):
        return {name: without_arrays(part) for name, part in value.items()}
    return [without_arrays(part) for part in value] if isinstance(value, list) else value


def copy_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies as deep as the data; a value that cannot be copied, such as an open file, is passed as it is."""
    copies = {}
    for name, value in columns.items():
        try:
            copies[name] = copy.deepcopy(value)
        except Exception:  # a user's own class may raise anything
            copies[name] = value
    return copies


def read_chat(text: str) -> Any:
    """Return what a chat's text stands for, written as JSON or as Python prints it; other text as it is."""
    if text.lstrip()[:1] not in ("[", "{") or not _CHAT_KEY.search(text):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python warns of a backslash in text that is no Python
                found = read(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        return found if _is_chat(found) else text
    return text


def _is_chat(found: Any) -> bool:
    if isinstance(found, dict):
        return any(isinstance(found.get(name), list) for name in ("messages", "conversations"))
    is_list = isinstance(found, list) and bool(found)
    return is_list and all(isinstance(m, dict) and any(keys <= m.keys() for keys in _MESSAGE_KEYS) for m in found)
