import dataclasses
import json
import math
from typing import get_type_hints

import pytest

from konic.finetuning.errors import ConfigError, KonicError
from konic.finetuning.results.evaluation import Evaluation
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.results.summary import FinetuningResult
from konic.finetuning.run.card import model_card

CONTRACT = (
    "iteration reward_mean reward_std reward_min reward_max kl_divergence policy_loss value_loss entropy_loss "
    "total_loss response_length_mean response_length_std learning_rate clip_fraction approx_kl explained_variance "
    "reward_breakdown generation_time_sec reward_compute_time_sec update_time_sec total_time_sec"
).split()
RUN_CONTRACT = (
    "total_iterations best_iteration best_reward final_reward_mean final_kl_divergence total_samples total_time_sec "
    "model_path history"
).split()


def iteration(number=1, **values):
    """An iteration whose every number is another one."""
    names = [name for name, kind in get_type_hints(FinetuningIterationResult).items() if kind is float]
    defaults = {name: 0.5 + index for index, name in enumerate(names)}
    counts = {"num_samples": 4, "num_unscored": 1, "reward_breakdown": {"brevity": 0.25, "style.loud": 1.0}}
    return FinetuningIterationResult(**{"iteration": number, **defaults, **counts, **values})


def run(rewards, **values):
    history = [iteration(number, reward_mean=reward) for number, reward in enumerate(rewards, start=1)]
    defaults = {"model_name": "gpt2", "total_time_sec": 12.34, "model_path": "runs/x/final"}
    return FinetuningResult(history=history, **{**defaults, **values})


def test_an_iteration_holds_what_the_contract_names():
    assert set(CONTRACT) <= {field.name for field in dataclasses.fields(FinetuningIterationResult)}
    FinetuningIterationResult(**{name: {} if name == "reward_breakdown" else 1 for name in CONTRACT})


def test_a_run_holds_what_the_contract_names():
    result = run([1.0])
    for name in RUN_CONTRACT:
        getattr(result, name)


@pytest.mark.parametrize("result", [iteration(), run([1.0])])
def test_results_are_frozen(result):
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.total_time_sec = 0.0


def test_an_iteration_comes_back_from_its_dict_through_json():
    result = iteration(7, num_unscored=2)
    assert FinetuningIterationResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_nan_becomes_none_in_the_dict_and_nan_again():
    names = ("reward_mean", "reward_min", "reward_max", "explained_variance")
    values = iteration(**dict.fromkeys(names, math.nan)).to_dict()
    assert [values[name] for name in names] == [None] * 4
    json.dumps(values, allow_nan=False)
    back = FinetuningIterationResult.from_dict(values)
    assert all(math.isnan(getattr(back, name)) for name in names)
    assert back.to_dict() == values


def test_infinities_and_values_inside_the_breakdown_are_json_too():
    values = iteration(total_loss=math.inf, reward_breakdown={"a": math.nan, "b": 1.0}).to_dict()
    assert values["total_loss"] is None
    assert values["reward_breakdown"] == {"a": None, "b": 1.0}
    json.dumps(values, allow_nan=False)


def test_the_dict_is_not_the_result_itself():
    result = iteration()
    result.to_dict()["reward_breakdown"]["brevity"] = 99
    assert result.reward_breakdown["brevity"] == 0.25


def test_curves_totals_and_finals_follow_from_the_history():
    result = run([0.1, 0.4, 0.3])
    assert result.total_iterations == 3
    assert result.get_reward_curve() == [0.1, 0.4, 0.3]
    assert result.get_kl_curve() == [result.history[0].kl_divergence] * 3
    assert result.final_reward_mean == 0.3
    assert result.final_kl_divergence == result.history[-1].kl_divergence
    assert result.total_samples == 12


@pytest.mark.parametrize(
    ("rewards", "best", "reward"),
    [
        ([0.1, 0.4, 0.3], 2, 0.4),
        ([0.4, 0.1, 0.4], 1, 0.4),
        ([-3.0, -1.0, -1.0], 2, -1.0),
        ([math.nan, 0.2, math.nan], 2, 0.2),
        ([0.2, math.nan, 0.3], 3, 0.3),
    ],
)
def test_the_best_iteration_is_the_first_with_the_highest_reward(rewards, best, reward):
    result = run(rewards)
    assert (result.best_iteration, result.best_reward) == (best, reward)


@pytest.mark.parametrize("rewards", [[], [math.nan, math.nan]])
def test_without_any_reward_there_is_no_best(rewards):
    result = run(rewards)
    assert result.best_iteration == 0
    assert math.isnan(result.best_reward)
    assert math.isnan(result.final_reward_mean)
    result.summary()


def test_the_summary_has_the_contracts_lines_in_order_then_the_runs_own():
    lines = run([0.1, 0.7234, 0.687], stopped_because="max_minutes passed").summary().splitlines()
    assert lines[:7] == [
        "=" * 50,
        "Finetuning Results Summary",
        "=" * 50,
        "Model: gpt2",
        "Total Iterations: 3",
        "Best Reward: 0.7234 (iteration 2)",
        "Final Reward: 0.6870",
    ]
    assert lines[-1] == "=" * 50
    more = "\n".join(lines[7:-1])
    assert all(part in more for part in ("12", "12.3s", "max_minutes passed", "runs/x/final"))


def test_the_summary_says_how_many_responses_did_not_count_and_why():
    history = [iteration(1, num_in_equal_groups=4, num_unscored=0), iteration(2, num_in_equal_groups=2, num_cut_off=3)]
    result = dataclasses.replace(run([]), history=history)
    assert result.left_out == {"in groups of equal rewards": 6, "cut off": 3, "without a reward": 1}
    assert "Left Out: 6 in groups of equal rewards, 3 cut off, 1 without a reward" in result.summary().splitlines()
    none = dataclasses.replace(result, history=[iteration(num_unscored=0)])
    assert none.left_out == {}
    assert "Left Out" not in none.summary()


def test_a_runs_dict_is_json_with_numbers_and_history():
    result = run([0.1, math.nan, 0.3])
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert set(RUN_CONTRACT) <= set(values)
    assert (values["best_iteration"], values["best_reward"], values["final_reward_mean"]) == (3, 0.3, 0.3)
    assert (values["total_iterations"], values["total_samples"]) == (3, 12)
    assert [row["reward_mean"] for row in values["history"]] == [0.1, None, 0.3]
    assert FinetuningIterationResult.from_dict(values["history"][2]) == result.history[2]


def test_breakdown_means_leave_out_the_samples_that_abstained():
    parts = {"a": [1.0, 2.0, 6.0], "b": [math.nan, 4.0, math.nan]}
    evaluation = Evaluation(
        prompts=["p"] * 3, responses=["r"] * 3, rewards=[1.0, math.nan, 3.0], breakdown=parts,
        kl_per_response=[0.0] * 3, response_lengths=[1] * 3,
    )  # fmt: skip
    assert evaluation.reward_breakdown_mean == {"a": 3, "b": 4}
    shown = evaluation.to_dict()
    assert shown["reward_breakdown"] == parts
    assert shown["reward_breakdown_mean"] == {"a": 3, "b": 4}
    assert evaluation.reward_mean == 2


def test_a_model_card_shows_names_as_text_alone():
    names = {"<b>|x": 1.0, "`y` [z](http://z)": 2.0}
    result = run([1.0], model_name="m[x](http://y)<img>\x1b")
    result.history[0].reward_breakdown.update(names)
    text = model_card(result, {"algorithm": "ppo"}, "base", is_adapter=True).partition("```")[0]
    assert "| &#60;b&#62;&#124;x | 1.0000 | 1.0000 |" in text
    assert not any(part in text for part in ("<img>", "[x](", "[z](", "\x1b", "`y`"))


def test_errors_cannot_steer_a_terminal():
    assert str(KonicError("a\x1b[2Jb\u202ec\nd", "second line")) == "a\\x1b[2Jb\\u202ec\\nd\nsecond line"
    assert str(ConfigError("plain")) == "plain"
