"""An object -> bytes that another Python process can load without the user's files: their code is sent by value."""

import functools
import inspect
import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import cloudpickle

from konic.finetuning.system.places import INSTALLED

_Cached = type(functools.cache(lambda: None))


def pickled_by_value(value: Any, modules: Iterable[ModuleType]) -> bytes:
    """Pickle an object, together with the code of those of the modules that are the user's own.

    Raises:
        Exception: Something in it cannot be pickled, such as an open file.
    """
    names: set[str] = set()
    with ExitStack() as registered:
        for module in modules:
            if _is_the_users(module):
                cloudpickle.register_pickle_by_value(module)
                registered.callback(cloudpickle.unregister_pickle_by_value, module)
                names.add(module.__name__)
        buffer = io.BytesIO()
        _Pickler(buffer, names).dump(value)
        return buffer.getvalue()


def what_cannot_be_pickled(value: Any, modules: Iterable[ModuleType]) -> str:
    """Return what keeps an object from being pickled: an attribute, or a name that a method uses; "" if unknown."""
    parts = [(f"its attribute {name!r}", part) for name, part in getattr(value, "__dict__", {}).items()]
    for name, method in inspect.getmembers(type(value), inspect.isfunction):
        try:
            used = inspect.getclosurevars(inspect.unwrap(method))
        except ValueError:  # it uses a name that has no value yet
            continue
        parts += [
            (f"{other!r}, which {name!r} uses", part)
            for other, part in {**used.globals, **used.nonlocals}.items()
            if part is not type(value)
        ]
    modules = list(modules)
    for words, part in parts:
        try:
            pickled_by_value(part, modules)
        except Exception:
            return words
    return ""


def own_paths() -> list[str]:
    """The folders of `sys.path` that hold neither Python's modules nor installed packages."""
    folders = (os.path.abspath(path) for path in sys.path if os.path.isdir(path))
    return [path for path in folders if not f"{path}{os.sep}".startswith(INSTALLED)]


class _Pickler(cloudpickle.Pickler):
    """Sends `functools.cache` and `lru_cache` functions by value as well, with an empty cache."""

    def __init__(self, file: io.BytesIO, modules: Iterable[str]) -> None:
        super().__init__(file)
        self._modules = {"__main__", *modules}

    def reducer_override(self, obj: Any) -> Any:
        """Return how an object is made again."""
        if isinstance(obj, _Cached) and getattr(obj, "__module__", None) in self._modules:
            return _cached, (obj.__wrapped__, obj.cache_parameters())
        return super().reducer_override(obj)


def _cached(function: Callable[..., Any], parameters: Mapping[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def _is_the_users(module: ModuleType) -> bool:
    """True for a module of the user's own, which is not installed and not part of konic."""
    file = getattr(module, "__file__", None)
    if module.__name__ == "__main__" or module.__name__.split(".")[0] == "konic" or not isinstance(file, str):
        return False
    path = os.path.abspath(file)
    is_in_packages = {"site-packages", "dist-packages"} & set(path.split(os.sep))
    return not is_in_packages and not path.startswith(INSTALLED)
