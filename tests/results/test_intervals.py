import inspect
import itertools
import math
import statistics
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from konic.finetuning.results import intervals
from konic.finetuning.results.intervals import (
    FEWEST_PAIRS,
    _student_t,
    bootstrap,
    distinct_n,
    mean,
    paired_bootstrap,
    spread,
)


def test_the_mean_is_exactly_rounded_and_nan_of_none():
    assert mean([1.0, 2.0, 6.0]) == 3
    assert mean([1e16, 1.0, -1e16, 1.0]) == 0.5
    assert math.isnan(mean([]))
    largest = sys.float_info.max
    assert math.isnan(mean([largest, largest])) and math.isnan(spread([largest, -largest] * 2))


def test_a_constant_gain_has_an_interval_of_no_width():
    before = [0.25 * n for n in range(20)]
    interval = paired_bootstrap(before, [value + 0.5 for value in before])
    assert (interval.mean, interval.low, interval.high) == (0.5, 0.5, 0.5)


def test_pairs_are_kept_together():
    """Rewards that vary widely from prompt to prompt, and a gain that hardly does: unpaired, the interval is wide."""
    before = [100.0 * (-1) ** n for n in range(40)]
    after = [value + 1 + 0.125 * (-1) ** (n // 2) for n, value in enumerate(before)]
    interval = paired_bootstrap(before, after)
    assert 0.9 < interval.low < interval.mean < interval.high < 1.1


def all_resamples(gains):
    """The means of every one of the N^N ways to draw N of N with replacement."""
    return sorted(statistics.fmean(drawn) for drawn in itertools.product(gains, repeat=len(gains)))


def test_the_interval_is_that_of_all_possible_resamples():
    gains = [0.0, 1.0, 2.0, 4.0, 8.0, 16.0]
    means = all_resamples(gains)
    wider = 2.5706 / 1.96 * math.sqrt(6 / 5)  # Student's t of 5 degrees of freedom
    interval = paired_bootstrap([5.0] * 6, [5 + gain for gain in gains], resamples=40_000)
    assert interval.mean == pytest.approx(31 / 6)
    for got, share in ((interval.low, 0.025), (interval.high, 0.975)):
        below, above = (means[round(at * len(means))] for at in (share - 0.005, share + 0.005))
        assert below <= interval.mean + (got - interval.mean) / wider <= above


def test_the_interval_of_few_pairs_covers_the_mean_as_often_as_it_says():
    """Of 1,000 samples from a normal distribution; the plain percentiles cover it in 86 % for 5 and 88 % for 8."""
    generator = np.random.default_rng(0)
    for count in (5, 8, 16):
        intervals = (paired_bootstrap([0.0] * count, generator.normal(size=count), resamples=500) for _ in range(1000))
        assert 0.93 < statistics.fmean(each.low <= 0 <= each.high for each in intervals) < 0.97


def test_fewer_than_five_pairs_have_no_interval():
    for count in range(1, FEWEST_PAIRS):
        interval = paired_bootstrap([0.0] * count, [1.0] * count)
        assert interval.mean == 1
        assert not interval.is_known and not interval.leaves_out_zero
        assert interval.words(3) == "fewer than 5 prompts: too few for an interval"
    interval = paired_bootstrap([0.0] * FEWEST_PAIRS, [1.0] * FEWEST_PAIRS)
    assert interval.is_known and interval.leaves_out_zero
    assert interval.words(2) == "95 % interval +1.00 to +1.00"


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(4, 2.77645), (5, 2.57058), (9, 2.26216), (29, 2.04523), (10**6, 1.95997)]
)
def test_students_t_is_that_of_the_tables(freedom, quantile):
    assert _student_t(freedom) == pytest.approx(quantile, rel=3e-3)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=5, max_size=20), st.integers(0, 1000))
def test_the_interval_lies_within_the_gains_and_its_mean_is_theirs(pairs, seed):
    before, after = zip(*pairs, strict=True)
    gains = [b - a for a, b in pairs]
    interval = paired_bootstrap(before, after, seed=seed, resamples=500)
    assert interval.mean == pytest.approx(math.fsum(gains) / len(gains), abs=1e-12)
    middle, wider = interval.mean, 1.6  # 2.776 / 1.96 · √(5/4) = 1.58 for five pairs
    assert middle - wider * (middle - min(gains)) - 1e-9 <= interval.low <= middle + 1e-9
    assert middle - 1e-9 <= interval.high <= middle + wider * (max(gains) - middle) + 1e-9


def test_the_interval_covers_the_mean():
    gains = [((7 * n) % 11 - 5) / 10 for n in range(64)]
    interval = paired_bootstrap([0.0] * 64, gains)
    assert interval.low < statistics.fmean(gains) < interval.high
    half_width = 1.96 * statistics.pstdev(gains) / math.sqrt(64)
    assert interval.high - interval.low == pytest.approx(2 * half_width, rel=0.1)


def test_after_less_before_is_a_gain():
    assert paired_bootstrap([1.0, 2.0], [3.0, 4.0]).mean == 2


def test_a_seed_decides_the_interval():
    before, after = [0.0] * 15, [float(n * n % 7) for n in range(15)]
    assert paired_bootstrap(before, after, seed=3) == paired_bootstrap(before, after, seed=3)
    assert paired_bootstrap(before, after) == paired_bootstrap(before, after, seed=0)
    few = [paired_bootstrap(before, after, seed=seed, resamples=50) for seed in range(5)]
    assert len({interval.low for interval in few}) > 1


@pytest.mark.parametrize(
    ("responses", "n", "share"),
    [
        (["the cat saw the cat"], 2, 3 / 4),  # the cat, cat saw, saw the, the cat
        (["the cat saw the cat"], 1, 3 / 5),
        (["so good so good so good"], 2, 2 / 5),
        (["a b", "a b", "a b", "a b"], 2, 1 / 4),
        (["a b", "c d"], 2, 1.0),
        (["a b", "b c"], 2, 1.0),  # no pair reaches over from one response to the next
        (["A b", "a B"], 2, 1 / 2),
        (["a  b\nc"], 2, 1.0),
        (["one", ""], 2, 0.0),
        ([], 2, 0.0),
        (["a b c a b c"], 3, 3 / 4),
    ],
)
def test_distinct_n_worked_by_hand(responses, n, share):
    assert distinct_n(responses, n) == share


def test_distinct_n_counts_pairs_of_words_by_default():
    assert inspect.signature(distinct_n).parameters["n"].default == 2


def test_pairs_without_a_value_are_left_out():
    nan = math.nan
    interval = paired_bootstrap([0.0, nan, 1.0, 5.0, 1.0, 1.0, 1.0], [1.0, 3.0, 2.0, nan, 2.0, 2.0, 2.0])
    assert (interval.mean, interval.low, interval.high) == (1.0, 1.0, 1.0)
    assert math.isnan(paired_bootstrap([nan], [1.0]).mean)
    with pytest.raises(ValueError, match="shorter"):
        paired_bootstrap([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("values", "deviation"),
    [
        ([1.0, 2.0, 3.0, 4.0], math.sqrt(5 / 3)),
        ([1.0, math.nan, 2.0, 3.0, math.nan, 4.0], math.sqrt(5 / 3)),
        ([-1.0, 1.0], math.sqrt(2)),
        ([3, 5], math.sqrt(2)),
        ([1e9, 1e9 + 1, 1e9 + 2], 1.0),
    ],
)
def test_spread_worked_by_hand(values, deviation):
    assert spread(values) == pytest.approx(deviation, rel=1e-12)


@pytest.mark.parametrize("values", [[], [5.0], [math.nan], [math.nan, 5.0, math.nan], [0.1] * 3, [1000.1] * 7])
def test_fewer_than_two_values_and_equal_ones_have_no_spread(values):
    assert spread(values) == 0


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(-800, 800).map(lambda n: n / 8) | st.just(math.nan), max_size=9), st.randoms())
def test_spread_is_that_of_all_pairs_in_any_order(values, random):
    """The unbiased variance is half the mean squared difference of two values that are drawn without replacement."""
    counted = [value for value in values if not math.isnan(value)]
    pairs = [*itertools.combinations(counted, 2)]
    variance = math.fsum((a - b) ** 2 for a, b in pairs) / (2 * len(pairs)) if pairs else 0.0
    assert spread(values) == pytest.approx(math.sqrt(variance), rel=1e-12)
    assert spread(random.sample(values, len(values))) == spread(values)


def test_many_values_are_drawn_in_parts_with_the_same_interval(monkeypatch):
    before, after = [0.0] * 9, [float(n * n % 7) for n in range(9)]
    whole = paired_bootstrap(before, after, resamples=100)
    for size in (1, 20, 9 * 33):
        monkeypatch.setattr(intervals, "_DRAWN_AT_ONCE", size)
        assert paired_bootstrap(before, after, resamples=100) == whole


def test_the_interval_of_values_is_that_of_their_gains_over_nothing():
    values = [1.0, 4.0, math.nan, 2.0, 2.0, 2.0]
    assert bootstrap(values) == paired_bootstrap([0.0] * 6, values)
    assert bootstrap(values).mean == pytest.approx(11 / 5)
