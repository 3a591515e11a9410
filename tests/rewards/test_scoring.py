"""What a run makes of a batch's rewards: faults raised or skipped, running moments, slow rewards named on screen."""

import asyncio
import logging
import math
import statistics
import time
from contextlib import nullcontext
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from konic.finetuning.config import TrainingConfig
from konic.finetuning.data.config import DatasetConfig
from konic.finetuning.data.prompts import Prompt, make_prompts
from konic.finetuning.data.samples import collect_columns, make_samples
from konic.finetuning.errors import RewardError
from konic.finetuning.results.evaluation import Evaluation
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.rewards import scoring
from konic.finetuning.rewards.composer import KonicLLMRewardComposer
from konic.finetuning.rewards.listing import list_rewards
from konic.finetuning.rewards.marks import llm_reward
from konic.finetuning.rewards.moments import RunningMoments
from konic.finetuning.rewards.outcomes import Fault
from konic.finetuning.rewards.reducers import WeightedSumReducer
from konic.finetuning.rewards.scoring import Scorer, Scores, require_errors_within
from konic.finetuning.rewards.signatures import RESERVED
from konic.finetuning.rewards.totals import evaluation_moments

LOGGER = "konic.finetuning.rewards.scoring"
SKIP = {"on_reward_error": "skip"}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def judged(response):
    """What a response asks for: an error, something that is no number, nothing, or a number."""
    if response.startswith("raise"):
        raise ValueError(response)
    if response.startswith("key"):
        raise KeyError(response)
    return {"nan": math.nan, "text": "good", "none": None, "zero": 0}.get(response, 1)


class Sized(KonicLLMRewardComposer):
    """One reward that never fails beside one that does as the response says."""

    @llm_reward
    def size(self, prompt, response):
        return len(response)

    @llm_reward
    def picky(self, prompt, response):
        return judged(response)


class Scaled(KonicLLMRewardComposer):
    """One reward that is normalised, one that is not, and one that fails on `raise`."""

    @llm_reward(normalize=True)
    def size(self, prompt, response):
        return None if response == "none" else len(response)

    @llm_reward
    def plain(self, prompt, response):
        return 10.0

    @llm_reward
    def fragile(self, prompt, response):
        if response == "raise":
            raise ValueError(response)


class Keyed(KonicLLMRewardComposer):
    @llm_reward(normalize=True)
    def style(self, prompt, response):
        return {"size": len(response), "vowels": sum(c in "aeiou" for c in response) if response != "none" else None}


def composer_of(function, **options):
    return KonicLLMRewardComposer().add_reward_function(function, name="odd", **options)


class Model:
    name = "odd"

    def __init__(self, score):
        self.score = score


def scored(composer, responses, moments=None, update_moments=False, **options):
    with Scorer(composer, TrainingConfig(**options)) as scorer:
        return score_by(scorer, responses, moments, update_moments)


def score_by(scorer, responses, moments=None, update_moments=False):
    prompts = [Prompt(row, f"p{row}") for row in range(len(responses))]
    return scorer.score(
        make_samples(prompts, [prompt.text for prompt in prompts], list(responses)), moments, update_moments
    )


def same(values, expected):
    return list(values) == pytest.approx(list(expected), rel=1e-12, abs=1e-12, nan_ok=True)


# --- skipping ---


@pytest.mark.parametrize("fault", ["raise", "nan", "text", "key"])
def test_skip_leaves_out_exactly_the_faulty_sample_and_keeps_its_other_parts(fault):
    scores = scored(Sized(), ["ab", fault, "none", "zero", "cccc"], **SKIP)
    assert same(scores.rewards, [2 + 1, math.nan, 4, 4 + 0, 4 + 1])
    assert scores.has_score == [True, False, True, True, True]
    assert scores.filled() == [3, 0, 4, 4, 5]
    assert scores.valid_rewards() == [3, 4, 4, 5]
    assert scores.breakdown["size"] == [2, len(fault), 4, 4, 4]
    assert same(scores.breakdown["picky"], [1, math.nan, math.nan, 0, 1])
    assert [found is not None for found in scores.faults] == [False, True, False, False, False]
    assert scores.num_faults == 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["a", "bb", "none", "zero", "raise", "nan", "text", ""]), max_size=12))
def test_skipping_gives_each_sound_sample_the_reward_that_it_has_alone(responses):
    scores, composer = scored(Sized(), responses, **SKIP), Sized()
    bad = [response in ("raise", "nan", "text") for response in responses]
    alone = [math.nan if is_bad else composer.compose("p", r) for r, is_bad in zip(responses, bad, strict=True)]
    assert same(scores.rewards, alone)
    assert scores.num_faults == sum(bad)
    assert scores.has_score == [not is_bad for is_bad in bad]


@pytest.mark.parametrize(
    "value, reward, parts, is_fault",
    [
        (0, 0.0, {"odd": 0.0}, False),
        (False, 0.0, {"odd": 0.0}, False),
        (None, math.nan, {}, False),
        ({}, math.nan, {}, False),
        ({"key": None}, math.nan, {}, False),
        ({"key": 0, "other": None}, 0.0, {"odd.key": 0.0}, False),
        (math.nan, math.nan, {}, True),
        (math.inf, math.nan, {}, True),
        ({"key": 1, "other": "x"}, math.nan, {}, True),
        ("0", math.nan, {}, True),
    ],
)
def test_zero_none_and_a_fault_are_three_things(value, reward, parts, is_fault):
    scores = scored(composer_of(lambda prompt, response: value), ["r"], **SKIP)
    assert same(scores.rewards, [reward])
    assert {name: values[0] for name, values in scores.breakdown.items()} == parts
    assert scores.num_faults == is_fault
    assert scores.has_score == [not math.isnan(reward)]


def awaited(function):
    async def later(prompt, response):
        await asyncio.sleep(0)
        return function(response)

    return later


@pytest.mark.parametrize("shape", ["sample", "async", "batch of values"])
def test_a_fault_is_its_own_samples_in_every_shape_that_tells_samples_apart(shape):
    composer = {
        "sample": composer_of(lambda prompt, response: judged(response)),
        "async": composer_of(awaited(judged)),
        "batch of values": composer_of(
            lambda prompts, responses: [{"nan": math.nan, "none": None}.get(response, 1) for response in responses]
        ),
    }[shape]
    scores = scored(composer, ["a", "nan", "none", "b"], **SKIP)
    assert same(scores.rewards, [1, math.nan, math.nan, 1])
    assert [found and found.what for found in scores.faults] == [None, "returned nan, not a finite number.", None, None]


@pytest.mark.parametrize("as_model", [True, False])
def test_a_batch_reward_that_raises_fails_on_every_sample(as_model):
    def fails(prompts, responses):
        raise ValueError("no")

    composer = KonicLLMRewardComposer([Model(fails)]) if as_model else composer_of(fails)
    composer.add_reward_function(lambda prompt, response: len(response), name="size")
    scores = scored(composer, ["a", "bb"], **SKIP)
    assert same(scores.rewards, [math.nan, math.nan])
    assert scores.breakdown == {"size": [1, 2]}
    assert [found.who for found in scores.faults] == ["Reward model 'odd'" if as_model else "Reward 'odd'"] * 2
    assert scores.num_faults == 2


def test_a_sample_on_which_two_rewards_fail_counts_once_by_the_first(caplog):
    class Twice(Sized):
        @llm_reward
        def again(self, prompt, response):
            return judged(response)

    scores = scored(Twice(), ["a", "raise"], **SKIP)
    assert scores.num_faults == 1
    assert scores.faults[1].who == "Reward 'picky'"
    assert [message.split(" raised")[0] for message in caplog.messages] == [
        "Skipped a response: Reward 'picky'",
        "Skipped a response: Reward 'again'",
    ]


def test_a_batch_of_none_scores_to_nothing():
    assert scored(Sized(), [], **SKIP) == Scores([], {}, [], {})


def test_scores_without_faults_count_none():
    scores = Scores([1.0, math.nan, 0.0], {})
    assert (scores.num_faults, scores.has_score) == (0, [True, False, True])
    assert (scores.filled(), scores.valid_rewards()) == ([1.0, 0.0, 0.0], [1.0, 0.0])


@pytest.mark.parametrize("how", ["skip", "raise"])
def test_a_reducer_that_fails_and_a_column_that_is_not_there_stop_the_run_either_way(how):
    class Broken:
        def reduce(self, parts):
            return math.nan

    with pytest.raises(RewardError, match=r"Reducer 'Broken' returned nan.*\n  prompt:   'p0'"):
        scored(Sized(reducer=Broken), ["a"], on_reward_error=how)
    with pytest.raises(RewardError, match="'odd' asks for the column 'label'"):
        scored(composer_of(lambda prompt, response, label: 1), ["a"], on_reward_error=how)


def test_an_interrupt_is_no_fault_to_skip():
    def interrupted(prompt, response):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored(composer_of(interrupted), ["a"], **SKIP)


# --- what is told of faults ---


@pytest.mark.parametrize(
    "responses, told",
    [
        (["a", "none", "zero"], 0),
        (["raise"], 1),
        (["raise 1", "raise 2", "raise 3"], 3),
        (["raise 1", "a", "raise 2", "raise 3", "raise 4", "raise 5"], 3),
        (["raise", "key", "raise", "key", "raise", "key", "raise", "key"], 6),
        (["nan"] * 5 + ["raise"] * 2, 5),
    ],
)
def test_the_first_three_faults_of_a_kind_are_reported(responses, told, caplog):
    scores = scored(Sized(), responses, **SKIP)
    assert len(caplog.records) == told
    assert {(record.name, record.levelno) for record in caplog.records} <= {(LOGGER, logging.WARNING)}
    assert scores.num_faults == sum(judges_badly(response) for response in responses)


def judges_badly(response):
    try:
        return isinstance(judged(response), float)
    except (ValueError, KeyError):
        return True


def test_the_third_says_that_the_rest_is_only_counted(caplog):
    scored(Sized(), ["raise"] * 9, **SKIP)
    last = "Further errors like this are only counted."
    assert [message.splitlines()[-1] == last for message in caplog.messages] == [False, False, True]


def test_a_told_fault_names_reward_sample_and_place(caplog):
    scored(Sized(), ["a", "raise it"], **SKIP)
    (message,) = caplog.messages
    assert message.startswith(
        "Skipped a response: Reward 'picky' raised ValueError: raise it\n"
        "  prompt:   'p1'\n  response: 'raise it'\n  Traceback (most recent call last):\n"
    )
    assert "raise ValueError(response)" in message
    assert "in judged" in message


def test_faults_of_two_rewards_are_two_kinds(caplog):
    class Twice(Sized):
        @llm_reward
        def again(self, prompt, response):
            return judged(response)

    scored(Twice(), ["raise"] * 5, **SKIP)
    assert [message.split("'")[1] for message in caplog.messages] == ["picky"] * 3 + ["again"] * 3


def test_kinds_are_counted_over_a_scorers_whole_life(caplog):
    with Scorer(Sized(), TrainingConfig(**SKIP)) as scorer:
        assert [score_by(scorer, ["raise", "raise"]).num_faults for _ in range(3)] == [2, 2, 2]
    assert len(caplog.records) == 3
    scored(Sized(), ["raise"], **SKIP)
    assert len(caplog.records) == 4, "another run tells them anew"


def test_where_faults_are_raised_nothing_is_reported(caplog):
    with pytest.raises(RewardError):
        scored(Sized(), ["raise", "key", "nan"])
    assert caplog.records == []


# --- raising ---


def blame(response):
    raise LookupError(f"no {response}")


async def blame_later(prompt, response):
    return 1 if response == "a" else blame(response)


@pytest.mark.parametrize(
    "composer, who, response",
    [
        (composer_of(lambda prompt, response: 1 if response == "a" else blame(response)), "Reward 'odd'", "second"),
        (composer_of(blame_later), "Reward 'odd'", "second"),
        (composer_of(lambda prompts, responses: blame(responses[1])), "Reward 'odd'", "a"),
        (composer_of(lambda completions: blame(completions[1])), "Reward 'odd'", "a"),
        (KonicLLMRewardComposer([Model(lambda prompts, responses: blame(responses[1]))]), "Reward model 'odd'", "a"),
    ],
    ids=["sample", "async", "batch", "TRL", "model"],
)
def test_raise_names_reward_prompt_and_response_with_the_users_own_frames(composer, who, response):
    with pytest.raises(RewardError) as error:
        scored(composer, ["a", "second"])
    told = str(error.value)
    row = ["a", "second"].index(response)
    assert told.startswith(
        f"{who} raised LookupError: no second\n  prompt:   'p{row}'\n  response: {response!r}\n  Traceback"
    )
    assert 'test_scoring.py", line' in told
    assert "in blame\n" in told and 'raise LookupError(f"no {response}")' in told
    assert told.endswith("LookupError: no second")
    assert "reward_calls.py" not in told and "scoring.py" not in told.replace("test_scoring.py", "")
    assert isinstance(error.value.__cause__, LookupError)


def test_raise_stops_at_the_first_fault_and_asks_nothing_more():
    asked = []

    class Noted(KonicLLMRewardComposer):
        @llm_reward
        def first(self, prompt, response):
            asked.append(("first", response))
            return judged(response)

        @llm_reward
        def second(self, prompt, response):
            asked.append(("second", response))
            return 1

    with pytest.raises(RewardError, match="'first' returned nan"):
        scored(Noted(), ["a", "nan", "raise", "b"])
    assert asked == [("first", "a"), ("first", "nan")]


# --- moments ---


def normalised(value, seen):
    return (value - statistics.mean(seen)) / statistics.stdev(seen)


def test_learning_counts_the_batch_in_before_normalising():
    first, second = ["a", "bbb", "cccccc"], ["dd", "eeeeeeeee"]
    with Scorer(Scaled(), TrainingConfig()) as scorer:
        one = score_by(scorer, first, {}, update_moments=True)
        two = score_by(scorer, second, one.moments, update_moments=True)
    assert same(one.rewards, [10 + normalised(value, [1, 3, 6]) for value in (1, 3, 6)])
    assert same(two.rewards, [10 + normalised(value, [1, 3, 6, 2, 9]) for value in (2, 9)])
    assert list(two.moments) == ["size"], "only what is normalised has moments"
    moments = two.moments["size"]
    assert (moments.count, moments.mean) == (5, pytest.approx(statistics.mean([1, 3, 6, 2, 9])))
    assert moments.std == pytest.approx(statistics.stdev([1, 3, 6, 2, 9]))
    assert one.breakdown == {"size": [1, 3, 6], "plain": [10, 10, 10]}, "the breakdown has the values themselves"


class Prepared(KonicLLMRewardComposer):
    """A part that is clipped, one that abstains, and two under one reward's weight."""

    def __init__(self):
        super().__init__(reward_weights={"length": 0.5, "both": 3.0, "both.second": -1.0})

    @llm_reward(clip=(0, 2))
    def length(self, prompt, response):
        return len(response)

    @llm_reward
    def even(self, prompt, response):
        return None if len(response) % 2 else 1.0

    @llm_reward
    def both(self, prompt, response):
        return {"first": 1.0, "second": 2.0}


def test_parts_are_kept_as_they_are_weighted_beside_their_weights():
    scores = scored(Prepared(), ["a", "bbbb"])
    assert scores.parts.keys() == scores.weights.keys() == scores.breakdown.keys()
    assert (scores.parts["length"], scores.breakdown["length"]) == ([1, 2], [1, 4])
    assert same(scores.parts["even"], [math.nan, 1.0])
    assert scores.weights == {"length": 0.5, "even": 1.0, "both.first": 3.0, "both.second": -1.0}
    for row, reward in enumerate(scores.rewards):
        parts = [scores.weights[name] * values[row] for name, values in scores.parts.items()]
        assert reward == pytest.approx(math.fsum(part for part in parts if not math.isnan(part)))


def test_without_learning_moments_are_used_and_left_as_they_are():
    seen = [2.0, 4.0, 9.0]
    moments = {"size": RunningMoments().after(seen)}
    scores = scored(Scaled(), ["a", "bbb"], moments)
    assert scores.moments == moments == {"size": RunningMoments().after(seen)}
    assert same(scores.rewards, [10 + normalised(value, seen) for value in (1, 3)])


@pytest.mark.parametrize("moments", [None, {}])
def test_before_any_moments_a_batch_is_normalised_by_its_own_which_are_not_kept(moments):
    scores = scored(Scaled(), ["a", "bbb", "raise", "none", "cccccc"], moments, **SKIP)
    expected = [normalised(value, [1, 3, 6]) for value in (1, 3, 6)]
    assert same(scores.rewards, [10 + expected[0], 10 + expected[1], math.nan, 10, 10 + expected[2]])
    assert scores.moments == {}
    assert same(scored(Scaled(), ["abc"], moments).rewards, [10]), "a single value has no spread"


def test_learning_leaves_the_moments_before_alone():
    before = {"size": RunningMoments().after([2.0, 4.0]), "gone": RunningMoments(3, 1.0, 1.0)}
    kept = dict(before)
    after = scored(Scaled(), ["a", "bbb"], before, update_moments=True).moments
    assert before == kept
    assert after == {"size": RunningMoments().after([2.0, 4.0, 1.0, 3.0]), "gone": RunningMoments(3, 1.0, 1.0)}


def test_neither_a_faulty_samples_other_parts_count_nor_what_abstained():
    scores = scored(Scaled(), ["a", "raise", "none", "bbb"], {}, update_moments=True, **SKIP)
    assert scores.moments == {"size": RunningMoments().after([1.0, 3.0])}
    seen = [1, 3]
    assert same(scores.rewards, [10 + normalised(1, seen), math.nan, 10, 10 + normalised(3, seen)])


def test_the_parts_of_a_dict_have_moments_of_their_own():
    responses = ["a", "none", "aeb", "bcdfgh"]
    scores = scored(Keyed(), responses, {}, update_moments=True)
    sizes, vowels = [1, 4, 3, 6], [1, 2, 0]
    assert {name: moments.count for name, moments in scores.moments.items()} == {"style.size": 4, "style.vowels": 3}
    assert scores.moments["style.size"].std == pytest.approx(statistics.stdev(sizes))
    assert scores.moments["style.vowels"].std == pytest.approx(statistics.stdev(vowels))
    expected = [normalised(size, sizes) for size in sizes]
    for row, value in zip((0, 2, 3), vowels, strict=True):
        expected[row] += normalised(value, vowels)
    assert same(scores.rewards, expected)


def test_a_part_seen_for_the_first_time_later_starts_then():
    first = scored(Keyed(), ["none", "none"], {}, update_moments=True)
    assert list(first.moments) == ["style.size"]
    second = scored(Keyed(), ["a", "bb"], first.moments, update_moments=True)
    assert second.moments["style.vowels"] == RunningMoments().after([1.0, 0.0])
    assert second.moments["style.size"] == RunningMoments().after([4.0, 4.0, 1.0, 2.0])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(["", "a", "bb", "cccc", "none", "raise"]), min_size=1, max_size=12), st.data())
def test_two_batches_are_one_concatenated_bit_for_bit(responses, data):
    cut = data.draw(st.integers(0, len(responses)))
    with Scorer(Scaled(), TrainingConfig(**SKIP)) as scorer:
        whole = score_by(scorer, responses, {}, update_moments=True)
        first = score_by(scorer, responses[:cut], {}, update_moments=True)
        second = score_by(scorer, responses[cut:], first.moments, update_moments=True)
    assert second.moments == whole.moments
    assert repr(second.rewards) == repr(whole.rewards[cut:])


# --- an earlier evaluation on a later scale ---


def evaluation_of(composer, responses, moments):
    scores = scored(composer, responses, moments, **SKIP)
    prompts = [f"p{row}" for row in range(len(responses))]
    kls, lengths = [0.5 * row for row in range(len(responses))], [len(response) for response in responses]
    return Evaluation(
        prompts=prompts, responses=list(responses), rewards=scores.rewards, breakdown=scores.breakdown,
        kl_per_response=kls, response_lengths=lengths,
    )  # fmt: skip


def test_an_evaluations_own_moments_leave_out_samples_without_a_reward():
    before = evaluation_of(Scaled(), ["a", "raise", "none", "bbbbb"], None)
    assert evaluation_moments(list_rewards(Scaled()), before) == {"size": RunningMoments().after([1.0, 5.0])}
    again = evaluation_of(Scaled(), ["a", "raise", "none", "bbbbb"], evaluation_moments(list_rewards(Scaled()), before))
    assert same(again.rewards, before.rewards), "an evaluation without moments is on its own scale"
    assert evaluation_moments(Scaled(), None) == {}


def test_a_part_that_no_reward_has_any_longer_has_no_moments():
    before = Evaluation(
        prompts=["p"], responses=["a"], rewards=[1.0], breakdown={"gone": [1.0], "size": [2.0]},
        kl_per_response=[0.0], response_lengths=[1],
    )  # fmt: skip
    assert evaluation_moments(list_rewards(Scaled()), before) == {"size": RunningMoments().after([2.0])}


# --- how many may fail ---


def iteration(failed, size):
    """An iteration of which only the counts matter."""
    numbers = dict.fromkeys(
        (
            "reward_mean", "reward_std", "reward_min", "reward_max", "kl_divergence", "policy_loss", "value_loss",
            "entropy_loss", "total_loss", "response_length_mean", "response_length_std", "learning_rate",
            "clip_fraction", "approx_kl", "explained_variance", "generation_time_sec", "reward_compute_time_sec",
            "update_time_sec", "total_time_sec",
        ),
        0.0,
    )  # fmt: skip
    counts = {"num_samples": size, "num_reward_errors": failed, "num_unscored": size}
    return FinetuningIterationResult(iteration=1, reward_breakdown={}, **numbers, **counts)


def fault(number=0):
    return Fault("Reward 'odd'", f"raised ValueError: number {number}", f"Traceback {number}")


def batch_of(failed, size):
    """Scores of which the first `failed` are faulty."""
    faults = [fault(index) if index < failed else None for index in range(size)]
    return Scores([math.nan if found else 1.0 for found in faults], {}, faults)


def is_refused(history, now, rate):
    config = TrainingConfig(max_error_rate=rate, on_reward_error="skip")
    try:
        require_errors_within([iteration(*counts) for counts in history], batch_of(*now), config)
    except RewardError:
        return True
    return False


@pytest.mark.parametrize(
    "history, now, rate, refused",
    [
        ([], (10, 10), 0.1, False),  # counted as 10 of 100
        ([], (10, 16), 0.1, False),
        ([], (11, 16), 0.1, True),
        ([(4, 32), (4, 32)], (2, 36), 0.1, False),  # exactly at the rate
        ([(4, 32), (4, 32)], (3, 36), 0.1, True),
        ([(5, 8), (0, 8), (5, 8)], (0, 8), 0.1, False),
        ([(5, 8), (0, 8), (5, 8)], (1, 8), 0.1, True),
        ([(50, 50), (0, 96)], (0, 4), 0.1, False),  # the last 100 are whole without the first batch
        ([(50, 50), (0, 95)], (0, 4), 0.1, True),  # and here they are not
        ([(100, 100)], (20, 200), 0.1, False),  # a batch bigger than the window is judged alone, as a whole
        ([(0, 100)], (21, 200), 0.1, True),
        ([], (0, 4), 0.0, False),
        ([], (1, 4), 0.0, True),
        ([(1, 4)], (0, 4), 0.0, True),
        ([(1, 4), (0, 96)], (0, 4), 0.0, False),
        ([], (4, 4), 1.0, False),
        ([(64, 64)] * 5, (64, 64), 1.0, False),
        ([(25, 50)], (25, 50), 0.5, False),
        ([(25, 50)], (26, 50), 0.5, True),
    ],
)
def test_no_more_than_the_rate_of_the_last_hundred_may_fail(history, now, rate, refused):
    assert is_refused(history, now, rate) is refused


COUNTS = st.integers(1, 130).flatmap(lambda size: st.tuples(st.integers(0, size), st.just(size)))


@settings(deadline=None, max_examples=150)
@given(st.lists(COUNTS, max_size=6), COUNTS, st.integers(0, 64))
def test_the_window_is_the_fewest_whole_batches_that_hold_a_hundred(history, now, sixty_fourths):
    batches = [*history, now]
    windows = [batches[start:] for start in range(len(batches) - 1, -1, -1)]
    window = next((window for window in windows if sum(size for _, size in window) >= 100), batches)
    share = Fraction(sum(failed for failed, _ in window), max(100, sum(size for _, size in window)))
    assert is_refused(history, now, sixty_fourths / 64) is (share > Fraction(sixty_fourths, 64))


def test_the_message_has_the_counts_and_the_last_fault():
    scores = batch_of(3, 4)
    config = TrainingConfig(max_error_rate=0.02)
    with pytest.raises(RewardError) as error:
        require_errors_within([iteration(1, 4)], scores, config)
    assert str(error.value) == (
        "Rewards failed on 4 of the last 8 responses, more than max_error_rate=0.02 of 100. "
        "The last error: Reward 'odd' raised ValueError: number 2\n  Traceback 2"
    )


def test_without_a_fault_in_the_batch_the_message_ends_with_the_counts():
    with pytest.raises(RewardError) as error:
        require_errors_within([iteration(50, 90)], Scores([1.0] * 30, {}), TrainingConfig())
    assert str(error.value) == "Rewards failed on 50 of the last 120 responses, more than max_error_rate=0.1 of 120."


@pytest.mark.parametrize(("failed", "rate", "refused"), [(4, 0.1, True), (3, 0.1, False), (4, 1.0, False)])
def test_an_evaluation_in_which_every_response_failed_is_an_error(failed, rate, refused):
    config = TrainingConfig(max_error_rate=rate, on_reward_error="skip")
    scorer = Scorer(KonicLLMRewardComposer(), config)
    message = r"failed on all 4 responses of an evaluation\. The last error: Reward 'odd'"
    with pytest.raises(RewardError, match=message) if refused else nullcontext():
        scorer.require_fit_evaluation(batch_of(failed, 4))


# --- slow rewards ---

ADVICE = " To stop a reward that hangs, set TrainingConfig(reward_workers=2, reward_timeout_seconds=10)."


@pytest.fixture
def watched(monkeypatch, caplog):
    """Short patience; the list is what had been told when a slow reward ended."""
    monkeypatch.setattr(scoring, "SLOW_SECONDS", 0.1)
    seen = []

    def wait(is_over=lambda: False):
        deadline = time.monotonic() + (0.3 if caplog.messages else 10)
        while time.monotonic() < deadline and not is_over():
            time.sleep(0.01)
        seen.append(list(caplog.messages))

    return wait, seen


@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_slow_reward_is_named_while_it_runs_with_the_responses_place(place, watched, caplog):
    wait, seen = watched

    class Slow(Sized):
        @llm_reward
        def slow(self, prompt, response):
            if response == "wait":
                wait(lambda: bool(caplog.messages))
            return 1

    scored(Slow(), ["wait" if number == place else "a" for number in (1, 2, 3)])
    told = f"Reward 'slow' has been running for 0 s (response {place} of 3)." + ADVICE
    assert seen == [[told]]
    assert [(record.name, record.levelno) for record in caplog.records] == [(LOGGER, logging.WARNING)]


def test_each_slow_reward_is_named_once_a_batch(watched, caplog):
    class Slow(KonicLLMRewardComposer):
        @llm_reward
        def first(self, prompt, response):
            time.sleep(0.25)
            return 1

        @llm_reward
        def second(self, prompt, response):
            time.sleep(0.25)
            return 1

    with Scorer(Slow(), TrainingConfig()) as scorer:
        for _ in range(2):
            score_by(scorer, ["a"])
    assert [message.split("'")[1] for message in caplog.messages] == ["first", "second"] * 2


def test_a_slow_worker_is_named_too(watched, caplog):
    class Slow(KonicLLMRewardComposer):
        @llm_reward
        def slow(self, prompt, response):
            time.sleep(0.4)
            return 1

    with Scorer(Slow(), TrainingConfig(reward_workers=1)) as scorer:
        score_by(scorer, ["a"])
    assert "'slow' has been running" in caplog.text


def test_a_slow_batch_reward_is_reported_with_its_number_of_responses(watched, caplog):
    wait, seen = watched

    def slow(prompts, responses):
        wait(lambda: bool(caplog.messages))
        return [1] * len(responses)

    scored(composer_of(slow), ["a", "b", "c"])
    assert seen == [["Reward 'odd' has been running for 0 s (3 responses at once)." + ADVICE]]


def test_a_slow_reward_model_cannot_be_isolated_and_is_not_told_to_be(watched, caplog):
    wait, seen = watched

    def slow(prompts, responses):
        wait(lambda: bool(caplog.messages))
        return [1] * len(responses)

    scored(KonicLLMRewardComposer([Model(slow)]), ["a", "b"])
    assert seen == [["Reward model 'odd' has been running for 0 s (2 responses at once)."]]


def test_quick_rewards_are_never_named(watched, caplog):
    with Scorer(Sized(), TrainingConfig()) as scorer:
        for _ in range(3):
            score_by(scorer, ["a", "bb", "ccc"])
            time.sleep(0.15)  # the time between two batches is nobody's
    assert caplog.messages == []


# --- columns ---


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([], {}),
        (["plain", "text"], {}),
        ([{"prompt": "a", "label": 1}, {"prompt": "b", "label": 2}], {"label": [1, 2]}),
        (
            [{"prompt": "a", "label": 1}, "b", {"prompt": "c", "bonus": 0}],
            {"label": [1, None, None], "bonus": [None, None, 0]},
        ),
        ([CHAT, CHAT[1:]], {"messages": [CHAT, CHAT[1:]]}),
        (["plain", CHAT], {"messages": [None, CHAT]}),
        ([{"prompt": CHAT, "label": 1}, {"prompt": "b", "label": 2}], {"label": [1, 2], "messages": [CHAT, None]}),
        ([{"prompt": "a", "messages": "own"}], {}),
        ([{"prompt": CHAT, "messages": "own"}], {"messages": [CHAT]}),
    ],
)
def test_columns_are_those_of_any_row_and_messages_those_of_chats(rows, expected):
    every = collect_columns(make_prompts(rows, DatasetConfig(), "test"))
    assert all(list(columns) == list(expected) for columns in every)
    assert {name: [columns[name] for columns in every] for name in expected} == expected


@pytest.mark.parametrize("name", RESERVED)
def test_reserved_names_are_never_passed(name):
    prompts = [Prompt(0, "a", {name: "taken", "label": 1}), Prompt(1, "b", {name: "taken"})]
    assert collect_columns(prompts) == [{"label": 1}, {"label": None}]
    got = []

    def collected(prompt, response, **columns):
        got.append((prompt, response, columns))
        return 1

    with Scorer(composer_of(collected), TrainingConfig()) as scorer:
        scorer.score(make_samples(prompts, ["a", "b"], ["r", "s"]))
    assert got == [("a", "r", {"label": 1}), ("b", "s", {"label": None})]


# --- known faults of src ---


@pytest.mark.parametrize("errors", [29, 57, 58])
def test_exactly_the_rate_may_fail_whatever_the_rate(errors):
    assert not is_refused([], (errors, 100), errors / 100)


def test_a_reward_that_returns_texts_is_reported_three_times(caplog):
    scores = scored(composer_of(lambda prompt, response: f"Score {len(response)}"), ["x" * n for n in range(9)], **SKIP)
    assert scores.num_faults == 9
    assert len(caplog.records) == 3


def test_a_reward_that_has_failed_is_not_named_as_running_while_its_error_is_kept(watched, caplog):
    with pytest.raises(RewardError) as error:
        scored(Sized(), ["raise", "a"])
    time.sleep(0.25)
    assert error.value is not None
    assert caplog.messages == []


class Styles(KonicLLMRewardComposer):
    @llm_reward
    def style(self, prompt, response):
        return {"tone": float(len(response)), "pace": 1.0} if response else None


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"style.tine": 3.0}, "The weight of 'style.tine' changes nothing so far"),
        ({"tine": 3.0}, "The weight of 'tine' changes nothing so far"),
        ({"style.tone ": 3.0}, "The weight of 'style.tone ' changes nothing so far"),
        ({"style.tone": 3.0, "pace": 2.0}, None),
        ({"style": 2.0}, None),
    ],
)
def test_a_weight_that_no_part_has_is_a_warning_once_the_parts_are_known(weights, said, caplog):
    with Scorer(Styles(reward_weights=weights), TrainingConfig()) as scorer:
        caplog.clear()
        score_by(scorer, [""])  # every reward abstains: no part is known yet
        assert not caplog.text
        score_by(scorer, ["a", "bb"])
        score_by(scorer, ["ccc"])
    assert caplog.text.count("changes nothing so far") == (said is not None)
    assert said is None or (said in caplog.text and "Did you mean" in caplog.text)


def test_the_reducers_own_weights_are_looked_at_too(caplog):
    scored(Styles(reducer=WeightedSumReducer(weights={"style.pase": 2.0})), ["a"])
    assert "The weight of 'style.pase' changes nothing so far" in caplog.text


@pytest.mark.parametrize("place", ["class", "old", "assigned", "reducer", "argument"])
def test_a_misspelt_weight_is_named_once_wherever_it_is_given(place, caplog):
    class Two(Sized):
        if place == "class":
            reward_weights = {"sise": 5.0}

        @llm_reward
        def rare(self, prompt, response):
            return 1.0 if response == "b" else None

    composer = Two(
        reward_weights={"sise": 5.0} if place == "argument" else None,
        reducer=WeightedSumReducer(weights={"sise": 5.0}) if place == "reducer" else None,
    )
    if place in ("old", "assigned"):
        setattr(composer, "_reward_weights" if place == "old" else "reward_weights", {"sise": 5.0})
    with Scorer(composer, TrainingConfig()) as scorer:
        score_by(scorer, ["a"])
        assert "sise" not in caplog.text or place == "argument", "`rare` may still return a dict with this key"
        score_by(scorer, ["b"])
        score_by(scorer, ["b"])
    assert caplog.text.count("'sise'") == caplog.text.count("Did you mean 'size'?") == 1


@pytest.mark.parametrize("weights", [None, 3, {1: 2.0}])
def test_a_reducer_of_ones_own_may_call_anything_its_weights(weights):
    class Own:
        _weights = weights

        def reduce(self, parts):
            return sum(parts.values())

    assert scored(Styles(reducer=Own()), ["a"]).rewards == [2.0]


def test_decimals_are_numbers():
    class Exact(KonicLLMRewardComposer):
        @llm_reward
        def exact(self, prompt, response):
            return Decimal("1.5") if response else Decimal("NaN")

    assert scored(Exact(), ["a"]).rewards == [1.5]
    with pytest.raises(RewardError, match="not a finite number"):
        scored(Exact(), [""])


def test_a_weight_for_the_key_of_several_parts_is_not_the_reducers_error():
    class Two(KonicLLMRewardComposer):
        @llm_reward
        def left(self, prompt, response):
            return {"x": 1.0}

        @llm_reward
        def right(self, prompt, response):
            return {"x": 1.0}

    with pytest.raises(RewardError, match=r"^reward_weights\['x'\] is the key of several parts: left\.x, right\.x"):
        scored(Two(reward_weights={"x": 2.0}), ["a"])


def test_a_reward_without_a_return_is_named_once_after_enough_responses(caplog):
    class Silent(KonicLLMRewardComposer):
        @llm_reward
        def forgotten(self, prompt, response):
            len(response)

        @llm_reward
        def rare(self, prompt, response):
            return 1.0 if response == "b" else None

        @llm_reward
        def failing(self, prompt, response):
            raise ValueError

    with Scorer(Silent(), TrainingConfig(on_reward_error="skip", max_error_rate=1.0)) as scorer:
        score_by(scorer, ["a"] * 30 + ["b"])
        assert "return" not in caplog.text
        for _ in range(5):
            score_by(scorer, ["a"] * 31)
    told = "Reward 'forgotten' has given no value for any of the first 62 responses. Is a `return` missing?"
    assert [message for message in caplog.messages if "return" in message] == [told]
