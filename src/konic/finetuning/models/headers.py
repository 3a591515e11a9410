"""Files of a model -> their headers, checked before anything is built: how many weights there can be at most.

Names, shapes and sizes in the files of a stranger are claims. Each is compared with the size of its file.
"""

import json
import math
import os
import re
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch.nn.modules import module as torch_modules
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from konic.finetuning.errors import ModelError
from konic.text import describe_error

_LARGEST_COUNT = 100_000
"""Of layers, heads, experts or labels in a config."""
_LARGEST_JSON = 50 * 2**20
_LARGEST_HEADER = 25 * 2**20
"""Bytes of a safetensors file. 100,000 tensors take about 12 MB."""
_MAX_BUFFER_BYTES = 2**29
_COUNTS = re.compile(r"(layers?|labels|experts?|heads?|blocks)$")


@dataclass(frozen=True)
class Header:
    """How many tensors and elements the weights of a model have at most."""

    num_tensors: int
    num_elements: int


@contextmanager
def bounded_by_files(location: str, asked: str, model_kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Within it, raise ModelError when `from_pretrained` builds a far larger model than its files hold.

    Args:
        location: A folder or a Hub id.
        asked: The user's setting as messages show it, such as `base_model='gpt2'`.
        model_kwargs: Arguments of `from_pretrained`, for the Hub.

    Raises:
        ModelError: The model is too large, or a number in config.json is, for any model.
        SafetensorError: A header does not agree with its file.
    """
    try:
        header = _read_header(location, model_kwargs)
    except ModelError as error:
        raise ModelError(f"{asked}: {error}") from None
    with weights_within(header, f"{asked}: config.json"):
        yield


def _read_header(location: str, kwargs: Mapping[str, Any]) -> Header | None:
    """Return what the safetensors files hold; None if there are none, which `from_pretrained` explains."""
    path = find_file("config.json", location, kwargs)
    config = _read_json(path) if path is not None else {}
    if not isinstance(config, dict):
        return None
    _check_counts(config, "config.json")
    named = config.get("transformers_weights")
    files = _weight_files(named if isinstance(named, str) else None, location, kwargs)
    header = safetensors_header(files)
    if config.get("quantization_config"):  # several weights may be packed into one element
        header = Header(header.num_tensors, 8 * sum(file.stat().st_size for file in files))
    return header if files else None


def find_file(name: str, location: str, kwargs: Mapping[str, Any]) -> Path | None:
    """Return a file of a folder or of a repository of the Hub; None if there is none."""
    if Path(location).is_dir():
        return path if (path := Path(location) / name).is_file() else None
    options = {key: kwargs[key] for key in ("revision", "token") if key in kwargs}
    found = cached_file(location, name, _raise_exceptions_for_missing_entries=False, **options)
    return Path(found) if found else None


def _weight_files(named: str | None, location: str, kwargs: Mapping[str, Any]) -> list[Path]:
    """Return the files of weights that `from_pretrained` reads: the one that config.json names, if it names one."""
    first, *others = [named] if named else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    found = find_file(first, location, kwargs) or (others and find_file(others[0], location, kwargs))
    if not found or found.suffix != ".json":
        return [found] if found else []
    index = _read_json(found)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict):
        raise ModelError(f"{found.name} has no 'weight_map', which says where each weight is. Copy the model again.")
    names = sorted(set(map(str, files.values())))
    shards = [find_file(name, location, kwargs) for name in names]
    return [path for path in shards if path is not None]


def _read_json(path: Path) -> Any:
    if path.stat().st_size > _LARGEST_JSON:
        raise ModelError(f"{path.name} has {path.stat().st_size / 1e6:.0f} MB, which no settings of a model need.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is damaged: {describe_error(error)}. Copy the model again.") from None


def _check_counts(value: Any, where: str) -> None:
    for name, part in value.items() if isinstance(value, dict) else ():
        if isinstance(part, int | float) and _COUNTS.search(name) and part > _LARGEST_COUNT:
            raise ModelError(f"{where}: {name}={part} is more than {_LARGEST_COUNT}, which no model has.")
        _check_counts(part, f"{where}: {name}")


def safetensors_header(files: Sequence[Path]) -> Header:
    """Return what safetensors files hold. The library checks each header against the size of its file.

    Raises:
        SafetensorError: A header does not agree with its file.
    """
    shapes = []
    for file in files:
        _check_header_size(file)
        with safe_open(file, framework="pt") as weights:
            shapes += [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 - not a dict
    return Header(len(shapes), sum(map(math.prod, shapes)))


def _check_header_size(file: Path) -> None:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
    if _LARGEST_HEADER < size <= file.stat().st_size:  # otherwise the library says what is wrong
        raise ModelError(f"{file.name}: its header has {size / 1e6:.0f} MB, which no list of weights needs.")


ONE_AT_A_TIME = threading.RLock()
"""Held while a model is loaded: `from_pretrained` replaces methods of the model classes and settings of the process
while it runs, and two at once would leave them replaced."""


@contextmanager
def weights_within(header: Header | None, files: str) -> Iterator[None]:
    """Within it, raise ModelError when a model is built that needs more weights than its files hold.

    A model may be built with three times the elements, because tied weights are built apart and layers to quantise are
    built again, and with a small head of its own; its parts may be saved as fewer tensors.
    """
    if header is None:
        yield
        return
    sizes = {"tensors": 0, "elements": 0, "buffer bytes": 0}
    most = {
        "tensors": 1000 + 4 * header.num_tensors,
        "elements": 2**22 + 3 * header.num_elements,
        "buffer bytes": _MAX_BUFFER_BYTES,
    }

    def count(kind: str, size: int) -> None:
        sizes[kind] += size
        if sizes[kind] > most[kind]:
            raise ModelError(
                f"{files}: the config describes a far larger model than the weights, which have {header.num_tensors} "
                f"tensors with {header.num_elements} elements. Use the config and the weights of the same model."
            )

    def parameter(module: torch.nn.Module, name: str, weight: torch.nn.Parameter) -> None:
        if module._parameters.get(name) is None:  # not one that takes the place of another
            count("tensors", 1)
            count("elements", weight.numel())

    def buffer(module: torch.nn.Module, name: str, values: torch.Tensor | None) -> None:
        if module._buffers.get(name) is None and values is not None:
            count("buffer bytes", values.numel() * values.element_size())

    with ONE_AT_A_TIME:  # the hooks count what any thread builds
        hooks = (
            torch_modules.register_module_parameter_registration_hook(parameter),
            torch_modules.register_module_buffer_registration_hook(buffer),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


# --- GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md ---

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of each type of value."""
_STRING, _ARRAY = 8, 9
_MOST_VALUES = 4_000_000
"""In all arrays of a file. A vocabulary of 262,144 tokens needs about 1.5 million."""


def gguf_header(file: Path) -> Header:
    """Return what a GGUF file holds, after checking that every count and size in its header fits into the file.

    Raises:
        ModelError: A count or size does not fit, or the file is of another format.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    with file.open("rb") as stream:
        reader = _GgufReader(stream, file)
        if stream.read(4) != b"GGUF":
            raise reader.failed("it does not begin with GGUF")
        version, num_tensors, num_values = reader.number("I"), reader.number("Q"), reader.number("Q")
        if version not in (2, 3):
            raise reader.failed(f"version {version} cannot be read, only 2 and 3")
        for _ in range(reader.fitting(num_values, 13, "values")):
            reader.skip_string()
            reader.skip_value(reader.number("I"))
        num_elements = num_bytes = 0
        for _ in range(reader.fitting(num_tensors, 24, "tensors")):
            reader.skip_string()
            shape = [reader.number("Q") for _ in range(reader.fitting(reader.number("I"), 8, "dimensions"))]
            kind = reader.number("I")
            reader.number("Q")
            if kind not in {known.value for known in GGMLQuantizationType}:
                raise reader.failed(f"a tensor has the unknown type {kind}")
            per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            num_elements += math.prod(shape)
            num_bytes += math.prod(shape) // per_block * block_bytes
        reader.fitting(num_bytes, 1, "bytes of tensors")
    return Header(num_tensors, num_elements)


class _GgufReader:
    """Reads the header of a GGUF file, and nothing past the end of the file."""

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        self._stream, self._file, self._size = stream, file, file.stat().st_size
        self._num_values = 0

    def failed(self, what: str) -> ModelError:
        return ModelError(f"{self._file}: is not a complete GGUF file: {what}. Download it again, or use another.")

    def fitting(self, count: int, size: int, what: str) -> int:
        """Return a count of things of at least `size` bytes each, for which the file has room."""
        if count * size > self._size - self._stream.tell():
            raise self.failed(f"its header claims {count} {what}, more than the file of {self._size} bytes can hold")
        return count

    def number(self, code: str) -> int:
        data = self._stream.read(struct.calcsize(code))
        if len(data) < struct.calcsize(code):
            raise self.failed("it ends within its header")
        return int(struct.unpack(f"<{code}", data)[0])

    def skip_string(self) -> None:
        self._skip(self.number("Q"), 1, "bytes of text")

    def _skip(self, count: int, size: int, what: str) -> None:
        self._stream.seek(self.fitting(count, size, what) * size, os.SEEK_CUR)

    def skip_value(self, kind: int, depth: int = 0) -> None:
        if kind == _STRING:
            self.skip_string()
        elif kind == _ARRAY and depth == 0:
            kind, count = self.number("I"), self.number("Q")
            self._num_values += count
            self.fitting(count, _SIZES.get(kind, 8), "values in a list")
            if self._num_values > _MOST_VALUES:
                raise self.failed(f"its lists hold more than {_MOST_VALUES} values")
            if kind in _SIZES:
                self._skip(count, _SIZES[kind], "values")
                return
            for _ in range(count):
                self.skip_value(kind, depth + 1)
        elif kind in _SIZES:
            self._skip(1, _SIZES[kind], "values")
        else:
            raise self.failed(f"a value has the unknown type {kind}")
