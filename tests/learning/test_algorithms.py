"""Every row of the table against the paper's formula written out in plain Python, one response at a time."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from conftest import prompt_batch, roll, shake_adapter, tiny_learner
from konic.finetuning.algorithms import ALGORITHMS
from konic.finetuning.config import GenerationConfig, TrainingConfig
from konic.finetuning.learning.estimators import compute_advantages
from konic.finetuning.rewards.scoring import Scores
from konic.finetuning.rollout.sampler import RandomKey

NAN = math.nan
GROUP_METHODS = ("rloo", "grpo", "dr_grpo")
SCORES = [0.3, -1.0, 2.0, 0.1, 0.7, -0.2, 1.1, 0.0]
BETA = 0.3
GENERATION = GenerationConfig(max_new_tokens=8, temperature=0.9, eos_token_id=tuple(range(40)))  # so that lengths vary


@pytest.fixture(scope="module")
def rolled():
    """Eight responses of unequal lengths, of a policy that differs from its reference and has values."""
    learner = tiny_learner("llama", generation=GENERATION)
    shake_adapter(learner.policy)
    return roll(learner, prompt_batch(learner), GENERATION, RandomKey(3, 1))


def settings(algorithm, **values):
    return TrainingConfig(**{"algorithm": algorithm, "batch_size": 8} | values)


def plain(rolled):
    """Per response: the log-ratios to the reference and the values of its own tokens."""
    for row, mask in enumerate(rolled.response_mask):
        ratios = (rolled.log_probs[row] - rolled.ref_log_probs[row])[mask].tolist()
        yield ratios, rolled.values[row][mask].tolist()


def check(found, rolled, rows):
    """Advantages [B, R] against plain lists, one per response."""
    for row, (mask, expected) in enumerate(zip(rolled.response_mask, rows, strict=True)):
        assert found[row][mask].tolist() == pytest.approx(expected, abs=1e-9), row
        assert (found[row][~mask] == 0).all()


def whitened(rows):
    flat = [value for row in rows for value in row]
    mean, spread = statistics.mean(flat), statistics.stdev(flat)
    return [[(value - mean) / (spread + 1e-8) for value in row] for row in rows]


def test_lengths_differ(rolled):
    assert len(set(rolled.response_mask.sum(dim=1).tolist())) > 3


def test_ppo_is_gae_on_the_score_and_the_kl_whitened(rolled):
    expected, returns = [], []
    for score, (ratios, values) in zip(SCORES, plain(rolled), strict=True):
        rewards = [-BETA * ratio for ratio in ratios]
        rewards[-1] += score
        deltas = [r + 0.9 * v_next - v for r, v, v_next in zip(rewards, values, [*values[1:], 0.0], strict=True)]
        row = [
            sum((0.9 * 0.8) ** (later - t) * deltas[later] for later in range(t, len(deltas)))
            for t in range(len(deltas))
        ]
        expected.append(row)
        returns.append([a + v for a, v in zip(row, values, strict=True)])
    config = settings("ppo", gamma=0.9, gae_lambda=0.8)
    found = compute_advantages(rolled, Scores(SCORES, {}), config, BETA)
    check(found.advantages, rolled, whitened(expected))
    check(found.returns, rolled, returns)
    assert (found.value_loss_weight, found.kl_loss_weight) == (0.1, 0.0)


def test_reinforce_plus_plus_is_the_reward_to_come_whitened_over_the_batch(rolled):
    expected = []
    for score, (ratios, _) in zip(SCORES, plain(rolled), strict=True):
        expected.append([score - BETA * math.fsum(ratios[t:]) for t in range(len(ratios))])
    found = compute_advantages(rolled, Scores(SCORES, {}), settings("reinforce++"), BETA)
    check(found.advantages, rolled, whitened(expected))
    assert (found.value_loss_weight, found.kl_loss_weight) == (0.0, 0.0)


def test_rloo_is_the_penalised_reward_less_the_mean_of_the_others(rolled):
    totals = [s - BETA * math.fsum(ratios) for s, (ratios, _) in zip(SCORES, plain(rolled), strict=True)]
    expected = []
    for row, (ratios, _) in enumerate(plain(rolled)):
        group = range(row // 4 * 4, row // 4 * 4 + 4)
        others = [totals[other] for other in group if other != row]
        expected.append([totals[row] - statistics.mean(others)] * len(ratios))
    found = compute_advantages(rolled, Scores(SCORES, {}), settings("rloo"), BETA)
    check(found.advantages, rolled, expected)
    assert (found.value_loss_weight, found.kl_loss_weight) == (0.0, 0.0)


@pytest.mark.parametrize(("algorithm", "num_generations"), [("grpo", 4), ("grpo", 2), ("dr_grpo", 4), ("dr_grpo", 8)])
def test_grpo_is_the_reward_within_its_group_with_and_without_its_deviation(rolled, algorithm, num_generations):
    expected = []
    for row, (ratios, _) in enumerate(plain(rolled)):
        start = row // num_generations * num_generations
        group = SCORES[start : start + num_generations]
        centred = SCORES[row] - statistics.mean(group)
        divisor = statistics.stdev(group) + 1e-4 if algorithm == "grpo" else 1.0
        expected.append([centred / divisor] * len(ratios))
    config = settings(algorithm, num_generations=num_generations)
    found = compute_advantages(rolled, Scores(SCORES, {}), config, BETA)
    check(found.advantages, rolled, expected)
    assert (found.value_loss_weight, found.kl_loss_weight) == (0.0, BETA)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_penalty_goes_into_the_reward_or_the_loss_and_never_both(rolled, algorithm):
    scores = Scores(SCORES, {})
    for placement in ("reward", "loss"):
        config = settings(algorithm, kl_placement=placement)
        free, priced = (compute_advantages(rolled, scores, config, beta) for beta in (0.0, BETA))
        assert torch.equal(free.advantages, priced.advantages) == (placement == "loss")
        assert priced.kl_loss_weight == (BETA if placement == "loss" else 0.0)
        assert free.kl_loss_weight == 0.0


@pytest.mark.parametrize("algorithm", GROUP_METHODS)
@pytest.mark.parametrize("value", [0.1, -3.3, 0.0, 1e6])
def test_groups_of_equal_rewards_give_exactly_zero(rolled, algorithm, value):
    scores = Scores([value] * 4 + SCORES[4:], {})
    found = compute_advantages(rolled, scores, settings(algorithm), 0.0)
    assert (found.advantages[:4] == 0).all()
    assert (found.advantages[4:] != 0).any()
    assert found.advantages.isfinite().all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_sample_without_a_score_changes_nothing_for_the_others(rolled, algorithm):
    with_gap = [*SCORES[:2], NAN, *SCORES[3:]]
    config = settings(algorithm)
    found = compute_advantages(rolled, Scores(with_gap, {}), config, BETA)
    assert (found.advantages[2] == 0).all() and (found.returns[2] == 0).all()
    assert not found.mask[2].any()
    assert torch.equal(found.mask[3], rolled.response_mask[3])
    if algorithm in GROUP_METHODS:
        totals = [
            s - BETA * math.fsum(r) * (algorithm == "rloo") for s, (r, _) in zip(SCORES, plain(rolled), strict=True)
        ]
        group = [totals[0], totals[1], totals[3]]
        if algorithm == "rloo":
            expected = totals[0] - (totals[1] + totals[3]) / 2
        else:
            divisor = statistics.stdev(group) + 1e-4 if algorithm == "grpo" else 1.0
            expected = (totals[0] - statistics.mean(group)) / divisor
        assert found.advantages[0, 0].item() == pytest.approx(expected, abs=1e-9)
    else:
        kept = [row for row in range(8) if row != 2]
        flat = torch.cat([found.advantages[row][rolled.response_mask[row]] for row in kept])
        assert flat.mean().item() == pytest.approx(0.0, abs=1e-9)
        assert flat.std().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("algorithm", GROUP_METHODS)
def test_a_group_with_a_single_score_gives_zero(rolled, algorithm):
    found = compute_advantages(rolled, Scores([1.5, NAN, NAN, NAN, *SCORES[4:]], {}), settings(algorithm), 0.0)
    assert (found.advantages[:4] == 0).all()
    assert found.advantages.isfinite().all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_missing_end_is_paid_for_by_those_cut_off(rolled, algorithm):
    ended = torch.tensor([True, False] * 4)
    cut = replace(rolled, samples=replace(rolled.samples, ended=ended))
    charged = [score - 0.5 * (not end) for score, end in zip(SCORES, ended.tolist(), strict=True)]
    found = compute_advantages(cut, Scores(SCORES, {}), settings(algorithm, missing_eos_penalty=0.5), BETA)
    expected = compute_advantages(rolled, Scores(charged, {}), settings(algorithm), BETA)
    assert torch.allclose(found.advantages, expected.advantages, atol=1e-12)
    assert torch.allclose(found.returns, expected.returns, atol=1e-12)
