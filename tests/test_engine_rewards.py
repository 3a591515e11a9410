"""Rewards inside a run: faults skipped or raised, workers, normalisation across checkpoints, hangs that end."""

import math
import os
import signal
import statistics
import time
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

from conftest import children_of
from konic.finetuning import (
    ConfigError,
    DatasetConfig,
    KonicFinetuningEngine,
    KonicLLMRewardComposer,
    RewardError,
    TrainingConfig,
    llm_reward,
)
from konic.finetuning.data.prompts import load_prompts
from konic.finetuning.system.user_code import preserved_state
from test_engine import LetterRewards, Silent, make_agent, make_engine, metrics, same_tensors, weights


class Sometimes(KonicLLMRewardComposer):
    """Fails on the rows it is told to."""

    def __init__(self, fails, how="raise"):
        self.fails, self.how = fails, how

    @llm_reward
    def kind(self, prompt, response, row):
        if row in self.fails:
            if self.how == "hang":
                time.sleep(60)
            if self.how == "nan":
                return math.nan
            raise ValueError("not today" if self.how == "raise" else "not \udce9")
        return sum(char.isalpha() for char in response)


ROWS = [{"prompt": f"a review of {row}", "row": row} for row in range(8)]


def engine_of(folder, run, composer, **training):
    agent = make_agent(folder, composer=composer, dataset=DatasetConfig(prompts=ROWS), **training)
    return KonicFinetuningEngine.from_agent(agent, checkpoint_dir=run, callback=Silent(), device="cpu")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raise", "raised ValueError: not today"),
        ("half a character", "raised ValueError: not \\udce9"),
        ("nan", "returned nan, not a finite number."),
        ("hang", "took longer"),
    ],
)
def test_a_skipped_fault_costs_its_sample_alone_and_is_counted(model_folders, how, told, tmp_path):
    workers = {"reward_workers": 2, "reward_timeout_seconds": 0.5} if how == "hang" else {}
    engine = engine_of(model_folders["llama"], tmp_path, Sometimes({3}, how), on_reward_error="skip", **workers)
    result = engine.train(2)
    assert [one.num_reward_errors for one in result.history] == [1, 1]
    assert [one.num_unscored for one in result.history] == [1, 1]
    assert [row["num_reward_errors"] for row in metrics(tmp_path)] == [1, 1]
    rows = pyarrow.parquet.read_table(tmp_path / "completions" / "000001.parquet").to_pylist()
    assert [(row["reward"] is None, row["error"] is not None) for row in rows] == [(r["row"] == 3,) * 2 for r in rows]
    assert next(row["error"] for row in rows if row["row"] == 3).startswith(f"Reward 'kind' {told}")


def test_too_many_faults_stop_the_run_with_the_last_one_and_what_was_done_is_kept(model_folders, tmp_path):
    engine = engine_of(
        model_folders["llama"], tmp_path, Sometimes({1, 2, 3, 4}), on_reward_error="skip", max_error_rate=0.1
    )
    with pytest.raises(RewardError, match=r"(?s)failed on 12 of the last 24 responses.*0\.1 of 100.*not today"):
        engine.train(5)
    assert len(metrics(tmp_path)) == 2
    assert (tmp_path / "checkpoint-2").is_dir()


def test_the_budget_for_faults_counts_those_before_a_resume(model_folders, tmp_path):
    settings = {"on_reward_error": "skip", "max_error_rate": 0.1}
    engine_of(model_folders["llama"], tmp_path, Sometimes({1, 2, 3, 4}), **settings).train(2)
    with pytest.raises(RewardError, match="12 of the last 24"):
        engine_of(model_folders["llama"], tmp_path, Sometimes({1, 2, 3, 4}), **settings).train(
            4, resume_from_checkpoint=True
        )


def test_a_batch_without_any_score_moves_nothing_and_the_run_goes_on(model_folders, tmp_path):
    engine = engine_of(
        model_folders["llama"], tmp_path, Sometimes(set(range(8))), on_reward_error="skip", max_error_rate=1.0
    )
    result = engine.train(2)
    assert [(one.num_reward_errors, one.num_steps) for one in result.history] == [(8, 0), (8, 0)]
    assert all(math.isnan(one.reward_mean) for one in result.history)


def test_a_run_with_workers_is_the_run_without(model_folders, tmp_path):
    for name, workers in (("serial", 0), ("pool", 2)):
        make_engine(model_folders["llama"], tmp_path / name, reward_workers=workers).train(2)
    same_tensors(weights(tmp_path / "serial" / "final"), weights(tmp_path / "pool" / "final"))
    assert metrics(tmp_path / "serial") == metrics(tmp_path / "pool")
    assert not children_of()


def disturb():
    """What user code may leave behind: each of these alone ended a run or changed its numbers."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_autocast_enabled("cpu", True)
    torch.set_grad_enabled(False)
    torch.manual_seed(1)


def disturb_kernels():
    """What a script may choose for a run, but not a reward."""
    from torch.backends import cuda  # cloudpickle cannot send it to a worker

    torch.set_float32_matmul_precision("medium")
    cuda.enable_flash_sdp(False)
    cuda.enable_mem_efficient_sdp(False)
    os.chdir("/")
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Disturbing(LetterRewards):
    @llm_reward
    def letters(self, prompt, response):
        disturb()
        disturb_kernels()
        return super().letters(prompt, response)

    @llm_reward(batch=True)
    async def brief(self, prompts, responses):
        disturb()
        return [-len(response) / 80 for response in responses]


class DisturbingReducer:
    def reduce(self, parts):
        disturb()
        disturb_kernels()
        return sum(parts.values())


class DisturbingCallback(Silent):
    def on_generation_end(self, prompts, responses):
        disturb()
        disturb_kernels()

    def should_stop_early(self, result):
        disturb()
        disturb_kernels()
        return False


def test_user_code_that_changes_the_process_changes_no_number(model_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = make_engine(model_folders["llama"], Path("plain"))
    plain.train(2)
    disturbing = Disturbing(reducer=DisturbingReducer)
    engines = {
        name: make_engine(
            model_folders["llama"], Path(name), DisturbingCallback(), composer=disturbing, reward_workers=workers
        )
        for name, workers in (("serial", 0), ("pool", 1))
    }
    with preserved_state("test"):
        disturb()  # between the engine's construction and its training
        for engine in engines.values():
            engine.train(2)
        assert torch.get_default_dtype() == torch.float64 and not torch.is_grad_enabled()
    for name in engines:
        same_tensors(weights(Path("plain/final")), weights(Path(name, "final")))
        assert metrics(Path("plain")) == metrics(Path(name))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("how", [SystemExit, GeneratorExit, type("TimedOut", (BaseException,), {})])
def test_what_is_no_exception_is_an_error_of_the_reward_too(model_folders, tmp_path, how):
    class Raises(LetterRewards):
        @llm_reward
        def letters(self, prompt, response):
            raise how(0)

    class Reducer:
        def reduce(self, parts):
            raise how(0)

    for composer, who in ((Raises(), "Reward 'letters'"), (LetterRewards(reducer=Reducer), "Reducer 'Reducer'")):
        with pytest.raises(RewardError, match=f"{who} raised {how.__name__}: 0"):
            make_engine(model_folders["llama"], tmp_path / who, composer=composer).train(1)


def test_no_worker_outlives_a_run_that_fails(model_folders, tmp_path):
    with pytest.raises(RewardError, match="not today"):
        engine_of(model_folders["llama"], tmp_path, Sometimes({0}), reward_workers=2).train(1)
    assert not children_of()


class Normalised(LetterRewards):
    @llm_reward(normalize=True, clip=(-2, 2))
    def letters(self, prompt, response):
        return 100 * sum(char.isalpha() for char in response)


def test_running_moments_are_part_of_a_resume_bit_for_bit(model_folders, tmp_path):
    whole = make_engine(model_folders["llama"], tmp_path / "whole", composer=Normalised())
    whole.train(4)
    make_engine(model_folders["llama"], tmp_path / "parts", composer=Normalised()).train(2)
    resumed = make_engine(model_folders["llama"], tmp_path / "parts", composer=Normalised())
    resumed.train(4, resume_from_checkpoint=True)
    same_tensors(weights(tmp_path / "whole" / "final"), weights(tmp_path / "parts" / "final"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_evaluations_are_on_the_scale_of_the_first(model_folders, tmp_path):
    result = make_engine(model_folders["llama"], tmp_path, composer=Normalised(), eval_every=1).train(3)
    raw = [100 * sum(char.isalpha() for char in response) for response in result.before.responses]
    assert result.before.breakdown["letters"] == raw
    centre, spread = statistics.mean(raw), statistics.stdev(raw)
    for evaluation in (result.before, result.after):
        brief = evaluation.breakdown["brief"]
        normal = [max(-2.0, min(2.0, (value - centre) / spread)) for value in evaluation.breakdown["letters"]]
        assert evaluation.rewards == pytest.approx([a + b for a, b in zip(normal, brief, strict=True)])
    assert result.history[0].eval_reward_mean == result.before.reward_mean


def test_faults_on_the_held_out_prompts_are_kept_and_bounded(model_folders, tmp_path):
    rows = [{"prompt": f"a review of {row}", "row": row} for row in range(24)]
    held_out = [prompt.row for prompt in load_prompts(DatasetConfig(prompts=rows, held_out=12)).held_out]

    def engine(run, fails):
        agent = make_agent(
            model_folders["llama"], composer=Sometimes(fails), dataset=DatasetConfig(prompts=rows, held_out=12),
            on_reward_error="skip",
        )  # fmt: skip
        return KonicFinetuningEngine.from_agent(agent, checkpoint_dir=run, callback=Silent(), device="cpu")

    result = engine(tmp_path / "few", set(held_out[:2])).train(1)
    assert [error is not None for error in result.before.errors] == [True, True, *[False] * 10]
    with pytest.raises(RewardError, match="on all 12 responses of an evaluation"):
        engine(tmp_path / "all", set(held_out)).train(1)


def test_a_model_scores_beside_methods_in_a_run(model_folders, tmp_path):
    class Model:
        name = "judge"
        normalize = True

        def score(self, prompts, responses):
            return [float(len(response)) for response in responses]

    composer = LetterRewards([Model()], {"judge": 0.5})
    result = make_engine(model_folders["llama"], tmp_path, composer=composer).train(2)
    assert {"letters", "brief", "judge"} == result.history[-1].reward_breakdown.keys()


def test_evaluate_and_generate_leave_no_worker(model_folders, tmp_path):
    engine = make_engine(model_folders["llama"], tmp_path, reward_workers=1)
    assert engine.evaluate(["ab", "cd"])["rewards"] == engine.evaluate(["ab", "cd"])["rewards"]
    assert not children_of()


def test_the_settings_for_rewards_may_change_on_resume(model_folders, tmp_path, caplog):
    make_engine(model_folders["llama"], tmp_path).train(1)
    make_engine(model_folders["llama"], tmp_path, reward_workers=1, on_reward_error="skip").train(
        2, resume_from_checkpoint=True
    )
    assert "other settings" not in caplog.text
    assert TrainingConfig().on_reward_error == "raise"


def test_the_value_head_starts_at_the_first_batchs_mean_score(model_folders, tmp_path):
    from safetensors.torch import load_file

    result = make_engine(model_folders["llama"], tmp_path, learning_rate=1e-9).train(1)
    head = load_file(tmp_path / "checkpoint-1" / "value_head.safetensors")
    assert head["bias"].item() == pytest.approx(result.history[0].reward_mean, abs=1e-6)
    assert head["weight"].abs().max() < 1e-6


class Plus100(LetterRewards):
    def compose(self, prompt, response):
        return 100.0 + super().compose(prompt, response)


def test_an_overridden_compose_is_what_a_run_learns_from_and_evaluates(model_folders, tmp_path):
    kinds = LetterRewards, Plus100
    runs = {kind: make_engine(model_folders["llama"], tmp_path / kind.__name__, composer=kind()) for kind in kinds}
    plain, raised = (engine.train(1).history[0] for engine in runs.values())
    assert raised.reward_mean == pytest.approx(plain.reward_mean + 100)
    assert raised.reward_breakdown == plain.reward_breakdown
    assert min(runs[Plus100].evaluate(["a film"])["rewards"]) > 90
    both = {"algorithm": "gdpo", "num_generations": 4}
    with pytest.raises(ConfigError, match=r"'gdpo' weights and sums .* it cannot use Plus100\.compose"):
        make_engine(model_folders["llama"], tmp_path / "gdpo", composer=Plus100(), **both).train(1)


def test_an_evaluation_and_a_callback_find_the_values_of_a_dict_by_their_own_keys(model_folders, tmp_path):
    class Keyed(KonicLLMRewardComposer):
        @llm_reward
        def style(self, prompt, response):
            return {"length": float(len(response))}

    class Reads(Silent):
        def on_reward_computed(self, rewards, reward_breakdown):
            seen.append((reward_breakdown["length"], dict(reward_breakdown), rewards))

    seen = []
    engine = make_engine(model_folders["llama"], tmp_path, Reads(), composer=Keyed())
    engine.train(1)
    breakdown = engine.evaluate(["why"])["reward_breakdown"]
    for own, listed, rewards in (*seen, (breakdown["length"], dict(breakdown), engine.evaluate(["why"])["rewards"])):
        assert own == listed["style.length"] == rewards
        assert list(listed) == ["style.length"]
