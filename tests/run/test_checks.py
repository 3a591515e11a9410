"""Self-checks: each fires on what it is for, once, and stays silent on a healthy run."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_measures import hand_made

from konic.finetuning.config import GenerationConfig, TrainingConfig
from konic.finetuning.errors import TrainingError
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.run.checks import FINDINGS, new_findings
from konic.finetuning.run.invariants import require_sound_rollout


def iteration(**values):
    """A healthy iteration."""
    healthy = FinetuningIterationResult(
        iteration=1, reward_mean=0.5, reward_std=0.3, reward_min=0.0, reward_max=1.0, kl_divergence=0.01,
        policy_loss=0.0, value_loss=0.0, entropy_loss=-2.0, total_loss=0.0, response_length_mean=20.0,
        response_length_std=5.0, learning_rate=1e-3, clip_fraction=0.1, approx_kl=0.01, explained_variance=0.1,
        reward_breakdown={}, generation_time_sec=1.0, reward_compute_time_sec=0.0, update_time_sec=1.0,
        total_time_sec=2.0, kl_per_response=0.2, objective=0.49, entropy=2.0, ended_fraction=0.5, num_samples=8,
        distinct_2=1.0,
    )  # fmt: skip
    return replace(healthy, **values)


def equal(value=0.5, **values):
    """An iteration in which all rewards are equal."""
    return iteration(reward_mean=value, reward_std=0.0, reward_min=value, reward_max=value, **values)


def unscored(**values):
    nothing = dict.fromkeys(("reward_mean", "reward_min", "reward_max", "objective"), math.nan)
    return iteration(num_unscored=8, reward_std=0.0, **nothing | values)


def at_once(num_texts=1):
    """An iteration whose responses end with their first token, with so many different texts."""
    return iteration(response_length_mean=1.0, ended_fraction=1.0, distinct_fraction=num_texts / 8)


GROUPS = TrainingConfig(algorithm="grpo", batch_size=8)
BUDGET = TrainingConfig(kl_budget=5.0)
MASKED = TrainingConfig(mask_truncated=True)
PPO = TrainingConfig()
HEALTHY = [iteration()] * 5
CASES = {
    "constant_reward": (PPO, [equal()] * 3),
    "single_response": (TrainingConfig(batch_size=1), [iteration(num_samples=1, reward_std=0.0)]),
    "equal_groups": (GROUPS, [iteration(no_signal_fraction=0.95)] * 3),
    "never_ends": (PPO, [iteration(ended_fraction=0.0)] * 4),
    "all_cut_off": (MASKED, [iteration(ended_fraction=0.0, num_samples=4, num_cut_off=3)] * 3),
    # the last of 20 ends among 64 responses comes within the first 40 with a probability of (40/64)^20 = 8e-5
    "stopped_ending": (PPO, [*HEALTHY, *[iteration(ended_fraction=0.0)] * 3]),
    "empty_responses": (PPO, [*[iteration(distinct_fraction=1 / 8)] * 5, *[at_once()] * 3]),
    "entropy_collapse": (PPO, [*HEALTHY, *[iteration(entropy=0.19)] * 3]),
    "no_rewards": (PPO, [*HEALTHY, *[iteration(num_unscored=8, reward_std=0.0)] * 3]),
    "beyond_budget": (BUDGET, [*HEALTHY, iteration(kl_per_response=5.1)]),
    # four standard errors of the difference are 4 · √(2 · 21/23 · 0.3²/24) = 0.33
    "objective_fell": (PPO, [*HEALTHY, *[iteration(objective=0.15)] * 3]),
    "kl_runaway": (PPO, [*HEALTHY, *[iteration(kl_per_response=10.1)] * 3]),
    "shrinking_responses": (PPO, [*HEALTHY, *[iteration(response_length_mean=5.0)] * 3]),
    "repeating_responses": (PPO, [*HEALTHY, *[iteration(distinct_fraction=0.5)] * 3]),
    "reward_hacking": (PPO, [*HEALTHY, *[iteration(reward_mean=1.5, objective=1.4, distinct_2=0.59)] * 3]),
    "sampler_differs": (PPO, [*HEALTHY, *[iteration(effective_sample_size=0.4, sampler_gap=0.7)] * 3]),
}
SAID = {
    "constant_reward": r"got the reward 0\.5: there is nothing to learn from",
    "single_response": r"batch_size=1: ppo compares the responses of a batch .*, so its reward is lost\. Set batch",
    "equal_groups": r"teaches grpo nothing\. Raise num_generations \(now 4\)",
    "never_ends": r"None of the first 32 responses ended by itself: each was cut off at max_new_tokens=48",
    "all_cut_off": r"every response of the last 3 iterations out of the loss: each was cut off at max_new_tokens=48",
    "stopped_ending": "used to end by themselves",
    "empty_responses": "is empty: the policy ends at once",
    "entropy_collapse": r"fell from 2\.00 to 0\.19 nats per token",
    "no_rewards": "Every reward abstained from every response of the last 3 iterations: nothing was learned",
    "beyond_budget": r"is 5\.1 nats per response from its reference, beyond kl_budget=5",
    "objective_fell": r"was 0\.490 in its first 3 iterations and is 0\.150 in the last 3: .* KL \(0\.2 nats ",
    "kl_runaway": r"is 10\.1 nats per response from its reference, and has been beyond 10 for 3 iterations",
    "shrinking_responses": r"shrank from 20 tokens to 5\.0",
    "repeating_responses": r"Only 50% of the responses in the last batch differ",
    "reward_hacking": r"rose from 0\.500 to 1\.500, but .* worse: 59% of the pairs of words",
    "sampler_differs": r"differed from the trainer's by 0\.7 nats per token; after correction the samples count as 40%",
}


def test_every_check_has_a_case():
    assert CASES.keys() == FINDINGS.keys() == SAID.keys()


@pytest.mark.parametrize("name", FINDINGS)
def test_a_check_fires_on_its_case_alone_and_once(name):
    config, history = CASES[name]
    found = new_findings(history, config, GenerationConfig())
    assert list(found) == [name]
    assert re.search(SAID[name], found[name])
    told = [*history[:-1], replace(history[-1], checks=(name,))]
    assert new_findings([*told, history[-1]], config, GenerationConfig()) == {}
    assert new_findings(history[:-1], config, GenerationConfig()) == {}, "one iteration earlier it is not there yet"


def test_rewards_that_all_abstain_are_named_after_the_first_iteration():
    silent = iteration(num_unscored=8, reward_std=0.0)
    found = new_findings([silent], PPO, GenerationConfig())
    assert "of the first iteration: nothing was learned" in found["no_rewards"]
    assert new_findings([iteration(), silent], PPO, GenerationConfig()) == {}


def test_responses_that_used_to_end_are_missed_once_chance_is_out_of_the_question():
    start = [iteration(ended_fraction=0.5)] * 3  # 12 ends among 24 responses
    for num_more, count in ((4, 1), (3, 0)):  # (24/56)^12 = 4e-5, (24/48)^12 = 2e-4
        history = [*start, *[iteration(ended_fraction=0.0)] * num_more]
        assert len(new_findings(history, PPO, GenerationConfig())) == count
        assert not new_findings(history, GROUPS, GenerationConfig())  # 3 prompts whose responses ended


@pytest.mark.parametrize("config", [PPO, GROUPS, BUDGET])
@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_a_healthy_run_is_left_alone(config, length):
    assert new_findings(HEALTHY[:length], config, GenerationConfig()) == {}


def test_text_that_surprises_its_base_model_is_a_trick_too():
    history = [*HEALTHY, *[iteration(reward_mean=1.5, reference_loss=1.1)] * 3]
    (message,) = new_findings(history, PPO, GenerationConfig()).values()
    assert re.search(r"surprised by 1\.1 nats per token, 0\.0 at first\. The reward may pay for a trick", message)
    assert new_findings([*history[:-1], unscored(reference_loss=9.0)], PPO, GenerationConfig()) == {}


@pytest.mark.parametrize(
    ("history", "config"),
    [
        ([*[equal()] * 2, iteration(reward_std=1e-9)], PPO),
        ([iteration(reward_std=0.0, reward_min=value, reward_max=value) for value in (36.0, 2.0, 12.0)], PPO),
        ([equal(num_samples=1)] * 11, PPO),  # too few to say that all are equal
        ([equal(num_samples=8, num_unscored=7)] * 3, PPO),
        ([iteration(no_signal_fraction=0.89)] * 3, GROUPS),
        ([*HEALTHY, *[iteration(ended_fraction=0.0)] * 2, iteration(ended_fraction=0.1)], PPO),
        ([iteration(ended_fraction=0.0, num_samples=10)] * 3, PPO),
        ([iteration(ended_fraction=0.0, num_samples=64)] * 2, PPO),
        ([*HEALTHY, *[iteration(entropy=0.19)] * 2, iteration(entropy=0.2)], PPO),
        ([*HEALTHY, *[iteration(num_unscored=8)] * 2, iteration(num_unscored=7)], PPO),
        ([iteration(entropy=0.0)] * 3, PPO),
        ([*HEALTHY, iteration(kl_per_response=5.0)], BUDGET),
        ([*HEALTHY, *[iteration(kl_per_response=1e9)] * 2], PPO),
        ([*HEALTHY, *[iteration(kl_per_response=10.0)] * 3], PPO),
        ([*HEALTHY, *[iteration(kl_per_response=19.0)] * 3], TrainingConfig(kl_limit=20)),
        ([*HEALTHY, *[iteration(kl_per_response=19.0)] * 3], TrainingConfig(kl_budget=20)),
        ([*HEALTHY, *[iteration(kl_per_response=19.0)] * 3], TrainingConfig(kl_target=20)),
        ([*HEALTHY, *[iteration(kl_per_response=9.0)] * 3], TrainingConfig(kl_limit=5)),
        ([*HEALTHY, *[iteration(objective=0.17)] * 3], PPO),
        ([*HEALTHY, *[iteration(objective=0.15)] * 3], GROUPS),  # six prompts are too few, however many responses
        ([*HEALTHY[:3], *[iteration(objective=0.0)] * 2], PPO),
        (
            [
                *[iteration(objective=0.0, reward_std=0.0, num_samples=1)] * 3,
                *[iteration(objective=-1e-8, reward_std=0.0, num_samples=1)] * 3,
            ],
            PPO,
        ),  # the rounding of a KL of 0
        ([*HEALTHY, *[iteration(objective=0.15, num_samples=4)] * 3], PPO),  # fewer samples, less certainty
        ([*HEALTHY, *[iteration(response_length_mean=5.1)] * 3], PPO),
        ([*HEALTHY, *[iteration(response_length_mean=5.0, num_samples=1)] * 11], PPO),
        ([iteration(ended_fraction=0.0, num_cut_off=8), *[iteration(ended_fraction=0.1, num_cut_off=7)] * 3], MASKED),
        ([equal(penalty_mean=0.1)] * 4, PPO),  # the penalty differs, or may
        ([iteration(num_samples=1, reward_std=0.0)], TrainingConfig(algorithm="grpo", batch_size=8)),
        ([*HEALTHY[:2], *[iteration(response_length_mean=1.1)] * 3], PPO),
        ([*HEALTHY, *[iteration(distinct_fraction=0.5)] * 2, iteration(distinct_fraction=0.51)], PPO),
        ([iteration(distinct_fraction=0.4)] * 6, PPO),  # few different responses from the start: such is the task
        ([*HEALTHY[:2], *[iteration(distinct_fraction=0.1)] * 3], PPO),
        ([iteration(response_length_mean=1.0, ended_fraction=0.9)] * 3, PPO),
        ([*HEALTHY, *[iteration(reward_mean=1.5, distinct_2=0.6, reference_loss=1.0)] * 3], PPO),
        ([*HEALTHY, *[iteration(reward_mean=0.6, distinct_2=0.1, reference_loss=9.0)] * 3], PPO),  # within chance
        ([iteration(effective_sample_size=0.5, sampler_gap=0.1)] * 3, PPO),
        ([iteration(num_in_equal_groups=7)] * 3, GROUPS),
        ([iteration(response_length_mean=1.1, ended_fraction=1.0)] * 3, PPO),
    ],
)
def test_just_short_of_a_finding_nothing_is_said(history, config):
    assert new_findings(history, config, GenerationConfig()) == {}


def test_batches_of_one_response_are_looked_at_together():
    alone = [equal(num_samples=1)] * 12
    (message,) = new_findings(alone, PPO, GenerationConfig()).values()
    assert "Every response of the last 12 iterations got the reward 0.5" in message


@pytest.mark.parametrize(
    ("config", "draw"),
    [
        (TrainingConfig(batch_size=1), lambda random: random.random(1) < 0.5),
        (TrainingConfig(batch_size=2), lambda random: random.random(2) < 0.5),
        (TrainingConfig(batch_size=16), lambda random: random.random(16) < 0.5),
        (
            TrainingConfig(algorithm="grpo", batch_size=16, num_generations=8),
            lambda random: (random.random((2, 8)) < random.choice([0.1, 0.9], (2, 1))).ravel(),
        ),  # prompts that are hard or easy
    ],
)
def test_a_run_in_which_nothing_changes_is_not_said_to_have_changed(config, draw):
    """Of 40 runs of 60 iterations, at most two are, by chance."""
    random, fired = np.random.Generator(np.random.Philox(key=0)), 0
    watched = {"objective_fell", "reward_hacking", "stopped_ending"}
    for _ in range(40):
        history, found = [], set()
        for _ in range(60):
            rewards = draw(random).astype(float)
            spread = rewards.std(ddof=1) if len(rewards) > 1 else 0.0
            ended = (random.random(len(rewards)) < 0.05).mean()
            values = {"reward_mean": rewards.mean(), "objective": rewards.mean(), "reward_std": spread}
            text = {"ended_fraction": ended, "distinct_2": 0.1 if len(history) > 30 else 1.0}
            history.append(iteration(num_samples=len(rewards), **values, **text))
            found |= watched & new_findings(history, config, GenerationConfig()).keys()
        fired += bool(found)
    assert fired <= 2


def test_groups_that_are_equal_each_by_itself_are_named_though_every_batch_is_one_group():
    history = [
        iteration(reward_std=0.0, reward_min=value, reward_max=value, reward_mean=value, no_signal_fraction=1.0)
        for value in (36.0, 2.0, 12.0)
    ]
    assert list(new_findings(history, GROUPS, GenerationConfig())) == ["equal_groups"]


def test_numbers_of_a_dropped_batch_are_looked_at_by_no_check():
    dropped = iteration(reward_mean=1e30, objective=1e30, num_nonfinite=1, num_steps=0)
    for history in ([dropped, *HEALTHY], [equal(), equal(), dropped]):
        assert new_findings(history, PPO, GenerationConfig()) == {}
    assert list(new_findings([equal(), equal(), dropped, equal()], PPO, GenerationConfig())) == ["constant_reward"]


def test_rewards_that_fail_are_not_said_to_abstain():
    failed = iteration(num_unscored=8, num_reward_errors=8, reward_std=0.0)
    found = new_findings([*HEALTHY, failed, failed, failed], PPO, GenerationConfig())["no_rewards"]
    assert "No response of the last 3 iterations has a score: 24 calls of rewards failed" in found


@pytest.mark.parametrize(("earlier", "says"), [(0.0, "the task is solved"), (2.0, "grows in small steps")])
def test_a_reward_that_is_always_earned_by_now_is_not_called_rare(earlier, says):
    known = iteration(reward_mean=earlier, reward_min=earlier, reward_max=earlier, reward_std=0.0)
    found = new_findings([unscored(), known, *[equal(1.0)] * 3], PPO, GenerationConfig())
    assert says in found["constant_reward"]


def test_an_iteration_without_rewards_hides_neither_a_fallen_objective_nor_a_trick():
    for name in ("objective_fell", "reward_hacking"):
        config, history = CASES[name]
        for early in range(4):
            found = new_findings([*history[:early], unscored(), *history[early:]], config, GenerationConfig())
            assert list(found) == [name]


@pytest.mark.parametrize(("share", "size"), [(0.2, 1), (0.2, 2), (0.2, 4), (1 / 30, 16), (0.8, 4)])
def test_a_rare_reward_is_not_said_to_be_constant_once_it_was_earned(share, size):
    """Of 40 runs of 60 iterations in which nothing changes, at most one, by chance."""
    random, fired = np.random.Generator(np.random.Philox(key=0)), 0
    for _ in range(40):
        history, found = [], []
        for _ in range(60):
            rewards = (random.random(size) < share).astype(float)
            spread = rewards.std(ddof=1) if size > 1 else 0.0
            history.append(
                iteration(
                    reward_mean=rewards.mean(), reward_std=spread, reward_min=rewards.min(), reward_max=rewards.max(),
                    num_samples=size,
                )
            )  # fmt: skip
            if len({end for result in history for end in (result.reward_min, result.reward_max)}) > 1:
                found += new_findings(history, TrainingConfig(batch_size=max(size, 2)), GenerationConfig())
        fired += "constant_reward" in found
    assert fired <= 1


def test_groups_with_too_few_rewards_are_not_said_to_have_equal_ones():
    history = [iteration(no_signal_fraction=1.0, num_unscored=6)] * 3
    found = new_findings(history, GROUPS, GenerationConfig())["equal_groups"]
    assert "too few rewards to compare" in found and "75% of the responses had none" in found


def test_responses_of_one_token_that_differ_are_not_called_empty():
    history = [*HEALTHY, *[at_once(num_texts=2)] * 3]
    assert "empty_responses" not in new_findings(history, PPO, GenerationConfig())


def test_one_token_responses_are_not_called_empty():
    history = [iteration(response_length_mean=1.0, ended_fraction=1.0)] * 3
    assert new_findings(history, PPO, GenerationConfig(max_new_tokens=1)) == {}
    history = [iteration(response_length_mean=1.0, ended_fraction=0.0)] * 4
    assert new_findings(history, PPO, GenerationConfig(max_new_tokens=1)) == {}


def test_an_untrained_policy_that_is_not_its_reference_stops_the_run():
    rolled = hand_made()
    require_sound_rollout(rolled, 2)
    with pytest.raises(TrainingError, match=r"Before any training the policy is 0\.5 nats per token from"):
        require_sound_rollout(rolled, 1)
    require_sound_rollout(replace(rolled, kl=torch.zeros(2, 3)), 1)
    require_sound_rollout(replace(rolled, in_full_precision=False), 1)
