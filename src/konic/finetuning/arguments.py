"""Arguments of the engine's methods -> errors that name the known ones and their bounds."""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

from konic.finetuning.errors import ConfigError, did_you_mean

P = ParamSpec("P")
R = TypeVar("R")


_OTHER_NAMES = {
    "base_model": "model_name", "model": "model_name", "output_dir": "checkpoint_dir", "output": "checkpoint_dir",
    "save_dir": "checkpoint_dir", "callbacks": "callback", "num_iterations": "max_iterations",
    "max_steps": "max_iterations", "save_steps": "save_every",
    "resume": "resume_from_checkpoint",
}  # fmt: skip
"""What other libraries, or konic in another place, call an argument."""


def refuse_unknown(names: Iterable[str], where: str, known: Sequence[str]) -> None:
    """Raise ConfigError for a name that is no argument."""
    for name in names:
        if name not in known:
            other = _OTHER_NAMES.get(name)
            hint = f" Here it is {other}." if other in known else did_you_mean(name, known)
            raise ConfigError(f"{where} has no argument {name!r}.{hint} It has: {', '.join(known)}.")


def with_known_arguments(method: Callable[P, R]) -> Callable[P, R]:
    """Let a method refuse an unknown argument with a ConfigError that names the known ones.

    For `__init__` it names the class instead.
    """
    known = list(inspect.signature(method).parameters)[1:]
    where = method.__qualname__.removesuffix(".__init__").rpartition(".")[2]

    @functools.wraps(method)
    def call(*values: P.args, **named: P.kwargs) -> R:
        refuse_unknown(named, where, known)
        return method(*values, **named)

    return call


def check_counts(max_iterations: Any, **others: Any) -> None:
    """Raise ConfigError for an argument of `train` that is no whole number of at least 0, or is below its least."""
    for name, value in {"max_iterations": max_iterations, **others}.items():
        if value is not None or name == "max_iterations":
            require_count("train", name, value, least=1 if name == "save_total_limit" else 0)


def require_count(where: str, name: str, value: Any, least: int) -> None:
    """Raise ConfigError for an argument that is no whole number, or is below its least; True is no number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{where}({name}={value!r}): it must be a whole number of at least {least}.")


def require_flags(where: str, **flags: Any) -> None:
    """Raise ConfigError for an argument that is neither True nor False: the text "false" would count as True."""
    for name, value in flags.items():
        if value not in (True, False):
            raise ConfigError(f"{where}({name}={value!r}): it must be True or False.")
