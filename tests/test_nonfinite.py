"""NaN and infinity put into a run's weights, logits, gradients, advantages and rewards before its third iteration."""

import math

import pytest
import torch

from konic.finetuning import KonicLLMRewardComposer, RewardError, TrainingError, llm_reward
from konic.finetuning import trainer as trainer_module
from konic.finetuning.run.resume import newest_checkpoint
from test_engine import LetterRewards, Silent, make_engine, metrics, same_tensors, weights


def spoil_weights(value):
    def spoil(engine, monkeypatch):
        named = engine._session.learner.policy.model.named_parameters()
        weight = next(weight for name, weight in named if "q_proj.base_layer" in name)
        with torch.no_grad():
            weight[1, 2] = value

    return spoil


def spoil_logits(value):
    def spoil(engine, monkeypatch):
        plain = trainer_module.sample_rollout

        def spoiled(*arguments):
            rolled = plain(*arguments)
            rolled.log_probs[2, 0] = value
            return rolled

        monkeypatch.setattr(trainer_module, "sample_rollout", spoiled)

    return spoil


def spoil_gradient(value):
    def spoil(engine, monkeypatch):
        weight = next(iter(engine._session.learner.policy.trainable().values()))
        weight.register_hook(lambda gradient: gradient * value)

    return spoil


def spoil_advantages(value):
    def spoil(engine, monkeypatch):
        plain = trainer_module.compute_advantages

        def spoiled(*arguments):
            advantages = plain(*arguments)
            advantages.advantages[1, 0] = value
            return advantages

        monkeypatch.setattr(trainer_module, "compute_advantages", spoiled)

    return spoil


def spoil_reward(value):
    def spoil(engine, monkeypatch):
        engine.agent.get_reward_composer().offset = value

    return spoil


class OffsetRewards(LetterRewards):
    offset = 0.0

    @llm_reward
    def offset_by(self, prompt, response):
        return self.offset


class Spoiling(Silent):
    def __init__(self, spoil):
        super().__init__()
        self.spoil = spoil

    def on_iteration_begin(self, iteration):
        if iteration == 3:
            self.spoil()


def spoiled_engine(model_folders, run, spoil, monkeypatch, **options):
    callback = Spoiling(lambda: spoil(engine, monkeypatch))
    engine = make_engine(model_folders["llama"], run, composer=OffsetRewards(), callback=callback, **options)
    return engine


WEIGHTS = r"of the response to dataset row \d+.*q_proj.base_layer.weight hold NaN or infinity"
LOGITS = r"log_probs of the response to dataset row \d+.*All weights are finite"
GRADIENT = r"The gradient of .*lora_A.* is not finite"
LOSS = "The loss is not finite for the sample of dataset row"
CASES = {
    "NaN weight": (spoil_weights(math.nan), WEIGHTS, TrainingError),
    "infinite weight": (spoil_weights(math.inf), WEIGHTS, TrainingError),
    "NaN log-prob": (spoil_logits(math.nan), LOGITS, TrainingError),
    "infinite log-prob": (spoil_logits(-math.inf), LOGITS, TrainingError),
    "NaN gradient": (spoil_gradient(math.nan), GRADIENT, TrainingError),
    "infinite gradient": (spoil_gradient(math.inf), GRADIENT, TrainingError),
    "NaN advantage": (spoil_advantages(math.nan), LOSS, TrainingError),
    "infinite advantage": (spoil_advantages(math.inf), LOSS, TrainingError),
    "NaN reward": (spoil_reward(math.nan), "offset_by.* nan", RewardError),
    "infinite reward": (spoil_reward(math.inf), "offset_by.* inf", RewardError),
    "reward of 1e30": (spoil_reward(1e30), r"is 1e\+30, beyond ±1e\+15", TrainingError),
    "reward of -1e30": (spoil_reward(-1e30), r"is -1e\+30, beyond ±1e\+15", TrainingError),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_a_number_stops_the_run_in_its_step_and_harms_nothing(model_folders, case, tmp_path, monkeypatch):
    spoil, told, kind = CASES[case]
    engine = spoiled_engine(model_folders, tmp_path / "run", spoil, monkeypatch)
    with pytest.raises(kind, match=told):
        engine.train(5, save_every=1)
    monkeypatch.undo()
    assert [row["iteration"] for row in metrics(tmp_path / "run")] == [1, 2]
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-2"
    whole = make_engine(model_folders["llama"], tmp_path / "whole", composer=OffsetRewards())
    whole.train(2, save_every=1)
    same_tensors(weights(tmp_path / "run" / "checkpoint-2"), weights(tmp_path / "whole" / "checkpoint-2"))
    left, right = engine._session.learner.policy.trainable(), whole._session.learner.policy.trainable()
    assert all(torch.equal(left[name], right[name]) for name in right)


@pytest.mark.parametrize("case", [name for name, (_, _, kind) in CASES.items() if kind is TrainingError])
def test_what_is_not_a_number_is_dropped_and_counted_but_not_for_ever(
    model_folders, case, tmp_path, monkeypatch, caplog
):
    engine = spoiled_engine(model_folders, tmp_path, CASES[case][0], monkeypatch, on_nonfinite="skip")
    with pytest.raises(TrainingError, match="In each of the last 3 iterations everything was dropped"):
        engine.train(9)
    rows = metrics(tmp_path)
    assert [row["num_nonfinite"] > 0 for row in rows] == [False, False, True, True, True]
    assert [row["num_steps"] for row in rows] == [2, 2, 0, 0, 0]
    assert "is dropped (on_nonfinite='skip')" in caplog.text


def test_a_run_goes_on_after_a_dropped_batch(model_folders, tmp_path):
    class Once(LetterRewards):
        calls = 0

        @llm_reward
        def once(self, prompt, response):
            self.calls += 1
            return 1e30 if self.calls == 20 else 0.0

    result = make_engine(model_folders["llama"], tmp_path, composer=Once(), on_nonfinite="skip").train(5)
    assert [row.num_nonfinite for row in result.history] == [0, 0, 1, 0, 0]
    assert [row.num_steps for row in result.history] == [2, 2, 0, 2, 2]
    assert result.best_iteration != 3


class Far(KonicLLMRewardComposer):
    """Rewards far from 0; those of the first batch are too large for the run."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    @llm_reward
    def letters(self, prompt, response):
        self.calls += 1
        return 1e30 if self.calls <= 4 else 105.0 + sum(map(str.isalpha, response)) / 8


def test_the_value_head_starts_at_the_first_batch_that_counts(model_folders, tmp_path):
    engine = make_engine(model_folders["llama"], tmp_path, composer=Far(), on_nonfinite="skip", batch_size=4)
    first, second, *_ = engine.train(3).history
    assert first.was_dropped
    assert not second.was_dropped
    assert second.value_loss < 10  # it would be 105 squared, less what clipping takes, from a head that starts at 0


class Debts(KonicLLMRewardComposer):
    @llm_reward
    def debt(self, prompt, response):
        return -1.0 if len(prompt) > 3 else 1.0


def test_a_reward_below_0_has_no_place_in_a_mean_that_divides(model_folders, tmp_path):
    engine = make_engine(model_folders["llama"], tmp_path, composer=Debts(), algorithm="max_rl", batch_size=8)
    with pytest.raises(RewardError, match=r"'max_rl' divides by .* row \d+, prompt .*, got -1\. Add a constant"):
        engine.train(3)


class Rising(KonicLLMRewardComposer):
    """Every batch of eight gets a higher reward than the one before."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    @llm_reward
    def rising(self, prompt, response):
        self.calls += 1
        return 10 * (self.calls // 8) + self.calls % 2 / 8


def test_an_iteration_whose_step_is_dropped_keeps_no_best_weights(model_folders, tmp_path, monkeypatch):
    callback = Spoiling(lambda: spoil_gradient(math.inf)(engine, monkeypatch))
    options = {"on_nonfinite": "skip", "batch_size": 8}
    engine = make_engine(model_folders["llama"], tmp_path / "spoiled", callback, composer=Rising(), **options)
    spoiled = engine.train(3)
    assert [row.was_dropped for row in spoiled.history] == [False, False, True]
    assert spoiled.best_iteration == 2
    make_engine(model_folders["llama"], tmp_path / "two", composer=Rising(), **options).train(2)
    same_tensors(weights(tmp_path / "spoiled" / "best"), weights(tmp_path / "two" / "best"))
