"""Rounds of sampling joined and rows chosen: each response keeps its own tokens and numbers."""

import itertools
import math
from dataclasses import fields, replace

import pytest
import torch

from conftest import prompt_batch, roll, shake_adapter, tiny_learner
from konic.finetuning.config import GenerationConfig
from konic.finetuning.rewards.scoring import Scores, join_scores
from konic.finetuning.rollout.rollout import TokenNumbers
from konic.finetuning.rollout.rows import join_rollouts, select_rows
from konic.finetuning.rollout.sampler import RandomKey

GENERATION = GenerationConfig(max_new_tokens=8, eos_token_id=tuple(range(60)))


@pytest.fixture(scope="module")
def rounds():
    learner = tiny_learner("llama", generation=GENERATION)
    shake_adapter(learner.policy)
    short, long = ["ab", "x", "no"], ["a longer prompt than the others here", "the film was"]
    made = [roll(learner, prompt_batch(learner, texts), GENERATION, RandomKey(3, 1)) for texts in (short, long)]
    assert made[0].ids.shape[1] != made[1].ids.shape[1]
    return made


def of_row(rollout, row):
    """Everything about one response, without padding."""
    mask, prompt_mask = rollout.response_mask[row], rollout.batch.mask[row]
    tensors = {field.name: getattr(rollout, field.name)[row][mask] for field in fields(TokenNumbers)}
    for name in ("response_ids", "log_probs"):
        tensors[f"samples.{name}"] = getattr(rollout.samples, name)[row][mask]
    for name in ("hidden", "ref_hidden"):
        tensors[name] = getattr(rollout.states, name)[rollout.states.places[row]][mask]
    tensors["prompt"] = rollout.batch.ids[row][prompt_mask]
    others = rollout.records[row], rollout.batch.texts[row], rollout.batch.prompts[row]
    return tensors, (*others, rollout.batch.sample_indices[row], rollout.samples.ended[row].item())


def same(left, right):
    assert left[1] == right[1]
    assert all(torch.equal(left[0][name], right[0][name]) for name in left[0])


def test_joined_rounds_hold_each_response_as_it_was(rounds):
    joined = join_rollouts(rounds)
    wanted = [of_row(rollout, row) for rollout in rounds for row in range(len(rollout.batch))]
    assert len(joined.batch) == len(wanted) == 5
    for row, expected in enumerate(wanted):
        same(of_row(joined, row), expected)
    width = joined.response_mask.shape[1]
    assert all(getattr(joined, field.name).shape[:2] == (5, width) for field in fields(TokenNumbers))
    assert joined.ids.shape == joined.mask.shape
    ends = joined.batch.mask.int().diff(dim=1)
    assert (ends >= 0).all() and joined.batch.mask[:, -1].all()  # prompts stay padded on the left
    assert join_rollouts(rounds[:1]) is rounds[0]


def test_rows_are_chosen_in_the_order_given(rounds):
    joined = join_rollouts(rounds)
    chosen = select_rows(joined, [4, 0, 2])
    for row, source in enumerate([4, 0, 2]):
        same(of_row(chosen, row), of_row(joined, source))
    assert select_rows(joined, range(5)) is joined


def test_states_of_other_processes_stay_there(rounds):
    mask = rounds[1].response_mask
    some = replace(rounds[1], states=rounds[1].states.among(range(1, 3), torch.cat([mask, mask[:1]])))
    assert some.states.places.tolist() == [-1, 0, 1]
    joined = join_rollouts([rounds[0], some]).states
    assert joined.places.tolist() == [0, 1, 2, -1, 3, 4]
    assert joined.own(torch.tensor([3, 5, 0])).tolist() == [5, 0]
    assert len(joined.hidden) == len(joined.ref_hidden) == 5


def test_a_part_that_a_round_does_not_have_is_nan_there():
    first = Scores([1.0, 2.0], {"a": [1.0, 2.0]}, parts={"a": [1.0, 2.0]}, weights={"a": 3.0}, seconds={"a": [0.1] * 2})
    second = Scores([3.0], {"b": [3.0]}, parts={"b": [3.0]}, weights={"b": 2.0}, seconds={"b": [0.2]})
    for rounds, order in (((first, second), [0, 1, 2]), ((second, first), [1, 2, 0])):
        joined = join_scores(rounds)
        assert joined.weights == {"a": 3.0, "b": 2.0}
        for values, name in itertools.product((joined.breakdown, joined.parts), "ab"):
            wanted = {"a": [1.0, 2.0, math.nan], "b": [math.nan, math.nan, 3.0]}[name]
            assert [values[name][at] for at in order] == pytest.approx(wanted, nan_ok=True)
        assert math.isnan(joined.seconds["b"][order[0]])


def test_scores_are_joined_and_chosen_alike():
    first = Scores([1.0, 2.0], {"a": [1.0, 2.0]}, parts={"a": [0.1, 0.2]}, weights={"a": 3.0})
    second = Scores([3.0], {"a": [3.0]}, [None], parts={"a": [0.3]}, weights={"a": 3.0}, is_dropped=True)
    joined = join_scores([first, second])
    assert (joined.rewards, joined.breakdown, joined.parts) == ([1, 2, 3], {"a": [1, 2, 3]}, {"a": [0.1, 0.2, 0.3]})
    assert (joined.faults, joined.weights, joined.is_dropped) == ([None] * 3, {"a": 3.0}, True)
    chosen = joined.select([2, 0])
    assert (chosen.rewards, chosen.breakdown, chosen.parts) == ([3, 1], {"a": [3, 1]}, {"a": [0.3, 0.1]})
    assert chosen.faults == [None, None] and chosen.weights == {"a": 3.0}
