"""Every row of the table against the paper's formula written out in plain Python, one response at a time."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from conftest import prompt_batch, roll, shake_adapter, tiny_learner
from konic.finetuning.algorithms import ALGORITHMS
from konic.finetuning.config import GenerationConfig, TrainingConfig
from konic.finetuning.learning.estimators import (
    compute_advantages,
    in_equal_group,
    mean_penalty,
    reasons_left_out,
    rows_to_learn_from,
)
from konic.finetuning.rewards.scoring import Scores
from konic.finetuning.rollout.rows import join_rollouts, select_rows
from konic.finetuning.rollout.sampler import RandomKey

NAN = math.nan
GROUP_METHODS = ("rloo", "grpo", "dr_grpo")
REWARD_METHODS = [name for name in ALGORITHMS if name != "gdpo"]
"""Those that look at the reward as a whole."""
PENALISED = [name for name in REWARD_METHODS if name != "max_rl"]
"""Those that take penalties and a KL in the reward: without its mean, max_rl has no unit."""
SCORES = [0.3, -1.0, 2.0, 0.1, 0.7, -0.2, 1.1, 0.0]
BETA = 0.3
GENERATION = GenerationConfig(max_new_tokens=8, temperature=0.9, eos_token_id=tuple(range(40)))  # so that lengths vary


@pytest.fixture(scope="module")
def rolled():
    """Eight responses of unequal lengths, of a policy that differs from its reference and has values."""
    learner = tiny_learner("llama", generation=GENERATION)
    shake_adapter(learner.policy)
    return roll(learner, prompt_batch(learner), GENERATION, RandomKey(3, 1))


def scored(rewards):
    """Scores with a single part."""
    return Scores(rewards, {}, parts={"all": rewards}, weights={"all": 1.0})


def settings(algorithm, **values):
    """Without what DAPO adds to the scores and takes from the batch, unless given."""
    plain_scores = {"overlong_penalty": 0.0, "filter_equal_groups": False}
    return TrainingConfig(**{"algorithm": algorithm, "batch_size": 8} | plain_scores | values)


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
    config = settings("ppo", gamma=0.9, gae_lambda=0.8, kl_placement="reward")
    found = compute_advantages(rolled, scored(SCORES), config, BETA)
    check(found.advantages, rolled, whitened(expected))
    check(found.returns, rolled, returns)
    assert (found.value_loss_weight, found.kl_loss_weight) == (0.1, 0.0)


def test_reinforce_plus_plus_is_the_reward_to_come_whitened_over_the_batch(rolled):
    expected = []
    for score, (ratios, _) in zip(SCORES, plain(rolled), strict=True):
        expected.append([score - BETA * math.fsum(ratios[t:]) for t in range(len(ratios))])
    found = compute_advantages(rolled, scored(SCORES), settings("reinforce++"), BETA)
    check(found.advantages, rolled, whitened(expected))
    assert (found.value_loss_weight, found.kl_loss_weight) == (0.0, 0.0)


def test_rloo_is_the_penalised_reward_less_the_mean_of_the_others(rolled):
    totals = [s - BETA * math.fsum(ratios) for s, (ratios, _) in zip(SCORES, plain(rolled), strict=True)]
    expected = []
    for row, (ratios, _) in enumerate(plain(rolled)):
        group = range(row // 4 * 4, row // 4 * 4 + 4)
        others = [totals[other] for other in group if other != row]
        expected.append([totals[row] - statistics.mean(others)] * len(ratios))
    found = compute_advantages(rolled, scored(SCORES), settings("rloo"), BETA)
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
    found = compute_advantages(rolled, scored(SCORES), config, BETA)
    check(found.advantages, rolled, expected)
    assert (found.value_loss_weight, found.kl_loss_weight) == (0.0, BETA)


@pytest.mark.parametrize("algorithm", PENALISED)
def test_the_penalty_goes_into_the_reward_or_the_loss_and_never_both(rolled, algorithm):
    scores = scored(SCORES)
    for placement in ("reward", "loss"):
        config = settings(algorithm, kl_placement=placement)
        free, priced = (compute_advantages(rolled, scores, config, beta) for beta in (0.0, BETA))
        assert torch.equal(free.advantages, priced.advantages) == (placement == "loss")
        assert (priced.kl_loss_weight > 0) == (placement == "loss")
        assert free.kl_loss_weight == 0.0


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce++"])
def test_one_nat_costs_the_same_reward_in_the_loss_where_advantages_are_whitened(rolled, algorithm):
    unit = statistics.stdev(raw_advantages(rolled, algorithm))
    found = compute_advantages(rolled, scored(SCORES), settings(algorithm, kl_placement="loss", gamma=0.9), BETA)
    assert found.kl_loss_weight == pytest.approx(BETA / unit, rel=1e-9)
    tenfold = scored([10 * score for score in SCORES])
    if algorithm == "reinforce++":  # PPO's values do not grow with the scores
        larger = compute_advantages(rolled, tenfold, settings(algorithm, kl_placement="loss", gamma=0.9), 10 * BETA)
        assert torch.allclose(larger.advantages, found.advantages, atol=1e-7)
        assert larger.kl_loss_weight == pytest.approx(found.kl_loss_weight, rel=1e-6)


def raw_advantages(rolled, algorithm):
    """The advantages of all tokens before whitening, with the score on the last token and γ = 0.9, λ = 0.95."""
    flat = []
    for score, (_, values) in zip(SCORES, plain(rolled), strict=True):
        length = len(values)
        if algorithm == "reinforce++":
            flat += [0.9 ** (length - 1 - t) * score for t in range(length)]
            continue
        deltas = [0.9 * later - value for value, later in zip(values, [*values[1:], 0.0], strict=True)]
        deltas[-1] += score
        flat += [sum((0.9 * 0.95) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]
    return flat


@pytest.mark.parametrize("algorithm", [name for name in REWARD_METHODS if name not in ("ppo", "reinforce++")])
def test_beta_is_the_weight_in_the_loss_where_the_paper_says_so(rolled, algorithm):
    found = compute_advantages(rolled, scored(SCORES), settings(algorithm, kl_placement="loss"), BETA)
    assert found.kl_loss_weight == BETA


@pytest.mark.parametrize("algorithm", GROUP_METHODS)
@pytest.mark.parametrize("value", [0.1, -3.3, 0.0, 1e6])
def test_groups_of_equal_rewards_give_exactly_zero(rolled, algorithm, value):
    scores = scored([value] * 4 + SCORES[4:])
    found = compute_advantages(rolled, scores, settings(algorithm), 0.0)
    assert (found.advantages[:4] == 0).all()
    assert (found.advantages[4:] != 0).any()
    assert found.advantages.isfinite().all()


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if ALGORITHMS[name].compares_groups])
def test_groups_that_are_left_out_of_the_loss_give_no_signal_to_the_others(rolled, algorithm):
    ended = torch.tensor([False] * 4 + [True] * 4)
    cut = replace(rolled, samples=replace(rolled.samples, ended=ended))
    config = settings(algorithm, mask_truncated=True, kl_placement="loss")
    differ = [0.1, 0.4, 0.2, 0.3]
    nothing = compute_advantages(cut, scored([*differ, *[0.7] * 4]), config, BETA)
    assert nothing.mask.any(dim=1).tolist() == ended.tolist()
    assert (nothing.advantages == 0).all() and not nothing.has_signal
    assert nothing.no_signal_fraction == 1.0
    assert compute_advantages(cut, scored([*[0.7] * 4, *differ]), config, BETA).has_signal


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("scores", [[0.7] * 8, [NAN, *[0.7] * 7], [NAN] * 8])
def test_a_batch_of_equal_scores_teaches_nothing(rolled, algorithm, scores):
    config = settings(algorithm)
    found = compute_advantages(rolled, scored(scores), config, BETA)
    assert (found.advantages == 0).all()
    assert not found.has_signal
    assert found.kl_loss_weight == (BETA if config.kl_in_loss else 0.0)  # no noise of the value head divides it
    assert found.mask.any(dim=1).tolist() == [not math.isnan(score) for score in scores]
    if not math.isnan(scores[1]):
        one_differs = compute_advantages(rolled, scored([*scores[:7], 0.8]), config, BETA)
        assert (one_differs.advantages != 0).any() and one_differs.has_signal


@pytest.mark.parametrize("algorithm", [name for name, row in ALGORITHMS.items() if row.compares_groups])
def test_groups_that_are_equal_each_by_itself_teach_nothing_though_the_batch_differs(rolled, algorithm):
    scores = scored([1.0] * 4 + [2.0] * 4)
    for placement in ("reward", "loss") if algorithm in PENALISED else ("loss",):
        found = compute_advantages(rolled, scores, settings(algorithm, kl_placement=placement), BETA)
        assert not found.has_signal  # the KL alone, however small, would be taken at Adam's full step size
        assert (found.advantages == 0).all()


@pytest.mark.parametrize("offset", [1e7, 1e12, -1e12])
@pytest.mark.parametrize("algorithm", [name for name in PENALISED if name != "ppo"])  # its values are in fp32
def test_large_rewards_keep_their_differences(rolled, algorithm, offset):
    learner = tiny_learner("llama", generation=GENERATION, dtype=torch.float32)
    narrow = roll(learner, prompt_batch(learner), GENERATION, RandomKey(3, 1))
    scores = [0.0, 0.25, 0.75, 0.5, 1.0, 0.0, 0.25, 0.25]
    config = settings(algorithm, kl_placement="loss")
    found, expected = (
        compute_advantages(narrow, scored([score + add for score in scores]), config, BETA) for add in (offset, 0.0)
    )
    assert found.advantages.dtype == found.returns.dtype == torch.float32
    # fp64 has three digits behind the point left at 1e12
    assert torch.allclose(found.advantages, expected.advantages, atol=2e-15 * abs(offset) + 1e-6)


@pytest.mark.parametrize("varied", [True, False])
def test_one_score_alone_teaches_unless_the_whole_run_had_the_same(rolled, varied):
    scores = scored([NAN] * 7 + [0.7])
    found = compute_advantages(rolled, scores, settings("ppo"), BETA, scores_have_varied=varied)
    assert (found.advantages != 0).any() == varied
    assert found.has_signal == varied


def test_a_cut_off_response_differs_from_one_that_ended(rolled):
    assert 0 < int(rolled.samples.ended.sum()) < 8
    config = settings("ppo", missing_eos_penalty=1.0)
    assert (compute_advantages(rolled, scored([0.7] * 8), config, BETA).advantages != 0).any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_sample_without_a_score_changes_nothing_for_the_others(rolled, algorithm):
    with_gap = [*SCORES[:2], NAN, *SCORES[3:]]
    config = settings(algorithm)
    found = compute_advantages(rolled, scored(with_gap), config, BETA)
    assert (found.advantages[2] == 0).all() and (found.returns[2] == 0).all()
    assert not found.mask[2].any()
    assert torch.equal(found.mask[3], rolled.response_mask[3])
    if algorithm in ("dapo", "dppo", "gspo", "cispo", "sapo", "max_rl", "gdpo"):
        if algorithm == "max_rl":
            expected = (SCORES[0] - statistics.mean(others := [SCORES[0], SCORES[1], SCORES[3]])) / statistics.mean(
                others
            )
            expected = expected if statistics.mean(others) > 0 else 0.0
        elif algorithm == "gdpo":
            flat = torch.stack([found.advantages[row, 0] for row in range(8) if row != 2])
            assert flat.mean().item() == pytest.approx(0.0, abs=1e-9)
            assert flat.std().item() == pytest.approx(1.0, abs=1e-3)
            return
        else:
            other = settings("dr_grpo" if algorithm == "dppo" else "grpo")
            like_grpo = compute_advantages(rolled, scored(with_gap), other, BETA)
            assert torch.equal(found.advantages, like_grpo.advantages)
            return
        assert found.advantages[0, 0].item() == pytest.approx(expected, abs=1e-9)
    elif algorithm in GROUP_METHODS:
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
    found = compute_advantages(rolled, scored([1.5, NAN, NAN, NAN, *SCORES[4:]]), settings(algorithm), 0.0)
    assert (found.advantages[:4] == 0).all()
    assert found.advantages.isfinite().all()


@pytest.mark.parametrize("algorithm", PENALISED)
def test_the_missing_end_is_paid_for_by_those_cut_off(rolled, algorithm):
    ended = torch.tensor([True, False] * 4)
    cut = replace(rolled, samples=replace(rolled.samples, ended=ended))
    charged = [score - 0.5 * (not end) for score, end in zip(SCORES, ended.tolist(), strict=True)]
    found = compute_advantages(cut, scored(SCORES), settings(algorithm, missing_eos_penalty=0.5), BETA)
    expected = compute_advantages(rolled, scored(charged), settings(algorithm), BETA)
    assert torch.allclose(found.advantages, expected.advantages, atol=1e-12)
    assert torch.allclose(found.returns, expected.returns, atol=1e-12)


def test_max_rl_is_the_reward_relative_to_its_groups_mean(rolled):
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.5]
    found = compute_advantages(rolled, scored(rewards), settings("max_rl"), BETA)
    expected = [3.0, -1.0, -1.0, -1.0, 0.6, 0.6, -1.0, -0.2]  # means 1/4 and 5/8
    check(found.advantages, rolled, [[a] * len(r) for a, (r, _) in zip(expected, plain(rolled), strict=True)])
    assert (found.value_loss_weight, found.kl_loss_weight) == (0.0, BETA)


PARTS = {"long": [100.0, 300.0, 200.0, 400.0, 0.0, 0.0, 0.0, 0.0], "good": [0.0, 1.0, NAN, 0.5, 0.0, 1.0, 1.0, 0.0]}


def test_gdpo_weighs_each_part_in_units_of_its_own_spread_within_the_group(rolled):
    def relative(values):
        known = [value for value in values if not math.isnan(value)]
        spread = statistics.stdev(known) + 1e-4
        mean = statistics.mean(known)
        return [0.0 if math.isnan(v) or len(set(known)) == 1 else (v - mean) / spread for v in values]

    weights = {"long": 0.5, "good": 2.0}
    sums = [0.0] * 8
    for name, values in PARTS.items():
        for row, value in enumerate(relative(values[:4]) + relative(values[4:])):
            sums[row] += weights[name] * value
    expected = [(value - statistics.mean(sums)) / (statistics.stdev(sums) + 1e-4) for value in sums]
    scores = Scores([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], {}, parts=PARTS, weights=weights)
    found = compute_advantages(rolled, scores, settings("gdpo"), BETA)
    check(found.advantages, rolled, [[a] * len(r) for a, (r, _) in zip(expected, plain(rolled), strict=True)])


def test_gdpo_learns_from_parts_that_differ_where_their_sums_are_equal(rolled):
    parts = {"a": [0.0, 1.0] * 4, "b": [1.0, 0.0] * 4}
    weights = {"a": 3.0, "b": 1.0}
    scores = Scores([1.0] * 8, {}, parts=parts, weights=weights)
    found = compute_advantages(rolled, scores, settings("gdpo"), BETA)
    assert (found.advantages[::2] < 0)[rolled.response_mask[::2]].all()
    assert (found.advantages[1::2] > 0)[rolled.response_mask[1::2]].all()
    flat = Scores([1.0] * 8, {}, parts={"a": [0.1] * 8, "b": [1.0] * 8}, weights=weights)
    assert (compute_advantages(rolled, flat, settings("gdpo"), BETA).advantages == 0).all()


@given(scale=st.floats(0.01, 100), shift=st.floats(-10, 10))
@settings_of_hypothesis(max_examples=20, deadline=None)
def test_gdpo_does_not_see_the_units_of_a_part(rolled, scale, shift):
    def found(values):
        scores = Scores(SCORES, {}, parts=PARTS | {"long": values}, weights={"long": 1.0, "good": 1.0})
        return compute_advantages(rolled, scores, settings("gdpo"), BETA).advantages

    moved = [scale * (value / 100) + shift for value in PARTS["long"]]
    # 1e-4 beside a spread of at least 0.01 is at most one part in a hundred
    assert torch.allclose(found(moved), found(PARTS["long"]), atol=0.03)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_cut_off_response_can_be_left_out_of_the_loss_and_still_counts_for_its_group(rolled, algorithm):
    ended = rolled.samples.ended
    assert 0 < int(ended.sum()) < 8
    masked = compute_advantages(rolled, scored(SCORES), settings(algorithm, mask_truncated=True), BETA)
    plain_ones = compute_advantages(rolled, scored(SCORES), settings(algorithm), BETA)
    assert torch.equal(masked.mask, rolled.response_mask & ended[:, None])
    assert torch.equal(masked.advantages[ended], plain_ones.advantages[ended])
    assert (masked.advantages[~ended] == 0).all()


def test_dapo_charges_long_responses_and_leaves_equal_groups_out(rolled):
    lengths = [len(ratios) for ratios, _ in plain(rolled)]
    assert max(lengths) == 8 and min(lengths) <= 4
    scores = [0.5] * 4 + SCORES[4:]
    config = settings("dapo", overlong_share=0.5, overlong_penalty=2.0)
    charged = [score - 2.0 * max(0.0, (n - 4) / 4) for score, n in zip(scores, lengths, strict=True)]
    expected = []
    for start in (0, 4):
        group = charged[start : start + 4]
        expected += [(value - statistics.mean(group)) / (statistics.stdev(group) + 1e-4) for value in group]
    found = compute_advantages(rolled, scored(scores), config, 0.0)
    check(found.advantages, rolled, [[a] * n for a, n in zip(expected, lengths, strict=True)])
    assert found.kl_loss_weight == 0.0
    taken = [score - penalised for score, penalised in zip(scores, charged, strict=True)]
    assert mean_penalty(rolled, scored(scores), config) == pytest.approx(statistics.mean(taken), abs=1e-12)
    assert mean_penalty(rolled, scored([NAN, *scores[1:]]), config) == pytest.approx(
        statistics.mean(taken[1:]), abs=1e-12
    )
    assert mean_penalty(rolled, scored([NAN] * 8), config) == 0.0
    whole = TrainingConfig(algorithm="dapo", batch_size=8)  # equal but for the penalty is equal
    found = compute_advantages(rolled, scored(scores), whole, 0.0)
    assert not found.mask[:4].any()  # they have no part in the token average either
    assert torch.equal(found.mask[4:], rolled.response_mask[4:])
    assert reasons_left_out(rolled, scored(scores), whole) == ["equal group"] * 4 + [None] * 4


@pytest.mark.parametrize("parts", [{}, {"logged": [1.0, 2.0] * 4}])
def test_without_a_part_that_counts_gdpo_has_nothing_to_compare(rolled, parts):
    scores = Scores([NAN] * 8 if not parts else [0.0] * 8, {}, parts=parts, weights=dict.fromkeys(parts, 0.0))
    found = compute_advantages(rolled, scores, settings("gdpo"), BETA)
    assert not found.has_signal
    assert (found.advantages == 0).all()
    assert in_equal_group(rolled, scores, settings("gdpo")).all()


def test_a_response_without_a_score_is_in_no_group_and_a_dropped_batch_is_called_so(rolled):
    config = settings("dapo", filter_equal_groups=True)
    scores = scored([NAN, 1.0, 1.0, 1.0, *SCORES[4:]])
    assert reasons_left_out(rolled, scores, config) == [None, *["equal group"] * 3, *[None] * 4]
    assert reasons_left_out(rolled, replace(scores, is_dropped=True), config) == ["dropped"] * 8


def test_an_equal_group_is_equal_in_all_parts_for_gdpo(rolled):
    config = settings("gdpo", filter_equal_groups=True)
    sums_are_equal = Scores([1.0] * 8, {}, {}, {}, {"a": [0.0, 1.0] * 4, "b": [1.0, 0.0] * 4}, {"a": 1.0, "b": 1.0})
    assert not in_equal_group(rolled, sums_are_equal, config).any()
    one_equal = replace(sums_are_equal, parts={"a": [0.1] * 4 + [0.0, 1.0] * 2, "b": [NAN] * 4 + [1.0] * 4})
    assert in_equal_group(rolled, one_equal, config).tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize(
    ("scores", "rows"),
    [
        (SCORES[4:] * 3, [*range(8)]),
        ([0.1] * 4 + SCORES[4:] * 2, [*range(4, 12)]),
        (SCORES[4:] + [0.1] * 4 + SCORES[4:], [*range(4), *range(8, 12)]),
        (SCORES[4:] + [0.1] * 8, [*range(8)]),
        ([0.1] * 12, [*range(8)]),
    ],
)
def test_a_batch_takes_groups_that_differ_first_and_fills_up_with_equal_ones(rolled, scores, rows):
    three_groups = join_rollouts([rolled, select_rows(rolled, [0, 1, 2, 3])])
    config = settings("grpo", filter_equal_groups=True)
    assert rows_to_learn_from(three_groups, scored(scores), config) == rows


def test_vapo_takes_lambda_from_the_length_and_returns_for_the_values(rolled):
    config = settings("ppo", gamma=0.9, gae_lambda_length=0.5, value_gae_lambda=1.0, kl_penalty_weight=0.0)
    found = compute_advantages(rolled, scored(SCORES), config, 0.0)
    raw, returns = [], []
    for score, (_, values) in zip(SCORES, plain(rolled), strict=True):
        length = len(values)
        factor = 0.9 * max(0.0, 1 - 1 / (0.5 * length))
        deltas = [0.9 * later - value for value, later in zip(values, [*values[1:], 0.0], strict=True)]
        deltas[-1] += score
        raw.append([sum(factor ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)])
        returns.append([0.9 ** (length - 1 - t) * score for t in range(length)])
    check(found.advantages, rolled, whitened(raw))
    check(found.returns, rolled, returns)


@pytest.mark.parametrize(("how", "expected"), [("truncate", [2.0, 1.5, 0.1]), ("mask", [0.0, 1.5, 0.0])])
def test_tokens_that_another_policy_drew_are_weighted(rolled, how, expected):
    ratios = torch.tensor([3.0, 1.5, 0.1], dtype=rolled.log_probs.dtype).log()
    drawn = rolled.log_probs.clone()
    drawn[2, :3] -= ratios
    assert rolled.response_mask[2, :3].all()
    foreign = replace(rolled, samples=replace(rolled.samples, log_probs=drawn), is_rescored=True)
    config = settings("grpo", sampler_correction=how)
    found = compute_advantages(foreign, scored(SCORES), config, BETA)
    own = compute_advantages(rolled, scored(SCORES), config, BETA)
    assert torch.allclose(found.advantages[2, :3] / own.advantages[2, :3], torch.tensor(expected).double(), atol=1e-6)
    others = torch.ones_like(rolled.response_mask)
    others[2, :3] = False
    assert torch.allclose(found.advantages[others], own.advantages[others], atol=1e-6)
    weights = [*expected, *[1.0] * (int(rolled.response_mask.sum()) - 3)]
    size = math.fsum(weights) ** 2 / len(weights) / math.fsum(weight**2 for weight in weights)
    assert found.effective_sample_size == pytest.approx(size, abs=1e-6)
    assert own.effective_sample_size == 1.0
    whole = compute_advantages(
        foreign, scored(SCORES), settings("grpo", sampler_correction=how, sampler_correction_level="sequence"), BETA
    )
    product = 0.45 if how == "truncate" else 0.0
    assert torch.allclose(whole.advantages[2], product * own.advantages[2], atol=1e-6)
    far = replace(foreign, samples=replace(foreign.samples, log_probs=rolled.log_probs - 9.0))
    dropped = compute_advantages(
        far, scored(SCORES), settings("grpo", sampler_correction="mask", sampler_correction_level="sequence"), BETA
    )
    assert not dropped.advantages.any()
    assert dropped.no_signal_fraction == own.no_signal_fraction < 1, "the rewards differ, whatever is left out"
    off = compute_advantages(foreign, scored(SCORES), settings("grpo", sampler_correction=None), BETA)
    assert torch.equal(off.advantages, own.advantages)
