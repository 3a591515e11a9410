"""Where a run stands: the best so far under a budget, and the price of KL from the last iteration."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch
from test_checks import iteration

from konic.finetuning.config import TrainingConfig
from konic.finetuning.results.summary import FinetuningResult, Selection
from konic.finetuning.rewards.moments import RunningMoments
from konic.finetuning.run.state import TrainerState

NAN = math.nan


def test_without_a_target_the_weight_stays_as_it_was_set():
    state = TrainerState(history=[replace(iteration(), kl_penalty_weight=0.3, kl_per_response=99.0)])
    assert state.kl_penalty_weight(0.05, TrainingConfig()) == 0.05


def test_with_a_target_the_weight_follows_the_last_iteration():
    config = TrainingConfig(batch_size=16, kl_target=4.0, kl_horizon=100)
    assert TrainerState().kl_penalty_weight(0.05, config) == 0.05
    last = replace(iteration(), kl_penalty_weight=0.3, kl_per_response=99.0)
    state = TrainerState(history=[replace(iteration(), kl_penalty_weight=9.0), last])
    assert state.kl_penalty_weight(0.05, config) == pytest.approx(0.3 * (1 + 0.2 * 16 / 100))


def test_iterations_that_were_dropped_do_not_move_the_weight():
    config = TrainingConfig(batch_size=16, kl_target=4.0, kl_horizon=100)
    last = replace(iteration(), kl_penalty_weight=0.3, kl_per_response=99.0)
    dropped = replace(last, kl_penalty_weight=0.5, kl_per_response=NAN, num_nonfinite=1, num_steps=0)
    state = TrainerState(history=[last, dropped, dropped])
    assert state.kl_penalty_weight(0.05, config) == pytest.approx(0.3 * (1 + 0.2 * 16 / 100))


def test_the_weight_waits_while_values_warm_up_and_starts_again_from_zero():
    config = TrainingConfig(batch_size=16, kl_target=4.0, value_warmup_iterations=2)
    still = [replace(iteration(), iteration=n, kl_penalty_weight=0.05, kl_per_response=0.0) for n in (1, 2)]
    assert TrainerState(history=still).kl_penalty_weight(0.05, config) == 0.05
    free = TrainerState(history=[replace(iteration(), kl_penalty_weight=0.0, kl_per_response=9.0)])
    assert free.kl_penalty_weight(0.05, TrainingConfig(kl_target=4.0)) == 0.05


HISTORY = [
    replace(iteration(iteration=number, reward_mean=reward, kl_per_response=kl), eval_reward_mean=held_out,
            eval_kl_per_response=kl)
    for number, reward, kl, held_out in [(1, 0.1, 0.0, 0.5), (2, 0.9, 4.0, NAN), (3, 1.5, 6.0, 0.4), (4, 0.9, 5.0, 0.8)]
]  # fmt: skip


@pytest.mark.parametrize(
    ("selection", "number", "reward"),
    [
        (Selection(), 3, 1.5),
        (Selection(kl_price=0.1), 3, 1.5),  # 0.1, 0.5, 0.9, 0.4
        (Selection(kl_price=0.15), 3, 1.5),  # 0.1, 0.3, 0.6, 0.15
        (Selection(kl_price=0.24), 1, 0.1),  # 0.1, -0.06, 0.06, -0.3
        (Selection(kl_price=0.15, kl_budget=5.0), 2, 0.9),
        (Selection(kl_price=0.24, kl_free=4.0), 3, 1.5),  # 0.1, 0.9, 1.02, 0.66
        (Selection(kl_price=0.35, kl_free=4.0), 2, 0.9),  # 0.1, 0.9, 0.8, 0.55
        (Selection(on_held_out=True, kl_price=9.0), 4, 0.8),  # held-out rewards are compared as they are
        (Selection(kl_budget=5.0), 2, 0.9),  # the first of equals; the budget itself is within it
        (Selection(kl_budget=3.0), 1, 0.1),
        (Selection(on_held_out=True), 4, 0.8),
        (Selection(on_held_out=True, kl_budget=4.5), 1, 0.5),
    ],
)
def test_the_best_iteration_is_the_highest_objective_within_the_budget(selection, number, reward):
    result = FinetuningResult("m", HISTORY, 1.0, None, selection=selection)
    assert (result.best_iteration, result.best_reward) == (number, reward)
    kept = None
    for done, now in enumerate(HISTORY):  # what the run does as it goes: keep the weights if the policy is the best yet
        state = TrainerState(history=HISTORY[:done])
        reward_now = now.eval_reward_mean if selection.on_held_out else now.reward_mean
        if state.is_best(reward_now, now.kl_per_response, selection):
            kept = now.iteration
    assert kept == number


def test_penalties_of_the_settings_count_where_the_batch_chooses_and_not_on_held_out_prompts():
    history = [replace(HISTORY[0], penalty_mean=0.0), replace(HISTORY[2], penalty_mean=1.5)]
    for selection, number in ((Selection(), 1), (Selection(on_held_out=True), 1)):
        assert FinetuningResult("m", history, 1.0, None, selection=selection).best_iteration == number
    better = [replace(history[0], eval_reward_mean=0.3), history[1]]
    assert FinetuningResult("m", better, 1.0, None, selection=Selection(on_held_out=True)).best_iteration == 3


@pytest.mark.parametrize(
    ("earlier", "rewards", "varied"),
    [
        ([], [0.0], False),
        ([], [0.0, 0.0], False),
        ([], [0.0, 1.0], True),
        ([(0.0, 0.0)], [0.0], False),
        ([(0.0, 0.0)], [0.1], True),
        ([(0.0, 1.0)], [0.0], True),
        ([(NAN, NAN), (0.0, 0.0)], [0.0], False),  # an iteration without a reward
        ([(NAN, NAN)], [], False),
    ],
)
def test_whether_the_rewards_of_a_run_have_ever_differed(earlier, rewards, varied):
    history = [iteration(reward_min=low, reward_max=high) for low, high in earlier]
    assert TrainerState(history=history).scores_have_varied(rewards) is varied


def test_nothing_is_best_where_nothing_has_a_reward():
    assert not TrainerState().is_best(NAN, 0.0, Selection())
    assert FinetuningResult("m", [replace(iteration(), reward_mean=NAN)], 1.0, None).best_iteration == 0


def test_a_plan_goes_on_until_its_end_and_then_a_new_fall_begins():
    state = TrainerState(iteration=3, num_steps=12, planned_iterations=5)
    state.plan(9)
    assert (state.planned_iterations, state.falls_from) == (9, 0)
    state.iteration, state.num_steps = 9, 36
    state.plan(9)
    assert (state.planned_iterations, state.falls_from) == (9, 36)
    state.plan(4)
    assert state.planned_iterations == 9, "what is done stays planned"


def test_a_state_comes_back_from_its_record_whole():
    moments = {"kind": RunningMoments().after([0.5, 2.0]), "other": RunningMoments()}
    state = TrainerState(3, 12, 5, 8, 9, {"5": 0.25}, 7.25, HISTORY[:2], {"weight": torch.ones(2)}, moments)
    record = json.loads(json.dumps(state.to_dict() | {"settings": {}, "more": 1}))
    assert "best_weights" not in record
    found = TrainerState.from_dict(record)
    assert found.best_weights is None
    assert repr(replace(found, best_weights=state.best_weights)) == repr(state)  # NaN differs from itself
    assert {field.name for field in fields(TrainerState)} == {"best_weights", *state.to_dict()}


@pytest.mark.parametrize(
    ("changes", "error"),
    [({"iteration": "3"}, "iteration is str, not int"), ({"history": {}}, "history is dict, not list"),
     ({"reward_moments": []}, "reward_moments is list, not dict"),
     ({"elapsed_seconds": None}, "elapsed_seconds is NoneType, not float")],
)  # fmt: skip
def test_a_record_with_a_field_of_another_kind_is_refused(changes, error):
    with pytest.raises(TypeError, match=error):
        TrainerState.from_dict(TrainerState().to_dict() | changes)
    with pytest.raises(KeyError, match="num_steps"):
        TrainerState.from_dict({name: value for name, value in TrainerState().to_dict().items() if name != "num_steps"})
