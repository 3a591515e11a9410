"""This Python -> other Pythons that it starts: what they import, and what they know of the environment."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import util

_KEPT = ("PATH", "HOME", "PYTHONHOME", "LD_LIBRARY_PATH", "SYSTEMROOT", "TZ", "LANG", "LC_ALL", "LC_TIME")


def child_environment() -> dict[str, str]:
    """Return the few variables that a process needs which does a stranger's work: the modules and no access tokens.

    It asks the Hub for nothing, and has one thread for sums.
    """
    own = {name: os.environ[name] for name in _KEPT if name in os.environ}
    modules = os.pathsep.join(filter(None, sys.path))
    return own | {"PYTHONPATH": modules, "HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1"}


@contextmanager
def importing_nothing_from_here() -> Iterator[None]:
    """Within it, a process that `multiprocessing` starts takes Python's own modules, whatever the current folder holds.

    Afterwards it has the `sys.path` of this process, as always.
    """
    flags = util._args_from_interpreter_flags  # type: ignore[attr-defined]
    util._args_from_interpreter_flags = lambda: [*flags(), "-P"]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        util._args_from_interpreter_flags = flags  # type: ignore[attr-defined]
