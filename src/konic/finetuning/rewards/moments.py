"""Mean and standard deviation of a stream of numbers, in one pass (Welford, Technometrics 4(3), 1962)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and summed squared deviations of the numbers seen so far."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Σ (x − mean)²."""

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 0 for fewer than two numbers."""
        return math.sqrt(max(0.0, self.squares / (self.count - 1))) if self.count > 1 else 0.0

    def after(self, values: Iterable[float]) -> "RunningMoments":
        """Return the moments after adding more numbers, one by one in their order."""
        count, mean, squares = self.count, self.mean, self.squares
        for value in values:
            count += 1
            delta = value - mean
            mean += delta / count
            squares += delta * (value - mean)
        return RunningMoments(count, mean, squares)

    def normalised(self, value: float) -> float:
        """Return a value's distance above the mean, in standard deviations.

        The result is 0 if the standard deviation is 0, and the value itself before the first number is added.
        """
        if self.count == 0:
            return value
        return (value - self.mean) / self.std if self.std > 0 else 0.0
