"""Whole runs of every algorithm on tiny models: they learn, resume, keep to their KL, and tell what goes wrong."""

import logging
import math

import pytest

from konic.finetuning import ConfigError, DatasetConfig, KonicLLMRewardComposer, OutputError, llm_reward
from konic.finetuning.algorithms import ALGORITHMS
from test_engine import Silent, completions, make_engine, metrics, same_tensors, weights


class OneToken(KonicLLMRewardComposer):
    @llm_reward
    def right(self, prompt, response):
        return float(response == "k")


class Until(Silent):
    """Ends a run once the mean reward of its last five iterations has reached a goal."""

    def __init__(self, goal):
        super().__init__()
        self.goal, self.rewards = goal, []

    def should_stop_early(self, result):
        self.rewards.append(result.reward_mean)
        return len(self.rewards) > 5 and sum(self.rewards[-5:]) / 5 >= self.goal


@pytest.mark.parametrize(("algorithm", "seed"), [*((name, 0) for name in ALGORITHMS), ("ppo", 2), ("grpo", 2)])
def test_the_bandit_is_solved(model_folders, algorithm, seed, tmp_path):
    """One-token answers, one of them rewarded, which the model gives once in 700 at first: 95 % of the maximum.

    The answer costs 6.5 nats, where the default `kl_limit` already counts: without it.
    DPPO trains an adapter below a fixed head, with which this model gives no answer more often than about 0.45.
    """
    fixed_head = algorithm == "dppo"
    goal = 0.25 if fixed_head else 0.95
    engine = make_engine(
        model_folders["llama"], tmp_path, composer=OneToken(), dataset=DatasetConfig(prompts=["one"]),
        callback=Until(goal), generation={"max_new_tokens": 1}, batch_size=64, num_generations=64,
        learning_rate=2e-2 if fixed_head else 5e-3, ppo_epochs=4,
        kl_penalty_weight=0.01, kl_limit=None, seed=seed, algorithm=algorithm, lora=fixed_head,
    )  # fmt: skip
    curve = engine.train(50).get_reward_curve()
    assert curve[0] < 0.05
    assert sum(curve[-5:]) / 5 >= goal


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_resumed_run_is_the_same_run_for_every_algorithm(model_folders, algorithm, tmp_path):
    def engine(run):
        return make_engine(
            model_folders["llama"], run, algorithm=algorithm, num_minibatches=2, kl_target=0.5, kl_horizon=8,
            kl_penalty_weight=0.05, target_kl=0.5, value_warmup_iterations=2 if algorithm == "ppo" else 0,
        )  # fmt: skip

    engine(tmp_path / "whole").train(5)
    engine(tmp_path / "parts").train(5, save_every=2)
    engine(tmp_path / "parts").train(5, resume_from_checkpoint=tmp_path / "parts" / "checkpoint-2")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert completions(tmp_path / "whole") == completions(tmp_path / "parts")
    for folder in ("final", "best", "checkpoint-5"):
        same_tensors(weights(tmp_path / "whole" / folder), weights(tmp_path / "parts" / folder))
    prices = [row["kl_penalty_weight"] for row in metrics(tmp_path / "whole")]
    assert len(set(prices)) == (3 if algorithm == "ppo" else 5), "it waits while values warm up"


def test_a_group_is_one_prompt_with_responses_of_its_own(model_folders, tmp_path):
    make_engine(model_folders["llama"], tmp_path, algorithm="grpo", num_generations=4).train(3)
    seen = []
    for rows in completions(tmp_path):
        for start in (0, 4):
            group = rows[start : start + 4]
            assert len({row["row"] for row in group}) == 1
            assert len({tuple(row["token_ids"]) for row in group}) == 4
            seen.append(group[0]["row"])
    assert sorted(seen) == sorted(set(seen)), "six prompts in a row without one twice"


def test_the_price_of_kl_rises_until_the_policy_is_near_the_target(model_folders, tmp_path):
    options = {"learning_rate": 5e-3, "kl_penalty_weight": 0.01, "kl_limit": None}
    free = make_engine(model_folders["llama"], tmp_path / "free", **options)
    steered = make_engine(model_folders["llama"], tmp_path / "steered", kl_target=0.5, kl_horizon=4, **options)
    loose, tight = (engine.train(55).history for engine in (free, steered))
    assert {result.kl_penalty_weight for result in loose} == {0.01}
    assert max(result.kl_penalty_weight for result in tight) > 0.1
    paid = [sum(result.kl_per_response for result in history[-8:]) / 8 for history in (loose, tight)]
    assert paid[0] > 2.5
    assert 0.1 < paid[1] < 1.0


def test_a_target_needs_a_price_to_start_from(model_folders, tmp_path):
    engine = make_engine(model_folders["llama"], tmp_path / "run", kl_target=1.0, kl_penalty_weight=0.0)
    with pytest.raises(ConfigError, match=r"kl_target steers kl_penalty_weight by factors: start it above 0"):
        engine.train(1)
    assert not (tmp_path / "run").exists()


def test_the_best_weights_are_within_the_budget(model_folders, tmp_path, caplog):
    engine = make_engine(
        model_folders["llama"], tmp_path, learning_rate=5e-3, batch_size=32, kl_penalty_weight=0.0, kl_budget=0.3
    )
    with caplog.at_level(logging.WARNING):
        result = engine.train(12)
    rows = metrics(tmp_path)
    within = [row for row in rows if row["kl_per_response"] <= 0.3]
    assert 1 < len(within) < len(rows)
    assert result.best_reward == max(row["reward_mean"] for row in within)
    assert max(row["reward_mean"] for row in rows) > result.best_reward
    told = [record.message for record in caplog.records if "beyond kl_budget=0.3" in record.message]
    assert len(told) == 1
    short = make_engine(
        model_folders["llama"], tmp_path / "short", learning_rate=5e-3, batch_size=32, kl_penalty_weight=0.0
    )
    short.train(result.best_iteration - 1)
    same_tensors(weights(tmp_path / "best"), weights(tmp_path / "short" / "final"))
    again = make_engine(
        model_folders["llama"], tmp_path, learning_rate=5e-3, batch_size=32, kl_penalty_weight=0.0, kl_budget=9.0
    )
    with pytest.raises(OutputError, match=r"another run: kl_budget was 0\.3 and is 9\.0\. "):
        again.train(14, resume_from_checkpoint=True)
    before = weights(tmp_path / "best")
    resumed = again.train(14, resume_from_checkpoint=True, allow_changes=True)
    assert "whose weights are not kept: best/ stays" in caplog.text
    assert resumed.best_iteration <= 12  # an earlier one, which is not in best/
    same_tensors(weights(tmp_path / "best"), before)


class Same(KonicLLMRewardComposer):
    @llm_reward
    def same(self, prompt, response):
        return 1.0


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_where_no_reward_is_ever_earned_the_policy_stays_exactly_where_it_is(
    model_folders, tmp_path, algorithm, batch_size
):
    if batch_size == 1 and ALGORITHMS[algorithm].compares_groups:
        pytest.skip("groups have at least two responses")
    options = {"algorithm": algorithm, "batch_size": batch_size, "num_generations": None}
    history = make_engine(model_folders["llama"], tmp_path, composer=Same(), **options).train(4).history
    assert max(result.kl_per_response for result in history) < 1e-6
    adapter = weights(tmp_path / "final")["adapter_model.safetensors"]
    assert all((weight == 0).all() for name, weight in adapter.items() if "lora_B" in name)


@pytest.mark.parametrize(("algorithm", "most"), [("rloo", 1e-6), ("reinforce++", 1e-6), ("grpo", 0.3)])
def test_an_entropy_bonus_without_a_reward_does_not_run_away(model_folders, tmp_path, algorithm, most):
    """With the KL in the reward nothing would hold it: 36 nats per response after 40 iterations."""
    options = {"algorithm": algorithm, "learning_rate": 1e-2, "entropy_coef": 0.01, "batch_size": 8}
    history = make_engine(model_folders["llama"], tmp_path, composer=Same(), **options).train(20).history
    assert max(result.kl_per_response for result in history) < most


@pytest.mark.parametrize("kl_limit", [None, 1.0])
def test_a_run_meets_its_kl_limit_and_not_beyond(model_folders, tmp_path, kl_limit):
    options = {"learning_rate": 1e-2, "batch_size": 16, "kl_penalty_weight": 0.01, "kl_limit": kl_limit}
    history = make_engine(model_folders["llama"], tmp_path, **options).train(25).history
    paid = [result.kl_per_response for result in history[-8:]]
    if kl_limit is None:
        assert min(paid) > 1.5
        assert {result.kl_penalty_weight for result in history} == {0.01}
    else:
        assert 0.3 < max(paid) < 1.5
        assert max(result.kl_penalty_weight for result in history) > 0.1


@pytest.mark.parametrize("is_on", [True, False])
def test_a_finding_is_reported_once_and_kept_across_a_resume(model_folders, tmp_path, caplog, is_on):
    def engine():
        return make_engine(model_folders["llama"], tmp_path, composer=Same(), self_checks=is_on)

    with caplog.at_level(logging.WARNING):
        engine().train(4, save_every=4)
        engine().train(7, resume_from_checkpoint=True)
    told = [record.message for record in caplog.records if "nothing to learn from" in record.message]
    assert len(told) == is_on
    assert sum("constant_reward" in row["checks"] for row in metrics(tmp_path)) == is_on
    if is_on:
        assert told[0].startswith("Iteration 3: Every response of the last 3 iterations got the reward 1")
        row = metrics(tmp_path)[2]
        assert "constant_reward" in row["checks"]
        assert told[0] == f"Iteration 3: {row['check_messages']['constant_reward']}"


def test_values_warm_up_before_the_policy_moves(model_folders, tmp_path):
    engine = make_engine(model_folders["llama"], tmp_path, value_warmup_iterations=3, batch_size=16)
    history = engine.train(5).history
    assert max(result.kl_divergence for result in history[:4]) < 1e-7
    assert history[4].kl_divergence > 1e-5
    assert all(math.isfinite(result.explained_variance) for result in history)


@pytest.mark.parametrize("placement", ["reward", "loss"])
def test_the_penalty_holds_the_policy_back_wherever_it_is_paid(model_folders, tmp_path, placement):
    paid = {}
    for weight in (0.0, 1.0):
        engine = make_engine(
            model_folders["llama"], tmp_path / str(weight), kl_penalty_weight=weight, kl_placement=placement
        )
        paid[weight] = engine.train(15).final_kl_divergence
    assert paid[1.0] < 0.7 * paid[0.0]
