"""An object -> bytes that another Python process can load without the user's files: their code is sent by value."""

import os
import sysconfig
from collections.abc import Iterable
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import cloudpickle

_INSTALLED = tuple(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def pickled_by_value(value: Any, modules: Iterable[ModuleType]) -> bytes:
    """Pickle an object, together with the code of those of the modules that are the user's own.

    Raises:
        Exception: Something in it cannot be pickled, such as an open file.
    """
    with ExitStack() as registered:
        for module in modules:
            if _is_the_users(module):
                cloudpickle.register_pickle_by_value(module)
                registered.callback(cloudpickle.unregister_pickle_by_value, module)
        return cloudpickle.dumps(value)


def _is_the_users(module: ModuleType) -> bool:
    """True for a module of the user's own, which is not installed and not part of konic."""
    file = getattr(module, "__file__", None)
    if module.__name__ == "__main__" or module.__name__.split(".")[0] == "konic" or not isinstance(file, str):
        return False
    path = os.path.abspath(file)
    is_in_packages = {"site-packages", "dist-packages"} & set(path.split(os.sep))
    return not is_in_packages and not path.startswith(_INSTALLED)
