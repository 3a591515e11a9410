"""A source's name -> rows: reads files, the bundled prompts, and datasets from the Hugging Face Hub."""

import contextlib
import json
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet

from konic.finetuning.errors import DatasetError, explain_hub_error
from konic.finetuning.system.files import as_path

BUNDLED_SPLITS = {"train": "movie_reviews_train.txt", "held_out": "movie_reviews_held_out.txt"}
STREAM_BUFFER = 10_000
"""Buffer size, in rows, from which a shuffled stream draws its next row."""
_ROW_NUMBER = "__konic_row_number"


def read_bundled(split: str) -> list[Any]:
    """Return the bundled prompts of a split, in order."""
    text = files("konic.finetuning.data").joinpath("bundled", BUNDLED_SPLITS[split]).read_text(encoding="utf-8")
    return [{"prompt": line} for line in text.splitlines()]


def read_local(name: str, *text_columns: str) -> list[Any]:
    """Return the rows of a csv, json, jsonl, parquet or txt file, or of a folder that holds one kind of these files.

    A csv file does not declare types: its `text_columns` are read as text, even where a value looks like a number.

    Raises:
        DatasetError: The path does not exist, the folder holds several kinds of files, or a file cannot be read in the
            format of its extension.
    """
    path = as_path(name, "DatasetConfig(name)", DatasetError)
    if not path.exists():
        raise DatasetError(f"Dataset {name!r}: there is no such file or folder: {str(path.absolute())!r}.")
    paths = sorted(file for file in path.iterdir() if not file.name.startswith(".")) if path.is_dir() else [path]
    suffixes = {file.suffix.lower() for file in paths}
    if len(suffixes) != 1 or not suffixes <= _READERS.keys():
        raise DatasetError(
            f"Dataset {name!r}: expected one kind of file (one of {', '.join(_READERS)}), found "
            f"{', '.join(sorted(suffixes)) or 'nothing'}."
        )
    suffix = suffixes.pop()
    try:
        rows = []
        for file in paths:
            rows += _READERS[suffix](file, text_columns)
        return rows
    except (OSError, ValueError, UnicodeError, RecursionError) as error:
        where = f", in {file.name!r}," if path.is_dir() else ""
        reason = str(error).rstrip(".")
        fix = (
            "Save it as UTF-8."
            if "utf" in reason.lower()
            else "Fix the file, or rename it with the extension of its real format."
        )
        raise DatasetError(f"Dataset {name!r}{where} cannot be read as {suffix[1:]}: {reason}. {fix}") from None


def read_hub(
    name: str, subset: str | None, split: str, revision: str | None, token: str | None, streaming: bool
) -> Any:
    """Load a Hub dataset: a `datasets.Dataset`, or with `streaming` an `IterableDataset` that reads rows when needed.

    Current versions of `datasets` require `namespace/name`. A bare name such as `imdb` is resolved to that form first.

    Raises:
        DatasetError: The Hub cannot be reached, the name is wrong, the dataset is gated and there is no token, the
            subset or split does not exist, or the download was interrupted.
    """
    import datasets

    bars_were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        identity = name if "/" in name else _canonical_id(name, token)
        return datasets.load_dataset(identity, subset, split=split, revision=revision, token=token, streaming=streaming)
    except Exception as error:
        raise DatasetError(_hub_failed(name, subset, split, error)) from error
    finally:
        if bars_were_on:
            datasets.enable_progress_bars()


def stream_rows(dataset: Any, shuffle_seed: int | None, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number in the dataset, row) of a stream; with a seed, drawn at random from the next 10,000 rows."""
    numbered = dataset.map(lambda row, index: {**row, _ROW_NUMBER: index}, with_indices=True)
    if shuffle_seed is not None:
        numbered = numbered.shuffle(seed=shuffle_seed, buffer_size=STREAM_BUFFER)
    rows = iter(numbered)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            what = explain_hub_error(error, "DatasetConfig(token=...)", "DatasetConfig(source=DatasetSource.BUNDLED)")
            raise DatasetError(f"{where}, during streaming: {what}") from error
        yield row.pop(_ROW_NUMBER), row


def _hub_failed(name: str, subset: str | None, split: str, error: BaseException) -> str:
    what = explain_hub_error(error, "DatasetConfig(token=...)", "DatasetConfig(source=DatasetSource.BUNDLED)")
    asked = f"split {split!r}" if subset is None else f"subset {subset!r}, split {split!r}"
    return f"Dataset {name!r} on the Hub ({asked}): {what}"


def _canonical_id(name: str, token: str | None) -> str:
    """Return `namespace/name` for a name without a namespace, from the Hub, or when offline from the Hub cache."""
    import huggingface_hub

    if not huggingface_hub.constants.is_offline_mode():
        return huggingface_hub.HfApi().dataset_info(name, token=token).id
    with contextlib.suppress(huggingface_hub.errors.CacheNotFound):
        repos = huggingface_hub.scan_cache_dir().repos
        cached = [repo.repo_id for repo in repos if repo.repo_type == "dataset" and repo.repo_id.endswith(f"/{name}")]
        if len(cached) == 1:
            return cached[0]
    return name


def _read_csv(path: Path, text_columns: tuple[str, ...]) -> list[Any]:
    table = pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(text_columns, pyarrow.string())),
    )
    repeated = {name for name in table.column_names if table.column_names.count(name) > 1}
    if repeated:
        raise ValueError(f"more than one column is named {', '.join(map(repr, sorted(repeated)))}")
    return table.to_pylist()


def _read_json(path: Path, text_columns: tuple[str, ...]) -> list[Any]:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError(f"the top level is a {type(rows).__name__}, not a list of rows")
    return rows


def _read_jsonl(path: Path, text_columns: tuple[str, ...]) -> list[Any]:
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from None
    return rows


def _read_parquet(path: Path, text_columns: tuple[str, ...]) -> list[Any]:
    return pyarrow.parquet.read_table(path).to_pylist()


def _read_txt(path: Path, text_columns: tuple[str, ...]) -> list[Any]:
    names = {"text"} | ({"prompt"} & set(text_columns))  # `prompt` is the default prompt column
    return [dict.fromkeys(names, line) for line in _lines(path)]


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file. Only a newline ends a line: text may hold the other Unicode line separators."""
    text = path.read_text(encoding="utf-8-sig").removesuffix("\n")
    return text.split("\n") if text else []


_READERS: dict[str, Callable[[Path, tuple[str, ...]], list[Any]]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
