"""A sample's parts, each already multiplied by its weight -> one reward: their sum, mean or maximum."""

import math
from typing import Protocol


class Reducer(Protocol):
    """Reduces a sample's parts, each already multiplied by its weight, to one reward."""

    def reduce(self, parts: dict[str, float]) -> float:
        """Return the sample's reward; `parts` has at least one entry."""


class WeightedSumReducer:
    """The sum of the weighted parts."""

    def reduce(self, parts: dict[str, float]) -> float:
        """The sum of `parts`."""
        return math.fsum(parts.values())


class MeanReducer:
    """The mean of the weighted parts."""

    def reduce(self, parts: dict[str, float]) -> float:
        """The mean of `parts`."""
        return math.fsum(parts.values()) / len(parts)


class MaxReducer:
    """The largest of the weighted parts."""

    def reduce(self, parts: dict[str, float]) -> float:
        """The largest of `parts`."""
        return max(parts.values())
