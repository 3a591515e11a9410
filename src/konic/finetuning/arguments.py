"""Arguments of the engine's methods -> errors that name the known ones and their bounds."""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

from konic.finetuning.errors import ConfigError, did_you_mean

P = ParamSpec("P")
R = TypeVar("R")


def refuse_unknown(names: Iterable[str], where: str, known: Sequence[str]) -> None:
    """Raise ConfigError for a name that is no argument."""
    for name in names:
        if name not in known:
            hint = " Here it is model_name." if name in ("base_model", "model") else did_you_mean(name, known)
            raise ConfigError(f"{where} has no argument {name!r}.{hint} It has: {', '.join(known)}.")


def with_known_arguments(method: Callable[P, R]) -> Callable[P, R]:
    """Let a method refuse an unknown argument with a ConfigError that names the known ones."""
    known = list(inspect.signature(method).parameters)[1:]

    @functools.wraps(method)
    def call(*values: P.args, **named: P.kwargs) -> R:
        refuse_unknown(named, method.__name__, known)
        return method(*values, **named)

    return call


def check_counts(max_iterations: Any, **others: Any) -> None:
    """Raise ConfigError for an argument of `train` that is no whole number of at least 0, or is below its least."""
    for name, value in {"max_iterations": max_iterations, **others}.items():
        least = 1 if name == "save_total_limit" else 0
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not is_count and (value is not None or name == "max_iterations"):
            raise ConfigError(f"train({name}={value!r}): it must be a whole number of at least {least}.")
