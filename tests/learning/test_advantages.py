import itertools
import math
import statistics

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from konic.finetuning.learning.advantages import (
    effective_sample_size,
    equal_groups,
    gae,
    group_centred,
    group_mean_normalised,
    group_normalised,
    lambdas_by_length,
    leave_one_out,
    overlong_penalties,
    parts_normalised,
    sampler_weights,
    standard_deviation,
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


def test_gae_with_a_lambda_for_each_response_worked_by_hand():
    """As many responses as tokens: a λ that went along the tokens would not be noticed by its shape."""
    rewards, values = tensor([[1.0, 2.0, 4.0]] * 3), tensor([[0.5, 1.0, 2.0]] * 3)
    lambdas = tensor([0.0, 0.5, 1.0])
    advantages, returns = gae(rewards, values, torch.ones(3, 3, dtype=torch.bool), 0.5, lambdas)
    # the residuals are [1, 2, 2]; each step back multiplies by 0, 1/4 or 1/2
    assert advantages.tolist() == [[1.0, 2.0, 2.0], [1.625, 2.5, 2.0], [2.5, 3.0, 2.0]]
    assert returns.tolist() == [[1.5, 3.0, 4.0], [2.125, 3.5, 4.0], [3.0, 4.0, 4.0]]


@settings(deadline=None, max_examples=100)
@given(masked_batches(), st.floats(0.01, 1), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_every_response_has_the_advantages_of_its_own_lambda(batch, gamma, lambdas):
    mask, rewards, values = batch
    lambdas, flags = lambdas[: len(mask)], tensor(mask).bool()
    inputs = with_garbage(tensor(rewards), flags), with_garbage(tensor(values), flags), flags
    advantages, returns = gae(*inputs, gamma, tensor(lambdas))
    for b, gae_lambda in enumerate(lambdas):
        expected = plain_gae(rewards[b], values[b], mask[b], gamma, gae_lambda)
        assert advantages[b].tolist() == pytest.approx(expected, abs=1e-9)
        alone = gae(*(each[b : b + 1] for each in inputs), gamma, gae_lambda)
        assert torch.equal(advantages[b], alone[0][0]) and torch.equal(returns[b], alone[1][0])


def test_lambdas_by_length_worked_by_hand():
    mask = torch.arange(40) < torch.tensor([[40], [25], [21], [20], [19], [1]])
    assert lambdas_by_length(mask, 0.05).tolist() == pytest.approx([0.5, 0.2, 1 / 21, 0.0, 0.0, 0.0], abs=1e-9)
    assert lambdas_by_length(mask, 1.0).tolist() == pytest.approx([39 / 40, 24 / 25, 20 / 21, 19 / 20, 18 / 19, 0.0])


@settings(deadline=None, max_examples=50)
@given(masked_batches(channels=0), st.floats(0.01, 10))
def test_lambdas_by_length_count_the_tokens_of_a_response_and_are_never_negative(batch, alpha):
    (mask,) = batch
    found = lambdas_by_length(torch.tensor(mask), alpha).tolist()
    assert found == pytest.approx([max(0.0, 1 - 1 / (alpha * sum(row))) for row in mask], abs=1e-9)
    assert all(0 <= value < 1 for value in found)


def test_the_longer_a_response_the_larger_its_lambda():
    lengths = torch.arange(1, 200)
    found = lambdas_by_length(torch.arange(199) < lengths[:, None], 0.1)
    assert not found[lengths <= 10].any()
    assert (found[lengths >= 10].diff() > 0).all()


def test_overlong_penalties_worked_by_hand():
    lengths = torch.tensor([1, 79, 80, 81, 90, 99, 100])
    found = overlong_penalties(lengths, max_length=100, share=0.2, most=2.0).tolist()
    assert found == pytest.approx([0.0, 0.0, 0.0, 0.1, 1.0, 1.9, 2.0], abs=1e-9)
    assert found[:3] == [0.0] * 3
    assert overlong_penalties(torch.tensor([1, 3, 4]), 4, share=1.0, most=1.0).tolist() == [0.25, 0.75, 1.0]
    for less_than_a_token in (0.01, 0.25):
        assert overlong_penalties(torch.tensor([2, 3, 4]), 4, less_than_a_token, most=2.0).tolist() == [0.0, 0.0, 2.0]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 60), st.floats(0.01, 1), st.floats(0, 5))
@example(27, 0.03955704816021122, 4.0)
def test_overlong_penalties_are_those_of_the_paper(max_length, share, most):
    cache = share * max_length
    lengths = list(range(1, max_length + 1))
    found = overlong_penalties(torch.tensor(lengths), max_length, share, most).tolist()
    for length, penalty in zip(lengths, found, strict=True):
        reward = 0.0 if length <= max_length - cache else ((max_length - cache) - length) / cache
        assert penalty == pytest.approx(-most * reward, abs=1e-8)  # the buffer is rounded to nine digits
        assert 0 <= penalty <= most
    assert found == sorted(found)
    assert found[-1] == most


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
    assert group_mean_normalised(tensor([[-1.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool)).tolist() == [[0.0, 0.0]]


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
    with pytest.raises(ValueError, match="shorter"):
        parts_normalised(parts, mask, tensor([1.0]), 2)


def test_of_one_response_with_parts_nothing_is_learned_and_of_two_their_difference():
    parts = tensor([[1.0, 3.0, 5.0, 5.0]])
    one, two = (torch.tensor([[True, has_two, False, False]]) for has_two in (False, True))
    assert parts_normalised(parts, one, tensor([2.0]), group_size=2).tolist() == [0.0] * 4
    found = parts_normalised(parts, two, tensor([2.0]), group_size=2).tolist()
    assert found == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5), 0.0, 0.0], rel=1e-3)


def test_equal_groups_worked_by_hand():
    scores = tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 2.0], [2.0, 1.0, 1.0], [5.0, math.nan, 5.0], [5.0, math.inf, 6.0]])
    mask = torch.tensor([[True] * 3] * 3 + [[True, False, True]] * 2)
    found = equal_groups(scores, mask)
    assert found.dtype == torch.bool
    assert found.tolist() == [True, False, False, True, False]


NEARLY_EQUAL = (0.1, math.nextafter(0.1, 1), 0.1 + 0.2, 0.3, 0.0, -0.0, 5e-324, 1e300, -1e300, 1.7e308, -1.7e308)


@settings(deadline=None, max_examples=200)
@given(st.data(), st.integers(1, 6), st.lists(st.sampled_from(NEARLY_EQUAL), min_size=1, max_size=2))
def test_groups_are_equal_only_if_all_their_scores_are_exactly(data, size, choices):
    group = st.lists(st.tuples(st.sampled_from(choices), st.booleans()), min_size=size, max_size=size)
    groups = data.draw(st.lists(group, min_size=1, max_size=4))
    mask = torch.tensor([[counts for _, counts in group] for group in groups])
    scores = with_garbage(tensor([[score for score, _ in group] for group in groups]), mask)
    expected = [len({score for score, counts in group if counts}) < 2 for group in groups]
    assert equal_groups(scores, mask).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, -3.3, 1e6 / 3, 3e38])
def test_a_group_stays_equal_although_its_mean_is_rounded_until_one_score_differs_in_the_last_bit(value, dtype):
    for count in range(2, 12):
        scores = torch.full((1, count), value, dtype=dtype)
        every = torch.ones_like(scores, dtype=torch.bool)
        assert equal_groups(scores, every).tolist() == [True]
        for position in range(count):
            other = scores.clone()
            other[0, position] = torch.nextafter(scores[0, 0], torch.zeros((), dtype=dtype))
            assert equal_groups(other, every).tolist() == [False]


@pytest.mark.parametrize("num_scores", [0, 1])
def test_groups_of_fewer_than_two_scores_are_equal(num_scores):
    assert equal_groups(tensor([[1.5, 2.5, 3.5]]), torch.arange(3)[None] < num_scores).tolist() == [True]


corrections = pytest.mark.parametrize(("drops_others", "by_sequence"), [*itertools.product([False, True], repeat=2)])


@pytest.mark.parametrize(
    ("drops_others", "by_sequence", "expected"),
    [
        (False, False, [[2.0, 0.5, 2.0, 0.2, 0.0], [2.0, 2.0, 0.0, 0.0, 0.0], [0.6, 0.0, 0.5, 0.0, 0.0]]),
        (True, False, [[2.0, 0.5, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0, 0.0], [0.6, 0.0, 0.5, 0.0, 0.0]]),
        (False, True, [[0.8, 0.8, 0.8, 0.8, 0.0], [2.0, 2.0, 0.0, 0.0, 0.0], [0.3, 0.0, 0.3, 0.0, 0.0]]),
        (True, True, [[0.8, 0.8, 0.8, 0.8, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]),
    ],
)
def test_sampler_weights_worked_by_hand(drops_others, by_sequence, expected):
    ratios = tensor([[2.0, 0.5, 4.0, 0.2, 9.0], [2.0, 3.0, 9.0, 9.0, 9.0], [0.6, 9.0, 0.5, 9.0, 9.0]])
    mask = torch.tensor([[True] * 4 + [False], [True] * 2 + [False] * 3, [True, False, True, False, False]])
    found = sampler_weights(ratios.log(), mask, 2.0, drops_others=drops_others, by_sequence=by_sequence)
    assert found.flatten().tolist() == pytest.approx(tensor(expected).flatten().tolist(), abs=1e-12)
    assert not found[~mask].any()


def plain_sampler_weights(log_ratios, mask, limit, drops_others, by_sequence):
    """One response, from the definition."""
    product = math.prod(math.exp(ratio) for ratio, counts in zip(log_ratios, mask, strict=True) if counts)
    weights = []
    for ratio, counts in zip(log_ratios, mask, strict=True):
        weight = product if by_sequence else math.exp(ratio)
        if drops_others:
            weight = weight if 1 / limit <= weight <= limit else 0.0
        weights.append(min(weight, limit) if counts else 0.0)
    return weights


@corrections
@settings(deadline=None, max_examples=50)
@given(masked_batches(channels=1), st.sampled_from([1.1, 1.5, 2.0, 5.0, 10.0]))
def test_sampler_weights_follow_the_definition_whatever_is_outside_the_mask(drops_others, by_sequence, batch, limit):
    mask, log_ratios = batch
    flags = tensor(mask).bool()
    garbled = with_garbage(tensor(log_ratios), flags)
    found = sampler_weights(garbled, flags, limit, drops_others=drops_others, by_sequence=by_sequence)
    for row, ratios, counts in zip(found.tolist(), log_ratios, mask, strict=True):
        expected = plain_sampler_weights(ratios, counts, limit, drops_others, by_sequence)
        assert row == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("by_sequence", [False, True])
def test_a_weight_on_the_edge_is_kept_and_one_past_it_is_not(by_sequence):
    edge, past = math.log(2.0), math.log(2.0) + 1e-9
    log_ratios = tensor([[edge], [-edge], [past], [-past]])
    arguments = log_ratios, torch.ones(4, 1, dtype=torch.bool), 2.0
    masked = sampler_weights(*arguments, drops_others=True, by_sequence=by_sequence).flatten().tolist()
    assert masked == pytest.approx([2.0, 0.5, 0.0, 0.0], abs=1e-12)
    truncated = sampler_weights(*arguments, drops_others=False, by_sequence=by_sequence).flatten().tolist()
    assert truncated == pytest.approx([2.0, 0.5, 2.0, 0.5], abs=1e-8)
    assert truncated[3] < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("drops_others", "by_sequence", "expected"),
    [
        (False, False, [[4.0, 0.0, 4.0], [4.0, 4.0, 4.0], [0.0, 0.0, 0.0]]),
        (True, False, [[0.0] * 3] * 3),
        (False, True, [[4.0] * 3, [4.0] * 3, [0.0] * 3]),
        (True, True, [[0.0] * 3] * 3),
    ],
)
def test_sampler_weights_do_not_overflow(drops_others, by_sequence, expected, dtype):
    log_ratios = torch.tensor([[1000.0, -1000.0, 1000.0], [1000.0] * 3, [-1000.0] * 3], dtype=dtype)
    every = torch.ones(3, 3, dtype=torch.bool)
    found = sampler_weights(log_ratios, every, 4.0, drops_others=drops_others, by_sequence=by_sequence)
    assert found.flatten().tolist() == pytest.approx(torch.tensor(expected).flatten().tolist(), abs=1e-6)


@corrections
def test_equal_policies_weigh_one_and_a_response_without_a_token_weighs_nothing(drops_others, by_sequence):
    log_ratios, mask = tensor([[0.0] * 2, [5.0] * 2]), torch.tensor([[True, True], [False, False]])
    found = sampler_weights(log_ratios, mask, 1.5, drops_others=drops_others, by_sequence=by_sequence)
    assert found.tolist() == [[1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("weights", "share"),
    [
        ([1.0, 2.0, 3.0], 6 / 7),
        ([1.0, 0.0, 0.0, 0.0], 1 / 4),
        ([3.0, 3.0, 0.0, 0.0], 1 / 2),
        ([0.25] * 8, 1.0),
        ([7.0], 1.0),
        ([0.0, 0.0], 0.0),
        ([0.0], 0.0),
    ],
)
def test_effective_sample_size_worked_by_hand(weights, share):
    assert effective_sample_size(tensor(weights)) == pytest.approx(share, rel=1e-12, abs=0)


def test_equal_weights_all_count_and_no_more_although_their_sum_is_rounded():
    found = [effective_sample_size(torch.full((n,), 0.1, dtype=torch.float64)) for n in range(1, 40)]
    assert max(found) == 1.0
    assert min(found) == pytest.approx(1.0, rel=1e-14)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.just(0.0) | st.floats(1e-3, 1e3), min_size=1, max_size=8), st.floats(1e-3, 1e3))
def test_effective_sample_size_follows_the_definition_whatever_the_scale(weights, scale):
    found = effective_sample_size(tensor(weights))
    squares = math.fsum(weight**2 for weight in weights)
    assert found == pytest.approx(math.fsum(weights) ** 2 / (len(weights) * squares) if squares else 0.0, rel=1e-12)
    assert found == 0 or 1 / len(weights) - 1e-12 <= found <= 1 + 1e-12
    assert effective_sample_size(scale * tensor(weights)) == pytest.approx(found, rel=1e-12)


def test_standard_deviation_worked_by_hand():
    values = tensor([[0.0, math.nan, 2.0], [4.0, 6.0, math.inf]])
    found = standard_deviation(values, torch.tensor([[True, False, True], [True, True, False]]))
    assert found.shape == ()
    assert found.item() == pytest.approx(math.sqrt(20 / 3), rel=1e-12)  # mean 3: 9 + 1 + 1 + 9 over 4 − 1


@settings(deadline=None, max_examples=100)
@given(masked_batches(channels=1))
def test_standard_deviation_is_unbiased_and_exactly_zero_without_two_different_values(batch):
    mask, values = batch
    flags = tensor(mask).bool()
    found = standard_deviation(with_garbage(tensor(values), flags), flags).item()
    counted = [v for row, counts in zip(values, mask, strict=True) for v, c in zip(row, counts, strict=True) if c]
    if len(set(counted)) < 2:
        assert found == 0
    else:
        assert found == pytest.approx(statistics.stdev(counted), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 0.7, -3.3, 1000.1])
def test_equal_values_have_no_deviation_although_their_mean_is_rounded(value, dtype):
    for count in (0, 1, 2, 3, 7, 100):
        mask = torch.arange(101)[None] < count
        values = with_garbage(torch.full((1, 101), value, dtype=dtype), mask)
        assert standard_deviation(values, mask).item() == 0
