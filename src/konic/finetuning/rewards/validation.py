"""Checks of what a composer is given: weights, a reducer, the price of KL."""

from collections.abc import Mapping
from typing import Any

from konic.finetuning.errors import ConfigError, RewardError
from konic.finetuning.rewards.marks import is_finite_number


def check_reducer(kind: type, reducer: Any) -> None:
    """Raise RewardError unless the reducer of a composer's class has a method `reduce`."""
    if not callable(getattr(reducer, "reduce", None)):
        raise RewardError(
            f"{kind.__name__}.reducer has no method reduce(parts): {reducer!r}. A reducer is a class or an object with "
            "this method, which makes one number of a dict of values, such as MeanReducer."
        )


def checked_weights(weights: Any) -> dict[str, float]:
    """Return weights by name; raise ConfigError unless all are finite numbers."""
    if not isinstance(weights, Mapping):
        raise ConfigError(f"reward_weights must be a dict of numbers by reward name, got {weights!r}.")
    for name, weight in weights.items():
        if not is_finite_number(weight):
            raise ConfigError(f"reward_weights[{str(name)!r}] must be a finite number, got {weight!r}.")
    return {str(name): float(weight) for name, weight in weights.items()}


def check_kl_penalty_weight(weight: Any) -> None:
    """Raise ConfigError unless the weight is None or a number of at least 0."""
    if weight is not None and (not is_finite_number(weight) or weight < 0):
        raise ConfigError(f"kl_penalty_weight must be a number of at least 0, got {weight!r}.")
