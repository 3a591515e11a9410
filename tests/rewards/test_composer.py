import copy
import math
from fractions import Fraction
from functools import cached_property

import numpy as np
import pytest
import torch

from konic.finetuning.agent import KonicFinetuningAgent
from konic.finetuning.config import TrainingConfig
from konic.finetuning.data.config import DatasetConfig
from konic.finetuning.data.prompts import make_prompts
from konic.finetuning.data.samples import make_samples
from konic.finetuning.errors import ConfigError, RewardError
from konic.finetuning.rewards.composer import KonicLLMRewardComposer
from konic.finetuning.rewards.marks import llm_reward
from konic.finetuning.rewards.reducers import MaxReducer, MeanReducer, WeightedSumReducer
from konic.finetuning.rewards.scoring import Scorer

PROMPTS, RESPONSES = ["p0", "p1", "p2"], ["a", "bb", "cccc"]


def score(composer, prompts, texts, responses):
    with Scorer(composer, TrainingConfig()) as scorer:
        return scorer.score(make_samples(prompts, texts, responses))


class Length(KonicLLMRewardComposer):
    @llm_reward
    def length(self, prompt, response):
        return len(response)


class LengthAndVowels(Length):
    def helper(self, prompt, response):
        raise AssertionError("not marked as a reward")

    @llm_reward
    def vowels(self, prompt, response):
        return sum(char in "aeiou" for char in response)


class Style(KonicLLMRewardComposer):
    @llm_reward
    def style(self, prompt, response):
        return {"short": -len(response), "loud": 1.0 if response.isupper() else None}


class ConstantModel:
    """A reward model that gives every response the values it was made with."""

    def __init__(self, name, values):
        self.name, self.values = name, values

    def score(self, prompts, responses):
        assert isinstance(prompts, list) and isinstance(responses, list)
        return self.values


def returning(value):
    """A composer whose one reward, `odd`, gives the value."""

    class Composer(KonicLLMRewardComposer):
        @llm_reward
        def odd(self, prompt, response):
            return value

    return Composer()


def same(values, expected):
    return values == pytest.approx(expected, nan_ok=True)


# --- discovery ---


@pytest.mark.parametrize(
    "name",
    [
        "_added",
        "_reward_weights",
        "compose",
        "check",
        "settings",
        "reducer",
        "add_reward_model",
        "reward_names",
        "_take_old_names",
        "_kl_penalty_weight",
        "__init__",
        "__len__",
    ],
)
def test_a_reward_with_a_name_that_the_composer_uses_is_refused_where_the_class_is_made(name):
    def reward(self, prompt, response):
        return 1.0

    with pytest.raises(ConfigError, match=f"Mine.{name}: a composer has {name} itself. Give the reward another name"):
        type("Mine", (KonicLLMRewardComposer,), {name: llm_reward(reward)})


@pytest.mark.parametrize(
    "name", ["forward", "score", "total", "reward", "prompt", "kl_per_response", "row", "weights", "σ", "x" * 300]
)
def test_any_other_name_is_a_reward(name):
    def reward(self, prompt, response):
        return 2.0

    composer = type("Mine", (KonicLLMRewardComposer,), {name: llm_reward(reward)})()
    composer.check()
    assert composer.compose_batch(["a"], ["b"]) == ([2.0], {name: [2.0]})


@pytest.mark.parametrize("name", ["check", "settings", "check_columns", "evaluate", "reward_names"])
def test_a_helper_may_have_any_name(name):
    class Mine(KonicLLMRewardComposer):
        @llm_reward
        def judged(self, prompt, response):
            return float(getattr(self, name)(response, 1, 2))

    setattr(Mine, name, lambda self, text, *_: len(text))
    agent = KonicFinetuningAgent("smollm2-135m", Mine())
    assert agent.settings(uses_lora=True)["rewards"] == ["judged"]
    assert agent.get_reward_composer().compose("a", "bcd") == 3.0


def _yields(self, prompt, response):
    yield 1.0


@pytest.mark.parametrize(
    ("member", "told"),
    [
        (lambda: llm_reward(_yields), "yields its values"),
        (lambda: llm_reward(int), "marks a method"),
        (lambda: llm_reward(property(len)), "marks a method"),
        (lambda: property(llm_reward(lambda self: 1.0)), "is a property"),
        (lambda: cached_property(llm_reward(lambda self: 1.0)), "is a property"),
        (lambda: llm_reward(name="other")(len), "no option 'name'"),
        (lambda: llm_reward("a", "b"), "no option 'b'"),
    ],
)
def test_what_cannot_be_a_reward_is_refused_where_it_is_written(member, told):
    with pytest.raises(ConfigError, match=told):
        type("Mine", (KonicLLMRewardComposer,), {"judged": member()})


def test_an_attribute_that_hides_a_reward_is_named():
    class Mine(Length):
        def __init__(self):
            self.length = 0.5

    with pytest.raises(ConfigError, match="an attribute 'length' hides the reward"):
        Mine().check()


def test_two_parts_of_one_name_are_refused_not_overwritten():
    class Mine(KonicLLMRewardComposer):
        @llm_reward
        def a(self, prompt, response):
            return {"b": 1.0}

    mine = Mine().add_reward_function(lambda prompt, response: 5.0, name="a.b")
    with pytest.raises(RewardError, match=r"Two rewards have a part named 'a\.b'"):
        mine.compose("p", "r")
    with pytest.raises(ConfigError, match=r"named 'a\.b', as a part of 'a' would be. Give it another name"):
        mine.check()
    Mine().add_reward_function(lambda prompt, response: 5.0, name="b.a").check()
    Mine(reward_models=[ConstantModel("a.5", [])]).check()


def test_class_and_static_methods_are_rewards_in_either_order():
    class Mine(KonicLLMRewardComposer):
        @llm_reward
        @classmethod
        def first(cls, prompt, response):
            return len(cls.__name__)

        @classmethod
        @llm_reward
        def second(cls, prompt, response):
            return 1.0

        @llm_reward
        @staticmethod
        def third(prompt, response):
            return 2.0

    assert Mine().compose("a", "b") == 7.0


def test_a_text_parameter_that_is_named_after_a_column_is_refused():
    class Mine(KonicLLMRewardComposer):
        @llm_reward
        def judged(self, text, answer):
            return float(text == answer)

    Mine().check_columns({})
    with pytest.raises(RewardError, match=r"a parameter 'answer', which is a column.*\(prompt, response, answer\)"):
        Mine().check_columns({"answer": None})


def test_a_reward_without_a_place_for_the_response_is_refused_before_a_run():
    class Mine(KonicLLMRewardComposer):
        @llm_reward
        def judged(self):
            return 1.0

    with pytest.raises(RewardError, match="'judged' takes no response"):
        Mine().check()


def test_rewards_are_the_marked_methods_in_the_order_written_bases_first():
    class More(LengthAndVowels):
        @llm_reward
        def zeal(self, prompt, response):
            return 0

        @llm_reward
        def awe(self, prompt, response):
            return 0

    assert More().reward_names == ["length", "vowels", "zeal", "awe"]


def test_reward_models_come_after_the_methods():
    composer = LengthAndVowels(reward_models=[ConstantModel("m2", []), ConstantModel("m1", [])])
    assert composer.reward_names == ["length", "vowels", "m2", "m1"]


def test_an_overriding_reward_replaces_its_bases_in_the_same_place():
    class Shorter(LengthAndVowels):
        @llm_reward
        def length(self, prompt, response):
            return -len(response)

    assert Shorter().reward_names == ["length", "vowels"]
    assert Shorter().compose_batch(PROMPTS, RESPONSES)[1]["length"] == [-1, -2, -4]


def test_an_override_that_is_no_reward_takes_it_away():
    class Without(LengthAndVowels):
        length = None

    assert Without().reward_names == ["vowels"]


def test_rewards_of_mixins_are_found():
    class Both(Style, Length):
        pass

    assert sorted(Both().reward_names) == ["length", "style"]


def test_the_mark_leaves_a_method_as_it_was():
    assert Length().length("p", "abc") == 3
    assert Length.length.__name__ == "length"


def test_a_reward_sees_the_composers_state():
    class Target(KonicLLMRewardComposer):
        def __init__(self, target):
            super().__init__(kl_penalty_weight=0.1)
            self.target = target

        @llm_reward
        def near(self, prompt, response):
            return -abs(len(response) - self.target)

    assert Target(3).compose_batch(PROMPTS, RESPONSES)[0] == [-2, -1, -1]


def test_a_subclass_that_forgets_its_bases_init_works():
    class Forgetful(Length):
        def __init__(self, bonus):
            self.bonus = bonus

        @llm_reward
        def extra(self, prompt, response):
            return self.bonus

    first, second = Forgetful(5), Forgetful(0)
    first.set_reward_weight("extra", 2).add_reward_model(ConstantModel("m", [100]))
    assert first.compose("p", "abc") == 3 + 2 * 5 + 100
    assert second.compose("p", "abc") == 3
    assert first.kl_penalty_weight is None


def test_a_composer_without_rewards_or_with_a_broken_reducer_fails_its_check():
    Length().check()
    KonicLLMRewardComposer(reward_models=[ConstantModel("m", [])]).check()
    with pytest.raises(RewardError, match="KonicLLMRewardComposer has no rewards"):
        KonicLLMRewardComposer().check()
    with pytest.raises(RewardError, match=r"Length\.reducer has no method reduce"):
        Length(reducer=sum).check()


def test_a_copied_composer_keeps_its_weights_and_models():
    composer = Length(reward_models=[ConstantModel("m", [1.0])], reward_weights={"length": 2})
    twin = copy.deepcopy(composer).set_reward_weight("length", 3)
    assert (composer.compose("p", "ab"), twin.compose("p", "ab")) == (5, 7)


# --- weights ---


def test_weights_multiply_the_parts_and_the_breakdown_shows_them_without():
    composer = LengthAndVowels(reward_weights={"length": 0.5, "vowels": -3})
    rewards, breakdown = composer.compose_batch(PROMPTS, ["a", "be", "xyz"])
    assert rewards == [0.5 - 3, 1 - 3, 1.5]
    assert breakdown == {"length": [1, 2, 3], "vowels": [1, 1, 0]}


def test_weights_of_the_class_count_without_an_init():
    class Weighted(LengthAndVowels):
        reward_weights = {"length": 0.5}  # noqa: RUF012

        def __init__(self):
            pass

    assert Weighted().compose("p", "abc") == 0.5 * 3 + 1
    with pytest.raises(ConfigError, match=r"reward_weights\['length'\] must be a finite number"):
        type("Wrong", (LengthAndVowels,), {"reward_weights": {"length": "x"}})()


def test_weights_that_are_assigned_count():
    class Weighted(LengthAndVowels):
        reward_weights = {"length": 0.5}  # noqa: RUF012

        def __init__(self, weights=None):
            super().__init__()
            if weights:
                self.reward_weights = weights

    assert Weighted({"vowels": 3}).compose("p", "abc") == 3 + 3
    composer = Weighted()
    composer.reward_weights["vowels"] = 3
    copied = copy.deepcopy(composer).set_reward_weight("length", 2)
    assert (composer.compose("p", "abc"), copied.compose("p", "abc")) == (0.5 * 3 + 3, 2 * 3 + 3)
    assert (copied.reward_weights, Weighted.reward_weights) == ({"length": 2, "vowels": 3}, {"length": 0.5})
    with pytest.raises(ConfigError, match=r"reward_weights\['length'\] must be a finite number"):
        composer.reward_weights = {"length": "x"}
    with pytest.raises(AttributeError, match="set_reward_weight"):
        Length().reward_weights["length"] = 2


@pytest.mark.parametrize("of_the_class", [True, False])
def test_rewards_in_an_attribute_that_counts_nowhere_are_told_once(of_the_class, caplog):
    def plain(prompt, response):
        return 1.0

    for name, how, each in (
        ("reward_models", "add_reward_model", ConstantModel("m", [])),
        ("reward_functions", "add_reward_function", plain),
    ):
        caplog.clear()
        composers = [type("Mine", (Length,), {name: [each]} if of_the_class else {})() for _ in range(2)]
        for composer in composers if not of_the_class else ():
            setattr(composer, name, [each])
        getattr(composers[0], how)(each)
        composers[0].check()
        assert not caplog.text
        composers[1].check()
        composers[1].check()
        assert caplog.text.count(f"Mine.{name}: ") == caplog.text.count(f"Give it to {how}(), or as the") == 1


def test_attributes_of_ones_own_under_names_of_arguments_are_left_alone(caplog):
    class Own(Length):
        reward_functions = ((len, 0.5), "length")

        def __init__(self):
            super().__init__()
            self.reward_models, self.reward_weights = [ConstantModel], {"length": {"start": 1.0, "end": 0.1}}

    composer = Own()
    composer.reward_functions = [composer.length]  # a reward already
    composer.check()
    assert composer.compose("p", "abc") == 3
    assert not caplog.text
    composer.reward_weights = [1.0, 2.0]
    assert composer.compose("p", "abc") == 3


@pytest.mark.parametrize(
    ("weights", "total"),
    [({"style.loud": 0}, -2), ({"loud": 0}, -2), ({"style": 0}, 0), ({"style": 0, "loud": 3}, 3)],
)
def test_a_reducer_knows_parts_by_the_names_that_the_composer_knows(weights, total):
    for given in ({"reward_weights": weights}, {"reducer": WeightedSumReducer(weights=weights)}):
        assert Style(**given).compose("p", "AB") == total


def test_a_weight_defaults_to_one_and_may_be_set_later_and_chained():
    composer = LengthAndVowels()
    assert composer.compose("p", "abc") == 4
    assert composer.set_reward_weight("length", 2).set_reward_weight("vowels", 0) is composer
    assert composer.compose("p", "abc") == 6


def test_one_part_of_a_reward_may_have_its_own_weight():
    composer = Style(reward_weights={"style": 2, "style.loud": 10})
    assert composer.compose("p", "AB") == -2 * 2 + 1 * 10
    assert composer.compose("p", "ab") == -2 * 2


def test_a_weight_for_an_unknown_reward_is_a_warning_with_the_nearest_once(caplog):
    composer = LengthAndVowels(reward_weights={"lenght": 2}).set_reward_weight("lenght", 2)
    assert caplog.text.count("no reward 'lenght'. Did you mean 'length'?") == 1
    assert composer.compose("p", "abc") == 4
    Style().set_reward_weight("stile.loud", 1)
    assert "no reward 'stile.loud'" in caplog.text


def test_the_key_of_a_dict_may_carry_the_weight():
    class Keys(KonicLLMRewardComposer):
        @llm_reward
        def style(self, prompt, response):
            return {"loud": 1.0, "length": 10.0, "other": 100.0}

        @llm_reward
        def length(self, prompt, response):
            return 1000.0

    weights = {"loud": 2, "length": 3, "style": 5}
    assert Keys(reward_weights=weights).compose("p", "r") == 2 * 1 + 5 * 10 + 5 * 100 + 3 * 1000
    assert Keys(reward_weights=weights | {"style.loud": 7}).compose("p", "r") == 7 * 1 + 5 * 10 + 5 * 100 + 3 * 1000


@pytest.mark.parametrize("weight", [math.nan, math.inf, "2", None, True])
def test_a_weight_that_is_no_finite_number_is_refused(weight):
    with pytest.raises(ConfigError, match=r"reward_weights\['length'\] must be a finite number"):
        Length().set_reward_weight("length", weight)


# --- reducers ---


class Raw:
    """A reducer as konic 0.1 called them: with the weights, on parts before weights."""

    def __init__(self, weights=None):
        self.weights = weights

    def reduce(self, parts):
        return sum(self.weights[name] * value for name, value in parts.items())


class RawByKeywords(Raw):
    def __init__(self, **options):
        super().__init__(options["weights"])


@pytest.mark.parametrize("reducer", [Raw, RawByKeywords])
def test_a_reducer_that_takes_weights_gets_them_and_the_parts_before_weights(reducer):
    composer = LengthAndVowels(reward_weights={"length": 2, "vowels": -1}, reducer=reducer)
    assert composer.compose("p", "aab") == 2 * 3 - 1 * 2
    named = Style(reward_weights={"style": 2, "loud": 10}, reducer=reducer)
    assert named.compose("p", "AB") == -2 * 2 + 1 * 10


def test_the_weighted_sum_may_have_weights_of_its_own():
    assert WeightedSumReducer(weights={"a": 2.0}, default_weight=0.5).reduce({"a": 1.0, "b": 4.0}) == 4.0
    assert WeightedSumReducer().reduce({"a": 1.0, "b": 4.0}) == 5.0

    class OnlyNamed(WeightedSumReducer):
        def __init__(self, weights=None):
            super().__init__(weights, default_weight=0.0)

    assert LengthAndVowels(reducer=OnlyNamed, reward_weights={"vowels": 3}).compose("p", "aab") == 6


@pytest.mark.parametrize(("reducer", "expected"), [(WeightedSumReducer, 5.0), (MeanReducer, 2.5), (MaxReducer, 6.0)])
@pytest.mark.parametrize("as_instance", [True, False])
def test_the_reducers_work_on_weighted_parts(reducer, expected, as_instance):
    composer = LengthAndVowels(
        reward_weights={"length": 2, "vowels": -1}, reducer=reducer() if as_instance else reducer
    )
    assert composer.compose("p", "abc") == expected  # parts 6 and -1


def test_the_default_reducer_is_the_weighted_sum_and_a_class_attribute_may_name_another():
    class Best(LengthAndVowels):
        reducer = MaxReducer

    class Average(LengthAndVowels):
        reducer = MeanReducer()

    assert LengthAndVowels().compose("p", "aaab") == 7
    assert Best().compose("p", "aaab") == 4
    assert Average().compose("p", "aaab") == 3.5
    assert Best(reducer=MeanReducer).compose("p", "aaab") == 3.5


def test_a_users_own_reducer_gets_named_weighted_parts():
    class Product:
        def reduce(self, parts):
            assert list(parts) == ["length", "vowels"]
            return math.prod(parts.values())

    assert LengthAndVowels(reducer=Product, reward_weights={"length": 2}).compose("p", "aab") == 12


@pytest.mark.parametrize("value", [None, "high", math.nan])
def test_a_reducer_that_gives_no_number_is_named_with_the_sample(value):
    class Broken:
        def reduce(self, parts):
            return value

    with pytest.raises(RewardError) as error:
        Length(reducer=Broken).compose("the prompt", "the response")
    assert all(part in str(error.value) for part in ("'Broken'", repr(value), "'the prompt'", "'the response'"))


@pytest.mark.parametrize(("reducer", "expected"), [(WeightedSumReducer, -2), (MeanReducer, -2), (MaxReducer, -2)])
def test_an_abstaining_part_is_left_out_rather_than_counted_as_zero(reducer, expected):
    assert Style(reducer=reducer).compose("p", "ab") == expected


# --- abstaining, dicts ---


def test_none_abstains_and_a_sample_without_any_value_has_no_score():
    class Picky(KonicLLMRewardComposer):
        @llm_reward
        def even(self, prompt, response):
            return len(response) if len(response) % 2 == 0 else None

    scores = score(Picky(), make_prompts(PROMPTS, DatasetConfig(), "test"), PROMPTS, RESPONSES)
    assert same(scores.rewards, [math.nan, 2, 4])
    assert same(scores.breakdown["even"], [math.nan, 2, 4])
    assert scores.has_score == [False, True, True]
    assert scores.filled() == [0, 2, 4]
    assert scores.valid_rewards() == [2, 4]
    assert math.isnan(Picky().compose("p", "abc"))


def test_a_batch_in_which_everything_abstains_has_no_parts():
    rewards, breakdown = returning(None).compose_batch(PROMPTS, RESPONSES)
    assert same(rewards, [math.nan] * 3)
    assert breakdown == {}


def test_a_dict_gives_parts_named_after_reward_and_key():
    rewards, breakdown = Style().compose_batch(PROMPTS, ["a", "BB", "cccc"])
    assert rewards == [-1, -1, -4]
    assert breakdown["style.short"] == [-1, -2, -4]
    assert same(breakdown["style.loud"], [math.nan, 1, math.nan])


def test_an_empty_dict_abstains():
    assert math.isnan(returning({}).compose("p", "r"))


# --- what counts as a number ---


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, 1.0),
        (False, 0.0),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.bool_(True), 1.0),
        (np.array(0.25), 0.25),
        (torch.tensor(0.25), 0.25),
        (torch.tensor(2), 2.0),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        (Fraction(1, 4), 0.25),
        ({"a": np.float32(1), "b": torch.tensor(2)}, 3.0),
    ],
)
def test_booleans_and_scalars_of_numpy_and_torch_are_numbers(value, expected):
    reward = returning(value).compose("p", "r")
    assert reward == expected
    assert type(reward) is float


@pytest.mark.parametrize(
    "value",
    [
        "0.5",
        [1.0],
        [1.0, None],
        (1.0, 2.0),
        1j,
        object(),
        np.array([1.0, 2.0]),
        torch.tensor([1.0, 2.0]),
        np.array("x"),
        math.nan,
        math.inf,
        -math.inf,
        np.float32("nan"),
        torch.tensor(math.inf),
        pytest.param(10**400, id="an integer past every float"),
    ],
)
@pytest.mark.parametrize("in_dict", [False, True])
def test_what_is_not_a_finite_number_is_reported_with_reward_prompt_and_response(value, in_dict):
    with pytest.raises(RewardError) as error:
        returning({"key": value} if in_dict else value).compose("the prompt", "the response")
    name = "'odd.key'" if in_dict else "'odd'"
    assert all(part in str(error.value) for part in (name, "'the prompt'", "'the response'"))


def test_a_reward_that_raises_is_reported_with_its_sample_and_keeps_the_cause():
    class Broken(Length):
        @llm_reward
        def fragile(self, prompt, response):
            return 1 / (len(response) - 2)

    with pytest.raises(RewardError) as error:
        Broken().compose_batch(PROMPTS, RESPONSES)
    assert all(part in str(error.value) for part in ("'fragile'", "ZeroDivisionError", "'p1'", "'bb'"))
    assert "'p0'" not in str(error.value)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_a_reward_with_the_wrong_parameters_is_reported():
    class Lacking(KonicLLMRewardComposer):
        @llm_reward
        def lacking(self, prompt):
            return 1.0

    with pytest.raises(RewardError, match="'lacking' takes no response"):
        Lacking().compose("p", "r")


def test_an_interrupt_is_not_a_rewards_error():
    class Slow(KonicLLMRewardComposer):
        @llm_reward
        def slow(self, prompt, response):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Slow().compose("p", "r")


def test_a_long_response_is_shortened_in_the_message():
    with pytest.raises(RewardError) as error:
        returning("x").compose("p", "y" * 5000)
    assert len(str(error.value)) < 1000
    assert "5000 characters" in str(error.value)


# --- reward models ---


def test_reward_models_score_the_batch_beside_the_methods_with_weights():
    composer = Length(reward_models=[ConstantModel("m", [10, 20, None])], reward_weights={"m": 0.5})
    rewards, breakdown = composer.compose_batch(PROMPTS, RESPONSES)
    assert rewards == [6, 12, 4]
    assert breakdown["length"] == [1, 2, 4]
    assert same(breakdown["m"], [10, 20, math.nan])


def test_add_reward_model_takes_a_weight_and_returns_the_composer():
    composer = Length()
    assert composer.add_reward_model(ConstantModel("m", torch.tensor([1.0, 2.0, 3.0])), weight=100) is composer
    assert composer.compose_batch(PROMPTS, RESPONSES)[0] == [101, 202, 304]


def test_a_model_may_have_dots_in_its_name():
    composer = Length(reward_models=[ConstantModel("hf_base_v1.5", [2.0])], reward_weights={"hf_base_v1.5": 3})
    assert composer.compose("p", "a") == 7


@pytest.mark.parametrize("values", [[1.0], [1.0] * 4, []])
def test_a_model_that_gives_another_number_of_values_is_reported(values):
    with pytest.raises(RewardError, match=f"'m' returned {len(values)} values for 3 responses"):
        Length(reward_models=[ConstantModel("m", values)]).compose_batch(PROMPTS, RESPONSES)


@pytest.mark.parametrize("value", ["good", math.nan, [1.0]])
def test_a_model_that_gives_no_number_is_reported_with_the_sample(value):
    with pytest.raises(RewardError) as error:
        Length(reward_models=[ConstantModel("m", [1.0, value, 1.0])]).compose_batch(PROMPTS, RESPONSES)
    assert all(part in str(error.value) for part in ("'m'", "'p1'", "'bb'"))


@pytest.mark.parametrize("name", ["m", "length"])
def test_two_rewards_of_one_name_are_refused(name):
    composer = Length(reward_models=[ConstantModel("m", [])])
    with pytest.raises(ConfigError, match=f"two rewards named '{name}'"):
        composer.add_reward_model(ConstantModel(name, []))


@pytest.mark.parametrize("model", ["gpt2", None, object(), Length(), ConstantModel(3, [])])
def test_what_cannot_score_is_no_reward_model(model):
    with pytest.raises(ConfigError, match="needs a name and a method score"):
        Length().add_reward_model(model)


# --- columns ---


class Labelled(KonicLLMRewardComposer):
    @llm_reward
    def right(self, prompt, response, label):
        return float(response == label)


def test_a_column_is_given_to_the_parameter_of_its_name():
    rewards, _ = Labelled().compose_batch(PROMPTS, RESPONSES, label=["a", "x", "cccc"], other=[1, 2, 3])
    assert rewards == [1, 0, 1]


def test_keyword_only_defaulted_and_collected_parameters_get_their_columns():
    class Various(KonicLLMRewardComposer):
        @llm_reward
        def keyword(self, prompt, response, *, label):
            return label

        @llm_reward
        def defaulted(self, prompt, response, label=0, absent=100):
            return label + absent

        @llm_reward
        def collected(self, prompt, response, **columns):
            return sum(columns.values())

    _, breakdown = Various().compose_batch(PROMPTS, RESPONSES, label=[1, 2, 3], bonus=[10, 20, 30])
    assert breakdown == {"keyword": [1, 2, 3], "defaulted": [101, 102, 103], "collected": [11, 22, 33]}


def test_a_column_that_is_not_there_is_reported_with_those_that_are():
    with pytest.raises(RewardError) as error:
        Labelled().compose_batch(PROMPTS, RESPONSES, labels=[1, 2, 3], other=[1, 2, 3])
    assert "'right' asks for the column 'label'" in str(error.value)
    assert "Did you mean 'labels'?" in str(error.value)
    assert "labels, other" in str(error.value)
    with pytest.raises(RewardError, match="other columns: none"):
        Labelled().compose("p", "r")


def test_a_datasets_columns_reach_the_rewards_and_rows_without_one_give_none():
    class Seen(KonicLLMRewardComposer):
        @llm_reward
        def seen(self, prompt, response, label):
            return -1.0 if label is None else label

    rows = [{"prompt": "p0", "label": 3}, {"prompt": "p1"}, {"prompt": "p2", "label": 0}]
    assert score(Seen(), make_prompts(rows, DatasetConfig(), "test"), PROMPTS, RESPONSES).rewards == [3, -1, 0]


@pytest.mark.parametrize("column", ["self", "prompts", "response", "responses"])
def test_a_dataset_may_have_columns_named_like_a_rewards_own_parameters(column):
    class Collected(KonicLLMRewardComposer):
        @llm_reward
        def collected(self, prompt, response, **columns):
            assert columns == {"label": 2}
            return len(response)

    prompts = make_prompts([{"prompt": "p", "label": 2, column: "taken"}], DatasetConfig(), "test")
    assert score(Collected(), prompts, ["p"], ["abc"]).rewards == [3]


def test_rewards_may_ask_for_the_messages_of_a_chat():
    class Turns(KonicLLMRewardComposer):
        @llm_reward
        def turns(self, prompt, response, messages):
            assert prompt == "Hello"
            return len(messages)

    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    prompts = make_prompts([chat, chat[1:]], DatasetConfig(), "test")
    assert score(Turns(), prompts, [prompt.text for prompt in prompts], ["a", "b"]).rewards == [2, 1]


def test_messages_are_none_for_plain_prompts_beside_chats_and_no_column_without_any():
    class Turns(KonicLLMRewardComposer):
        @llm_reward
        def turns(self, prompt, response, messages):
            return 0 if messages is None else len(messages)

    mixed = make_prompts(["plain", [{"role": "user", "content": "Hello"}]], DatasetConfig(), "test")
    assert score(Turns(), mixed, ["plain", "Hello"], ["a", "b"]).rewards == [0, 1]
    with pytest.raises(RewardError, match="asks for 'messages', the chat of a prompt"):
        score(Turns(), make_prompts(["plain"], DatasetConfig(), "test"), ["plain"], ["a"])
    assert score(Turns(), mixed[:1], ["plain"], ["a"]).rewards == [0]  # a plain row of a dataset with chats


def test_rewards_get_the_text_that_the_model_read_not_the_whole_prompt():
    class Echo(KonicLLMRewardComposer):
        @llm_reward
        def echo(self, prompt, response):
            return len(prompt)

    assert score(Echo(), make_prompts(["a long prompt"], DatasetConfig(), "test"), ["prompt"], ["r"]).rewards == [6]


# --- compose, KL ---


def test_compose_is_a_batch_of_one():
    assert Length().compose("p", "abc") == 3
    assert Length().compose_batch(["p"], ["abc"]) == ([3], {"length": [3]})
    assert Length().compose_batch([], []) == ([], {})


def test_kl_penalty_weight_is_none_unless_given():
    class Own(Length):
        kl_penalty_weight = 0.3

    assert Length().kl_penalty_weight is None
    assert Length(kl_penalty_weight=0).kl_penalty_weight == 0
    assert Length(kl_penalty_weight=0.2).kl_penalty_weight == 0.2
    assert Own().kl_penalty_weight == 0.3
    assert Own(kl_penalty_weight=0.1).kl_penalty_weight == 0.1


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf, "0.1", True])
def test_a_kl_penalty_weight_that_cannot_be_is_refused(weight):
    with pytest.raises(ConfigError, match="kl_penalty_weight must be a number from 0 to"):
        Length(kl_penalty_weight=weight)


def test_a_raising_reward_model_or_reducer_is_named():
    class Broken:
        name = "broken"

        def score(self, prompts, responses):
            raise KeyError("weights")

        def reduce(self, parts):
            raise KeyError("parts")

    class One(KonicLLMRewardComposer):
        @llm_reward
        def one(self, prompt, response):
            return 1.0

    with pytest.raises(RewardError, match="Reward model 'broken' raised KeyError: 'weights'"):
        One(reward_models=[Broken()]).compose("p", "r")
    with pytest.raises(RewardError, match=r"Reducer 'Broken' raised KeyError: 'parts'\n  prompt:   'p'"):
        One(reducer=Broken()).compose("p", "r")


def test_a_reward_method_without_self_is_refused_where_its_class_is_made():
    with pytest.raises(ConfigError, match=r"Forgot.brief: its first parameter is 'prompt'. .* \(self, prompt"):

        class Forgot(KonicLLMRewardComposer):
            @llm_reward
            def brief(prompt, response):
                return 1.0

    class Static(KonicLLMRewardComposer):
        @staticmethod
        @llm_reward
        def brief(prompt, response):
            return float(len(prompt))

    assert Static().compose("ab", "c") == 2.0


class TakesBoth:
    def reduce(self, rewards, weights):
        return 0.0


class NamedOtherwise:
    def __init__(self, reward_weights):
        self.weights = reward_weights

    def reduce(self, rewards):
        return 0.0


class Waits:
    async def reduce(self, rewards):
        return 0.0


@pytest.mark.parametrize("reducer", [TakesBoth, TakesBoth(), NamedOtherwise, Waits, Waits()])
def test_a_reducer_that_cannot_be_called_is_refused_before_any_reward(reducer):
    with pytest.raises(RewardError, match=r"cannot be called as|async"):
        Length(reducer=reducer)
    Own = type("Own", (Length,), {"reducer": reducer})
    with pytest.raises(RewardError, match=r"cannot be called as|async"):
        KonicLLMRewardComposer.check(Own())


def test_a_weight_for_a_key_of_several_parts_is_refused():
    def first(prompt, response):
        return {"x": 1.0, "y": 1.0}

    def second(prompt, response):
        return {"x": 2.0}

    composer = KonicLLMRewardComposer(reward_functions=[first, second], reward_weights={"x": 10.0, "y": 3.0})
    with pytest.raises(RewardError, match=r"reward_weights\['x'\] is the key of several parts: first.x, second.x"):
        composer.compose("p", "r")
    composer = KonicLLMRewardComposer(reward_functions=[first, second], reward_weights={"first.x": 10.0, "y": 3.0})
    assert composer.compose("p", "r") == 10.0 + 3.0 + 2.0


# --- names that cannot be written, and batches that are not marked ---


@pytest.mark.parametrize("name", ["\ud800", 5, ("x",), b"x"])
def test_a_name_that_is_not_valid_text_is_refused_and_nothing_is_added(name):
    composer = Length()
    with pytest.raises(ConfigError, match="The name of a reward must be valid text, got"):
        composer.add_reward_function(lambda prompt, response: 1.0, name=name)
    assert composer.reward_names == ["length"]


def test_half_a_character_in_the_name_of_a_method_or_a_model_is_refused():
    with pytest.raises(ConfigError, match="must be valid text"):
        Length().add_reward_model(ConstantModel("\ud800", [1.0]))
    with pytest.raises(ConfigError, match="must be valid text"):
        type("Mine", (KonicLLMRewardComposer,), {"\ud800": Length.length})().check()


def test_a_weight_that_would_be_lost_or_could_not_be_written_is_refused():
    with pytest.raises(ConfigError, match=r"reward_weights\['1'\] is given twice"):
        Length(reward_weights={1: 1.0, "1": 2.0})
    with pytest.raises(ConfigError, match="half a character"):
        Length(reward_weights={"\ud800": 1.0})


def test_a_breakdown_with_two_keys_of_one_text_is_refused():
    class Mine(Length):
        def compose_batch(self, prompts, responses, **columns):
            return [1.0] * len(prompts), {1: [1.0] * len(prompts), "1": [2.0] * len(prompts)}

    with pytest.raises(RewardError, match="two keys that are the same text, '1'"):
        score(Mine(), make_prompts(PROMPTS, DatasetConfig(), "test"), PROMPTS, RESPONSES)


def test_a_marked_method_of_many_texts_gets_a_batch():
    class Mine(KonicLLMRewardComposer):
        @llm_reward
        def many(self, prompts, responses):
            assert prompts == PROMPTS
            return [len(response) for response in responses]

        @llm_reward
        def answers(self, responses):
            return [2 * len(response) for response in responses]

        @llm_reward
        def trl(self, completions, **kwargs):
            return [3 * len(completion) for completion in completions]

    composer = Mine()
    composer.check()
    assert composer.compose_batch(PROMPTS, RESPONSES)[1] == {
        "many": [1, 2, 4], "answers": [2, 4, 8], "trl": [3, 6, 12],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": {"a": "2"}}, r"weights\['a'\] must be a finite number, got '2'"),
        ({"weights": {"a": None}}, r"weights\['a'\] must be a finite number"),
        ({"weights": {"a": math.nan}}, r"weights\['a'\] must be a finite number, got nan"),
        ({"weights": [1]}, "weights must be a dict of numbers"),
        ({"default_weight": "x"}, "default_weight must be a finite number, got 'x'"),
        ({"default_weight": math.inf}, "default_weight must be a finite number"),
    ],
)
def test_a_weighted_sum_takes_numbers_only(options, said):
    with pytest.raises(ConfigError, match=f"WeightedSumReducer: {said}"):
        WeightedSumReducer(**options)


def test_a_reducer_may_be_named_in_text():
    assert KonicLLMRewardComposer(reducer="MeanReducer").reducer is MeanReducer
    with pytest.raises(RewardError, match="By name, as in YAML: WeightedSumReducer, MeanReducer, MaxReducer"):
        KonicLLMRewardComposer(reducer="Mean")


@pytest.mark.parametrize("option", ["batch", "normalize"])
@pytest.mark.parametrize("value", ["no", 1, None])
def test_options_of_a_mark_are_true_or_false(option, value):
    with pytest.raises(ConfigError, match=f"@llm_reward: {option} must be True or False, got"):
        llm_reward(**{option: value})
