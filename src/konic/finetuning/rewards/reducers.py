"""A sample's parts and their weights -> one reward: their sum, mean or maximum."""

import inspect
import math
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

from konic.finetuning.errors import ConfigError
from konic.finetuning.rewards.marks import checked_weights, is_finite_number
from konic.finetuning.rewards.named_parts import NamedParts


class Reducer(Protocol):
    """Reduces a sample's parts, each already multiplied by its weight, to one reward."""

    def reduce(self, parts: dict[str, float]) -> float:
        """Return the sample's reward; `parts` has at least one entry."""


class BaseRewardReducer:
    """Base class of one's own reducers; any class with a method `reduce(parts)` serves.

    A class that can be called with `weights=` gets the composer's weights so, and the parts before weights. Any other
    gets parts that are multiplied by their weights.
    """


@cache
def takes_weights(reducer: type[Any]) -> bool:
    """True if the class can be called with `weights=`."""
    parameters = inspect.signature(reducer).parameters.values()
    return any(each.name == "weights" or each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)


class WeightedSumReducer(BaseRewardReducer):
    """The sum of the parts, each times its weight.

    Args:
        weights: By the name of a part, its key or its reward; a composer gives its own.
        default_weight: For a part that has none.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, default_weight: float = 1.0) -> None:
        # named as in konic 0.1, whose subclasses read them
        self._weights = checked_weights({} if weights is None else weights, "WeightedSumReducer: weights")
        if not is_finite_number(default_weight):
            raise ConfigError(f"WeightedSumReducer: default_weight must be a finite number, got {default_weight!r}.")
        self._default_weight = default_weight

    def reduce(self, parts: dict[str, float]) -> float:
        """The weighted sum of `parts`."""
        return math.fsum(self._weight_of(name, parts) * value for name, value in parts.items())

    def _weight_of(self, name: str, parts: dict[str, float]) -> float:
        names = parts.names_of(name) if isinstance(parts, NamedParts) else [name]
        return next((self._weights[each] for each in names if each in self._weights), self._default_weight)


class MeanReducer(BaseRewardReducer):
    """The mean of the weighted parts."""

    def reduce(self, parts: dict[str, float]) -> float:
        """The mean of `parts`."""
        return math.fsum(parts.values()) / len(parts)


class MaxReducer(BaseRewardReducer):
    """The largest of the weighted parts."""

    def reduce(self, parts: dict[str, float]) -> float:
        """The largest of `parts`."""
        return max(parts.values())


REDUCERS: dict[Any, type[Any]] = {kind.__name__: kind for kind in (WeightedSumReducer, MeanReducer, MaxReducer)}
"""By name, as a YAML file gives one."""


def reducer_of(given: Any) -> Any:
    """Return the reducer that a name stands for; anything else as it is."""
    return REDUCERS.get(given, given) if isinstance(given, str) else given
