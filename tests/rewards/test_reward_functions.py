import asyncio
import copy
import functools
import math

import numpy as np
import pytest

from konic.finetuning.config import TrainingConfig
from konic.finetuning.data.config import DatasetConfig
from konic.finetuning.data.prompts import make_prompts
from konic.finetuning.data.samples import Sample, make_samples
from konic.finetuning.errors import ConfigError, RewardError
from konic.finetuning.reward_models.classifier import HuggingFaceRewardModel
from konic.finetuning.rewards.composer import KonicLLMRewardComposer, describe_weighting, without_models
from konic.finetuning.rewards.listing import list_rewards
from konic.finetuning.rewards.marks import llm_reward
from konic.finetuning.rewards.moments import RunningMoments
from konic.finetuning.rewards.outcomes import Reward
from konic.finetuning.rewards.reducers import MaxReducer, MeanReducer
from konic.finetuning.rewards.remote import RemoteRewardModel
from konic.finetuning.rewards.scoring import Scorer
from konic.finetuning.rewards.totals import compute_total, find_owners

PROMPTS, RESPONSES = ["p1", "p2", "p3"], ["a", "bb", "cccc"]
SPREAD = RunningMoments().after([2.0, 4.0, 6.0])
"""Mean 4, standard deviation 2."""


class Length(KonicLLMRewardComposer):
    @llm_reward
    def length(self, prompt, response):
        return len(response)


class Sizes(KonicLLMRewardComposer):
    @llm_reward(batch=True, clip=(0, 3))
    def size(self, prompts, responses):
        return [len(response) for response in responses]


class Judge:
    """A reward model that gives every response the same."""

    def __init__(self, name, value=1.0, normalize=False):
        self.name, self.value, self.normalize = name, value, normalize

    def score(self, prompts, responses):
        return [self.value] * len(responses)


class Recorder:
    """A reducer that keeps what it gets."""

    def __init__(self):
        self.seen = []

    def reduce(self, parts):
        self.seen.append(dict(parts))
        return sum(parts.values())


def vowels(prompt, response):
    return sum(char in "aeiou" for char in response)


def lengths(prompts, responses):
    return [len(response) for response in responses]


def completion_lengths(completions, **kwargs):
    return [len(completion) for completion in completions]


async def slow_length(prompt, response):
    await asyncio.sleep(0.001)
    return len(response)


def total_of(composer, parts, prompt, response, moments=None):
    return compute_total(describe_weighting(composer), parts, Sample(0, prompt, response), moments)


def scored(function, **options):
    """The values of a function added to a composer with nothing else."""
    composer = KonicLLMRewardComposer().add_reward_function(function, name="added", **options)
    return composer.compose_batch(PROMPTS, RESPONSES)[0]


# --- llm_reward ---


class Marked(KonicLLMRewardComposer):
    @llm_reward
    def bare(self, prompt, response):
        return 1.0

    @llm_reward()
    def bracketed(self, prompt, response):
        return 2.0

    @llm_reward(batch=True)
    def of_all(self, prompts, responses):
        assert (prompts, responses) == (PROMPTS, RESPONSES)
        return [3.0, None, {"key": 4.0}]

    @llm_reward(normalize=True, clip=[-1, 2])
    def scaled(self, prompt, response):
        return 5.0

    @llm_reward
    async def waiting(self, prompt, response):
        await asyncio.sleep(0)
        return len(response)

    @llm_reward(batch=True)
    async def waiting_for_all(self, prompts, responses):
        await asyncio.sleep(0)
        return [len(response) for response in responses]

    def unmarked(self, prompt, response):
        raise AssertionError("not marked as a reward")


def test_a_mark_says_how_a_method_is_called_and_what_happens_to_its_values():
    composer = Marked()
    assert list_rewards(composer) == [
        Reward("bare", composer.bare, "sample"),
        Reward("bracketed", composer.bracketed, "sample"),
        Reward("of_all", composer.of_all, "batch"),
        Reward("scaled", composer.scaled, "sample", normalize=True, clip=(-1.0, 2.0)),
        Reward("waiting", composer.waiting, "sample"),
        Reward("waiting_for_all", composer.waiting_for_all, "batch"),
    ]


def test_marked_methods_of_every_kind_work_side_by_side():
    rewards, breakdown = Marked().compose_batch(PROMPTS, RESPONSES)
    of_all, of_all_key = breakdown.pop("of_all"), breakdown.pop("of_all.key")
    assert of_all == pytest.approx([3, math.nan, math.nan], nan_ok=True)
    assert of_all_key == pytest.approx([math.nan, math.nan, 4], nan_ok=True)
    assert breakdown == {
        "bare": [1] * 3,
        "bracketed": [2] * 3,
        "scaled": [5] * 3,
        "waiting": [1, 2, 4],
        "waiting_for_all": [1, 2, 4],
    }
    assert rewards == [1 + 2 + 3 + 2 + 1 + 1, 1 + 2 + 2 + 2 + 2, 1 + 2 + 4 + 2 + 4 + 4]


def test_a_mark_leaves_the_method_itself_alone():
    def method(self, prompt, response):
        return 1.0

    assert llm_reward(method) is method
    assert llm_reward(batch=True)(method) is method


BOUNDS_THAT_CANNOT_BE = [
    (1, 1),
    (2, 1),
    (0,),
    (0, 1, 2),
    "01",
    5,
    {0, 1},
    (None, 1),
    (0, math.inf),
    (math.nan, 1),
    (False, True),
    ("0", "1"),
    pytest.param((0, 10**400), id="past every float"),
]


@pytest.mark.parametrize("clip", BOUNDS_THAT_CANNOT_BE)
def test_bounds_that_cannot_be_are_refused(clip):
    with pytest.raises(ConfigError, match="clip must be a lower and a higher bound"):
        llm_reward(clip=clip)
    composer = Length()
    with pytest.raises(ConfigError, match="clip must be a lower and a higher bound"):
        composer.add_reward_function(vowels, clip=clip)
    assert composer.reward_names == ["length"]


# --- list_rewards ---


def test_an_override_without_a_mark_inherits_its_bases():
    class Doubled(Sizes):
        def size(self, prompts, responses):
            return [2 * value for value in super().size(prompts, responses)]

    (reward,) = list_rewards(Doubled())
    assert (reward.name, reward.shape, reward.clip) == ("size", "batch", (0, 3))
    assert Doubled().compose_batch(PROMPTS, RESPONSES) == ([2, 3, 3], {"size": [2, 4, 8]})


def test_an_override_with_a_mark_of_its_own_has_that():
    class PerSample(Sizes):
        @llm_reward
        def size(self, prompt, response):
            return 2 * len(response)

    class Grandchild(PerSample):
        def size(self, prompt, response):
            return 3 * len(response)

    for kind, factor in ((PerSample, 2), (Grandchild, 3)):
        (reward,) = list_rewards(kind())
        assert (reward.shape, reward.clip) == ("sample", None)
        assert kind().compose_batch(PROMPTS, RESPONSES)[0] == [factor * 1, factor * 2, factor * 4]


def test_none_in_a_subclass_takes_a_reward_away_and_a_later_mark_brings_it_back():
    class Without(Sizes, Length):
        size = None

    class Again(Without):
        @llm_reward
        def size(self, prompt, response):
            return 10

    assert Without().reward_names == ["length"]
    assert Without().compose("p", "abc") == 3
    assert sorted(Again().reward_names) == ["length", "size"]
    assert Again().compose("p", "abc") == 13
    assert sorted(Sizes().reward_names) == ["size"]


def test_functions_come_after_the_methods_and_models_last():
    judge = Judge("judge")
    composer = Length().add_reward_function(vowels).add_reward_model(judge).add_reward_function(lengths)
    assert list_rewards(composer) == [
        Reward("length", composer.length),
        Reward("vowels", vowels),
        Reward("lengths", lengths, "batch"),
        Reward("judge", judge.score, "batch", is_model=True),
    ]


def test_a_composers_own_functions_and_models_come_in_that_order():
    composer = Length(reward_models=[Judge("judge")], reward_functions=[vowels, lengths])
    assert composer.reward_names == ["length", "vowels", "lengths", "judge"]
    assert Length().reward_names == ["length"]


# --- add_reward_function ---


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        (vowels, "sample", [1, 0, 0]),
        (slow_length, "sample", [1, 2, 4]),
        (lengths, "batch", [1, 2, 4]),
        (completion_lengths, "completions", [1, 2, 4]),
        (functools.partial(vowels), "sample", [1, 0, 0]),
        (lambda prompt, response: int(prompt[1]), "sample", [1, 2, 3]),
    ],
)
def test_a_function_of_any_shape_is_a_reward(function, shape, expected):
    composer = KonicLLMRewardComposer().add_reward_function(function, name="added")
    assert [reward.shape for reward in list_rewards(composer)] == [shape]
    assert composer.compose_batch(PROMPTS, RESPONSES) == (expected, {"added": expected})


def test_a_function_has_its_own_name_or_the_one_given_a_weight_and_bounds():
    composer = Length()
    assert composer.add_reward_function(vowels, weight=10) is composer
    composer.add_reward_function(vowels, weight=-1, name="again", normalize=True, clip=(0, 1))
    assert list_rewards(composer)[1:] == [
        Reward("vowels", vowels),
        Reward("again", vowels, normalize=True, clip=(0.0, 1.0)),
    ]
    rewards, breakdown = composer.compose_batch(["p"], ["aeio"])
    assert rewards == [4 + 10 * 4 - 1]
    assert breakdown == {"length": [4], "vowels": [4], "again": [4]}


class Callable:
    """A function that is an object."""

    def __call__(self, prompt, response):
        return 1.0


@pytest.mark.parametrize(
    "function",
    [lambda prompt, response: 1.0, functools.partial(vowels), Callable()],
    ids=["lambda", "partial", "object"],
)
def test_a_function_without_a_name_needs_one(function):
    composer = Length()
    with pytest.raises(ConfigError, match=r"has no name: call add_reward_function\(\.\.\., name='\.\.\.'\)"):
        composer.add_reward_function(function)
    assert composer.reward_names == ["length"]
    assert composer.add_reward_function(function, name="named").reward_names == ["length", "named"]


@pytest.mark.parametrize("name", ["length", "vowels", "judge"])
def test_two_rewards_of_one_name_are_refused(name):
    composer = Length(reward_functions=[vowels], reward_models=[Judge("judge")])
    with pytest.raises(ConfigError, match=f"two rewards named '{name}'"):
        composer.add_reward_function(slow_length, name=name, weight=100)
    assert composer.reward_names == ["length", "vowels", "judge"]
    assert composer.compose("p", "ab") == 2 + 1 + 1


@pytest.mark.parametrize("function", ["vowels", None, 1.0, Judge("judge"), Callable])
def test_what_cannot_be_called_is_no_reward_function(function):
    with pytest.raises(ConfigError, match="A reward function must be a function"):
        Length().add_reward_function(function)


def test_a_function_that_takes_something_else_is_refused():
    def odd(x):
        return 1.0

    composer = Length()
    with pytest.raises(RewardError, match=r"'odd' takes \(x\)"):
        composer.add_reward_function(odd)
    assert composer.reward_names == ["length"]


@pytest.mark.parametrize("functions", [vowels, {vowels}, 3])
def test_reward_functions_that_are_no_list_are_refused(functions):
    with pytest.raises(ConfigError, match="reward_functions must be a list"):
        Length(reward_functions=functions)


def test_a_plain_function_handed_in_as_a_model_is_sent_to_the_right_place():
    with pytest.raises(ConfigError, match="Plain functions go to add_reward_function"):
        Length().add_reward_model(vowels)


def test_added_functions_get_columns():
    def right(prompt, response, label):
        return float(response == label)

    def right_trl(completions, label, **kwargs):
        assert kwargs.keys() == {"prompts", "other"}
        return [float(completion == of_row) for completion, of_row in zip(completions, label, strict=True)]

    composer = KonicLLMRewardComposer(reward_functions=[right, right_trl])
    _, breakdown = composer.compose_batch(PROMPTS, RESPONSES, label=["a", "x", "cccc"], other=[1, 2, 3])
    assert breakdown == {"right": [1, 0, 1], "right_trl": [1, 0, 1]}
    composer.check_columns({"label": [], "other": []})
    with pytest.raises(RewardError, match="Reward 'right' asks for the column 'label'"):
        composer.check_columns({"other": []})


def score_rows(composer, rows):
    prompts = make_prompts(rows, DatasetConfig(), "test")
    with Scorer(composer, TrainingConfig()) as scorer:
        return scorer.score(make_samples(prompts, [prompt.text for prompt in prompts], ["yes", "no"])).rewards


def test_trl_functions_get_the_messages_of_a_datasets_chats_and_plain_texts_of_mixed_rows():
    seen = []

    def judge(prompts, completions):
        seen.append((prompts, completions))
        return [0.5, 1.5]

    composer = KonicLLMRewardComposer(reward_functions=[judge])
    chats = [[{"role": "system", "content": "Brief."}, {"role": "user", "content": text}] for text in ("A?", "B?")]
    assert score_rows(composer, chats) == [0.5, 1.5]
    assert score_rows(composer, [chats[0], "plain"]) == [0.5, 1.5]
    said = [[{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]]
    assert seen == [(chats, said), (["A?", "plain"], ["yes", "no"])]


# --- compose_batch ---


def test_composing_works_in_a_running_event_loop():
    class Waiting(KonicLLMRewardComposer):
        @llm_reward
        async def waiting(self, prompt, response):
            return await slow_length(prompt, response)

    composer = Waiting(reward_functions=[slow_length, lengths])

    async def notebook():
        await asyncio.sleep(0)
        return composer.compose("p", "a"), composer.compose_batch(PROMPTS, RESPONSES)

    one, (rewards, breakdown) = asyncio.run(notebook())
    assert one == 3
    assert rewards == [3, 6, 12]
    assert breakdown == {"waiting": [1, 2, 4], "slow_length": [1, 2, 4], "lengths": [1, 2, 4]}


def test_composing_stops_at_the_first_sample_that_fails():
    called = []

    class Fragile(KonicLLMRewardComposer):
        @llm_reward
        def fragile(self, prompt, response):
            called.append(prompt)
            return 1 / (len(response) - 2)

        @llm_reward
        def later(self, prompt, response):
            raise AssertionError("called after a reward that failed")

    with pytest.raises(RewardError) as error:
        Fragile().compose_batch(PROMPTS, RESPONSES)
    assert called == ["p1", "p2"]
    assert str(error.value).startswith(
        "Reward 'fragile' raised ZeroDivisionError: division by zero\n  prompt:   'p2'\n  response: 'bb'\n  Traceback"
    )
    assert "return 1 / (len(response) - 2)" in str(error.value)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_composing_clips_and_does_not_normalise_and_the_breakdown_has_the_values_themselves():
    class Bounded(KonicLLMRewardComposer):
        @llm_reward(normalize=True, clip=(1.5, 3))
        def bounded(self, prompt, response):
            return len(response)

    assert Bounded().compose_batch(PROMPTS, RESPONSES) == ([1.5, 2, 3], {"bounded": [1, 2, 4]})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 2, 4]),
        ({"clip": (0, 2)}, [1, 2, 2]),
        ({"clip": (2, 9)}, [2, 2, 4]),
        ({"clip": [-1, 0.5], "weight": 4}, [2, 2, 2]),
        ({"normalize": True}, [1, 2, 4]),
    ],
)
def test_an_added_functions_values_are_clipped_before_they_are_weighted(options, expected):
    assert scored(lengths, **options) == expected


# --- compute_total ---


class Scaled(KonicLLMRewardComposer):
    @llm_reward(normalize=True, clip=(-1.0, 1.5))
    def scaled(self, prompt, response):
        raise AssertionError("only its mark matters here")

    @llm_reward
    def plain(self, prompt, response):
        raise AssertionError("only its mark matters here")


@pytest.mark.parametrize(
    ("value", "weighted"),
    [
        (10.0, 3.0),  # 3 deviations, cut to 1.5, doubled; cut first it would be −2.5, doubled before the cut 1.5
        (5.0, 1.0),
        (4.0, 0.0),
        (-50.0, -2.0),
    ],
)
def test_a_value_is_normalised_then_clipped_then_weighted_then_reduced(value, weighted):
    recorder = Recorder()
    composer = Scaled(reducer=recorder, reward_weights={"scaled": 2, "plain": 10})
    moments = {"scaled": SPREAD, "plain": SPREAD}
    total = total_of(composer, {"scaled": value, "plain": 7.0}, "p", "r", moments)
    assert recorder.seen == [{"scaled": weighted, "plain": 70.0}]
    assert total == weighted + 70


@pytest.mark.parametrize("moments", [None, {}, {"other": SPREAD}, {"scaled": RunningMoments()}])
def test_without_moments_a_value_is_clipped_as_it_is(moments):
    assert total_of(Scaled(), {"scaled": 1.25}, "p", "r", moments) == 1.25
    assert total_of(Scaled(), {"scaled": 4.0}, "p", "r", moments) == 1.5


def test_moments_without_spread_make_every_value_zero():
    moments = {"scaled": RunningMoments().after([3.0, 3.0])}
    assert total_of(Scaled(), {"scaled": 9.0, "plain": 0.5}, "p", "r", moments) == 0.5


class Style(KonicLLMRewardComposer):
    @llm_reward(normalize=True, clip=(-2, 2))
    def style(self, prompt, response):
        raise AssertionError("only its mark matters here")


def test_the_parts_of_a_dict_are_normalised_each_on_its_own():
    recorder = Recorder()
    composer = Style(reducer=recorder, reward_weights={"style": 3, "style.b": 5})
    moments = {"style.a": SPREAD, "style.b": RunningMoments().after([0.0, 10.0, 20.0]), "style": SPREAD}
    parts = {"style.a": 6.0, "style.b": 15.0, "style.c": 0.5, "style.d": -9.0}
    total = total_of(composer, parts, "p", "r", moments)
    assert recorder.seen == [{"a": 3 * 1.0, "b": 5 * 0.5, "c": 3 * 0.5, "d": 3 * -2.0}]
    assert total == 3 + 2.5 + 1.5 - 6


def test_a_model_with_a_dot_in_its_name_is_normalised_and_weighted():
    composer = Length(
        reward_models=[Judge("hf_base_v1.5", normalize=True)], reward_weights={"hf_base_v1.5": 3, "length": 0.5}
    )
    parts = {"length": 8.0, "hf_base_v1.5": 10.0}
    assert total_of(composer, parts, "p", "r", {"hf_base_v1.5": SPREAD, "length": SPREAD}) == 4 + 3 * 3
    assert total_of(composer, parts, "p", "r") == 4 + 3 * 10


@pytest.mark.parametrize(
    ("normalize", "expected"), [(True, 3.0), (np.True_, 3.0), (False, 10.0), (None, 10.0), (lambda text: text, 10.0)]
)
def test_a_model_is_normalised_only_where_it_says_so(normalize, expected):
    composer = KonicLLMRewardComposer(reward_models=[Judge("judge", normalize=normalize)])
    assert list_rewards(composer)[0].normalize is (expected == 3.0)
    assert total_of(composer, {"judge": 10.0}, "p", "r", {"judge": SPREAD}) == expected


@pytest.mark.parametrize("normalize", ["no", 1, 0.0, [True]])
def test_whether_to_normalise_is_true_or_false_everywhere(normalize):
    for make in (
        lambda: KonicLLMRewardComposer().add_reward_function(vowels, normalize=normalize),
        lambda: KonicLLMRewardComposer().add_reward_model(Judge("judge", normalize=normalize)),
        lambda: RemoteRewardModel("judge", Judge, normalize=normalize),
        lambda: HuggingFaceRewardModel("nowhere", normalize=normalize),
        lambda: llm_reward(normalize=normalize),
    ):
        with pytest.raises(ConfigError, match="normalize must be True or False, got "):
            make()


def test_a_class_for_an_instance_is_said():
    class Own(Judge):
        name = "own"

        def __call__(self, prompt, response):
            return 1.0

    for make in (KonicLLMRewardComposer().add_reward_model, lambda own: KonicLLMRewardComposer(reward_models=[own])):
        with pytest.raises(ConfigError, match=r"got <class .*Own'>\. Give an instance: Own\(\)\.$"):
            make(Own)
    with pytest.raises(ConfigError, match=r"must be a function, got <class .*Own'>\. Give an instance, Own\(\)"):
        KonicLLMRewardComposer().add_reward_function(Own)


def swapped(response, prompt, /):
    return 1.0


def swapped_batch(responses, prompts, /):
    return [1.0] * len(responses)


def swapped_trl(completions, prompts, /):
    return [1.0] * len(completions)


def behind_another(answer, /, prompt, response):
    return 1.0


@pytest.mark.parametrize("function", [swapped, swapped_batch, swapped_trl, behind_another])
def test_texts_before_a_slash_in_another_order_are_refused(function):
    composer = KonicLLMRewardComposer(reward_functions=[function])
    with pytest.raises(RewardError, match=r"at another place than .*, /\). Leave out the `/` of its parameters"):
        composer.check_columns({"answer": ["a"]})


def test_texts_before_a_slash_in_order_are_passed_by_place():
    def partly(prompt, /, response, answer):
        return 10 * len(prompt) + len(response) + len(answer)

    composer = KonicLLMRewardComposer(reward_functions=[partly])
    assert composer.compose_batch(["pp"], ["r"], answer=["aaa"])[0] == [24.0]


def test_the_total_of_no_parts_is_nan_and_the_reducer_is_not_asked():
    recorder = Recorder()
    assert math.isnan(total_of(Length(reducer=recorder), {}, "p", "r"))
    assert recorder.seen == []


@pytest.mark.parametrize(("reducer", "expected"), [(MaxReducer, 1.5), (MaxReducer(), 1.5), (MeanReducer, 0.75)])
def test_the_reducer_gets_normalised_values(reducer, expected):
    composer = Scaled(reducer=reducer)
    assert total_of(composer, {"scaled": 100.0, "plain": 0.0}, "p", "r", {"scaled": SPREAD}) == expected


def test_a_reducer_that_fails_is_named_with_the_sample():
    class Broken:
        def reduce(self, parts):
            return parts["absent"]

    class Wordy:
        def reduce(self, parts):
            return "high"

    with pytest.raises(RewardError) as error:
        total_of(Length(reducer=Broken), {"length": 1.0}, "the prompt", "the response")
    assert str(error.value) == (
        "Reducer 'Broken' raised KeyError: 'absent'\n  prompt:   'the prompt'\n  response: 'the response'\n"
        "  parts:    'length'"
    )
    assert isinstance(error.value.__cause__, KeyError)
    with pytest.raises(RewardError, match=r"Reducer 'Wordy' returned 'high', not a number\.\n  prompt:   'p'"):
        total_of(Length(reducer=Wordy), {"length": 1.0}, "p", "r")


# --- find_owners ---


def test_a_parts_owner_is_the_reward_of_its_name_or_of_the_name_before_the_key():
    def length_of(prompt, response):
        return {"key": 1.0}

    composer = Length(reward_functions=[length_of], reward_models=[Judge("hf_base_v1.5")])
    parts = ["hf_base_v1.5", "length_of.key", "length_of.key.inner", "length", "length.key", "hf_base_v1.5.key"]
    owners = find_owners(list_rewards(composer), parts)
    assert list(owners) == parts
    assert [reward.name for reward in owners.values()] == [
        "hf_base_v1.5", "length_of", "length_of", "length", "length", "hf_base_v1.5",
    ]  # fmt: skip
    assert owners["length_of.key"] == Reward("length_of", length_of)
    assert find_owners(list_rewards(composer), []) == {}


# --- without_models ---


def test_a_copy_without_models_leaves_the_original_alone():
    class Target(Length):
        def __init__(self, target, **options):
            super().__init__(**options)
            self.target = target

        @llm_reward
        def near(self, prompt, response):
            return -abs(len(response) - self.target)

    composer = Target(
        3, reward_functions=[vowels], reward_models=[Judge("judge", 100.0)], reward_weights={"vowels": 10, "judge": 2}
    )
    bare = without_models(composer)
    assert type(bare) is Target
    assert bare.reward_names == ["length", "near", "vowels"]
    assert bare.compose("p", "ab") == 2 - 1 + 10
    assert composer.reward_names == ["length", "near", "vowels", "judge"]
    assert composer.compose("p", "ab") == 2 - 1 + 10 + 200


def test_what_is_done_to_a_copy_without_models_is_not_done_to_the_original():
    composer = Length(reward_models=[Judge("judge", 100.0)])
    bare = without_models(composer)
    bare.add_reward_function(vowels)
    bare.kl_penalty_weight = 0.5
    assert bare.reward_names == ["length", "vowels"]
    assert composer.reward_names == ["length", "judge"]
    assert composer.kl_penalty_weight is None


def test_a_copy_calls_its_own_methods():
    bare = without_models(Length())
    assert list_rewards(bare)[0].call.__self__ is bare
    assert list_rewards(copy.deepcopy(bare))[0].name == "length"


def test_without_any_models_a_copy_has_the_same_rewards():
    composer = Length(reward_functions=[vowels, lengths])
    assert without_models(composer).reward_names == composer.reward_names == ["length", "vowels", "lengths"]


def by_response(response):
    return len(response)


def other_way_round(response, prompt):
    return 10 * len(prompt) + len(response)


def with_a_column_first(response, answer):
    return float(answer == response)


def by_name_only(*, prompt, response):
    return 10 * len(prompt) + len(response)


def whole_batch(responses, answer):
    return [float(one == other) for one, other in zip(responses, answer, strict=True)]


def of_prompts(prompts, **columns):
    assert columns["completions"] == ["bb", "c"]
    return [len(prompt) for prompt in prompts]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (by_response, [2, 1]),
        (other_way_round, [12, 21]),
        (with_a_column_first, [0, 1]),
        (by_name_only, [12, 21]),
        (whole_batch, [0, 1]),
        (of_prompts, [1, 2]),
    ],
)
def test_texts_go_to_the_parameters_of_their_names_in_any_order(function, expected):
    composer = KonicLLMRewardComposer(reward_functions=[function])
    rewards, _ = composer.compose_batch(["p", "pp"], ["bb", "c"], answer=["x", "c"])
    assert rewards == expected


def test_a_mark_on_a_plain_function_counts():
    @llm_reward(batch=True, clip=(0, 1))
    def many(questions, answers):
        return [len(answer) for answer in answers]

    assert KonicLLMRewardComposer(reward_functions=[many]).compose_batch(["p"] * 2, ["", "long"])[0] == [0, 1]
