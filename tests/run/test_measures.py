"""The numbers of an iteration, against sums over a hand-made rollout of unequal lengths."""

import math
from dataclasses import replace

import pytest
import torch

from konic.finetuning.data.config import DatasetConfig
from konic.finetuning.data.prompts import make_prompts
from konic.finetuning.data.samples import make_samples
from konic.finetuning.data.tokenization import PromptBatch
from konic.finetuning.learning.estimators import Advantages
from konic.finetuning.learning.update import UpdateStats
from konic.finetuning.results.evaluation import Evaluation
from konic.finetuning.results.summary import Selection
from konic.finetuning.rewards.scoring import Scores
from konic.finetuning.rollout.rollout import Rollout, States
from konic.finetuning.rollout.sampler import Samples
from konic.finetuning.run import measures
from konic.finetuning.run.measures import RunClock, StageClock, iteration_result

NAN = math.nan
STATS = UpdateStats(
    policy_loss=-0.1, value_loss=0.2, entropy_loss=-0.3, total_loss=0.4, clip_fraction=0.05, approx_kl=0.06,
    grad_norm=0.7, learning_rate=1e-3, explained_variance=0.08, first_log_ratio=0.0, sampler_gap=0.003, kl_loss=0.09,
    num_steps=4, num_nonfinite=2,
)  # fmt: skip


PRICED = Selection(kl_price=0.05)


def hand_made():
    """Two responses, of one and of three tokens."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    prompts = make_prompts(["a", "b"], DatasetConfig(), "test")
    ids = torch.ones(2, 1, dtype=torch.int64)
    batch = PromptBatch(prompts=prompts, texts=["a", "b"], ids=ids, mask=ids.bool(), sample_indices=[0, 0])
    sampled = torch.tensor([[-1.0, 0, 0], [-2.0, -3.0, -4.0]], dtype=torch.float64)
    ids, ended = torch.ones(2, 3, dtype=torch.int64), torch.tensor([True, False])
    samples = Samples(response_ids=ids, response_mask=mask, log_probs=sampled, ended=ended)
    return Rollout(
        batch=batch, samples=samples, records=make_samples(prompts, batch.texts, ["x", "yyy"], samples.token_ids()),
        temperature=1.0, max_new_tokens=3, in_full_precision=True,
        log_probs=sampled + torch.tensor([[0.004, 0, 0], [0.0, -0.008, 0.0]]),
        ref_log_probs=torch.tensor([[-1.5, 0, 0], [-1.0, -3.5, -4.0]], dtype=torch.float64),
        kl=torch.tensor([[0.4, 0, 0], [0.1, 0.2, 0.5]], dtype=torch.float64),
        entropy=torch.tensor([[2.0, 0, 0], [1.0, 3.0, 2.0]], dtype=torch.float64), values=zeros,
        is_rescored=False, states=States.of_all(*torch.zeros(2, 2, 3, 4, dtype=torch.float64)),
    )  # fmt: skip


def clock():
    stages = StageClock()
    for stage in ("generation", "reward", "update"):
        stages.lap(stage)
    return stages


def measured(scores, evaluation=None, iteration=1, rollout=None, selection=PRICED, penalty=0.0):
    mask = hand_made().response_mask & torch.tensor(scores.has_score)[:, None]
    advantages = Advantages(
        advantages=torch.tensor([[0.5, 0, 0], [0.0, 0.0, 0.0]]), no_signal_fraction=0.5, returns=torch.zeros(2, 3),
        mask=mask, has_signal=True,
        value_loss_weight=0.1, kl_loss_weight=0.0, effective_sample_size=0.9,
    )  # fmt: skip
    left_out = ["equal group", "cut off"]
    return iteration_result(
        iteration, rollout or hand_made(), scores, advantages, STATS, selection, penalty, 0.07, clock(), evaluation,
        left_out,
    )  # fmt: skip


def test_token_averages_are_over_tokens_and_response_sums_over_responses():
    scores = Scores([1.0, 4.0], {"a": [1.0, 4.0], "b": [NAN, 2.0]})
    result = measured(scores, iteration=3)
    assert result.kl_divergence == pytest.approx((0.4 + 0.1 + 0.2 + 0.5) / 4)
    assert result.kl_per_response == pytest.approx((0.4 + 0.8) / 2)
    assert result.objective == pytest.approx(2.5 - 0.05 * 0.6)  # the price that was set, not this iteration's β
    assert result.distinct_fraction == 1.0
    assert result.reference_loss == pytest.approx((1.5 + 1.0 + 3.5 + 4.0) / 4)
    assert math.isnan(result.distinct_2)  # a response of one word has no pairs
    texts = ["x", "a b a b c"]  # of ab, ba, ab, bc three differ
    records = [replace(record, response=text) for record, text in zip(hand_made().records, texts, strict=True)]
    assert measured(scores, rollout=replace(hand_made(), records=records)).distinct_2 == pytest.approx(0.75)
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
    assert (result.effective_sample_size, result.num_in_equal_groups, result.num_cut_off) == (0.9, 1, 1)
    assert math.isnan(result.eval_reward_mean)


def test_unscored_samples_are_counted_and_left_out_of_the_mean():
    result = measured(Scores([NAN, 4.0], {}))
    assert (result.reward_mean, result.reward_std, result.num_unscored) == (4.0, 0.0, 1)


def test_penalties_of_the_settings_and_nats_beyond_a_target_alone_lower_the_objective():
    scores = Scores([1.0, 4.0], {})
    found = measured(scores, penalty=0.75)
    assert (found.reward_mean, found.penalty_mean) == (2.5, 0.75)
    assert found.objective == pytest.approx(2.5 - 0.75 - 0.05 * 0.6)
    for target, paid in ((0.25, 0.35), (0.6, 0.0), (9.0, 0.0)):
        selection = Selection(kl_price=0.05, kl_free=target)
        assert measured(scores, selection=selection).objective == pytest.approx(2.5 - 0.05 * paid)


def test_an_evaluation_is_reported_with_the_iteration_that_its_policy_samples():
    evaluation = Evaluation(
        prompts=["p"] * 2, responses=["r"] * 2, rewards=[1.0, 2.0], breakdown={}, kl_per_response=[0.5, 1.5],
        response_lengths=[3, 4],
    )  # fmt: skip
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
