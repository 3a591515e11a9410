import json
import math
import statistics
from dataclasses import asdict
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from konic.finetuning.rewards.moments import RunningMoments

FLOATS = st.floats(-1e6, 1e6)


def moments_of(*values):
    return RunningMoments().after(values)


@settings(deadline=None, max_examples=200)
@given(st.lists(FLOATS, min_size=2, max_size=40))
def test_count_mean_and_spread_are_those_of_statistics(values):
    moments = moments_of(*values)
    within = 1e-11 * max(map(abs, values)) + 1e-150  # the square of less is nothing
    assert moments.count == len(values)
    assert moments.mean == pytest.approx(statistics.mean(values), rel=0, abs=within)
    assert moments.std == pytest.approx(statistics.stdev(values), rel=1e-9, abs=within)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=40))
def test_squares_are_the_summed_squared_deviations(values):
    mean = Fraction(sum(values), len(values))
    expected = float(sum((value - mean) ** 2 for value in values))
    assert moments_of(*values).squares == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e9, -1e9])
def test_values_far_from_zero_keep_their_spread(offset):
    moments = moments_of(*(offset + value for value in (4.0, 7.0, 13.0, 16.0)))
    assert moments.mean == offset + 10
    assert moments.std == pytest.approx(math.sqrt(30), rel=1e-9)


@settings(deadline=None, max_examples=100)
@given(st.lists(FLOATS, max_size=30), st.integers(0, 30), st.integers(0, 30))
def test_one_at_a_time_and_in_batches_are_exactly_the_same(values, first, second):
    first, second = sorted((first, second))
    in_batches = RunningMoments().after(values[:first]).after(values[first:second]).after(values[second:])
    one_by_one = RunningMoments()
    for value in values:
        one_by_one = one_by_one.after([value])
    assert one_by_one == in_batches == RunningMoments().after(values)


def test_counting_in_leaves_the_moments_before_alone():
    before = moments_of(1.0, 3.0)
    assert before.after(value for value in (5.0,)) == RunningMoments(3, 3.0, 8.0)
    assert before == RunningMoments(2, 2.0, 2.0)
    assert before.after([]) == before


def test_fewer_than_two_values_have_no_spread():
    assert RunningMoments() == RunningMoments(count=0, mean=0.0, squares=0.0)
    assert RunningMoments().std == 0
    assert moments_of(7.5).std == 0
    assert moments_of(7.5).mean == 7.5


@settings(deadline=None, max_examples=100)
@given(FLOATS, st.integers(1, 30), FLOATS)
def test_a_constant_has_no_spread_and_everything_beside_it_counts_as_zero(constant, count, other):
    moments = moments_of(*[constant] * count)
    assert (moments.mean, moments.squares, moments.std) == (constant, 0, 0)
    assert moments.normalised(constant) == 0
    assert moments.normalised(other) == 0


@settings(deadline=None, max_examples=50)
@given(FLOATS)
def test_before_any_value_a_value_stays_itself(value):
    assert RunningMoments().normalised(value) == value


@pytest.mark.parametrize(("value", "expected"), [(2.0, -1.0), (4.0, 0.0), (5.0, 0.5), (10.0, 3.0)])
def test_a_normalised_value_is_counted_in_standard_deviations_from_the_mean(value, expected):
    assert moments_of(2.0, 4.0, 6.0).normalised(value) == expected


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=40, unique=True), st.integers(-5000, 5000))
def test_normalising_agrees_with_statistics(values, value):
    expected = (value - statistics.mean(values)) / statistics.stdev(values)
    assert moments_of(*values).normalised(value) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=100)
@given(st.lists(FLOATS, max_size=30), FLOATS)
def test_the_round_trip_through_json_is_exact(values, further):
    moments = moments_of(*values)
    back = RunningMoments(**json.loads(json.dumps(asdict(moments))))
    assert back == moments
    assert back.after([further]) == moments.after([further])
