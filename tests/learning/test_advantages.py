import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from konic.finetuning.learning.advantages import (
    gae,
    group_centred,
    group_mean_normalised,
    group_normalised,
    leave_one_out,
    parts_normalised,
    token_rewards,
    whiten,
)

GARBAGE = (math.nan, math.inf, -math.inf, 1e30, -7.0)
EIGHTHS = st.integers(-32, 32).map(lambda n: n / 8)  # sums and differences of these are exact


@st.composite
def masked_batches(draw, channels=2, numbers=EIGHTHS):
    """(mask [B][R], channels x [B][R] of numbers); every row counts at least one token, holes anywhere."""
    num_rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    rows = st.lists(st.booleans(), min_size=length, max_size=length).filter(any)
    mask = draw(st.lists(rows, min_size=num_rows, max_size=num_rows))
    table = st.lists(st.lists(numbers, min_size=length, max_size=length), min_size=num_rows, max_size=num_rows)
    return mask, *(draw(table) for _ in range(channels))


def tensor(rows, dtype=torch.float64):
    return torch.tensor(rows, dtype=dtype)


def with_garbage(values, mask):
    """The values with something different under every masked-out position."""
    fill = torch.tensor([GARBAGE[i % len(GARBAGE)] for i in range(values.numel())], dtype=values.dtype)
    return torch.where(mask, values, fill.view_as(values))


def plain_gae(rewards, values, mask, gamma, gae_lambda):
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, over the tokens that count: the paper's formula, O(n^2)."""
    advantages = [0.0] * len(mask)
    counted = [t for t, counts in enumerate(mask) if counts]
    v = [values[t] for t in counted] + [0.0]
    deltas = [rewards[t] + gamma * v[i + 1] - v[i] for i, t in enumerate(counted)]
    for i, t in enumerate(counted):
        advantages[t] = math.fsum((gamma * gae_lambda) ** k * delta for k, delta in enumerate(deltas[i:]))
    return advantages


def test_token_rewards_stay_on_the_device_of_what_is_given():
    """A tensor of "meta" refuses to be computed with one of the CPU, as a GPU's does."""
    scores, ratios, mask = torch.zeros(2), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    assert token_rewards(scores.to("meta"), ratios.to("meta"), mask.to("meta"), 0.1).device.type == "meta"


def test_the_score_lands_once_on_the_last_response_token():
    mask = torch.tensor([[True, True, True], [True, False, False], [True, False, True], [False, True, False]])
    scores = tensor([1.0, 2.0, 3.0, 4.0])
    rewards = token_rewards(scores, torch.zeros(4, 3, dtype=torch.float64), mask, 0.05)
    assert rewards.tolist() == [[0, 0, 1], [2, 0, 0], [0, 0, 3], [0, 4, 0]]


def test_token_rewards_worked_by_hand():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    log_ratios = tensor([[0.5, -1.0, 9.0], [2.0, 0.0, 4.0]])
    rewards = token_rewards(tensor([1.0, -1.0]), log_ratios, mask, 0.25)
    assert rewards.tolist() == [[-0.125, 1.25, 0.0], [-0.5, 0.0, -2.0]]


@settings(deadline=None, max_examples=50)
@given(masked_batches(channels=1), st.lists(EIGHTHS, min_size=4, max_size=4), st.floats(0, 1))
def test_token_rewards_sum_to_score_less_beta_times_kl(batch, scores, beta):
    mask, log_ratios = batch
    scores = scores[: len(mask)]
    got = token_rewards(
        tensor(scores), with_garbage(tensor(log_ratios), tensor(mask).bool()), tensor(mask).bool(), beta
    )
    for row, score, counts, ratios in zip(got.tolist(), scores, mask, log_ratios, strict=True):
        kl = math.fsum(ratio for ratio, c in zip(ratios, counts, strict=True) if c)
        assert math.fsum(row) == pytest.approx(score - beta * kl, abs=1e-6)
        assert all(reward == 0 for reward, c in zip(row, counts, strict=True) if not c)


def test_token_rewards_sum_to_score_less_beta_times_kl_in_single_precision():
    generator = torch.Generator().manual_seed(1)
    log_ratios = torch.rand(16, 48, generator=generator) - 0.5
    scores = torch.rand(16, generator=generator) * 4 - 2
    mask = torch.arange(48) < torch.arange(3, 51, 3)[:, None]
    got = token_rewards(scores, log_ratios, mask, 0.05).double().sum(dim=1)
    expected = scores.double() - 0.05 * torch.where(mask, log_ratios.double(), 0.0).sum(dim=1)
    assert (got - expected).abs().max() <= 1e-6


def test_gae_worked_by_hand():
    rewards, values = tensor([[1.0, 2.0, 4.0]]), tensor([[0.5, 1.0, 2.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5)
    # delta = [1 + .5*1 - .5, 2 + .5*2 - 1, 4 + 0 - 2] = [1, 2, 2]; each step back multiplies by 1/4
    assert advantages.tolist() == [[1 + 2.5 / 4, 2.5, 2.0]]
    assert returns.tolist() == [[1 + 2.5 / 4 + 0.5, 3.5, 4.0]]


def test_gae_steps_over_holes_as_if_they_were_not_there():
    rewards = tensor([[1.0, math.nan, 2.0, math.inf, 4.0, math.nan]])
    values = tensor([[0.5, math.inf, 1.0, math.nan, 2.0, -math.inf]])
    mask = torch.tensor([[True, False, True, False, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[1.625, 0, 2.5, 0, 2.0, 0]]
    assert returns.tolist() == [[2.125, 0, 3.5, 0, 4.0, 0]]


@settings(deadline=None, max_examples=150)
@given(masked_batches(), st.floats(0.01, 1), st.floats(0, 1))
def test_gae_is_the_papers_sum_of_discounted_residuals(batch, gamma, gae_lambda):
    mask, rewards, values = batch
    flags = tensor(mask).bool()
    advantages, returns = gae(
        with_garbage(tensor(rewards), flags), with_garbage(tensor(values), flags), flags, gamma, gae_lambda
    )
    for b, counts in enumerate(mask):
        expected = plain_gae(rewards[b], values[b], counts, gamma, gae_lambda)
        assert advantages[b].tolist() == pytest.approx(expected, abs=1e-9)
        sums = [a + v if c else 0.0 for a, v, c in zip(expected, values[b], counts, strict=True)]
        assert returns[b].tolist() == pytest.approx(sums, abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(masked_batches())
def test_lambda_one_gives_the_return_less_the_value_exactly(batch):
    mask, rewards, values = batch
    flags = tensor(mask).bool()
    advantages, returns = gae(tensor(rewards), tensor(values), flags, gamma=1.0, gae_lambda=1.0)
    for b, counts in enumerate(mask):
        for t, c in enumerate(counts):
            to_go = sum(rewards[b][s] for s in range(t, len(counts)) if counts[s])
            assert returns[b, t] == (to_go if c else 0)
            assert advantages[b, t] == (to_go - values[b][t] if c else 0)


def test_lambda_zero_gives_the_one_step_residuals():
    rewards, values = tensor([[1.0, 2.0, 4.0]]), tensor([[0.5, 1.0, 2.0]])
    advantages, _ = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, gae_lambda=0.0)
    assert advantages.tolist() == [[1.5, 3.0, 2.0]]


def test_more_padding_changes_no_advantage():
    generator = torch.Generator().manual_seed(2)
    rewards, values = (torch.randn(3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]])
    padded = [torch.cat([x, torch.full((3, 5), math.nan, dtype=x.dtype)], dim=1) for x in (rewards, values)]
    longer = torch.cat([mask, torch.zeros(3, 5, dtype=torch.bool)], dim=1)
    short, long = gae(rewards, values, mask, 0.9, 0.95), gae(*padded, longer, 0.9, 0.95)
    for before, after in zip(short, long, strict=True):
        assert torch.equal(before, after[:, :7])
        assert not after[:, 7:].any()


def test_whitening_worked_by_hand_over_the_whole_batch():
    mask = torch.tensor([[True, True, False], [True, False, True]])
    whitened = whiten(tensor([[0.0, 2.0, 99.0], [4.0, -99.0, 6.0]]), mask)
    std = math.sqrt((9 + 1 + 1 + 9) / 3)  # mean 3, unbiased
    expected = tensor([[-3 / std, -1 / std, 0], [1 / std, 0, 3 / std]])
    assert (whitened - expected).abs().max() <= 1e-7


@settings(deadline=None, max_examples=100)
@given(masked_batches(channels=1))
def test_whitened_values_have_mean_zero_and_unbiased_deviation_one_or_are_zero(batch):
    mask, values = batch
    flags = tensor(mask).bool()
    whitened = whiten(with_garbage(tensor(values), flags), flags)
    assert not whitened[~flags].any()
    counted = [v for row, counts in zip(values, mask, strict=True) for v, c in zip(row, counts, strict=True) if c]
    got = whitened[flags].tolist()
    if len(set(counted)) < 2:
        assert got == [0.0] * len(counted)
    else:
        mean, std = statistics.fmean(counted), statistics.stdev(counted)
        assert got == pytest.approx([(v - mean) / std for v in counted], abs=1e-6)
        assert statistics.fmean(got) == pytest.approx(0, abs=1e-9)
        assert statistics.stdev(got) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [2, 3, 7, 100])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, -3.3, 1000.1])
def test_equal_values_whiten_to_zero_although_their_mean_is_rounded(value, count, dtype):
    values = torch.full((1, count), value, dtype=dtype)
    assert not whiten(values, torch.ones_like(values, dtype=torch.bool)).any()


def test_values_that_differ_little_still_whiten():
    values = torch.tensor([[0.7, 0.701]])
    whitened = whiten(values, torch.ones_like(values, dtype=torch.bool))
    assert whitened[0].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], abs=1e-3)


@pytest.mark.parametrize("num_counted", [0, 1])
def test_fewer_than_two_values_whiten_to_zero(num_counted):
    mask = torch.arange(4)[None] < num_counted
    assert whiten(with_garbage(torch.full((1, 4), 5.0), mask), mask).tolist() == [[0.0] * 4]


GROUPS = [[0.0, 1.0, 5.0], [2.0, 2.0, 2.0]]


def test_group_relative_scores_worked_by_hand():
    scores, every = tensor(GROUPS), torch.ones(2, 3, dtype=torch.bool)
    assert group_centred(scores, every).tolist() == [[-2.0, -1.0, 3.0], [0.0] * 3]
    assert leave_one_out(scores, every).tolist() == [[-3.0, -1.5, 4.5], [0.0] * 3]
    spread = math.sqrt((4 + 1 + 9) / 2) + 1e-4
    assert group_normalised(scores, every)[0].tolist() == pytest.approx([-2 / spread, -1 / spread, 3 / spread])
    assert leave_one_out(tensor([[1.0, 4.0]]), every[:1, :2]).tolist() == [[-3.0, 3.0]]
    pair = group_normalised(tensor([[1.0, 4.0]]), every[:1, :2])[0].tolist()
    assert pair == pytest.approx([-1.5 / (math.sqrt(4.5) + 1e-4), 1.5 / (math.sqrt(4.5) + 1e-4)])


def test_a_missing_score_is_no_member_of_its_group():
    scores = tensor([[0.0, 1.0, 99.0, 5.0]])
    mask = torch.tensor([[True, True, False, True]])
    assert group_centred(scores, mask).tolist() == [[-2.0, -1.0, 0.0, 3.0]]
    assert leave_one_out(scores, mask).tolist() == [[-3.0, -1.5, 0.0, 4.5]]
    garbage = scores.masked_fill(~mask, torch.nan)
    for function in (group_centred, leave_one_out, group_normalised):
        assert torch.equal(function(scores, mask), function(garbage, mask))


@given(st.lists(st.lists(st.tuples(EIGHTHS, st.booleans()), min_size=5, max_size=5), min_size=1, max_size=3))
def test_group_relative_scores_follow_their_papers(groups):
    scores = tensor([[score for score, _ in group] for group in groups])
    mask = torch.tensor([[present for _, present in group] for group in groups])
    found = [function(scores, mask).tolist() for function in (leave_one_out, group_normalised, group_centred)]
    for index, group in enumerate(groups):
        present = [score for score, is_present in group if is_present]
        for position, (score, is_present) in enumerate(group):
            expected = [0.0, 0.0, 0.0]
            if is_present and len(present) > 1:
                others = [s for at, (s, there) in enumerate(group) if there and at != position]
                centred = score - statistics.mean(present)
                spread = statistics.stdev(present) + 1e-4
                expected = [score - statistics.mean(others), centred / spread, centred]
            assert [rows[index][position] for rows in found] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 1.1, -3.3, 1e6 / 3, 1e-9])
@pytest.mark.parametrize("count", [2, 3, 5, 6, 7, 10])
def test_equal_groups_give_exactly_zero_although_their_mean_is_rounded(value, count, dtype):
    """Beside a group that does vary, and with one score missing from the equal one."""
    scores = torch.full((2, count + 1), value, dtype=dtype)
    scores[1] = torch.arange(count + 1)
    mask = torch.ones(2, count + 1, dtype=torch.bool)
    mask[0, 1] = False
    for function in (leave_one_out, group_normalised, group_centred):
        found = function(scores, mask)
        assert (found[0] == 0).all()
        assert (found[1] != 0).any()


@pytest.mark.parametrize("num_scores", [0, 1])
def test_groups_of_fewer_than_two_scores_give_zero(num_scores):
    scores, mask = tensor([[1.5, 2.5, 3.5]]), torch.arange(3)[None] < num_scores
    for function in (leave_one_out, group_normalised, group_centred):
        assert function(scores, mask).tolist() == [[0.0] * 3]


def test_max_rl_worked_by_hand():
    scores = tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [2.0, 1.0, 3.0, 9.0], [-1.0, -2.0, 1.0, 0.0]])
    mask = torch.tensor([[True] * 4, [True] * 4, [True, True, True, False], [True] * 4])
    found = group_mean_normalised(scores, mask)
    assert found[0].tolist() == pytest.approx([3.0, -1.0, -1.0, -1.0])
    assert found[1].tolist() == [0.0] * 4  # no success: nothing to follow
    assert found[2].tolist() == pytest.approx([0.0, -0.5, 0.5, 0.0])
    assert found[3].tolist() == [0.0] * 4  # a mean below 0 has no likelihood


def test_max_rls_expectation_is_the_gradient_of_the_truncated_log_likelihood():
    """With n samples of success probability p, E[Σ A_i ∂ log π(y_i)] / n is Σ_{k<n} (1 − p)^k per unit of ∂p."""
    n, p = 4, 0.3
    expected = 0.0
    for outcome in range(2**n):
        wins = [bool(outcome >> index & 1) for index in range(n)]
        chance = math.prod(p if win else 1 - p for win in wins)
        rewards = tensor([[float(win) for win in wins]])
        advantages = group_mean_normalised(rewards, torch.ones(1, n, dtype=torch.bool))[0]
        score = [1 / p if win else -1 / (1 - p) for win in wins]  # ∂ log P(outcome) / ∂p
        expected += chance * sum(a * s for a, s in zip(advantages.tolist(), score, strict=True)) / n
    assert expected == pytest.approx(sum((1 - p) ** k for k in range(n)) - (1 - p) ** (n - 1), abs=1e-12)


def test_parts_of_equal_values_count_nothing_and_the_sum_is_whitened():
    parts = tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0], [0.0, 1.0, math.nan, 0.0]])
    mask = torch.tensor([[True] * 4, [True] * 4, [True, True, False, True]])
    found = parts_normalised(parts, mask, tensor([1.0, 7.0, 0.0]), group_size=2)
    unit = 0.5 / (math.sqrt(0.5) + 1e-4)  # half the distance over the unbiased deviation, in both groups
    spread = statistics.stdev([-unit, unit, -unit, unit]) + 1e-4
    assert found.tolist() == pytest.approx([-unit / spread, unit / spread] * 2)
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    assert parts_normalised(parts.nan_to_num(), nothing, tensor([1.0, 7.0, 1.0]), 2).tolist() == [0.0] * 4
