import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.optimization import get_inverse_sqrt_schedule

from konic.finetuning.learning.schedule import TIMESCALE, learning_rate_at

SCHEDULES = ("constant", "inverse_sqrt", "linear", "cosine")


@pytest.mark.parametrize("step", [0, 1, 99, 10_000])
def test_a_constant_rate_is_the_peak_at_every_step(step):
    assert learning_rate_at(step, 100, 3e-4, 0, "constant") == 3e-4


@pytest.mark.parametrize(("step", "rate"), [(0, 8.0), (1, 6.0), (2, 4.0), (3, 2.0), (4, 0.0)])
def test_linear_worked_by_hand(step, rate):
    assert learning_rate_at(step, 4, 8.0, 0, "linear") == rate


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 8.0), (1, 4 * (1 + math.sqrt(0.5))), (2, 4.0), (3, 4 * (1 - math.sqrt(0.5))), (4, 0.0)]
)
def test_cosine_worked_by_hand(step, rate):
    assert learning_rate_at(step, 4, 8.0, 0, "cosine") == pytest.approx(rate, abs=1e-12)


@pytest.mark.parametrize(("after_warm_up", "share"), [(0, 1), (1, math.sqrt(1 / 2)), (3, 1 / 2), (15, 1 / 4)])
@pytest.mark.parametrize("total", [1, 10_000])
def test_inverse_square_root_worked_by_hand_whatever_the_runs_length(after_warm_up, share, total):
    rate = learning_rate_at(5 + after_warm_up * TIMESCALE, total, 8.0, 5, "inverse_sqrt", falls_from=2)
    assert rate == pytest.approx(8 * share)


@pytest.mark.parametrize("warmup", [0, 7])
def test_inverse_square_root_is_the_one_of_transformers(warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3.0)
    theirs = get_inverse_sqrt_schedule(optimizer, warmup, timescale=TIMESCALE)
    for step in range(40):
        if step >= warmup:  # in warm-up theirs begins with a step of zero
            ours = learning_rate_at(step, 10, 3.0, warmup, "inverse_sqrt")
            assert ours == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_in_equal_parts_to_the_peak_and_never_takes_a_step_of_zero(schedule):
    rates = [learning_rate_at(step, 20, 1.0, 4, schedule) for step in range(5)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_of_one_step_takes_it_at_the_peak(schedule):
    rates = [learning_rate_at(step, 1, 8.0, 0, schedule) for step in range(3)]
    assert rates == pytest.approx([8.0, 0.0, 0.0], abs=1e-12)
    assert learning_rate_at(5, 5, 8.0, 5, schedule) == 8.0, "nothing is left to fall over"


def test_the_fall_begins_after_warm_up():
    assert learning_rate_at(6, 8, 1.0, 4, "linear") == 0.5
    assert learning_rate_at(6, 8, 1.0, 4, "cosine") == pytest.approx(0.5, abs=1e-12)


def test_a_second_fall_begins_at_the_peak_where_an_earlier_one_ended():
    rates = [learning_rate_at(step, 8, 1.0, 2, "linear", falls_from=4) for step in range(4, 9)]
    assert rates == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert learning_rate_at(7, 8, 1.0, 6, "linear", falls_from=4) == 0.5, "the fall still begins after warm-up"


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_falling_rates_end_at_zero_and_stay_there(schedule, warmup):
    assert learning_rate_at(9, 10, 1.0, warmup, schedule) > 0
    for step in (10, 11, 500):
        assert learning_rate_at(step, 10, 1.0, warmup, schedule) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warm_up_longer_than_the_run_only_rises(schedule):
    rates = [learning_rate_at(step, 3, 1.0, 10, schedule) for step in range(3)]
    assert rates == pytest.approx([0.1, 0.2, 0.3])


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 60), st.integers(0, 30), st.sampled_from(SCHEDULES), st.floats(1e-8, 1))
def test_rates_stay_between_zero_and_the_peak_and_turn_once(total, warmup, schedule, peak):
    rates = [learning_rate_at(step, total, peak, warmup, schedule) for step in range(total + 1)]
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    rise, fall = rates[:warmup], rates[warmup:]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
