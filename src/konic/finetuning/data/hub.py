"""Datasets of the Hugging Face Hub -> their tables, loaded whole or streamed."""

import contextlib
import itertools
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from konic.finetuning.data.rows import without_decoding
from konic.finetuning.errors import DatasetError
from konic.finetuning.hub import explain_hub_error, hub_cause, hub_or_cache
from konic.finetuning.system.places import is_file_name

STREAM_BUFFER = 10_000
"""Buffer size, in rows, from which a shuffled stream draws its next row."""
_SHARDS_AT_ONCE = 10
"""Of a shuffled stream: datasets are often sorted, so one file's rows may be alike."""


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

    if is_file_name(name) or Path(name).exists():  # `datasets` would read the folder
        raise DatasetError(
            f"Dataset {name!r} is a file or folder here, or is named like one, so the Hub is not asked for it. Use "
            "DatasetSource.LOCAL, or the dataset's name on the Hub."
        )
    bars_were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with hub_or_cache(name):
            identity = name if "/" in name else _canonical_id(name, token)
            settings = {"split": split, "revision": revision, "token": token, "streaming": streaming}
            return datasets.load_dataset(identity, subset, **settings)
    except Exception as error:
        raise DatasetError(_hub_failed(name, subset, split, error)) from hub_cause(error, name)
    finally:
        if bars_were_on:
            datasets.enable_progress_bars()


def stream_rows(dataset: Any, shuffle_seed: int | None, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number in the dataset, row) of a stream; with a seed, drawn at random from the next 10,000 rows.

    With a seed, the files of a dataset are numbered in turns, so that a row has the same number with every seed.
    """
    stream = without_decoding(dataset)
    rows = enumerate(stream) if shuffle_seed is None else _shuffled(stream, np.random.default_rng(shuffle_seed))
    while True:
        try:
            number, row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            what = explain_hub_error(error, "DatasetConfig(token=...)", "DatasetConfig(source=DatasetSource.BUNDLED)")
            raise DatasetError(f"{where}, during streaming: {what}") from hub_cause(error)
        yield number, row


def _shuffled(stream: Any, generator: np.random.Generator) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield numbered rows from a buffer that is filled from several shards in turns, which come in a random order."""
    count = stream.num_shards
    buffer: list[tuple[int, dict[str, Any]]] = []
    order = generator.permutation(count).tolist()
    numbered = (zip(itertools.count(shard, count), stream.shard(count, shard), strict=False) for shard in order)
    turns = deque(itertools.islice(numbered, _SHARDS_AT_ONCE))
    while turns or buffer:
        if turns and len(buffer) < STREAM_BUFFER:
            row = next(turns[0], None)
            if row is None:
                turns.popleft()
                turns.extend(itertools.islice(numbered, 1))
            else:
                buffer.append(row)
                turns.rotate(-1)
        else:
            drawn = int(generator.integers(len(buffer)))
            buffer[drawn], buffer[-1] = buffer[-1], buffer[drawn]
            yield buffer.pop()


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
