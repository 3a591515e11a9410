"""What people have in hand -> rows: reads tables of other libraries, and the values in them."""

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any

from konic.finetuning.errors import panics_as_errors, safe_cause
from konic.finetuning.settings import short_repr
from konic.finetuning.system.places import looks_like_path
from konic.output import get_logger
from konic.text import describe_error

logger = get_logger(__name__)

_MANY = 10_000
"""Rows of a stream after which it is said that all are read."""


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
    rows = prompts if read is None else _read(prompts, read)
    return [row._asdict() if isinstance(row, tuple) and hasattr(row, "_asdict") else row for row in rows]


def _read(table: Any, read: Callable[[Any], list[Any]]) -> list[Any]:
    try:
        return read(table)
    except ValueError:
        raise
    except Exception as error:  # each library has errors of its own
        raise ValueError(f"prompts cannot be read: {describe_error(error)}") from safe_cause(error)


def _not_rows(prompts: Any) -> ValueError:
    is_path = isinstance(prompts, PathLike) or (isinstance(prompts, str) and prompts != "" and looks_like_path(prompts))
    hint = "; for those of a file, DatasetConfig(name=...)" if is_path else ""
    return ValueError(
        f"prompts is of the type {type(prompts).__name__}, which is not a list of rows: {short_repr(prompts)}. Give "
        f"a list of strings, of chats or of dicts, or a table{hint}"
    )


def require_distinct(names: Iterable[Any]) -> None:
    """Raise ValueError if two columns, or two keys of an object, have one name: the last would win in silence."""
    repeated = [repr(name) for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"more than one column is named {', '.join(repeated)}: rename or remove one of them")


def _read_pandas(table: Any) -> list[Any]:
    pandas = sys.modules["pandas"]
    is_frame = isinstance(table, pandas.DataFrame)
    if is_frame:
        require_distinct(table.columns)
        named = [level for level in table.index.names if level is not None and level not in table.columns]
        table = table.reset_index(level=named) if named else table
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
    try:
        with panics_as_errors():
            return list(read())
    except Exception as error:
        columns = [(name, table[name].to_list) for name in getattr(table, "columns", ())]
        what = f"prompts{_unreadable_column(columns)} cannot be read: {describe_error(error)}"
        raise ValueError(what) from safe_cause(error)


def read_cells(table: Any, first: int = 0) -> list[Any]:
    """Return the rows of a pyarrow table, or the values of a pyarrow array.

    Raises:
        ValueError: A cell has no Python value, such as a date out of range; the message names its row and column.
    """
    try:
        return list(table.to_pylist())
    except Exception as whole:
        is_table = hasattr(table, "column_names")
        columns = zip(table.column_names, table.columns, strict=True) if is_table else [("values", table)]
        for name, column in columns:
            for row, cell in enumerate(column, first):
                try:
                    cell.as_py()
                except Exception as error:
                    what = f"row {row}, column {name!r}, of the type {column.type}"
                    raise ValueError(f"{what}, cannot be read: {describe_error(error)}") from None
        raise ValueError(f"a cell cannot be read: {describe_error(whole)}") from None


def read_dataset(table: Any, numbers: Sequence[int] | None = None) -> list[Any]:
    """Return the rows of a table of `datasets`, or the values of its column, as plain Python values.

    Args:
        table: A `Dataset`, an `IterableDataset`, or a column of one.
        numbers: The rows' numbers for an error, where the table is a selection.

    Raises:
        ValueError: A row cannot be read; the message names it.
    """
    plain = without_decoding(table)
    is_stream = not hasattr(getattr(plain, "source", plain), "num_rows")
    rows: list[Any] = []
    try:
        for row in plain:
            rows.append(row)
            if is_stream and len(rows) == _MANY:
                logger.warning(
                    "prompts=... is a stream, of which all rows are read into memory now: %d so far. Give "
                    "prompts=data.take(n), or a dataset of the Hub by DatasetConfig(name=..., streaming=True).",
                    _MANY,
                )
    except Exception as error:
        at = len(rows)
        row = at if numbers is None else numbers[at]
        has_cells = hasattr(plain, "num_rows") and plain.format["type"] is None  # no stream, transform or column
        names = plain.column_names if has_cells else ()
        columns = [(name, partial(plain.select_columns([name]).__getitem__, at)) for name in names]
        column = _unreadable_column(columns)
        raise ValueError(f"row {row}{column} cannot be read: {describe_error(error)}") from safe_cause(error)
    return rows


def _unreadable_column(columns: Iterable[tuple[Any, Callable[[], Any]]]) -> str:
    """Return `, column 'x'` for the first of the columns that cannot be read, or an empty text."""
    for name, read in columns:
        try:
            read()
        except BaseException:
            return f", column {name!r},"
    return ""


def without_decoding(table: Any) -> Any:
    """Return a table of `datasets` that gives plain Python values, with images and sounds as they are stored.

    A transform that the user set is kept, and so are the columns that a format chose.
    """
    if hasattr(table, "column_name"):  # a column
        return type(table)(without_decoding(table.source), table.column_name)
    chosen = getattr(table, "format", None) or {}
    if chosen.get("type") == "custom":
        return table
    options = {name: chosen[name] for name in ("columns", "output_all_columns") if name in chosen}
    table = table.with_format(None, **options)
    if table.features:
        features = type(table.features)({name: _undecoded(feature) for name, feature in table.features.items()})
        table = table.decode(False) if hasattr(table, "decode") else table  # a stream may decode in threads of its own
        table.info.features = features
    return table


def _undecoded(feature: Any) -> Any:
    """Return a copy of a feature of `datasets` that decodes no media, also inside of lists and dicts."""
    if isinstance(feature, dict):
        return {name: _undecoded(part) for name, part in feature.items()}
    if isinstance(feature, list | tuple):
        return [_undecoded(part) for part in feature]
    if hasattr(feature, "feature"):
        return replace(feature, feature=_undecoded(feature.feature))
    is_media = getattr(feature, "decode", False) and type(feature).__name__ != "Json"  # whose text is the value
    return replace(feature, decode=False) if is_media else feature


def _read_pyarrow(table: Any) -> list[Any]:
    read_whole = getattr(table, "read_all", None) or getattr(table, "to_table", None)  # a reader, or a dataset
    table = read_whole() if read_whole is not None else table
    if not hasattr(table, "to_pylist"):
        raise _not_rows(table)
    require_distinct(table.schema.names if hasattr(table, "schema") else ())
    return read_cells(table)


def _read_datasets(table: Any) -> list[Any]:
    if hasattr(table, "keys"):
        split = next(iter(table), "train") if "train" not in table else "train"
        raise ValueError(f"prompts holds the splits {', '.join(table)}: give one of them, prompts=data[{split!r}]")
    return read_dataset(table)


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
