"""A composer tried without training: every number against an oracle, every warning on its case, and the command."""

import itertools
import json
import math
import random
import re
import statistics
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from command import konic, konic_here, script
from konic.cli import app
from konic.cli.rewards import sample_responses, show
from konic.cli.scripts import load_agent, load_composer, load_composer_and_dataset
from konic.finetuning.data.config import DatasetConfig
from konic.finetuning.data.prompts import Prompt, load_prompts, make_prompts
from konic.finetuning.data.samples import make_samples
from konic.finetuning.errors import ConfigError, DatasetError, KonicError, RewardError
from konic.finetuning.rewards import trial as reward_trial
from konic.finetuning.rewards.composer import KonicLLMRewardComposer
from konic.finetuning.rewards.marks import llm_reward
from konic.finetuning.rewards.reducers import MaxReducer
from konic.finetuning.rewards.responses import read_responses
from konic.finetuning.rewards.trial import PROBES, correlation, try_rewards

LENGTHS = (3, 5, 7, 7, 5, 3)
RESPONSES = ["x" * length for length in LENGTHS]
A, B = (1, 0, 0, 1, 1, 0), (1, 1, 1, 0, 0, 0)
"""Columns that neither go with the lengths nor outweigh one another."""


class Sized(KonicLLMRewardComposer):
    @llm_reward
    def size(self, prompt, response):
        return len(response)


class Keyed(KonicLLMRewardComposer):
    @llm_reward
    def style(self, prompt, response):
        return {"size": -len(response), "loud": 5.0 if response.isupper() else None}


def tried(composer, responses=RESPONSES, **columns):
    rows = [{name: values[row] for name, values in columns.items()} for row in range(len(responses))]
    prompts = [Prompt(row, f"p{row}", row_columns) for row, row_columns in enumerate(rows)]
    return try_rewards(composer, make_samples(prompts, [prompt.text for prompt in prompts], list(responses)))


def reading(**weights):
    """A composer whose rewards give the dataset's columns of their names."""
    composer = KonicLLMRewardComposer()
    for name, weight in weights.items():
        composer.add_reward_function(reader(name), weight, name)
    return composer


def reader(name):
    return lambda prompt, response, **columns: columns[name]


def adding(function):
    """Two sound rewards, `a` and `b`, and `c`, which is the function."""
    return reading(a=1.0, b=1.0).add_reward_function(function, name="c")


def reducing(composer, reducer):
    composer.reducer = reducer
    return composer


def part(trial, name):
    (found,) = [part for part in (*trial.parts, trial.total) if part.name == name]
    return found


def reward(trial, name):
    (found,) = [reward for reward in trial.rewards if reward.name == name]
    return found


def near(value, nan_ok=True):
    return pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=nan_ok)


# --- what moves the total ---

TABLES = st.integers(2, 12).flatmap(
    lambda count: st.dictionaries(
        st.sampled_from("abcd"),
        st.tuples(st.lists(st.integers(-50, 50), min_size=count, max_size=count), st.sampled_from([0, 0.5, -1, 2, 3])),
        min_size=1,
    )
)


@settings(deadline=None, max_examples=60)
@given(TABLES)
def test_shares_of_variance_are_the_covariances_and_add_up_to_one(table):
    columns = {name: values for name, (values, _) in table.items()}
    weighted = {name: [Fraction(weight) * value for value in values] for name, (values, weight) in table.items()}
    totals = [sum(row) for row in zip(*weighted.values(), strict=True)]
    trial = tried(reading(**{name: weight for name, (_, weight) in table.items()}), ["r"] * len(totals), **columns)
    shares = {part.name: part.share_of_variance for part in trial.parts}
    assert shares.keys() == table.keys()
    if len(set(totals)) == 1:
        assert all(math.isnan(share) for share in shares.values())
        return
    mean = Fraction(sum(totals), len(totals))
    variance = sum((total - mean) ** 2 for total in totals)
    for name, values in weighted.items():
        together = sum(value * (total - mean) for value, total in zip(values, totals, strict=True))
        assert shares[name] == near(float(together / variance))
    assert math.fsum(shares.values()) == near(1.0)
    assert trial.total.share_of_variance == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_shares_and_moments_of_real_numbers_are_numpys(seed):
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(3, 40)) * [[0.01], [1], [30]] + [[5], [0], [-1000]]
    weights = dict(zip("abc", generator.normal(size=3).tolist(), strict=True))
    columns = dict(zip("abc", values.tolist(), strict=True))
    trial = tried(reading(**weights), ["r"] * 40, **columns)
    total = sum(weight * np.array(columns[name]) for name, weight in weights.items())
    for name, weight in weights.items():
        covariance = np.cov(weight * np.array(columns[name]), total)
        assert part(trial, name).share_of_variance == near(covariance[0, 1] / covariance[1, 1])
        own = np.array(columns[name])
        told = part(trial, name)
        assert (told.mean, told.std, told.low, told.high) == (
            near(own.mean()), near(own.std(ddof=1)), own.min(), own.max(),
        )  # fmt: skip
    assert math.fsum(part.share_of_variance for part in trial.parts) == near(1.0)
    assert (trial.total.mean, trial.total.std) == (near(total.mean()), near(total.std(ddof=1)))


def test_what_abstains_adds_nothing_to_the_total_and_responses_without_one_are_left_out():
    a, b = [1, None, 4, None, 2], [3, 7, None, None, 0]
    trial = tried(reading(a=2.0, b=1.0), ["r"] * 5, a=a, b=b)
    part_a, part_b = [2, 0, 8, 4], [3, 7, 0, 0]
    total = np.add(part_a, part_b)
    assert part(trial, "a").share_of_variance == near(np.cov(part_a, total)[0, 1] / np.var(total, ddof=1))
    assert part(trial, "b").share_of_variance == near(np.cov(part_b, total)[0, 1] / np.var(total, ddof=1))
    assert [part(trial, name).num_none for name in ("a", "b", "total")] == [2, 2, 1]
    assert (part(trial, "a").mean, part(trial, "a").std) == (near(7 / 3), near(statistics.stdev([1, 4, 2])))
    assert trial.total.mean == near(total.mean())


def test_values_are_shown_before_weights_and_move_the_total_by_weight_and_clip():
    composer = reading(a=1.0).add_reward_function(reader("b"), -2.0, "b", clip=(0.0, 1.0))
    trial = tried(composer, ["r"] * 4, a=[0, 1, 2, 3], b=[-5, 1, 0.5, 9])
    assert (part(trial, "b").low, part(trial, "b").high) == (-5, 9)
    clipped = [0, -2, -1, -2]
    total = np.add([0, 1, 2, 3], clipped)
    assert part(trial, "b").share_of_variance == near(np.cov(clipped, total)[0, 1] / np.var(total, ddof=1))
    assert (trial.total.low, trial.total.high) == (min(total), max(total))


def test_another_reducer_makes_the_total():
    composer = reading(a=1.0, b=1.0)
    composer.reducer = MaxReducer
    trial = tried(composer, ["r"] * 3, a=[1, 5, 0], b=[2, 2, 2])
    assert (trial.total.mean, trial.total.low, trial.total.high) == (3, 2, 5)
    assert part(trial, "a").share_of_variance == near(np.cov([1, 5, 0], [2, 5, 2])[0, 1] / np.var([2, 5, 2], ddof=1))


# --- the correlation with length ---


@pytest.mark.parametrize("seed", range(4))
def test_the_correlation_with_length_is_pearsons(seed):
    generator = random.Random(seed)
    responses = ["x" * generator.randrange(50) for _ in range(30)]
    a = [len(response) + generator.gauss(0, 20) for response in responses]
    b = [generator.gauss(0, 9) if generator.random() < 0.7 else None for _ in responses]
    trial = tried(reading(a=1.0, b=-3.0), responses, a=a, b=b)
    lengths = [len(response) for response in responses]
    present = [(value, length) for value, length in zip(b, lengths, strict=True) if value is not None]
    total = [x - 3 * (y or 0) for x, y in zip(a, b, strict=True)]
    assert part(trial, "a").length_correlation == near(np.corrcoef(a, lengths)[0, 1])
    assert part(trial, "b").length_correlation == near(np.corrcoef(*zip(*present, strict=True))[0, 1])
    assert trial.total.length_correlation == near(np.corrcoef(total, lengths)[0, 1])


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(-100, 100), st.integers(0, 100)), min_size=2, max_size=20))
def test_correlation_is_numpys_and_nan_where_either_does_not_vary(pairs):
    left, right = zip(*pairs, strict=True)
    if len(set(left)) == 1 or len(set(right)) == 1:
        assert math.isnan(correlation(left, right))
        return
    assert correlation(left, right) == near(np.corrcoef(left, right)[0, 1])


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20), st.floats(0.1, 10), st.floats(-10, 10))
def test_a_line_has_a_correlation_of_one_either_way(values, slope, start):
    assume(max(values) - min(values) > 1)
    assert correlation(values, [start + slope * value for value in values]) == pytest.approx(1)
    assert correlation(values, [start - slope * value for value in values]) == pytest.approx(-1)


# --- little to go by ---


def test_a_constant_total_moves_by_nothing():
    trial = tried(reading(a=1.0, b=1.0), a=[0.25] * 6, b=[2] * 6)
    for name in ("a", "b", "total"):
        assert part(trial, name).std == 0
        assert math.isnan(part(trial, name).length_correlation)
    assert math.isnan(part(trial, "a").share_of_variance) and math.isnan(part(trial, "b").share_of_variance)
    assert (trial.total.mean, trial.total.low, trial.total.high) == (2.25, 2.25, 2.25)


def test_a_constant_part_moves_nothing_of_a_total_that_varies():
    trial = tried(reading(a=1.0, b=1.0), a=A, b=[2] * 6)
    assert part(trial, "b").share_of_variance == near(0)
    assert part(trial, "a").share_of_variance == near(1)
    assert math.isnan(part(trial, "b").length_correlation)


def test_responses_of_one_length_go_with_nothing():
    trial = tried(reading(a=1.0), ["abc", "def"], a=[1, 2])
    assert math.isnan(part(trial, "a").length_correlation)
    assert math.isnan(trial.total.length_correlation)


def test_one_response_is_enough_for_everything_but_spread():
    trial = tried(Sized(reward_weights={"size": 2.0}), ["abcd"])
    told = part(trial, "size")
    assert (told.mean, told.std, told.low, told.high, told.num_none) == (4, 0, 4, 4, 0)
    assert math.isnan(told.share_of_variance) and math.isnan(told.length_correlation)
    assert (trial.total.mean, trial.num_responses) == (8, 1)
    assert not any("constant" in warning or "length" in warning for warning in trial.warnings)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_where_everything_abstains_nothing_is_known(count):
    trial = tried(adding(lambda prompt, response: None), ["r"] * count, a=[None] * count, b=[None] * count)
    assert [told.name for told in trial.parts] == ["a", "b", "c"], "every reward has its row"
    for told in (*trial.parts, trial.total):
        assert all(math.isnan(value) for value in (told.mean, told.low, told.high, told.length_correlation))
        assert told.num_none == count
        assert all(math.isnan(value) for value in told.probes.values())
    assert [told.faults for told in trial.rewards] == [[], [], []]
    assert len(trial.warnings) == 3 and all("Is a `return` missing?" in warning for warning in trial.warnings)


def test_where_everything_fails_it_is_reported_once_with_the_first_error():
    numbers = itertools.count()

    def fails(prompt, response):
        raise ValueError(f"number {next(numbers)}")

    trial = tried(KonicLLMRewardComposer(reward_functions=[fails]), ["r", "s", "t"])
    assert [fault.what for fault in reward(trial, "fails").faults] == [
        f"raised ValueError: number {number}" for number in range(3)
    ]
    assert list(reward(trial, "fails").probe_faults) == list(PROBES)
    assert part(trial, "fails").num_none == 3
    assert math.isnan(part(trial, "fails").mean) and math.isnan(trial.total.mean)
    assert trial.warnings[0] == "'fails' failed on 3 of 3 responses: raised ValueError: number 0"
    assert not any("fails on a response that is" in warning for warning in trial.warnings)


def test_a_failing_response_has_no_value_of_that_reward_alone():
    def fragile(prompt, response):
        return {"key": 1 / (len(response) - 5), "other": 1}

    trial = tried(reading(a=1.0).add_reward_function(fragile), a=A)
    assert part(trial, "a").num_none == 0
    assert [part(trial, f"fragile.{key}").num_none for key in ("key", "other")] == [2, 2]
    assert len(reward(trial, "fragile").faults) == 2
    assert part(trial, "fragile.key").mean == near(statistics.fmean([-0.5, 0.5, 0.5, -0.5]))


def test_the_parts_of_a_dict_have_a_row_each():
    trial = tried(Keyed(reward_weights={"style.loud": 2.0}), ["a", "BB", "CCCC", "ddd"])
    assert [(told.name, told.reward) for told in trial.parts] == [("style.size", "style"), ("style.loud", "style")]
    assert [told.num_none for told in trial.parts] == [0, 2]
    assert (part(trial, "style.loud").mean, part(trial, "style.loud").std) == (5, 0)
    sizes, loud = [-1, -2, -4, -3], [0, 10, 10, 0]
    total = np.add(sizes, loud)
    for name, values in (("style.size", sizes), ("style.loud", loud)):
        assert part(trial, name).share_of_variance == near(np.cov(values, total)[0, 1] / np.var(total, ddof=1))
    assert [told.name for told in trial.rewards] == ["style"]


def test_rewards_are_shown_in_the_composers_order_with_what_they_cost():
    class Model:
        name = "model"

        def score(self, prompts, responses):
            time.sleep(0.03)
            return [1.0] * len(responses)

    composer = Sized(reward_models=[Model()], reward_functions=[lambda_named("quick")])
    trial = tried(composer, ["a", "bb", "ccc"])
    assert [told.name for told in trial.rewards] == composer.reward_names == ["size", "quick", "model"]
    assert 10 <= reward(trial, "model").milliseconds < 30, "0.03 s for 3 responses"
    assert 0 <= reward(trial, "quick").milliseconds < 10


def lambda_named(name):
    def function(prompt, response):
        return 0.5

    function.__name__ = name
    return function


def test_a_column_that_is_not_there_and_a_reducer_that_fails_are_reported():
    def wants(prompt, response, label):
        return 1

    with pytest.raises(RewardError, match="'wants' asks for the column 'label'"):
        tried(KonicLLMRewardComposer(reward_functions=[wants]))

    class Broken:
        def reduce(self, parts):
            return None

    with pytest.raises(RewardError, match="Reducer 'Broken' returned None"):
        tried(Sized(reducer=Broken))


# --- the same again ---


def flickering(changes_at):
    """A function that gives another value from its call of that number on."""
    numbers = itertools.count()
    return lambda prompt, response: 0.5 if next(numbers) < changes_at else 0.75


def failing_at(response, told):
    def fails(prompt, given):
        if given == response:
            raise ValueError(told())
        return 1.0

    return fails


async def awaited(prompt, response):
    return len(response)


def drifting(told):
    numbers = itertools.count()
    return lambda: next(numbers) if told == "another" else told


@pytest.mark.parametrize(
    "function, is_deterministic",
    [
        (lambda prompt, response: len(response), True),
        (lambda prompt, response: None if "bb" in response else {"key": 0.1, "none": None}, True),
        (lambda prompts, responses: [sorted(responses).index(response) for response in responses], True),
        (awaited, True),
        (failing_at("bb", drifting("the same")), True),
        (lambda prompt, response: math.nan, True),
        (lambda prompt, response, label: label, True),
        (lambda prompt, response: random.random(), False),
        (flickering(3), False),
        (flickering(5), False),
        (lambda prompts, responses: list(range(len(responses))), False),
        (lambda prompts, responses: [len(response) - len(responses[0]) for response in responses], False),
        (failing_at("bb", drifting("another")), False),
    ],
    ids=[
        "by length", "abstains", "rank", "async", "same error", "nan", "by column",
        "random", "other values the second time", "at the very last call", "place", "compared with the first",
        "another error",
    ],
)  # fmt: skip
def test_what_gives_other_values_when_asked_again_is_found(function, is_deterministic):
    composer = KonicLLMRewardComposer().add_reward_function(function, name="odd")
    trial = tried(composer, ["a", "bb", "cccc"], label=[1, 2, 3])
    assert reward(trial, "odd").is_deterministic is is_deterministic
    assert any("returns different values" in warning for warning in trial.warnings) is not is_deterministic


def test_the_first_values_are_the_ones_shown():
    trial = tried(KonicLLMRewardComposer().add_reward_function(flickering(3), name="odd"), ["a", "bb", "cccc"])
    assert (part(trial, "odd").low, part(trial, "odd").high) == (0.5, 0.5)


# --- probes ---


def test_a_batch_gets_a_probe_among_others_with_the_first_rows_prompt_and_columns():
    asked = []

    def noted(prompts, responses, label):
        asked.append((prompts, responses, label))
        return [len(response) for response in responses]

    trial = tried(KonicLLMRewardComposer(reward_functions=[noted]), ["a", "bb"], label=[7, 8])
    assert asked == [
        (["p0", "p1"], ["a", "bb"], [7, 8]),
        (["p1", "p0"], ["bb", "a"], [8, 7]),
        *((["p0", "p0", "p1"], [probe, "a", "bb"], [7, 7, 8]) for probe in PROBES.values()),
    ]
    assert part(trial, "noted").probes == {name: len(probe) for name, probe in PROBES.items()}


def test_the_total_of_a_probe_is_the_weighted_sum_of_its_parts():
    trial = tried(Keyed(reward_weights={"style.size": 0.5}), ["A", "bb"])
    assert part(trial, "style.size").probes == {name: -len(probe) for name, probe in PROBES.items()}
    assert all(math.isnan(value) for value in part(trial, "style.loud").probes.values())
    assert trial.total.probes == {name: -0.5 * len(probe) for name, probe in PROBES.items()}


@pytest.mark.parametrize("probe", PROBES)
def test_a_reward_that_fails_on_one_probe_only_is_found(probe):
    def fragile(prompt, response):
        return 1 / (len(response) - len(PROBES[probe]))

    responses = ["x" * 7, "x" * 11]
    trial = tried(KonicLLMRewardComposer(reward_functions=[fragile]), responses)
    told = reward(trial, "fragile")
    assert {name: fault.what for name, fault in told.probe_faults.items()} == {
        probe: "raised ZeroDivisionError: division by zero"
    }
    assert told.faults == []
    values = part(trial, "fragile").probes
    assert {name for name, value in values.items() if math.isnan(value)} == {probe}
    for other in set(PROBES) - {probe}:
        assert values[other] == 1 / (len(PROBES[other]) - len(PROBES[probe]))
    assert f"'fragile' fails on a response that is {probe}: raised ZeroDivisionError: division by zero" in (
        trial.warnings
    )


def test_a_probe_on_which_a_reward_abstains_is_no_fault():
    trial = tried(KonicLLMRewardComposer().add_reward_function(lambda p, r: len(r) or None, name="odd"), ["a", "bb"])
    assert math.isnan(part(trial, "odd").probes["empty"])
    assert part(trial, "odd").probes["emoji"] == len(PROBES["emoji"])
    assert reward(trial, "odd").probe_faults == {}


# --- warnings ---


def every_second():
    numbers = itertools.count()
    return lambda prompt, response: -0.1 * (next(numbers) % 2)


def fails_where(condition):
    def function(prompt, response, row):
        if condition(response, row):
            raise ValueError("no")

    return function


def sleepy(prompt, response):
    time.sleep(0.05)
    return None if response else 0.0


def abstains(prompt, response):
    return None


class Fragile:
    def reduce(self, parts):
        return sum(parts.values()) / ("c" not in parts)


CLEAN = {
    "two sound rewards": reading(a=1.0, b=1.0),
    "one reward is all of the total": reading(a=1.0),
    "one that gives a single value": adding(lambda prompt, response, row: 0.25 if row == 2 else None),
    "a probe that is as good as the best": adding(lambda prompt, response: 0.0 if not response else None),
    "emoji are liked": adding(lambda prompt, response: 9.0 if response == PROBES["emoji"] else None),
    "goes a little with the length": adding(lambda p, r: 0.2 * len(r) if set(r) == {"x"} else None),
}
CASES = {
    "fails": (
        adding(fails_where(lambda response, row: row in (2, 4))),
        "'c' failed on 2 of 6 responses: raised ValueError: no",
    ),
    "fails on empty": (
        adding(fails_where(lambda response, row: not response)),
        "'c' fails on a response that is empty: raised ValueError: no",
    ),
    "its total fails on empty": (
        reducing(adding(lambda prompt, response: None if response else -2), Fragile),
        "A response that is empty has no total: Reducer 'Fragile' raised ZeroDivisionError: ",
    ),
    "is random": (
        adding(every_second()),
        "'c' returns different values for the same responses: the policy learns partly from noise.",
    ),
    "depends on the order": (
        adding(lambda prompts, responses: [-0.01 * place for place in range(len(responses))]),
        "'c' returns different values for the same responses",
    ),
    "never returns": (adding(abstains), "'c' returned None for every response. Is a `return` missing?"),
    "is slow": (adding(sleepy), "'c' takes 0.1 s per response. Score a batch at once"),
    "is constant": (adding(lambda prompt, response: 0.25), "'c' is constant (0.25): the policy cannot learn from it."),
    "outweighs": (reading(a=100.0, b=1.0), "'a' makes up 100% of the total's variance: the other parts hardly count."),
    "likes length": (
        adding(lambda p, r: 0.54 * len(r) if set(r) == {"x"} else None),
        "The total is a length reward in disguise (correlation +0.84, by 'c'): longer responses are the quickest way",
    ),
    "likes brevity": (
        adding(lambda p, r: 0.54 * (10 - len(r)) if set(r) == {"x"} else None),
        "The total is a length reward in disguise (correlation -0.84, by 'c'): shorter responses are the quickest way",
    ),
    "likes nothing": (
        adding(lambda prompt, response: None if response else 5),
        "A response that is empty gets 7, more than the best of the 6 (2): expect the policy to find that.",
    ),
    "likes too much": (
        adding(lambda prompt, response: 0.5 if len(response) > 1000 else None),
        "A response that is very long gets 2.5, more than the best of the 6 (2): expect the policy to find that.",
    ),
}  # fmt: skip


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(reward_trial, "SLOW_SECONDS", 0.04)


@pytest.mark.parametrize("name", CASES)
def test_each_warning_comes_alone_of_what_it_warns_of(name, impatient):
    composer, expected = CASES[name]
    (warning,) = tried(composer, a=A, b=B, row=range(6)).warnings
    assert expected in warning


@pytest.mark.parametrize("name", CLEAN)
def test_nothing_is_said_of_clean_rewards(name, impatient):
    assert tried(CLEAN[name], a=A, b=B, row=range(6)).warnings == []


def test_every_warning_there_is_has_a_case():
    heads = {re.sub(r"'c'|'a'|[\d.]+", "", told)[:30] for _, told in CASES.values()}
    source = Path(reward_trial.__file__).read_text(encoding="utf-8")
    assert source.count("messages.append(") == len(heads) - 1, "one of the total's has two forms: empty and very long"


def test_a_part_is_named_as_constant_only_where_it_was_seen_twice():
    values = {"a": [3, None, None], "b": [2, 2, None]}
    trial = tried(reading(a=1.0, b=1.0), ["r"] * 3, **values)
    assert [warning for warning in trial.warnings if "constant" in warning] == [
        "'b' is constant (2): the policy cannot learn from it."
    ]


# --- files of responses ---


ROWS = [{"prompt": "p0", "response": "a", "label": 3}, {"prompt": "p1", "response": "", "label": 4}]


def written(tmp_path, rows, kind="jsonl"):
    path = tmp_path / f"texts.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_responses_are_read_with_their_prompts_and_other_columns(kind, tmp_path):
    samples = read_responses(str(written(tmp_path, ROWS, kind)))
    assert [(sample.prompt, sample.response) for sample in samples] == [("p0", "a"), ("p1", "")]
    labels = ["3", "4"] if kind == "csv" else [3, 4]  # a csv file holds text
    assert [sample.columns for sample in samples] == [{"label": label} for label in labels]
    assert [sample.row for sample in samples] == [0, 1]


def test_prompts_in_a_file_may_be_chats(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    (sample,) = read_responses(str(written(tmp_path, [{"prompt": chat, "response": "Hi"}])))
    assert (sample.messages, sample.prompt) == (chat, "Hello")


@pytest.mark.parametrize(
    "rows, told",
    [
        ([*ROWS, {"prompt": "p2"}], r"texts\.jsonl, row 2: needs a text in the column 'response'"),
        ([*ROWS, {"prompt": "p2", "response": None}], r"texts\.jsonl, row 2: needs a text"),
        ([{"prompt": "p", "response": 5}, *ROWS], r"texts\.jsonl, row 0: needs a text"),
        ([ROWS[0], "just text"], r"texts\.jsonl, row 1: needs a text"),
        ([ROWS[0], {"response": "r", "promt": "p"}], r"texts\.jsonl, row 1: has no column 'prompt'\. Did you mean"),
        ([{"response": "r", "prompt": " "}] * 2, r"texts\.jsonl: 2 of 2 prompts .*row 1 \(empty\)"),
        ([], r"texts\.jsonl: holds no rows\. Give at least one"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_reported_with_its_row(rows, told, tmp_path):
    with pytest.raises(DatasetError, match=told):
        read_responses(str(written(tmp_path, rows)))


def test_the_agents_prompt_column_is_read_where_the_file_has_it(tmp_path):
    rows = [{"prompt": "p", "question": "q", "response": "r"}]
    path = str(written(tmp_path, rows))
    assert [read_responses(path, column)[0].prompt for column in ("question", "prompt", "absent")] == ["q", "p", "p"]
    with pytest.raises(DatasetError, match=r"has no column 'task' or 'prompt'\..* Rename the column") as error:
        read_responses(str(written(tmp_path, [{"question": "q", "response": "r"}])), "task")
    assert "DatasetConfig" not in str(error.value)
    text = AGENT.format(model="any", seed=0).replace("shuffle=False", "prompt_column='question'")
    assert load_composer_and_dataset(script(tmp_path, text))[1].prompt_column == "question"


def test_the_template_of_the_agent_makes_the_prompts_where_the_file_has_its_columns(tmp_path):
    template = "{title}: {text}"
    (made,) = read_responses(
        str(written(tmp_path, [{"title": "A", "text": "b", "prompt": "p", "response": "r"}])), "prompt", template
    )
    assert (made.prompt, made.columns["title"]) == ("A: b", "A")
    (read,) = read_responses(str(written(tmp_path, [{"title": "A", "prompt": "A: b", "response": "r"}])), "p", template)
    assert read.prompt == "A: b"


def test_the_system_prompt_of_the_agent_goes_first_in_chats_and_plain_prompts_are_reported(tmp_path, caplog):
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Hello"}]
    path = str(written(tmp_path, [{"prompt": own[1:], "response": "r"}, {"prompt": own, "response": "r"}]))
    samples = read_responses(path, system_prompt="Be kind.")
    assert [sample.messages[0]["content"] for sample in samples] == ["Be kind.", "Mine."]
    assert [sample.prompt for sample in samples] == ["Hello", "Hello"]
    assert not caplog.text
    (sample,) = read_responses(str(written(tmp_path, [{"prompt": "p", "response": "r"}])), system_prompt="Be kind.")
    assert (sample.prompt, sample.messages) == ("p", None)
    assert "prompts of plain text are tried without the system_prompt" in caplog.text


def test_the_command_gives_rewards_the_system_prompt_that_they_see_in_training(tmp_path):
    code = """
        from konic.finetuning import *

        class Rewards(KonicLLMRewardComposer):
            @llm_reward
            def chat_length(self, prompt, response, messages):
                return len(messages)

        agent = KonicFinetuningAgent(
            base_model="any", reward_composer=Rewards(),
            dataset_config=DatasetConfig(prompts=[[{"role": "user", "content": "x"}]], system_prompt="Be kind."),
        )
    """
    texts = written(tmp_path, [{"prompt": [{"role": "user", "content": "x"}], "response": "r"}])
    assert cells(run(script(tmp_path, code), "--texts", texts).stdout, "chat_length")[0] == "2.000"


def test_rows_with_an_empty_prompt_are_left_out_with_their_responses(tmp_path, caplog):
    rows = [{"prompt": text, "response": f"to {text}"} for text in ("a", " ", "b")]
    samples = read_responses(str(written(tmp_path, rows)))
    assert [(sample.prompt, sample.response) for sample in samples] == [("a", "to a"), ("b", "to b")]
    assert "empty prompts are left out, 1 of 3: rows 1." in caplog.text


def test_a_file_that_is_not_there_or_is_no_data_is_reported(tmp_path):
    with pytest.raises(DatasetError, match="there is no such file"):
        read_responses(str(tmp_path / "absent.jsonl"))
    path = tmp_path / "texts.jsonl"
    path.write_text('{"prompt": "p", "response": "r"}\n{oops\n')
    with pytest.raises(DatasetError, match=r"texts\.jsonl.*line 2"):
        read_responses(str(path))


# --- fresh samples ---

AGENT = """
from konic.finetuning import *

class Rewards(KonicLLMRewardComposer):
    @llm_reward
    def brief(self, prompt, response, label):
        return label - len(response) / 80

def build_agent():
    return KonicFinetuningAgent(
        base_model={model!r}, reward_composer=Rewards(reward_weights={{"brief": 2.0}}), lora_config=LoraConfig(r=2),
        dataset_config=DatasetConfig(
            prompts=[{{"prompt": "a long beginning " * n + word, "label": n}} for n, word in enumerate("xyz")],
            shuffle=False,
        ),
        training_config=TrainingConfig(seed={seed}),
        generation_config=GenerationConfig(max_new_tokens=4, max_prompt_length=8),
    )
"""


@pytest.fixture(autouse=True)
def _imports_as_they_were(monkeypatch):
    """Loading a script adds its folder to the path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name in ("job", "konic_script_job", "rewards_elsewhere"):
            del sys.modules[name]


def agent_of(tmp_path, model_folders, seed=0):
    return load_agent(script(tmp_path, AGENT.format(model=model_folders["llama"], seed=seed)))


def test_samples_are_of_the_datasets_rows_in_order_with_what_the_model_read(model_folders, tmp_path):
    agent = agent_of(tmp_path, model_folders)
    samples = sample_responses(agent, 5, "cpu")
    assert [sample.row for sample in samples] == [0, 1, 2, 0, 1]
    assert [sample.columns["label"] for sample in samples] == [0, 1, 2, 0, 1]
    whole = [prompt.text for prompt in load_prompts(agent.get_dataset_config()).batch(0, 3)]
    read = [sample.prompt for sample in samples]
    assert all(text.endswith(cut) and len(cut) <= 8 for text, cut in zip([*whole, *whole[:2]], read, strict=True))
    assert len(read[1]) < len(whole[1])
    assert len(samples) == 5 and all(isinstance(sample.response, str) for sample in samples)


def test_samples_come_again_with_the_seed_and_differ_by_it_and_by_place(model_folders, tmp_path):
    first, again, other = (
        [sample.response for sample in sample_responses(agent_of(tmp_path, model_folders, seed), 6, "cpu")]
        for seed in (1, 1, 12)  # another length: Python takes compiled code by the file's second and length
    )
    assert first == again
    assert first != other
    assert first[:3] != first[3:], "a row that comes twice gets other random numbers"


def test_more_samples_than_fit_one_batch_are_all_there(model_folders, tmp_path):
    assert len(sample_responses(agent_of(tmp_path, model_folders), 35, "cpu")) == 35


# --- the composer of a script ---

COMPOSER = """
from konic.finetuning import *

class Rewards(KonicLLMRewardComposer):
    @llm_reward
    def size(self, prompt, response):
        return len(response)

    @llm_reward
    def style(self, prompt, response):
        if "!" in response:
            raise ValueError("too loud")
        return {"dots": response.count("."), "end": 1.0 if response.endswith("?") else None}
"""
WORDED = COMPOSER + "\nscored_by = Rewards(reward_weights={'size': 0.5})\n"
UNREACHABLE = AGENT.format(model="./not-there", seed=0)


@pytest.mark.parametrize(
    "text, weights",
    [
        (COMPOSER, {}),
        (WORDED, {"size": 0.5}),
        (WORDED + "class Other(Rewards): pass\n", {"size": 0.5}),
        (COMPOSER + "\ndef helper(): return Rewards()\nkind = KonicLLMRewardComposer\n", {}),
        (UNREACHABLE, {"brief": 2.0}),
        (UNREACHABLE.replace("def build_agent", "def make") + "\nagent = make()\n", {"brief": 2.0}),
        (UNREACHABLE + "\nother = Rewards()\n", {"brief": 2.0}),
        ("from rewards_elsewhere import Rewards, common\n", {"size": 0.25}),
    ],
    ids=[
        "only a class", "a module-level composer", "a composer beside classes", "a class and what is imported",
        "build_agent", "agent", "an agent beside a composer", "an imported composer",
    ],
)  # fmt: skip
def test_the_composer_of_a_script_is_found(text, weights, tmp_path):
    script(tmp_path, COMPOSER + "common = Rewards(reward_weights={'size': 0.25})\n", "rewards_elsewhere.py")
    composer = load_composer(script(tmp_path, text))
    assert type(composer).__name__ == "Rewards"
    assert composer._reward_weights == weights


@pytest.mark.parametrize(
    "text, told",
    [
        ("x = 1", "defines no composers and no agent"),
        ("from konic.finetuning import *", "defines no composers and no agent"),
        (COMPOSER + "class Other(Rewards): pass\n", "defines 2 composers and no agent"),
        (WORDED + "another = Rewards()\n", "defines 2 composers and no agent"),
        (COMPOSER + "agent = Rewards()\n", "its agent is a Rewards, not a KonicFinetuningAgent"),
        (COMPOSER + "    def __init__(self):\n        self.x = 1 / 0\n", "raised ZeroDivisionError"),
        (COMPOSER + "    def __init__(self, needed):\n        pass\n", r"raised TypeError.*'needed'"),
        ("import nothing_of_this_name", "raised ModuleNotFoundError"),
        ("raise SystemExit(0)", r"called sys\.exit\(\)"),
        (COMPOSER + "Rewards().set_reward_weight('size', 'x')\n", "must be a finite number"),
    ],
)
def test_a_script_without_one_composer_is_reported_why(text, told, tmp_path):
    with pytest.raises(ConfigError, match=f"(?s){told}"):
        load_composer(script(tmp_path, text))


def test_the_error_of_a_composers_own_init_shows_the_users_line(tmp_path):
    path = script(tmp_path, COMPOSER + "    def __init__(self):\n        self.x = 1 / 0\n")
    with pytest.raises(ConfigError) as error:
        load_composer(path)
    assert "self.x = 1 / 0" in str(error.value)
    assert "konic/cli" not in str(error.value)


def test_a_script_that_is_not_there_is_reported(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.py: there is no such file"):
        load_composer(tmp_path / "absent.py")


# --- the command ---

TEXTS = ["a.", "no!", "why so long?", "ok..."]


def run(*arguments):
    """The command in this process; a user's mistake is raised."""
    result = CliRunner().invoke(app, ["rewards", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result


def cells(output, name, occurrence=0):
    """The numbers in the row of a part."""
    rows = [line.split() for line in output.splitlines() if line.split()[:1] == [name]]
    return rows[occurrence][1:]


@pytest.fixture
def texts(tmp_path):
    return written(tmp_path, [{"prompt": f"p{row}", "response": text} for row, text in enumerate(TEXTS)])


def test_the_command_shows_the_rewards_the_probes_and_the_warnings(texts, tmp_path):
    done = konic("rewards", script(tmp_path, COMPOSER), "--texts", texts)
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"Loading {tmp_path / 'job.py'} ...\n"
    output = done.stdout
    assert "Rewards on 4 responses" in output
    for headings in ("mean spread lowest highest moves total r(length) None", "ms each errors repeatable"):
        assert headings in " ".join(output.split())
    size, dots, end = cells(output, "size"), cells(output, "style.dots"), cells(output, "style.end")
    lengths = [len(text) for text in TEXTS]
    assert size[:4] == ["5.500", f"{statistics.stdev(lengths):.3f}", "2.000", "12.000"]
    assert size[5] == "+1.00"
    assert size[6:] == ["0"]
    assert cells(output, "size", 1)[1:] == ["0", "yes"]
    assert cells(output, "style", 0)[1:] == ["1", "yes"]
    assert dots[:4] == ["1.333", "1.528", "0.000", "3.000"]
    assert dots[-1] == "0", "one error, and it is no None"
    assert end[-1] == "2", "two abstain beside the error"
    assert [int(row[4].rstrip("%")) for row in (size, dots)] == [
        pytest.approx(100 * share, abs=0.51) for share in shares_of(lengths)
    ]
    assert cells(output, "total")[2:4] == ["3.000", "13.000"]
    assert cells(output, "size", 2) == [f"{len(probe)}.000" for probe in PROBES.values()]
    assert cells(output, "style.dots", 1) == ["0.000", "400.000", "error", "0.000"]
    warnings = " ".join(output.split("emoji")[1].split())
    assert "! 'style' failed on 1 of 4 responses: raised ValueError: too loud" in warnings
    assert "! The total is a length reward in disguise" in warnings
    assert "Nothing stands out" not in output


def shares_of(lengths):
    """Of size and style.dots, by numpy: `no!` failed and has no total, `why so long?` ends well."""
    size, dots, end = [lengths[row] for row in (0, 2, 3)], [1, 0, 3], [0, 1, 0]
    total = np.sum([size, dots, end], axis=0)
    return [np.cov(values, total)[0, 1] / np.var(total, ddof=1) for values in (size, dots)]


def test_a_reward_whose_every_call_fails_ends_the_command_with_an_error(texts, tmp_path):
    failing = COMPOSER.replace('if "!" in response', "if True")
    done = konic_here("rewards", script(tmp_path, failing), "--texts", texts)
    assert done.returncode == 1
    assert cells(done.stdout, "style", 1)[1:] == ["4", "–"]
    assert done.stderr == f"Loading {tmp_path / 'job.py'} ...\n"


@pytest.mark.parametrize(("condition", "code"), [("True", 1), ("not response", 0)])
def test_a_compose_of_ones_own_is_tried_like_a_reward(condition, code, texts, tmp_path):
    own = f"    def compose(self, prompt, response):\n        return 1 // (not ({condition}))\n"
    head, _, tail = COMPOSER.partition("    @llm_reward\n")
    done = konic_here("rewards", script(tmp_path, f"{head}{own}    @llm_reward\n{tail}"), "--texts", texts)
    assert done.returncode == code
    told = "failed on 3 of 4 responses" if code else "fails on a response that is empty"
    assert f"! 'Rewards.compose' {told}: raised ZeroDivisionError" in " ".join(done.stdout.split())
    assert cells(done.stdout, "total", 1)[0] == "error"


def test_two_composers_are_one_message(texts, tmp_path):
    done = konic("rewards", script(tmp_path, COMPOSER + "class Other(Rewards): pass\n"), "--texts", texts)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "job.py: defines 2 composers and no agent" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_takes_a_module_level_composer_or_an_agents_and_loads_no_model(texts, tmp_path):
    weighted = cells(run(script(tmp_path, WORDED), "--texts", texts).stdout, "total")
    assert weighted[2:4] == ["2.000", "7.000"]
    labelled = written(tmp_path, [{"prompt": "p", "response": "x" * 8, "label": n} for n in (1, 2)])
    output = run(script(tmp_path, UNREACHABLE), "--texts", labelled).stdout
    assert cells(output, "brief")[:4] == ["1.400", "0.707", "0.900", "1.900"]
    assert cells(output, "total")[:4] == ["2.800", "1.414", "1.800", "3.800"]


def test_mistakes_with_files_are_the_users(tmp_path):
    path = script(tmp_path, COMPOSER)
    with pytest.raises(DatasetError, match="there is no such file"):
        run(path, "--texts", tmp_path / "absent.jsonl")
    with pytest.raises(DatasetError, match="row 0: needs a text in the column 'response'"):
        run(path, "--texts", written(tmp_path, [{"prompt": "p"}]))
    with pytest.raises(ConfigError, match="defines neither a module-level `agent`"):
        run(path)


def test_without_texts_the_base_model_is_sampled(model_folders, tmp_path):
    path = script(tmp_path, AGENT.format(model=model_folders["llama"], seed=0))
    result = run(path, "--samples", 5, "--device", "cpu")
    assert result.stderr == f"Loading {path} ...\nSampling 5 responses from {model_folders['llama']} ...\n"
    assert "Rewards on 5 responses" in result.stdout
    agent = load_agent(path)
    trial = try_rewards(agent.get_reward_composer(), sample_responses(agent, 5, "cpu"))
    told = part(trial, "brief")
    assert cells(result.stdout, "brief")[:4] == [f"{v:.3f}" for v in (told.mean, told.std, told.low, told.high)]
    assert cells(result.stdout, "total")[0] == f"{2 * told.mean:.3f}"


def test_clean_rewards_get_a_clean_bill(capsys):
    show(tried(reading(a=1.0, b=1.0), a=A, b=B))
    output = capsys.readouterr().out
    assert "Nothing stands out." in output
    assert "!" not in output
    assert cells(output, "a")[4] == "50%"


def test_what_is_not_known_is_left_blank_and_noise_is_marked(capsys):
    numbers = itertools.count()
    composer = reading(a=1.0).add_reward_function(lambda p, r: -0.01 * next(numbers), name="odd")
    show(tried(composer.add_reward_function(abstains), ["r"] * 3, a=[1, 0, 1]))
    output = capsys.readouterr().out
    assert cells(output, "abstains") == ["0%", "3"], "what moves and None; no mean, spread, lowest, highest, r"
    assert cells(output, "abstains", 1)[1:] == ["0", "yes"], "errors, repeatable"
    assert cells(output, "abstains", 2) == []
    assert cells(output, "odd", 1)[-1] == "NO"
    assert "nan" not in output


def test_names_cannot_mark_up_or_steer_the_terminal(capsys):
    def loud(prompt, response):
        return {"\x1b[1m": 1.0, "[bold]": len(response)}

    show(tried(KonicLLMRewardComposer(reward_functions=[loud])))
    output = capsys.readouterr().out
    assert "\x1b" not in output
    for table in (0, 1):
        assert cells(output, "loud.[bold]", table) and cells(output, "loud.\\x1b[1m", table)


def test_the_columns_of_make_prompts_reach_the_rewards():
    prompts = make_prompts([{"prompt": "p", "a": 1}, {"prompt": "q", "a": 3}], DatasetConfig(), "test")
    trial = try_rewards(reading(a=1.0), make_samples(prompts, ["p", "q"], ["r", "s"]))
    assert part(trial, "a").mean == 2


# --- known faults of src ---


class Judge:
    def __init__(self, name, score):
        self.name, self._score = name, score

    def score(self, prompts, responses):
        return [self._score(response) for response in responses]


def test_a_model_whose_name_starts_with_anothers_has_one_row_of_its_own():
    models = [Judge("judge_v1", len), Judge("judge_v1.5", lambda response: response.count("a"))]
    trial = tried(KonicLLMRewardComposer(models), ["a", "bb", "aaa", "baab"])
    assert [(told.name, told.reward) for told in trial.parts] == [(name, name) for name in ("judge_v1", "judge_v1.5")]
    assert math.fsum(told.share_of_variance for told in trial.parts) == near(1.0)


def test_where_a_reward_fails_there_is_no_total_as_in_training():
    composer = reading(a=1.0).add_reward_function(lambda prompt, response: -5 + 1 / len(response), name="odd")
    trial = tried(composer, ["x", "", "xx"], a=[1, 1, 1])
    assert trial.total.num_none == 1
    assert trial.total.high == -3
    assert math.isnan(trial.total.probes["empty"])
    assert not any("response that is empty gets" in warning for warning in trial.warnings)


@pytest.mark.parametrize("value, count", [(0.1, 3), (0.2, 6), (0.7, 12)])
def test_a_constant_total_moves_by_nothing_whatever_its_value(value, count):
    trial = tried(reading(a=1.0), ["r"] * count, a=[value] * count)
    assert math.isnan(part(trial, "a").share_of_variance)


def test_tiny_rewards_have_a_correlation():
    assert correlation([1e-170, 2e-170, 3e-170], [1.0, 2.0, 3.0]) == pytest.approx(1)


def test_huge_rewards_can_be_tried():
    trial = tried(reading(a=1.0), ["r"] * 3, a=[1e160, 2e160, 3e160])
    assert (trial.total.low, trial.total.high) == (1e160, 3e160)


def test_the_responses_of_a_csv_are_text_though_they_look_like_numbers(tmp_path):
    rows = [{"prompt": "6*7?", "response": "42"}, {"prompt": "1+1?", "response": "2"}]
    assert [sample.response for sample in read_responses(str(written(tmp_path, rows, "csv")))] == ["42", "2"]


def test_a_row_that_comes_again_in_a_later_batch_gets_other_random_numbers(model_folders, tmp_path):
    samples = sample_responses(agent_of(tmp_path, model_folders), 64, "cpu")
    assert len({(sample.row, sample.response) for sample in samples}) > 50


@pytest.mark.parametrize("samples", [0, -3])
def test_no_samples_are_a_users_mistake(samples, model_folders, tmp_path):
    text = AGENT.format(model=model_folders["llama"], seed=0).replace("response, label)", "response, label=0)")
    with pytest.raises((SystemExit, KonicError)):
        run(script(tmp_path, text), "--samples", samples, "--device", "cpu")


def test_a_composer_without_rewards_is_reported(texts, tmp_path):
    text = (
        "from konic.finetuning import *\nclass Rewards(KonicLLMRewardComposer):\n    def size(self, p, r): return 1\n"
    )
    with pytest.raises(RewardError, match="Rewards has no rewards"):
        run(script(tmp_path, text), "--texts", texts)


@pytest.mark.parametrize("alias", ["composer = scored_by = Rewards()", "Alias = Rewards"])
def test_two_names_of_one_composer_are_one(alias, tmp_path):
    assert type(load_composer(script(tmp_path, f"{COMPOSER}\n{alias}\n"))).__name__ == "Rewards"


def test_the_text_of_a_users_error_cannot_steer_the_terminal(capsys):
    def fails(prompt, response):
        raise ValueError("\x1b[31m red")

    show(tried(KonicLLMRewardComposer(reward_functions=[fails])))
    assert "\x1b" not in capsys.readouterr().out


def test_a_reward_named_total_has_a_row_beside_the_total(capsys):
    trial = tried(reading(total=2.0, a=1.0), total=A, a=B)
    assert [told.name for told in (*trial.parts, trial.total)] == ["total", "a", "total of all"]
    show(trial)
    starts = [line.strip().partition("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert (starts.count("a"), starts.count("total"), starts.count("total of all")) == (3, 3, 2)


def test_without_a_standard_output_the_tables_go_nowhere(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python starts where the shell has closed it
    show(tried(Sized()))


def test_long_names_can_be_told_apart_in_the_table(capsys):
    show(
        tried(
            reading(correctness_of_answer=1.0, correctness_of_format=1.0),
            correctness_of_answer=A,
            correctness_of_format=B,
        )
    )
    table = capsys.readouterr().out.partition("Unusual responses")[0]
    assert "correctness_of_answer" in table and "correctness_of_format" in table
