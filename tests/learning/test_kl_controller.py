"""The adaptive price of KL, worked by hand and as a closed loop."""

import math

import pytest

from konic.finetuning.learning.kl_controller import adapted_kl_weight, limited_kl_weight


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(0.0, 1.0), (6.0, 1.0), (8.0, 10**0.5), (10.0, 10.0), (12.0, 10**1.5), (14.0, 100.0), (99.0, 100.0)],
)
def test_the_weight_rises_from_six_tenths_of_the_limit_on(kl, factor):
    assert limited_kl_weight(0.3, kl, 10.0) == pytest.approx(0.3 * factor)
    assert limited_kl_weight(0.0, kl, 10.0) == pytest.approx(0.05 * (factor - 1))
    assert limited_kl_weight(0.01, kl, 10.0) == pytest.approx(0.01 + 0.05 * (factor - 1))


def test_a_kl_that_is_not_a_number_leaves_the_weight_as_it_is():
    assert limited_kl_weight(0.3, math.nan, 10.0) == 0.3


def test_one_noisy_batch_does_not_multiply_the_weight():
    """Between two batches whose KL differs by a nat, of ten, it no more than doubles."""
    weights = [limited_kl_weight(0.05, kl / 10, 10.0) for kl in range(150)]
    assert all(later <= 2 * earlier for earlier, later in zip(weights, weights[10:], strict=False))


@pytest.mark.parametrize(
    ("paid", "expected"),
    [
        (4.0, 0.05),  # on target
        (4.4, 0.05 * (1 + 0.1 * 16 / 100)),
        (4.8, 0.05 * (1 + 0.2 * 16 / 100)),  # the clip's corner
        (40.0, 0.05 * (1 + 0.2 * 16 / 100)),
        (3.6, 0.05 * (1 - 0.1 * 16 / 100)),
        (0.0, 0.05 * (1 - 0.2 * 16 / 100)),
    ],
)
def test_the_adaptive_weight_worked_by_hand(paid, expected):
    assert adapted_kl_weight(0.05, paid, target=4.0, num_responses=16, horizon=100) == pytest.approx(expected)


def test_a_batch_beyond_the_horizon_never_turns_the_weight_negative():
    assert adapted_kl_weight(0.05, 0.0, 4.0, num_responses=10_000, horizon=10) == pytest.approx(0.05 * 0.8)


def test_over_one_horizon_the_weight_changes_by_at_most_e_to_the_fifth():
    weight = 1.0
    for _ in range(100):
        weight = adapted_kl_weight(weight, 1e9, 1.0, num_responses=1, horizon=100)
    assert 0.99 * math.exp(0.2) < weight <= math.exp(0.2)


@pytest.mark.parametrize("start", [0.001, 0.05, 10.0])
def test_a_policy_whose_kl_falls_with_its_price_is_steered_to_the_target(start):
    weight = start
    for _ in range(600):
        weight = adapted_kl_weight(weight, 1.0 / weight, target=4.0, num_responses=16, horizon=100)
    assert weight == pytest.approx(0.25, rel=1e-3)
