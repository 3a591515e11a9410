"""Freed memory -> the operating system: makes glibc return the memory that it keeps.

The C library keeps freed memory, in pieces that seldom fit an aligned tensor again. glibc returns a block at once only
above a threshold, which is at most 32 MB. With another C library these functions do nothing.
"""

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_M_MMAP_THRESHOLD = -3
_LARGEST_THRESHOLD = 32 * 2**20
SMALLEST_BLOCK = 2**20
"""Bytes. :func:`eager_free` returns blocks of at least this size at once; each then costs its page faults again."""


def return_freed_memory() -> None:
    """Return to the system the freed memory that glibc keeps: after packing, that is most of a copy of the weights."""
    trim = _c_library("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def eager_free(on: bool) -> Iterator[None]:
    """Return freed tensors to the system at once inside the block.

    That is slower by a third, but no memory is lost in gaps between tensors.
    """
    set_option = _c_library("mallopt") if on else None
    if set_option is None:
        yield
        return
    set_option(_M_MMAP_THRESHOLD, SMALLEST_BLOCK)
    try:
        yield
    finally:
        set_option(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        return_freed_memory()


def available_memory() -> int | None:
    """Return the bytes of memory that programs may still take; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", lines)
    return int(found[1]) * 1024 if found else None


def _c_library(name: str) -> Any | None:
    """Return a function of glibc; None if another C library is in use."""
    found = getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
    return found if found is None or hasattr(ctypes.CDLL(None), "malloc_trim") else None
