"""This Python -> the environment of a process that does a stranger's work: the same modules, and no access tokens."""

import os
import sys

_KEPT = ("PATH", "HOME", "PYTHONHOME", "LD_LIBRARY_PATH", "SYSTEMROOT", "TZ", "LANG", "LC_ALL", "LC_TIME")


def child_environment() -> dict[str, str]:
    """Return the few variables that such a process needs. It asks the Hub for nothing and has one thread for sums."""
    own = {name: os.environ[name] for name in _KEPT if name in os.environ}
    modules = os.pathsep.join(filter(None, sys.path))
    return own | {"PYTHONPATH": modules, "HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1"}
