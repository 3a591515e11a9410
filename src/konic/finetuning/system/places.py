"""Names, links and files -> where they lead: what others made may not point outside of the folder that was named."""

import json
import os
import re
import stat
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

_FILE_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        "7z arrow bin bz2 ckpt csv db doc docx feather ggml gguf gz h5 html ini ipynb json jsonl log md ndjson npy npz "
        "ods onnx orc parquet pdf pickle pkl pt pth py safetensors sqlite tar tgz toml tsv txt xls xlsx xml xz yaml "
        "yml zip zst"
    ).split()
)
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
INSTALLED = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")})
"""Folders of Python's modules and of installed packages."""
_OF_A_RUN = re.compile(r"final|best|checkpoint-\d+|earlier-\d+")
"""Folders that a run writes."""


def current_folder() -> str | None:
    """Return the path of the current folder; None if it was removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def is_url(place: Any) -> bool:
    """Return True for text such as `s3://bucket/run`; a Path has lost one of the slashes, and counts too."""
    return isinstance(place, str | os.PathLike) and _URL.match(str(place)) is not None


def is_file_name(name: str) -> bool:
    """Return True for a name with the extension of a file, such as `clients/acme.csv`."""
    return Path(name).suffix.lower() in _FILE_SUFFIXES


def looks_like_path(name: str) -> bool:
    """Return True for a name that is meant as a path, existing or not; the Hub is never asked for it.

    Such are `./rows`, `a/b/c`, `clients/acme.csv`, `runs/final`, and a name below a file or folder that exists.
    """
    parts = Path(name).parts
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or len(parts) > 2
        or is_file_name(name)
        or parts[0] == "runs"
        or _OF_A_RUN.fullmatch(parts[-1]) is not None
        or (len(parts) == 2 and os.path.lexists(parts[0]))
    )


def find_stray(paths: Iterable[Path], folder: Path) -> str | None:
    """Return what is wrong with the first path that is not a regular file inside `folder`, or None.

    `folder` itself may be reached through links. A snapshot of the Hub's cache may link to the blobs beside it.
    """
    root = folder.resolve()
    roots = [root, *(parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots")]
    for path in paths:
        try:
            target = path.resolve(strict=True)
            is_file = stat.S_ISREG(target.stat().st_mode)
        except (OSError, RuntimeError) as error:
            return f"{path.name} cannot be read: {getattr(error, 'strerror', None) or error}"
        if not any(target.is_relative_to(place) for place in roots):
            return f"{path.name} leads to {target}, which is outside of the folder. Replace the link with the file"
        if not is_file:
            return f"{path.name} is not a regular file"
    return None


LARGEST_RECORD = 200 * 10**6
"""Bytes of a file of settings or records, which is read as a whole."""


def read_regular(path: Path) -> bytes:
    """Return the bytes of a regular file of settings or records.

    Raises:
        OSError: The file cannot be read, is not a regular file, or is larger than any such file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_RECORD:
            raise OSError(f"{path.name} has {size / 1e6:.0f} MB, more than the {LARGEST_RECORD / 1e6:.0f} MB allowed")
        return file.read()


DEEPEST_RECORD = 50
"""Levels of a record in JSON; what walks through it calls itself once or twice for each of them."""


def read_json(path: Path) -> Any:
    """Return what a regular file of settings or records says in JSON.

    Raises:
        OSError: As :func:`read_regular`.
        ValueError: It is not JSON, or is nested too deep.
    """
    too_deep = ValueError(f"it is nested more than {DEEPEST_RECORD} deep")
    try:
        value = json.loads(read_regular(path))
    except RecursionError:
        raise too_deep from None
    if _is_deeper(value, DEEPEST_RECORD):
        raise too_deep
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return parts is not None and (levels == 0 or any(_is_deeper(part, levels - 1) for part in parts))


def open_no_link(path: str, flags: int) -> int:
    """Open a file as `open(..., opener=)` asks; a link in its place is an OSError, and is not followed."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def open_regular(path: Path) -> BinaryIO:
    """Return an open regular file. A pipe or a device, which may never end, is not opened for reading.

    Raises:
        OSError: The file cannot be read, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name} is not a regular file")
    return os.fdopen(descriptor, "rb")
