"""Checks of what a composer is given: a reducer, the price of KL."""

import inspect
from typing import Any

from konic.finetuning.errors import ConfigError, RewardError
from konic.finetuning.rewards.marks import is_finite_number
from konic.finetuning.rewards.reducers import REDUCERS, takes_weights
from konic.finetuning.settings import MAX_PENALTY
from konic.text import describe_error


def check_reducer(kind: type, reducer: Any) -> None:
    """Raise RewardError unless the reducer of a composer's class can be called as a composer calls it."""
    who, advice = f"{kind.__name__}.reducer", "A reducer is a class or an object with a method reduce(parts)"
    reduce = getattr(reducer, "reduce", None)
    if not callable(reduce):
        raise RewardError(
            f"{who} has no method reduce(parts): {reducer!r}. {advice}, which makes one number of a dict of values, "
            f"such as MeanReducer. By name, as in YAML: {', '.join(REDUCERS)}."
        )
    if inspect.iscoroutinefunction(reduce):
        raise RewardError(f"{who}: {reducer!r} has an async method reduce. It must be a plain one.")
    is_class = isinstance(reducer, type)
    name = (reducer if is_class else type(reducer)).__name__
    try:
        if is_class:
            inspect.signature(reducer).bind(**({"weights": {}} if takes_weights(reducer) else {}))
        is_bound = not is_class or isinstance(inspect.getattr_static(reducer, "reduce"), staticmethod | classmethod)
        inspect.signature(reduce).bind(*([{}] if is_bound else [None, {}]))
    except TypeError as error:
        raise RewardError(
            f"Reducer {name!r} cannot be called as {who}: {describe_error(error)}. {advice}. Its class is "
            "called without arguments, or with weights= if it has this parameter."
        ) from None
    except ValueError:  # no signature can be read, as of a class written in C
        return


def check_kl_penalty_weight(weight: Any) -> None:
    """Raise ConfigError unless the weight is None or a number of at least 0 and at most 1e15."""
    if weight is not None and not (is_finite_number(weight) and 0 <= weight <= MAX_PENALTY):
        raise ConfigError(f"kl_penalty_weight must be a number from 0 to {MAX_PENALTY:g}, got {weight!r}.")
