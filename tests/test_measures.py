"""The numbers of an iteration, against sums over a hand-made rollout of unequal lengths."""

import math

import pytest
import torch

from konic.finetuning import measures
from konic.finetuning.algorithms import Advantages
from konic.finetuning.dataset import DatasetConfig, make_prompts
from konic.finetuning.measures import RunClock, StageClock, iteration_result
from konic.finetuning.prompts import PromptBatch
from konic.finetuning.results import Evaluation
from konic.finetuning.rollout import Rollout
from konic.finetuning.sampling import Samples
from konic.finetuning.scoring import Scores
from konic.finetuning.update import UpdateStats

NAN = math.nan
STATS = UpdateStats(-0.1, 0.2, -0.3, 0.4, 0.05, 0.06, 0.7, 1e-3, 0.08, 0.0, 0.003, 0.09, 4, 2)


def hand_made():
    """Two responses, of one and of three tokens."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    prompts = make_prompts(["a", "b"], DatasetConfig(), "test")
    ids = torch.ones(2, 1, dtype=torch.int64)
    batch = PromptBatch(prompts, ["a", "b"], ids, ids.bool(), [0, 0])
    sampled = torch.tensor([[-1.0, 0, 0], [-2.0, -3.0, -4.0]], dtype=torch.float64)
    ids, ended = torch.ones(2, 3, dtype=torch.int64), torch.tensor([True, False])
    samples = Samples(ids, mask, sampled, torch.zeros(2, 3, 4), ended, ["x", "yyy"])
    return Rollout(
        batch, samples, temperature=1.0, in_full_precision=True,
        log_probs=sampled + torch.tensor([[0.004, 0, 0], [0.0, -0.008, 0.0]]),
        ref_log_probs=torch.tensor([[-1.5, 0, 0], [-1.0, -3.5, -4.0]], dtype=torch.float64),
        kl=torch.tensor([[0.4, 0, 0], [0.1, 0.2, 0.5]], dtype=torch.float64),
        entropy=torch.tensor([[2.0, 0, 0], [1.0, 3.0, 2.0]], dtype=torch.float64), values=zeros,
        ref_hidden=torch.zeros(2, 3, 4, dtype=torch.float64),
    )  # fmt: skip


def clock():
    stages = StageClock()
    for stage in ("generation", "reward", "update"):
        stages.lap(stage)
    return stages


def measured(scores, evaluation=None, iteration=1, per_token=((0.5, 0, 0), (0.0, 0.0, 0.0))):
    mask = hand_made().response_mask & torch.tensor(scores.has_score)[:, None]
    advantages = Advantages(torch.tensor(per_token), torch.zeros(2, 3), mask, 0.1, 0.0)
    return iteration_result(iteration, hand_made(), scores, advantages, STATS, 0.07, clock(), evaluation)


def test_token_averages_are_over_tokens_and_response_sums_over_responses():
    scores = Scores([1.0, 4.0], {"a": [1.0, 4.0], "b": [NAN, 2.0]})
    result = measured(scores, iteration=3)
    assert result.kl_divergence == pytest.approx((0.4 + 0.1 + 0.2 + 0.5) / 4)
    assert result.kl_per_response == pytest.approx((0.4 + 0.8) / 2)
    assert result.kl_k1 == pytest.approx((0.5 + 0.004 - 1.0 + 0.5 - 0.008 + 0.0) / 4)
    k3s = [math.exp(-r) - 1 + r for r in (0.504, -1.0, 0.492, 0.0)]
    assert result.kl_k3 == pytest.approx(sum(k3s) / 4)
    assert (result.kl_loss, result.kl_penalty_weight, result.num_steps) == (0.09, 0.07, 4)
    assert result.no_signal_fraction == 0.5
    assert result.entropy == pytest.approx(8 / 4)
    assert result.sampler_gap == 0.003
    assert (result.response_length_mean, result.response_length_std) == (2.0, pytest.approx(math.sqrt(2)))
    assert (result.reward_mean, result.reward_std) == (2.5, pytest.approx(math.sqrt(4.5)))
    assert (result.reward_min, result.reward_max, result.ended_fraction) == (1.0, 4.0, 0.5)
    assert result.reward_breakdown == {"a": 2.5, "b": 2.0}
    assert (result.num_samples, result.num_unscored) == (2, 0)
    assert (result.policy_loss, result.value_loss, result.grad_norm) == (-0.1, 0.2, 0.7)
    assert math.isnan(result.eval_reward_mean)


def test_unscored_samples_are_counted_and_left_out_of_the_mean():
    result = measured(Scores([NAN, 4.0], {}))
    assert (result.reward_mean, result.reward_std, result.num_unscored) == (4.0, 0.0, 1)
    assert result.no_signal_fraction == 1.0
    assert measured(Scores([NAN, NAN], {})).no_signal_fraction == 0.0


def test_an_evaluation_is_reported_with_the_iteration_that_its_policy_samples():
    evaluation = Evaluation(["p"] * 2, ["r"] * 2, [1.0, 2.0], {}, [0.5, 1.5], [3, 4])
    result = measured(Scores([1.0, 4.0], {}), evaluation)
    assert (result.eval_reward_mean, result.eval_kl_per_response) == (1.5, 1.0)


def test_a_runs_clock_counts_minutes_and_what_was_before(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(measures.time, "monotonic", lambda: now[0])
    run_clock = RunClock(50.0, 2.0)
    now[0] += 119
    assert run_clock.elapsed_seconds == 169
    assert not run_clock.time_is_up
    now[0] += 1
    assert run_clock.time_is_up
    assert not RunClock(1e9, None).time_is_up


def test_a_stage_clock_gives_each_stage_its_own_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measures.time, "perf_counter", lambda: now[0])
    stages = StageClock()
    for stage, seconds in (("generation", 3.0), ("reward", 1.0), ("update", 5.0)):
        now[0] += seconds
        stages.lap(stage)
    assert stages.seconds == {"generation": 3.0, "reward": 1.0, "update": 5.0}
    assert stages.total == 9.0
