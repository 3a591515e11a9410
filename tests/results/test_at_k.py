"""pass@k and best@k against every way to choose k of n responses."""

import itertools
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from konic.finetuning.results.at_k import best_at_k, pass_at_k


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_all_choices_that_hold_one_that_passed(n):
    for passed in range(n + 1):
        outcomes = [1] * passed + [0] * (n - passed)
        for k in range(1, n + 1):
            choices = [max(chosen) for chosen in itertools.combinations(outcomes, k)]
            assert pass_at_k(n, passed, k) == pytest.approx(statistics.fmean(choices), abs=1e-12)
            assert best_at_k(outcomes, k) == pytest.approx(pass_at_k(n, passed, k), abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.data())
def test_best_at_k_is_the_mean_of_the_highest_of_all_choices(rewards, data):
    k = data.draw(st.integers(1, len(rewards)))
    highest = [max(chosen) for chosen in itertools.combinations(rewards, k)]
    assert best_at_k(rewards, k) == pytest.approx(statistics.fmean(highest), abs=1e-9)


def test_the_best_of_all_is_the_highest_and_the_best_of_one_the_mean():
    assert best_at_k([3.0, -1.0, 2.0], 3) == 3
    assert best_at_k([3.0, -1.0, 2.0], 1) == pytest.approx(4 / 3)


def test_many_responses_fit_into_floats():
    assert pass_at_k(1500, 10, 750) == pytest.approx(1 - 0.5**10, abs=2e-3)
    assert best_at_k([0.0] * 1490 + [1.0] * 10, 750) == pytest.approx(pass_at_k(1500, 10, 750), abs=1e-9)


def test_mean_of_the_unbiased_estimate_is_the_true_chance_and_of_the_plain_one_is_not():
    """Over all outcomes of 4 responses that each pass with probability 1/4."""
    chance = {c: 0.25**c * 0.75 ** (4 - c) * len([*itertools.combinations(range(4), c)]) for c in range(5)}
    assert sum(p * pass_at_k(4, c, 2) for c, p in chance.items()) == pytest.approx(1 - 0.75**2)
    assert sum(p * (1 - (1 - c / 4) ** 2) for c, p in chance.items()) < 1 - 0.75**2 - 0.01
