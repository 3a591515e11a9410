"""A composer's own `compose` or `compose_batch` is what scores, with the rewards' error policy and metrics."""

import copy
import json
import math
import pickle

import pytest

from konic.finetuning import KonicLLMRewardComposer, RewardError, TrainingConfig, llm_reward
from konic.finetuning.data.samples import samples_from_texts
from konic.finetuning.rewards import composer as composer_module
from konic.finetuning.rewards.composer import find_override
from konic.finetuning.rewards.scoring import Scorer
from konic.finetuning.rewards.trial import try_rewards

NAN = math.nan


class Length(KonicLLMRewardComposer):
    """Its reward counts its calls, fails on "bad" and abstains on "?"."""

    def __init__(self, **options):
        super().__init__(**options)
        self.calls = 0

    @llm_reward
    def length(self, prompt, response):
        self.calls += 1
        if response == "bad":
            raise ValueError("bad response")
        return None if response == "?" else float(len(response))


def score(composer, responses, prompts=None, columns=None, **settings):
    samples = samples_from_texts(prompts or ["p"] * len(responses), responses, columns or {})
    with Scorer(composer, TrainingConfig(**settings)) as scorer:
        return scorer.score(samples, update_moments=True)


class Doubled(Length):
    def compose_batch(self, prompts, responses):
        rewards, breakdown = super().compose_batch(prompts, responses)
        return [2 * reward for reward in rewards], breakdown | {"doubled": [2 * reward for reward in rewards]}


class Shouted(Length):
    def compose(self, prompt, response):
        return super().compose(prompt, response) + (100 if response.isupper() else 0)


def test_a_method_of_ones_own_may_be_async():
    class Later(Doubled):
        async def compose_batch(self, prompts, responses):
            return super().compose_batch(prompts, responses)

    class Each(Shouted):
        async def compose(self, prompt, response):
            return super().compose(prompt, response)

    responses = ["a", "?", "BCD"]
    assert repr(score(Later(), responses)) == repr(score(Doubled(), responses))
    assert repr(score(Each(), responses)) == repr(score(Shouted(), responses))


@pytest.mark.parametrize("kind", [Doubled, Shouted])
def test_the_rewards_are_listed_once_per_batch_and_not_per_response(kind, monkeypatch):
    calls = []
    list_all = composer_module.list_rewards
    monkeypatch.setattr(composer_module, "list_rewards", lambda composer: calls.append(1) or list_all(composer))
    score(kind(), ["a", "abc", "abcd"])
    assert len(calls) == 1


def test_compose_batch_scores_and_its_rewards_are_called_once():
    composer = Doubled(reward_weights={"length": 3})
    scores = score(composer, ["a", "abc"])
    assert scores.rewards == [6.0, 18.0]
    assert scores.breakdown == {"length": [1.0, 3.0], "doubled": [6.0, 18.0]}
    assert scores.parts == {"length": [1.0, 3.0]}
    assert composer.calls == 2
    assert composer.compose_batch(["p"], ["abc"])[0] == [18.0]


def test_compose_scores_response_by_response_and_its_rewards_are_called_once():
    composer = Shouted()
    scores = score(composer, ["ABC", "abc", "ABC"])
    assert scores.rewards == [103.0, 3.0, 103.0]
    assert scores.breakdown == {"length": [3.0, 3.0, 3.0]}
    assert composer.calls == 3


def test_an_override_alone_is_enough():
    class Alone(KonicLLMRewardComposer):
        def compose(self, prompt, response):
            return float(len(prompt) * len(response))

    composer = Alone()
    composer.check()
    scores = score(composer, ["a", "ab"], prompts=["ppp", "p"])
    assert (scores.rewards, scores.breakdown) == ([3.0, 2.0], {})
    assert composer.compose_batch(["ppp"], ["a"]) == ([3.0], {})
    assert score(Length(), ["abc"]).rewards == [3.0]


def test_what_a_subclass_changes_last_counts():
    class OneByOne(Doubled):
        def compose(self, prompt, response):
            return -1.0

    class Both(Length):
        compose = OneByOne.compose
        compose_batch = Doubled.__dict__["compose_batch"]

    assert find_override(Length()) is None
    assert find_override(OneByOne()).name == "OneByOne.compose"
    assert find_override(Both()).name == "Both.compose_batch"
    assert score(OneByOne(), ["abc"]).rewards == [-1.0]


def test_columns_reach_an_override_that_asks_for_them_by_name():
    class Answers(Length):
        def compose(self, prompt, response, answer):
            return float(response == answer)

    class AllColumns(Length):
        def compose_batch(self, prompts, responses, **columns):
            return [float(value) for value in columns["worth"]], {}

    assert score(Answers(), ["a", "b"], columns={"answer": ["a", "x"], "worth": [5, 7]}).rewards == [1.0, 0.0]
    assert score(AllColumns(), ["a", "b"], columns={"answer": ["a", "x"], "worth": [5, 7]}).rewards == [5.0, 7.0]
    with pytest.raises(RewardError, match=r"'Answers.compose' asks for the column 'answer'"):
        Answers().check_columns({"anser": 1})


def test_equal_texts_with_other_columns_keep_their_own_values():
    class Worth(KonicLLMRewardComposer):
        @llm_reward
        def worth(self, prompt, response, worth):
            return float(worth)

        def compose(self, prompt, response):
            return -super().compose(prompt, response)

    assert score(Worth(), ["a", "a"], columns={"worth": [1, 2]}).rewards == [-1.0, -2.0]


@pytest.mark.parametrize("kind", [Doubled, Shouted])
def test_a_reward_that_fails_or_abstains_keeps_the_policy(kind):
    with pytest.raises(RewardError, match="'length' raised ValueError: bad response"):
        score(kind(), ["a", "bad"])
    scores = score(kind(), ["a", "bad", "?"], on_reward_error="skip")
    assert scores.has_score == [True, False, False]
    assert [fault is not None for fault in scores.faults] == [False, True, False]
    assert scores.breakdown["length"][0] == 1.0 and math.isnan(scores.breakdown["length"][1])


class Failing(Length):
    def compose(self, prompt, response):
        return {"x": 1.0} if response == "dict" else 1 / (len(response) - 1)


def test_an_override_that_fails_is_named_with_its_response():
    with pytest.raises(RewardError, match=r"(?s)'Failing\.compose' raised ZeroDivisionError.*response: 'a'"):
        score(Failing(), ["abc", "a"])
    scores = score(Failing(), ["abc", "a", "dict"], on_reward_error="skip")
    assert scores.has_score == [True, False, False]
    assert "returned {'x': 1.0}, not a number" in scores.errors[2]
    assert scores.breakdown == {"length": [3.0, 1.0, 4.0]}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (([1.0], {}), "returned 1 values for 2 responses"),
        (([1.0, NAN], {}), "returned nan, not a finite number"),
        (([1.0, "x"], {}), "returned 'x', not a number"),
        (([1.0, 2.0], {"part": [1.0]}), "returned 1 values as 'part' of its breakdown for 2 responses"),
        (([1.0, 2.0], {"part": [1.0, "x"]}), "returned 'x', not a number, in 'part' of its breakdown"),
        (([1.0, 2.0], {"part": 5.0}), "returned 5.0 as 'part' of its breakdown, not a list with a value for each of 2"),
        (([1.0, 2.0], {"part": None}), "returned None as 'part' of its breakdown, not a list"),
        (None, "returned None, not a list"),
        (3.0, "returned 3.0, not a list"),
    ],
)
def test_what_an_override_must_not_return(returned, message):
    class Wrong(Length):
        def compose_batch(self, prompts, responses):
            return returned

    with pytest.raises(RewardError, match=f"'Wrong.compose_batch' {message}"):
        score(Wrong(), ["a", "b"])


def test_normalised_rewards_reach_the_override_normalised():
    class Scaled(KonicLLMRewardComposer):
        @llm_reward(normalize=True)
        def length(self, prompt, response):
            return float(len(response))

        def compose_batch(self, prompts, responses):
            return super().compose_batch(prompts, responses)[0], {}

    assert score(Scaled(), ["a", "abc"]).rewards == pytest.approx([-(0.5**0.5), 0.5**0.5])


def test_a_normalised_reward_keeps_its_own_values_in_the_breakdown():
    class Shown(KonicLLMRewardComposer):
        @llm_reward(normalize=True)
        def length(self, prompt, response):
            return float(len(response))

        @llm_reward
        def one(self, prompt, response):
            return 1.0

        def compose_batch(self, prompts, responses):
            rewards, parts = super().compose_batch(prompts, responses)
            return rewards, parts | {"length": [0.0] * len(rewards), "one": [2.0] * len(rewards)}

    assert score(Shown(), ["a", "abc"]).breakdown == {"length": [1.0, 3.0], "one": [2.0, 2.0]}


def test_the_trial_and_the_record_of_a_run_know_the_override():
    samples = samples_from_texts(["p"] * 3, ["a", "ab", "abc"], {})
    assert try_rewards(Doubled(), samples).total.mean == 4.0
    assert Doubled().settings()["rewards_sha256"] != Length().settings()["rewards_sha256"]


@pytest.mark.parametrize("returned", [([1.0, 2.0], None), [[1.0, 2.0], {}], [1.0, 2.0], (1.0, 2.0)])
def test_a_breakdown_may_be_left_out(returned):
    class Own(Length):
        def compose_batch(self, prompts, responses):
            return returned

    scores = score(Own(), ["a", "b"])
    assert (scores.rewards, scores.breakdown) == ([1.0, 2.0], {"length": [1.0, 1.0]})


def test_a_method_set_on_the_object_is_what_scores():
    composer = Doubled()
    composer.compose_batch = lambda p, r: ([7.0] * len(p), {})
    assert score(composer, ["a", "abc"], reward_workers=1).rewards == [7.0, 7.0]
    one_by_one = Doubled()
    one_by_one.compose = lambda p, r: -1.0
    assert score(one_by_one, ["a"]).rewards == [-1.0]
    alone = KonicLLMRewardComposer()
    alone.compose = lambda prompt, response: 3.0
    alone.check()
    assert alone.compose_batch(["p"], ["r"]) == ([3.0], {})


@pytest.mark.parametrize("method", ["compose", "compose_batch"])
def test_without_rewards_super_answers_0(method):
    class Alone(KonicLLMRewardComposer):
        pass

    def compose(self, prompt, response):
        return 1.5 + super(Alone, self).compose(prompt, response)

    def compose_batch(self, prompts, responses):
        rewards, breakdown = super(Alone, self).compose_batch(prompts, responses)
        return [1.5 + reward for reward in rewards], breakdown

    setattr(Alone, method, {"compose": compose, "compose_batch": compose_batch}[method])
    assert Alone().compose_batch(["p", "q"], ["r", "s"]) == ([1.5, 1.5], {})
    scores = score(Alone(), ["a", "b"])
    assert (scores.rewards, scores.breakdown) == ([1.5, 1.5], {})


class Two(KonicLLMRewardComposer):
    @llm_reward
    def quality(self, prompt, response):
        return {"x": 3.0, "y": 1.0}


def reduced_by(reduce, composer=Two, **methods):
    kind = type("Own", (), {"reduce": lambda self, parts: float(reduce(parts)), **methods})
    return composer(reducer=kind).compose("p", "r")


@pytest.mark.parametrize("methods", [{}, {"__init__": lambda self, weights: None}])
def test_a_reducer_finds_the_values_of_a_dict_by_their_own_keys(methods):
    for reduce, expected in (
        (lambda parts: parts.get("x", 0.0), 3.0),
        (lambda parts: parts["x"] - parts["quality.y"], 2.0),
        (lambda parts: "x" in parts and "z" not in parts, 1.0),
        (lambda parts: parts.pop("x") * sum(parts.values()), 3.0),
        (lambda parts: parts.setdefault("x", 9.0) + len(parts), 5.0),
        (lambda parts: parts.get("z", -1.0), -1.0),
        (lambda parts: dict(parts)["x"] - {**parts}["y"], 2.0),
        (lambda parts: sum(dict(parts).values()) + len({**parts} | parts), 6.0),
        (lambda parts: sum((parts | {"x": 1.0, "quality.y": 2.0}).values()), 3.0),
        (lambda parts: parts.update(x=5.0) or sum(parts.copy().values()) + parts.copy()["quality.x"], 11.0),
        (lambda parts: sum(parts.values()), 4.0),
    ):
        assert reduced_by(reduce, **methods) == expected

    def doubled(parts):
        parts["x"] *= 2
        del parts["y"]
        return sum(parts.values())

    assert reduced_by(doubled, **methods) == 6.0


def test_a_key_that_another_part_or_reward_has_is_not_its_own():
    class Taken(Two):
        @llm_reward
        def x(self, prompt, response):
            return 10.0

    class Shared(Two):
        @llm_reward
        def other(self, prompt, response):
            return {"x": 5.0}

    assert reduced_by(lambda parts: parts["x"], Taken) == 10.0
    assert reduced_by(lambda parts: parts["other.x"] + parts["y"], Shared) == 6.0
    assert reduced_by(lambda parts: list(parts) == ["quality.x", "y", "other.x"], Shared) == 1.0
    with pytest.raises(RewardError, match=r"'x' is the key of several parts: ask for one of quality\.x, other\.x"):
        reduced_by(lambda parts: parts.get("x", 0.0), Shared)


def test_an_override_finds_the_values_of_a_dict_by_their_own_keys():
    class Own(Two):
        def compose_batch(self, prompts, responses):
            _, breakdown = super().compose_batch(prompts, responses)
            return [10 * value for value in breakdown["x"]], breakdown

    assert score(Own(), ["a", "b"]).rewards == [30.0, 30.0]
    assert score(Own(), ["a"]).breakdown == {"quality.x": [3.0], "quality.y": [1.0]}
    assert Own().compose_batch(["p"], ["r"])[1]["x"] == [3.0]
    assert Two().get_reward_breakdown("p", "r")["y"] == 1.0


def test_a_reducer_that_takes_weights_finds_them_by_the_names_of_the_parts():
    class Total:
        def __init__(self, weights):
            self.weights = weights

        def reduce(self, parts):
            return sum(self.weights[name] * value for name, value in parts.items())

    for weights in ({"quality": 2.0}, {"quality.x": 2.0, "y": 2.0}):
        assert Two(reward_weights=weights, reducer=Total).compose("p", "r") == 8.0
        assert Two(reward_weights=weights).compose("p", "r") == 8.0


def test_copies_of_a_breakdown_find_the_values_by_their_own_keys_too():
    breakdown = score(Two(), ["a", "b"]).breakdown
    for copied in (pickle.loads(pickle.dumps(breakdown)), copy.deepcopy(breakdown), breakdown | {}):
        assert (copied["x"], copied["quality.x"]) == ([3.0, 3.0], [3.0, 3.0])
        assert json.loads(json.dumps(copied)) == {"quality.x": [3.0, 3.0], "quality.y": [1.0, 1.0]}
