"""What the C library does with freed memory: it keeps it, in pieces that aligned tensors seldom fit again.

glibc gives back at once only blocks above a threshold, 32 MB at most. With another C library nothing is done here.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_M_MMAP_THRESHOLD = -3
_LARGEST_THRESHOLD = 32 * 2**20
SMALLEST_BLOCK = 2**20
"""Bytes from which on blocks go back at once under :func:`eager_free`; each then costs its page faults again."""


def return_freed_memory() -> None:
    """Give the system back what is kept of freed memory: after packing, most of a copy of the weights."""
    trim = _c_library("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def eager_free(on: bool) -> Iterator[None]:
    """Within it freed tensors go back to the system at once: slower by a third, without memory lost between them."""
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


def _c_library(name: str) -> Any | None:
    """A function of glibc's; None where another library is in its place."""
    found = getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
    return found if found is None or hasattr(ctypes.CDLL(None), "malloc_trim") else None
