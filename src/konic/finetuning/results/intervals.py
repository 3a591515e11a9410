"""Values before and after training -> changes with confidence intervals. Pure functions of plain numbers and texts.

Why by hand: the paired bootstrap and Wilson's interval are a few lines each, and the library that has both, SciPy, is a
download of 35 MB that nothing else here needs.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z = 1.959963984540054
"""The 0.975 quantile of the normal distribution."""
_DRAWN_AT_ONCE = 2**22
"""Values that the bootstrap draws at once: some 64 MB, however many there are."""


FEWEST_PAIRS = 5
"""With fewer, there is no interval: resampling them says too little of the values that were not seen."""


@dataclass(frozen=True)
class Interval:
    """A mean with a 95 % confidence interval."""

    mean: float
    low: float
    """NaN, as `high`, where there are too few values for an interval."""
    high: float

    @property
    def is_known(self) -> bool:
        """True if there is an interval."""
        return not math.isnan(self.high - self.low)

    @property
    def leaves_out_zero(self) -> bool:
        """True if chance alone would rarely give such a mean; False where that is not known."""
        return self.low > 0 or self.high < 0

    def words(self, digits: int) -> str:
        """The interval of a gain in words, such as "95 % interval -0.040 to +0.210"."""
        if not self.is_known:
            return f"fewer than {FEWEST_PAIRS} prompts: too few for an interval"
        return f"95 % interval {self.low:+.{digits}f} to {self.high:+.{digits}f}"


def mean(values: Sequence[float]) -> float:
    """The mean; NaN if there are no values, or if their sum is beyond all floats."""
    try:
        return math.fsum(values) / len(values) if values else math.nan
    except OverflowError:
        return math.nan


def spread(values: Sequence[float]) -> float:
    """The unbiased standard deviation of the values that are not NaN; 0 for fewer than two, NaN beyond all floats."""
    counted = [value for value in values if not math.isnan(value)]
    try:
        return statistics.stdev(counted) if len(counted) > 1 else 0.0
    except OverflowError:
        return math.nan


def of_standard_error(mean: float, error: float) -> Interval:
    """A mean that is normally distributed with this standard error, with its 95 % interval."""
    return Interval(mean, mean - 1.96 * error, mean + 1.96 * error)


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], seed: int = 0, resamples: int = 10_000
) -> Interval:
    """The mean of after − before, with a 95 % interval by the percentile bootstrap over pairs (Efron 1979).

    Of few pairs the percentiles are too near to the mean, for normal values by z/t · √((N − 1)/N) with Student's t of
    N − 1 degrees of freedom (Hesterberg, The American Statistician 69, 2015). Both ends are moved away by that factor.
    Fewer than `FEWEST_PAIRS` have no interval.

    Args:
        before: [N] one value per prompt; a pair with a NaN is left out.
        after: [N] for the same prompts.
        seed: Seeds the resampling.
        resamples: How many times N pairs are drawn with replacement.
    """
    pairs = zip(before, after, strict=True)
    gains = np.array([late - early for early, late in pairs if not math.isnan(late - early)])
    if len(gains) < FEWEST_PAIRS:
        return Interval(mean(gains.tolist()), math.nan, math.nan)
    generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    size = max(1, _DRAWN_AT_ONCE // len(gains))
    means = [
        gains[generator.integers(len(gains), size=(min(size, resamples - start), len(gains)))].mean(axis=1)
        for start in range(0, resamples, size)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    middle, wider = float(gains.mean()), _student_t(len(gains) - 1) / _Z * math.sqrt(len(gains) / (len(gains) - 1))
    return Interval(middle, middle - wider * (middle - float(low)), middle + wider * (float(high) - middle))


def _student_t(freedom: int) -> float:
    """The 0.975 quantile of Student's t, within 0.3 % for 4 degrees of freedom or more (Abramowitz & Stegun 26.7.5)."""
    terms = (
        (_Z**3 + _Z) / 4,
        (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96,
        (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / 384,
    )
    return _Z + math.fsum(term / freedom**power for power, term in enumerate(terms, 1))


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean, with a 95 % interval as that of :func:`paired_bootstrap`; a NaN is left out."""
    return paired_bootstrap([0.0] * len(values), values, seed)


def distinct_n(responses: Sequence[str], n: int = 2) -> float:
    """Number of different word n-grams in the responses, divided by the number of all of them (Li et al. 2016).

    Near 0 if the same phrase occurs again and again.
    """
    grams = [
        tuple(words[start : start + n])
        for words in (response.lower().split() for response in responses)
        for start in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def proportion(successes: int, total: int) -> Interval:
    """A share with Wilson's 95 % interval (Wilson, JASA 22, 1927)."""
    if total == 0:
        return Interval(math.nan, math.nan, math.nan)
    z, share = _Z, successes / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def nanmean(values: Sequence[float]) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    return mean([value for value in values if not math.isnan(value)])
