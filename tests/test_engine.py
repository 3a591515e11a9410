"""The whole run, end to end, on tiny models: what it learns, prints, writes, and how it ends."""

import errno
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import peft
import pyarrow.parquet
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import warm
from conftest import LORA_TARGETS, PLANTED, PROMPTS, byte_tokenizer, tiny_model
from konic.cli.rewards import sample_responses
from konic.finetuning import (
    BaseKonicFinetuningCallback,
    ConfigError,
    DatasetConfig,
    KonicFinetuningAgent,
    KonicFinetuningCallback,
    KonicFinetuningEngine,
    KonicLLMRewardComposer,
    LoraConfig,
    MeanReducer,
    ModelError,
    OutputError,
    RemoteRewardModel,
    RewardError,
    TensorBoardCallback,
    TrainingError,
    llm_reward,
)
from konic.finetuning import trainer as trainer_module
from konic.finetuning.data.prompts import PromptSet, load_prompts, make_prompts
from konic.finetuning.errors import NotFiniteError
from konic.finetuning.learning.schedule import TIMESCALE
from konic.finetuning.models import decode_probe
from konic.finetuning.models.prepacked import DecodePlan, Product
from konic.finetuning.run import saving
from konic.finetuning.run import session as session_module
from konic.finetuning.run.folder import RunFolder
from konic.finetuning.run.resume import newest_checkpoint
from konic.finetuning.system.files import seal
from konic.report.run import Run

TIMES = {"generation_time_sec", "reward_compute_time_sec", "update_time_sec", "total_time_sec"}


class LetterRewards(KonicLLMRewardComposer):
    @llm_reward
    def letters(self, prompt, response):
        return sum(char.isalpha() for char in response) / 8

    @llm_reward
    def brief(self, prompt, response):
        return -len(response) / 80


class Silent(KonicFinetuningCallback):
    def __init__(self):
        super().__init__(verbose=False)


def make_agent(
    folder, architecture="llama", composer=None, lora=True, dataset=None, generation=None, model_kwargs=None, **training
):
    settings = {"batch_size": 8, "learning_rate": 1e-2 if lora else 1e-3, "ppo_epochs": 2} | training
    return KonicFinetuningAgent(
        base_model=folder,
        reward_composer=composer or LetterRewards(),
        lora_config=LoraConfig(r=4, target_modules=LORA_TARGETS[architecture]) if lora else None,
        dataset_config=dataset or DatasetConfig(prompts=PROMPTS, held_out=2),
        training_config=settings,
        generation_config={"max_new_tokens": 8, "max_prompt_length": 48} | (generation or {}),
        model_kwargs={"token": PLANTED} | (model_kwargs or {}),
    )


def make_engine(folder, run, callback=None, **options):
    agent = make_agent(folder, **options)
    return KonicFinetuningEngine.from_agent(agent, checkpoint_dir=run, callback=callback or Silent(), device="cpu")


def metrics(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def completions(run):
    """The rows of each iteration, without the times of the rewards, which no two runs share."""
    tables = [pyarrow.parquet.read_table(file) for file in sorted((run / "completions").glob("*.parquet"))]
    return [
        table.select([name for name in table.column_names if name[:8] != "seconds/"]).to_pylist() for table in tables
    ]


def weights(folder):
    from safetensors.torch import load_file

    return {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}


def same_tensors(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].keys() == right[name].keys()
        assert all(torch.equal(left[name][key], right[name][key]) for key in left[name]), name


@pytest.mark.parametrize("lora", [True, False])
def test_reward_rises_and_kl_with_it(model_folders, architecture, lora, tmp_path):
    engine = make_engine(
        model_folders[architecture], tmp_path, architecture=architecture, lora=lora, kl_penalty_weight=0.01,
        batch_size=32, learning_rate=6e-2 if lora else 1e-2,
    )  # fmt: skip
    result = engine.train(20)
    curve, kl = result.get_reward_curve(), result.get_kl_curve()
    assert sum(curve[-5:]) / 5 > sum(curve[:3]) / 3 + 0.03
    assert kl[0] < 1e-7
    assert kl[-1] > kl[1] >= 0


def test_prompts_that_are_cut_are_a_warning_once(model_folders, tmp_path, caplog):
    prompts = DatasetConfig(prompts=["short", "a long prompt " * 9], shuffle=False)
    make_engine(model_folders["llama"], tmp_path, dataset=prompts, batch_size=4).train(2)
    cuts = [record.getMessage() for record in caplog.records if "cut off" in record.getMessage()]
    assert len(cuts) == 1
    assert "1 of 2 prompts of this batch, such as row 1, is cut off at max_prompt_length=48 tokens" in cuts[0]


def test_the_kl_penalty_holds_the_policy_back(model_folders, tmp_path):
    paid = {}
    for weight in (0.0, 1.0):
        engine = make_engine(model_folders["llama"], tmp_path / str(weight), kl_penalty_weight=weight)
        paid[weight] = engine.train(15).final_kl_divergence
    assert paid[1.0] < 0.7 * paid[0.0]


def test_two_runs_with_one_seed_are_identical(model_folders, architecture, tmp_path):
    for name in ("a", "b"):
        make_engine(model_folders[architecture], tmp_path / name, architecture=architecture).train(3)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert completions(tmp_path / "a") == completions(tmp_path / "b")
    same_tensors(weights(tmp_path / "a" / "final"), weights(tmp_path / "b" / "final"))
    make_engine(model_folders[architecture], tmp_path / "c", architecture=architecture, seed=1).train(3)
    assert metrics(tmp_path / "c") != metrics(tmp_path / "a")


@pytest.mark.parametrize("lora", [True, False])
def test_a_resumed_run_is_the_same_run_bit_for_bit(model_folders, architecture, lora, tmp_path):
    def engine(run):
        return make_engine(
            model_folders[architecture], run, architecture=architecture, lora=lora, warmup_steps=3,
            lr_scheduler="linear", num_minibatches=2,
        )  # fmt: skip

    engine(tmp_path / "whole").train(5)
    engine(tmp_path / "parts").train(5, save_every=2)
    resumed = engine(tmp_path / "parts")
    result = resumed.train(5, resume_from_checkpoint=tmp_path / "parts" / "checkpoint-2")
    assert result.total_iterations == 5
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert completions(tmp_path / "whole") == completions(tmp_path / "parts")
    for folder in ("final", "best", "checkpoint-5"):
        same_tensors(weights(tmp_path / "whole" / folder), weights(tmp_path / "parts" / folder))


def test_a_resume_samples_by_the_plan_of_its_checkpoint_whatever_is_fastest_now(tmp_path, monkeypatch):
    tiny_model("llama", torch.float32).save_pretrained(tmp_path / "model")
    byte_tokenizer("llama").save_pretrained(tmp_path / "model")

    exact = Product.__call__

    def rounded(product, *arguments, **named):
        """A packed product whose rounding shows, also in a model this small."""
        return exact(product, *arguments, **named) * (1.0 if product._prepacking is None else 1.0 + 1e-5)

    monkeypatch.setattr(Product, "__call__", rounded)

    def train(run, layout, iterations, resume=None):
        monkeypatch.setattr(session_module, "choose_plan", lambda *_: DecodePlan(layout))
        engine = make_engine(
            tmp_path / "model", tmp_path / run, generation={"max_new_tokens": 16, "decode_layout": "auto"}
        )
        engine.train(iterations, resume_from_checkpoint=resume)
        policy = engine._session.learner.policy
        assert policy.decode_plan == policy.language_model.decode_plan
        return policy.decode_plan

    train("whole", "plain", 2)
    train("other", "onednn", 2)
    train("parts", "plain", 1)
    assert train("parts", "onednn", 2, resume=True) == DecodePlan("plain")
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole") != metrics(tmp_path / "other")
    same_tensors(weights(tmp_path / "parts" / "final"), weights(tmp_path / "whole" / "final"))
    for file in ("run.json", "checkpoint-2/trainer_state.json"):
        record = json.loads((tmp_path / "parts" / file).read_text())
        assert record["settings"]["decode_plan"] == {"layout": "plain", "threads": None}


def test_a_checkpoint_without_a_plan_goes_on_with_the_one_of_its_time(model_folders, tmp_path, monkeypatch, caplog):
    def decode_plan(record):
        file = tmp_path / "checkpoint-1" / "trainer_state.json"
        found = json.loads(file.read_text())
        found["settings"].pop("decode_plan", None)
        file.write_text(json.dumps(found | {"settings": found["settings"] | record}))
        (file.parent / "complete.json").unlink()
        seal(file.parent)
        engine = make_engine(model_folders["llama"], tmp_path, generation={"decode_layout": "auto"})
        engine.train(2, resume_from_checkpoint=tmp_path / "checkpoint-1")
        return engine._session.learner.policy.decode_plan

    monkeypatch.setattr(session_module, "choose_plan", lambda *_: DecodePlan("plain"))
    make_engine(model_folders["llama"], tmp_path, generation={"decode_layout": "auto"}).train(1)
    assert decode_plan({}) == DecodePlan("onednn")
    assert "decode_plan" not in caplog.text
    assert decode_plan({"decode_plan": {"layout": "gone", "threads": None}}) == DecodePlan("plain")
    assert "decode_plan was {'layout': 'gone', 'threads': None}, which is not possible here" in caplog.text


def test_a_run_from_when_one_layout_was_the_default_keeps_it(model_folders, tmp_path, monkeypatch):
    make_engine(model_folders["llama"], tmp_path, generation={"decode_layout": "onednn"}).train(1)
    monkeypatch.setattr(session_module, "choose_plan", lambda *_: DecodePlan("plain"))
    engine = make_engine(model_folders["llama"], tmp_path)
    engine.train(2, resume_from_checkpoint=True)
    assert engine._session.learner.policy.decode_plan == DecodePlan("onednn")
    assert make_engine(model_folders["llama"], tmp_path / "new").train(1).total_iterations == 1
    with pytest.raises(
        OutputError, match=r"another run: generation_config\.decode_layout was None and is 'mkl'\. Resume"
    ):
        make_engine(model_folders["llama"], tmp_path, generation={"decode_layout": "mkl"}).train(
            3, resume_from_checkpoint=True
        )


def test_a_plan_that_is_the_same_but_does_not_apply_here_is_no_warning(model_folders, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(decode_probe, "layouts", lambda *_: ("plain",))  # a GPU, a torch without oneDNN
    make_engine(model_folders["llama"], tmp_path).train(1)
    make_engine(model_folders["llama"], tmp_path).train(2, resume_from_checkpoint=True)
    assert "decode_plan" not in caplog.text


def test_all_processes_sample_by_the_plan_of_the_first(model_folders, tmp_path, monkeypatch):
    def from_first(world, value):
        return {"layout": "mkl", "threads": 3} if value == {"layout": "plain", "threads": None} else value

    monkeypatch.setattr(session_module, "choose_plan", lambda *_: DecodePlan("plain"))
    monkeypatch.setattr(session_module, "from_first", from_first)
    session = make_engine(model_folders["llama"], tmp_path)._current_session()
    session.check()
    with session.opened(1, None, False):
        assert session.learner.policy.decode_plan == DecodePlan("mkl", 3)


def test_resuming_takes_the_newest_checkpoint_and_max_iterations_is_the_total(model_folders, tmp_path):
    make_engine(model_folders["llama"], tmp_path).train(2)
    result = make_engine(model_folders["llama"], tmp_path).train(3, resume_from_checkpoint=True)
    assert [row["iteration"] for row in metrics(tmp_path)] == [1, 2, 3]
    assert result.total_iterations == 3
    assert result.total_samples == 24


def test_train_called_again_goes_on(model_folders, tmp_path):
    twice = make_engine(model_folders["llama"], tmp_path / "twice")
    twice.train(2)
    assert twice.train(2).total_iterations == 4
    make_engine(model_folders["llama"], tmp_path / "once").train(4)
    assert metrics(tmp_path / "twice") == metrics(tmp_path / "once")


def test_a_report_alone_is_no_run(model_folders, tmp_path):
    (tmp_path / "report.html").write_text("a page")
    make_engine(model_folders["llama"], tmp_path).train(1)
    assert (tmp_path / "report.html").is_file() and not (tmp_path / "earlier-1").exists()


def test_a_finished_run_is_not_overwritten_but_set_aside(model_folders, tmp_path, caplog):
    run = tmp_path / "run"
    make_engine(model_folders["llama"], run).train(2)
    before = metrics(run), completions(run), weights(run / "final")
    (run / "report.html").write_text("links to final/")
    make_engine(model_folders["llama"], run, seed=1).train(1)
    assert (run / "earlier-1" / "report.html").is_file() and not (run / "report.html").exists()
    assert f"An earlier run was in {run}; its files are now in {run / 'earlier-1'}." in caplog.text
    kept = run / "earlier-1"
    assert (metrics(kept), completions(kept)) == before[:2]
    same_tensors(weights(kept / "final"), before[2])
    assert [row["iteration"] for row in metrics(run)] == [1]
    assert not (run / "checkpoint-2").exists()
    make_engine(model_folders["llama"], run).train(2)
    assert (run / "earlier-2" / "final").is_dir()
    earlier = make_engine(model_folders["llama"], kept).train(3, resume_from_checkpoint=True)
    assert earlier.total_iterations == 3


def rewards_of(folder):
    return [(row["iteration"], row["reward_mean"]) for row in metrics(folder)]


def test_an_engine_that_goes_on_in_a_folder_that_another_run_took_over_moves_that_run_away(
    model_folders, tmp_path, caplog
):
    first, second = (make_engine(model_folders["llama"], tmp_path, seed=seed) for seed in (0, 1))
    first.train(2)
    second.train(3, save_every=1)
    of_second = {path.name: path.read_bytes() for path in (tmp_path / "final").iterdir()} | {"rows": metrics(tmp_path)}
    caplog.clear()
    result = first.train(1)
    assert f"An earlier run was in {tmp_path}; its files are now in {tmp_path / 'earlier-2'}." in caplog.text
    kept = tmp_path / "earlier-2"
    assert {path.name: path.read_bytes() for path in (kept / "final").iterdir()} | {"rows": metrics(kept)} == of_second
    assert (kept / "checkpoint-3").is_dir()
    assert rewards_of(tmp_path) == [(row.iteration, row.reward_mean) for row in result.history]
    alone = make_engine(model_folders["llama"], tmp_path / "alone", seed=0).train(3)
    assert result.before.rewards == alone.before.rewards
    assert result.history[2].reward_mean == alone.history[2].reward_mean
    caplog.clear()
    result.history[0].reward_breakdown.clear()  # a result that was given away may change
    first.train(1)
    assert "earlier" not in caplog.text
    assert [number for number, _ in rewards_of(tmp_path)] == [1, 2, 3, 4]


def test_a_line_of_metrics_that_a_full_disk_cut_off_is_written_again(model_folders, tmp_path, caplog):
    engine = make_engine(model_folders["llama"], tmp_path)
    engine.train(2)
    rows, log = metrics(tmp_path), tmp_path / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    engine.train(1)
    assert "earlier" not in caplog.text
    assert metrics(tmp_path)[:2] == rows
    assert len(metrics(tmp_path)) == len(completions(tmp_path)) == 3


def test_an_engine_that_goes_on_in_another_folder_moves_the_run_there_away(model_folders, tmp_path, caplog):
    for seed in (0, 1):
        engine = make_engine(model_folders["llama"], tmp_path / "one", seed=seed)
        engine.train(1)
        engine.checkpoint_dir = tmp_path / "two"
        engine.train(1, save_every=1)
    assert "An earlier run was in " + str(tmp_path / "two") in caplog.text
    assert [number for number, _ in rewards_of(tmp_path / "two")] == [1, 2]
    assert [number for number, _ in rewards_of(tmp_path / "two" / "earlier-1")] == [1, 2]
    engine.checkpoint_dir = tmp_path / "one"  # where the engine has been before
    engine.train(1)
    assert [number for number, _ in rewards_of(tmp_path / "one")] == [1, 2, 3]
    assert not (tmp_path / "one" / "earlier-2").exists()


def test_a_run_that_goes_on_in_another_folder_and_ends_before_its_first_iteration_keeps_that_folder(
    model_folders, tmp_path, caplog
):
    class Failing(Silent):
        def on_iteration_begin(self, iteration):
            raise ValueError("not yet")

    engine = make_engine(model_folders["llama"], tmp_path / "one")
    engine.train(1)
    engine.checkpoint_dir, engine.callback = tmp_path / "two", Failing()
    with pytest.raises(ValueError, match="not yet"):
        engine.train(1)
    engine.callback = Silent()
    engine.train(1, save_every=1)
    assert "earlier" not in caplog.text
    assert [number for number, _ in rewards_of(tmp_path / "two")] == [1, 2]
    make_engine(model_folders["llama"], tmp_path / "two").train(3, resume_from_checkpoint=True)
    assert [number for number, _ in rewards_of(tmp_path / "two")] == [1, 2, 3]


def test_a_finished_run_without_its_checkpoints_is_not_emptied_by_a_resume(model_folders, tmp_path):
    make_engine(model_folders["llama"], tmp_path).train(2)
    shutil.rmtree(tmp_path / "checkpoint-2")
    before = metrics(tmp_path)
    with pytest.raises(OutputError, match="no whole checkpoint to resume from"):
        make_engine(model_folders["llama"], tmp_path).train(3, resume_from_checkpoint=True)
    assert metrics(tmp_path) == before
    assert (tmp_path / "final" / "adapter_model.safetensors").is_file()


def test_a_checkpoint_on_another_disk_counts_through_its_link(model_folders, tmp_path):
    run = tmp_path / "run"
    make_engine(model_folders["llama"], run).train(2)
    shutil.move(run / "checkpoint-2", tmp_path / "elsewhere")
    (run / "checkpoint-2").symlink_to(tmp_path / "elsewhere")
    engine = make_engine(model_folders["llama"], run)
    assert engine.train(3, resume_from_checkpoint=True, save_total_limit=1).total_iterations == 3
    assert not (run / "checkpoint-2").exists()
    assert (tmp_path / "elsewhere" / "trainer_state.json").is_file()  # only the link is deleted


def test_a_run_moved_together_with_its_model_and_data_goes_on(model_folders, tmp_path):
    def engine(root, model="model"):
        data = DatasetConfig(name=root / "data.jsonl")
        return make_engine(str(root / model), root / "run", dataset=data)

    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(model_folders["llama"], here / "model")
    (here / "data.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    engine(here).train(2)
    shutil.copytree(here, tmp_path / "kept")
    engine(here).train(4, resume_from_checkpoint=True)
    shutil.move(tmp_path / "kept", there)
    engine(there, "model/").train(4, resume_from_checkpoint=True)
    assert metrics(there / "run") == metrics(here / "run")
    (there / "data.jsonl").write_text('{"prompt": "other"}\n')
    with pytest.raises(OutputError, match="the rows of the dataset are not the same"):
        engine(there).train(5, resume_from_checkpoint=True)


@pytest.mark.parametrize("merged_first", [True, False])
def test_a_full_model_and_an_adapter_are_never_saved_into_one_folder(merged_first, model_folders, tmp_path):
    engine = make_engine(model_folders["llama"], tmp_path / "run")
    for _ in range(2):  # the same kind again replaces it
        engine.save_pretrained(tmp_path / "mine", merge=merged_first)
    before = {file.name: file.read_bytes() for file in (tmp_path / "mine").iterdir()}
    holds = (
        r"a full model \(config.json\), and an adapter"
        if merged_first
        else r"an adapter \(adapter_config.json\), and a"
    )
    with pytest.raises(OutputError, match=f"mine: holds {holds}.* beside it would be loaded.*Name another folder"):
        engine.save_pretrained(tmp_path / "mine", merge=not merged_first)
    assert {file.name: file.read_bytes() for file in (tmp_path / "mine").iterdir()} == before


def test_plain_peft_and_transformers_load_what_a_run_leaves(model_folders, architecture, tmp_path):
    engine = make_engine(model_folders[architecture], tmp_path / "run", architecture=architecture)
    result = engine.train(2)
    assert result.model_path == str(tmp_path / "run" / "final")
    ids = torch.tensor([[5, 6, 7, 8]])
    adapted = AutoPeftModelForCausalLM.from_pretrained(result.model_path)
    assert adapted.peft_config["default"].base_model_name_or_path == model_folders[architecture]
    engine.save_pretrained(tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(model_folders[architecture])
    with torch.no_grad():
        difference = (adapted(ids).logits - merged(ids).logits).abs().max()
        assert difference <= 1e-4
        assert (adapted(ids).logits - base(ids).logits).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(result.model_path)("ab").input_ids
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "More Information Needed" not in card
    assert "letters" in card
    engine.save_pretrained(tmp_path / "adapter")
    same_tensors(weights(tmp_path / "adapter"), weights(tmp_path / "run" / "final"))


def test_a_full_model_loads_with_plain_transformers(model_folders, tmp_path):
    result = make_engine(model_folders["gpt2"], tmp_path, architecture="gpt2", lora=False).train(1)
    model = AutoModelForCausalLM.from_pretrained(result.model_path)
    assert model.config.attn_pdrop == 0.1  # the user's config, though no dropout was applied


def test_best_is_the_policy_that_sampled_the_best_iteration(model_folders, tmp_path):
    engine = make_engine(model_folders["llama"], tmp_path / "run")
    result = engine.train(6)
    best = result.best_iteration
    assert max(result.get_objective_curve()) == result.get_objective_curve()[best - 1]
    assert result.best_reward == result.get_reward_curve()[best - 1]
    if best == 1:
        pytest.fail("the reward must rise for this test to see anything")
    make_engine(model_folders["llama"], tmp_path / "short").train(best - 1)
    same_tensors(weights(tmp_path / "run" / "best"), weights(tmp_path / "short" / "final"))


def test_the_runs_folder_holds_what_was_promised(model_folders, tmp_path):
    make_engine(model_folders["llama"], tmp_path).train(2, save_every=1)
    present = {path.name for path in tmp_path.iterdir()}
    assert present == {
        "metrics.jsonl",
        "run.json",
        "completions",
        "evaluations",
        "checkpoint-1",
        "checkpoint-2",
        "best",
        "final",
    }
    row = completions(tmp_path)[0][0]
    assert {"iteration", "row", "prompt", "response", "reward", "kl", "ended", "reward/letters"} <= row.keys()
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["rewards"]["class"] == "LetterRewards"
    assert record["rewards"]["file"] == os.path.abspath(__file__)
    assert len(record["rewards"]["sha256"]) == 64
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    assert not list(tmp_path.rglob(".*"))


def test_metrics_follow_from_completions(model_folders, tmp_path):
    make_engine(model_folders["llama"], tmp_path).train(1)
    rows, (line,) = completions(tmp_path)[0], metrics(tmp_path)
    rewards = [row["reward"] for row in rows]
    mean = sum(rewards) / 8
    assert line["reward_mean"] == pytest.approx(mean)
    assert line["reward_std"] == pytest.approx(math.sqrt(sum((r - mean) ** 2 for r in rewards) / 7))
    assert (line["reward_min"], line["reward_max"]) == (min(rewards), max(rewards))
    for row in rows:
        assert row["reward"] == pytest.approx(row["reward/letters"] + row["reward/brief"])
        assert row["reward/letters"] == pytest.approx(sum(char.isalpha() for char in row["response"]) / 8)
    lengths = [len(row["token_ids"]) for row in rows]
    assert line["response_length_mean"] == pytest.approx(sum(lengths) / 8)
    assert line["ended_fraction"] == pytest.approx(sum(row["ended"] for row in rows) / 8)


def test_the_printed_lines_are_the_contracts(model_folders, tmp_path, capsys):
    agent = make_agent(model_folders["gpt2"], architecture="gpt2")
    KonicFinetuningEngine.from_agent(agent, checkpoint_dir=tmp_path / "run").train(2)
    out = capsys.readouterr().out.splitlines()
    rule = "=" * 60
    assert out[:10] == [
        rule, "Starting RLHF Training", rule, f"Model: {model_folders['gpt2']}", "LoRA: True", "Learning Rate: 0.01",
        "Batch Size: 8", "Max Iterations: 2", rule, "",
    ]  # fmt: skip
    number = r"-?\d+\.\d{3}"
    line = (
        rf"\[Iter    1\] Reward: +{number} \(\+/- {number}\) \| KL: 0\.0000 \| Loss: -?\d+\.\d{{4}} \| Time: \d+\.\ds"
    )
    import re

    assert re.fullmatch(line, out[10])
    assert out[11].startswith("[Iter    2] Reward:")
    assert out[12:16] == ["=" * 50, "Finetuning Results Summary", "=" * 50, f"Model: {model_folders['gpt2']}"]
    assert out[16] == "Total Iterations: 2"
    assert re.fullmatch(r"Best Reward: -?\d\.\d{4} \(iteration \d\)", out[17])
    assert re.fullmatch(r"Final Reward: -?\d\.\d{4}", out[18])
    assert out[-1] == "=" * 50


class Recorder(BaseKonicFinetuningCallback):
    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if name.startswith("on_"):
            return lambda *args: self.calls.append((name, args)) or value(*args)
        return value


def test_hooks_come_in_order_with_what_they_promise(model_folders, tmp_path):
    recorder = Recorder()
    make_engine(model_folders["llama"], tmp_path, callback=[Silent(), recorder]).train(2, save_every=1)
    names = [name for name, _ in recorder.calls]
    iteration = [
        "on_iteration_begin",
        "on_generation_begin",
        "on_generation_end",
        "on_reward_computed",
        "on_iteration_end",
    ]
    assert names[:7] == ["on_train_begin", *iteration, "on_checkpoint_saved"]
    assert names[-1] == "on_train_end"
    config = recorder.calls[0][1][0]
    expected = {"model_name", "use_lora", "learning_rate", "batch_size", "max_iterations", "kl_penalty_weight"}
    assert expected <= config.keys()
    prompts, responses = recorder.calls[3][1]
    rewards, breakdown = recorder.calls[4][1]
    assert len(prompts) == len(responses) == len(rewards) == len(breakdown["letters"]) == 8


def test_a_callback_stops_early(model_folders, tmp_path):
    callback = KonicFinetuningCallback(verbose=False, early_stop_kl_threshold=1e-7, early_stop_patience=2)
    result = make_engine(model_folders["llama"], tmp_path, callback=callback).train(10)
    assert result.total_iterations == 3  # iteration 1 samples from the reference itself
    assert "callback" in result.stopped_because


def test_max_minutes_ends_after_the_iteration_that_passes_it(model_folders, tmp_path):
    result = make_engine(model_folders["llama"], tmp_path, max_minutes=1e-6).train(10)
    assert result.total_iterations == 1
    assert result.stopped_because == "max_minutes passed"


class Interrupting(Silent):
    """Presses Ctrl-C in a given hook of iteration 3."""

    def __init__(self, hook):
        super().__init__()
        self._hook, self._iteration = hook, 0

    def on_iteration_begin(self, iteration):
        self._iteration = iteration

    def __getattribute__(self, name):
        if name.startswith("on_") and name == super().__getattribute__("_hook") and self._iteration == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__getattribute__(name)


@pytest.mark.parametrize("hook, done", [("on_generation_begin", 2), ("on_reward_computed", 2), ("on_iteration_end", 3)])
def test_ctrl_c_ends_cleanly_saves_whole_iterations_and_can_be_resumed(model_folders, hook, done, tmp_path):
    result = make_engine(model_folders["llama"], tmp_path / "run", callback=Interrupting(hook)).train(5)
    assert (result.total_iterations, result.stopped_because) == (done, "interrupted")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    make_engine(model_folders["llama"], tmp_path / "run").train(5, resume_from_checkpoint=True)
    make_engine(model_folders["llama"], tmp_path / "whole").train(5)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


class Raising(LetterRewards):
    calls = 0

    @llm_reward
    def fragile(self, prompt, response):
        self.calls += 1
        return 1 / 0 if self.calls > 20 else 0.0


def test_a_raising_reward_is_named_and_whole_iterations_are_kept(model_folders, tmp_path):
    recorder = Recorder()
    engine = make_engine(model_folders["llama"], tmp_path, composer=Raising(), callback=[Silent(), recorder])
    with pytest.raises(
        RewardError, match=r"Reward 'fragile' raised ZeroDivisionError: division by zero\n  prompt:   '"
    ):
        engine.train(5)
    assert [row["iteration"] for row in metrics(tmp_path)] == [1, 2]
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert "on_train_error" in [name for name, _ in recorder.calls]
    assert not list(tmp_path.rglob(".*"))


class Abstaining(KonicLLMRewardComposer):
    @llm_reward
    def sometimes(self, prompt, response):
        return None if len(prompt) % 2 else float(len(response))


def test_abstaining_samples_are_counted(model_folders, tmp_path):
    result = make_engine(model_folders["llama"], tmp_path, composer=Abstaining()).train(1)
    rows = completions(tmp_path)[0]
    missing = sum(row["reward"] is None for row in rows)
    assert 0 < missing < 8
    assert result.history[0].num_unscored == missing


class AnswerRewards(KonicLLMRewardComposer):
    @llm_reward
    def right(self, prompt, response, answer, weight=2.0):
        assert answer == prompt.upper()
        return float(weight)


def test_columns_of_the_dataset_reach_the_rewards_that_ask(model_folders, tmp_path):
    rows = [{"prompt": text, "answer": text.upper(), "unused": 1} for text in PROMPTS]
    engine = make_engine(
        model_folders["llama"], tmp_path, composer=AnswerRewards(), dataset=DatasetConfig(prompts=rows)
    )
    assert engine.train(1).final_reward_mean == 2.0


def test_a_column_that_rewards_cannot_get_is_no_column_that_they_are_told_of(model_folders, tmp_path):
    def compare(prompts, responses, response):
        return [0.0 for _ in responses]

    def match(prompt, response, answer):
        return 0.0

    dataset = DatasetConfig(prompts=[{"prompt": "a", "response": "b", "completions": "c", "label": "d"}])
    for reward, told in (
        (compare, "'compare' has the parameter 'response'.* column of that name must be renamed to reach rewards"),
        (match, "'match' asks for the column 'answer', which the dataset does not have. Its other columns: label.$"),
    ):
        composer = KonicLLMRewardComposer().add_reward_function(reward)
        engine = make_engine(model_folders["llama"], tmp_path, composer=composer, dataset=dataset)
        with pytest.raises(RewardError, match=told):
            engine._current_session().check()


def test_tables_are_prompts_of_generate_and_evaluate_and_other_things_one_error(model_folders, tmp_path):
    pandas = pytest.importorskip("pandas")
    engine = make_engine(model_folders["llama"], tmp_path)
    frame = pandas.DataFrame({"prompt": ["a", "b"]})
    assert len(engine.generate(frame)) == len(engine.generate(frame["prompt"].to_numpy())) == 2
    assert engine.evaluate(frame)["prompts"] == ["a", "b"]
    for call in (engine.generate, engine.evaluate):
        with pytest.raises(
            ConfigError, match=rf"^{call.__name__}\(prompts\): prompts is of the type str, .*Give a list of"
        ):
            call("text")


@pytest.mark.parametrize("plain_rows", [[0, 1, 2, 3], [4, 5, 6, 7]])
def test_a_reward_of_messages_learns_from_chats_and_plain_text_in_any_order(plain_rows, model_folders, tmp_path):
    class Chatty(KonicLLMRewardComposer):
        @llm_reward
        def is_chat(self, prompt, response, messages):
            return float(messages is not None)

    chat = [{"role": "user", "content": "hi"}]
    prompts = ["plain" if row in plain_rows else chat for row in range(8)]
    dataset = DatasetConfig(prompts=prompts, shuffle=False)
    engine = make_engine(
        model_folders["llama"], tmp_path, composer=Chatty(), dataset=dataset, batch_size=4, ppo_epochs=1
    )
    rewards = [result.reward_mean for result in engine.train(2).history]
    assert rewards == ([0, 1] if plain_rows[0] == 0 else [1, 0])


def test_evaluate_is_the_same_every_time_and_does_not_train(model_folders, tmp_path):
    engine = make_engine(model_folders["llama"], tmp_path)
    first = engine.evaluate(list(PROMPTS))
    assert {"prompts", "responses", "rewards", "reward_mean"} <= first.keys()
    assert [len(values) for values in first["reward_breakdown"].values()] == [8, 8]
    assert first["reward_breakdown"].keys() == first["reward_breakdown_mean"].keys() == {"letters", "brief"}
    assert first == engine.evaluate(list(PROMPTS))
    assert first["prompts"] == list(PROMPTS)
    assert first["reward_mean"] == pytest.approx(sum(first["rewards"]) / 8)
    assert max(first["kl_per_response"]) < 1e-6
    assert engine.generate(list(PROMPTS)) == first["responses"]
    assert len(engine.evaluate()["prompts"]) == 2  # the held-out ones
    with_evaluation = engine.train(2)
    assert with_evaluation.get_reward_curve() == make_engine(
        model_folders["llama"], tmp_path / "other"
    ).train(2).get_reward_curve()  # fmt: skip
    assert engine.evaluate(list(PROMPTS))["responses"] != first["responses"]


def test_a_prompt_that_comes_again_in_another_batch_gets_another_response(model_folders, monkeypatch):
    monkeypatch.setattr("konic.finetuning.rollout.evaluation.BATCH_SIZE", 2)
    rows = [{"prompt": "a", "weight": 1}, *({"prompt": "b", "weight": 0} for _ in range(5))]
    agent = make_agent(model_folders["llama"], dataset=DatasetConfig(prompts=rows, weights_column="weight"))
    assert len({sample.response for sample in sample_responses(agent, 6, "cpu")}) == 6


def test_without_a_folder_a_run_makes_its_own_and_says_where(model_folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    agent = make_agent(model_folders["llama"])
    result = KonicFinetuningEngine.from_agent(agent).train(1)
    (run,) = (tmp_path / "runs").iterdir()
    assert result.model_path == str(run / "final")
    assert f"Saved in: {run / 'final'}" in capsys.readouterr().out


def test_filters_are_said_to_change_the_distribution(model_folders, tmp_path, caplog):
    make_engine(model_folders["llama"], tmp_path, generation={"top_k": 5}).train(1)
    assert "Sampling with top_k=5 draws from another distribution" in caplog.text


def test_a_context_too_short_is_refused_before_the_run_writes(model_folders, tmp_path):
    options = {"generation": {"max_prompt_length": 120, "max_new_tokens": 9}}
    with pytest.raises(ConfigError, match="over the 128 positions"):
        make_engine(model_folders["llama"], tmp_path / "run", **options).train(1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [{"max_iterations": -1}, {"max_iterations": 2.5}, {"save_every": -1}])
def test_counts_that_cannot_be_are_refused(model_folders, arguments, tmp_path):
    with pytest.raises(ConfigError, match=f"train\\({next(iter(arguments))}="):
        make_engine(model_folders["llama"], tmp_path).train(**arguments)


def test_engine_options_are_checked(model_folders, tmp_path):
    agent = make_agent(model_folders["llama"])
    with pytest.raises(ConfigError, match=r"no argument 'chekpoint_dir'.*Did you mean 'checkpoint_dir'"):
        KonicFinetuningEngine.from_agent(agent, chekpoint_dir=tmp_path)
    with pytest.raises(ConfigError, match="device='cuda:99' is not available"):
        KonicFinetuningEngine.from_agent(agent, device="cuda:99")
    with pytest.raises(ConfigError, match="device='quantum' is not a device: give auto"):
        KonicFinetuningEngine.from_agent(agent, device="quantum")
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OutputError, match="cannot be written"):
        KonicFinetuningEngine.from_agent(agent, checkpoint_dir=blocked / "run", callback=Silent()).train(1)


def test_a_users_script_runs_and_ctrl_c_ends_it_with_a_summary(model_folders, tmp_path):
    """A real process, its standard output a pipe: lines come as they happen, SIGINT prints the summary and exits 0."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(f"""
            from konic.finetuning import *

            class Rewards(KonicLLMRewardComposer):
                def __init__(self):
                    pass

                @llm_reward
                def brief(self, prompt: str, response: str) -> float:
                    return -len(response) / 80

            agent = KonicFinetuningAgent(
                base_model={model_folders["gpt2"]!r}, reward_composer=Rewards(),
                lora_config=LoraConfig(r=4, lora_alpha=16, target_modules=["c_attn", "c_proj"]),
                dataset_config=DatasetConfig(source=DatasetSource.MEMORY, prompts=["a", "b", "c"]),
                training_config=dict(batch_size=4),
                generation_config=GenerationConfig(max_new_tokens=8, max_prompt_length=32),
            )
            result = KonicFinetuningEngine.from_agent(agent).train(max_iterations=100000)
            print(result.stopped_because)
        """)
    )
    process = subprocess.Popen(
        [sys.executable, script.name], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("[Iter    3]"):
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Finetuning Results Summary" in rest
    assert rest.rstrip().endswith("interrupted")
    assert errors == ""


def test_training_goes_on_from_an_adapter_and_is_held_to_where_it_started(model_folders, architecture, tmp_path):
    first = make_engine(model_folders[architecture], tmp_path / "first", architecture=architecture, ppo_epochs=4)
    start = first.train(3).model_path
    agent = KonicFinetuningAgent(
        base_model=start,
        reward_composer=LetterRewards(),
        dataset_config=DatasetConfig(prompts=PROMPTS),
        training_config={"batch_size": 8, "learning_rate": 1e-2},
        generation_config={"max_new_tokens": 8, "max_prompt_length": 48},
    )
    second = KonicFinetuningEngine.from_agent(agent, checkpoint_dir=tmp_path / "second", callback=Silent())
    assert second.generate(list(PROMPTS)) == first.generate(list(PROMPTS))
    result = second.train(3)
    assert result.get_kl_curve()[0] < 1e-7  # the reference is the adapter as it was loaded, not its base
    assert result.get_kl_curve()[2] > 0
    assert result.history[0].sampler_gap < 1e-5
    config = json.loads((tmp_path / "second" / "final" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == model_folders[architecture]
    assert not (tmp_path / "second" / "final" / "start").exists()
    resumed = KonicFinetuningEngine.from_agent(agent, checkpoint_dir=tmp_path / "second", callback=Silent())
    assert resumed.train(4, resume_from_checkpoint=True).get_kl_curve()[:3] == result.get_kl_curve()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = AutoPeftModelForCausalLM.from_pretrained(start)(ids).logits
        after = AutoPeftModelForCausalLM.from_pretrained(result.model_path)(ids).logits
    assert (before - after).abs().max() > 1e-3


def test_a_run_from_an_adapter_records_the_settings_of_that_adapter(model_folders, tmp_path):
    start = make_engine(model_folders["llama"], tmp_path / "first").train(1).model_path

    def train(iterations, agent, **options):
        engine = KonicFinetuningEngine.from_agent(agent, checkpoint_dir=tmp_path / "run", callback=Silent())
        return engine.train(iterations, **options)

    agent = make_agent(start)
    ignored = agent.with_settings({"lora_config": {"r": 7, "lora_alpha": 3}})
    train(1, ignored)
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["lora_config"]
    assert (recorded["r"], recorded["lora_alpha"]) == (4, 16)
    assert recorded["target_modules"] == sorted(LORA_TARGETS["llama"])
    assert '"r": 7' not in (tmp_path / "run" / "final" / "README.md").read_text()
    assert train(2, agent, resume_from_checkpoint=True).total_iterations == 2  # either way it is the same run
    for iteration, before in ((2, None), (3, ignored.get_lora_config().model_dump())):  # as it was recorded before
        file = tmp_path / "run" / f"checkpoint-{iteration}" / "trainer_state.json"
        record = json.loads(file.read_text())
        record["settings"]["lora_config"] = before
        file.write_text(json.dumps(record))
        seal(file.parent)
        assert train(iteration + 1, agent, resume_from_checkpoint=True).total_iterations == iteration + 1


def test_pefts_config_and_konics_are_compared_in_a_resume(model_folders, tmp_path):
    agent = make_agent(model_folders["llama"])
    names = ("base_model", "reward_composer", "dataset_config", "training_config", "generation_config")
    parts = {name: getattr(agent, f"get_{name}")() for name in names}

    def engine(lora):
        agent = KonicFinetuningAgent(lora_config=lora, **parts)
        return KonicFinetuningEngine.from_agent(agent, checkpoint_dir=tmp_path, callback=Silent(), device="cpu")

    targets = LORA_TARGETS["llama"]
    engine(peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")).train(1)
    with pytest.raises(OutputError, match="lora_alpha was 16 and is 32"):
        engine(LoraConfig(r=4, lora_alpha=32, target_modules=targets)).train(2, resume_from_checkpoint=True)


def test_an_adapter_that_cannot_be_gone_on_from_is_said(model_folders, tmp_path):
    engine = make_engine(model_folders["llama"], tmp_path / "run")
    engine.save_pretrained(tmp_path / "adapter")
    config_file = tmp_path / "adapter" / "adapter_config.json"
    good = json.loads(config_file.read_text())

    def complaint(**changes):
        config_file.write_text(json.dumps(good | changes))
        with pytest.raises(ModelError) as caught:
            make_engine(str(tmp_path / "adapter"), tmp_path / "x", lora=False).generate(["a"])
        return str(caught.value)

    assert "holds a IA3 adapter" in complaint(peft_type="IA3")
    assert "bias='all'" in complaint(bias="all")
    assert "no such folder" in complaint(base_model_name_or_path="/gone/away")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    assert "pickled weights are not read" in complaint()


def test_held_out_prompts_are_evaluated_before_during_and_after(model_folders, tmp_path):
    dataset = DatasetConfig(prompts=[f"prompt {n}" for n in range(30)], held_out=10)
    engine = make_engine(model_folders["llama"], tmp_path / "run", dataset=dataset, eval_every=2, ppo_epochs=4)
    held_out = [prompt.text for prompt in load_prompts(dataset).held_out]
    before = engine.evaluate()
    assert before["prompts"] == held_out
    result = engine.train(5)
    assert result.before.rewards == before["rewards"]
    assert result.after.responses == engine.evaluate()["responses"] != before["responses"]
    evaluated = [row.iteration for row in result.history if not math.isnan(row.eval_reward_mean)]
    assert evaluated == [1, 3, 5]
    assert result.history[0].eval_reward_mean == before["reward_mean"]
    assert result.history[0].eval_kl_per_response < 1e-6
    trained_on = {row["prompt"] for rows in completions(tmp_path / "run") for row in rows}
    assert not trained_on & set(held_out)
    files = sorted(path.stem for path in (tmp_path / "run" / "evaluations").iterdir())
    assert files == ["000000", "000002", "000004", "000005"]
    gain = sum(result.after.rewards) / 10 - sum(result.before.rewards) / 10
    assert result.held_out_gain.mean == pytest.approx(gain)
    assert f"Held-out Gain: {result.held_out_gain.mean:+.4f} (95 % interval" in result.summary()
    assert "held-out prompts (10)" in (tmp_path / "run" / "final" / "README.md").read_text()


def test_best_is_chosen_on_the_held_out_prompts_where_there_are_any(model_folders, tmp_path):
    dataset = DatasetConfig(prompts=[f"prompt {n}" for n in range(30)], held_out=10)
    options = {
        "dataset": dataset,
        "eval_every": 2,
        "batch_size": 20,
        "ppo_epochs": 4,
        "learning_rate": 1e-2,
        "lora": False,
    }
    result = make_engine(model_folders["llama"], tmp_path / "run", **options).train(8)
    scores = {row.iteration: row.eval_reward_mean for row in result.history if row.iteration % 2}
    assert result.best_iteration == max(scores, key=scores.get)
    assert result.best_reward == max(scores.values())
    if result.best_iteration == 1:
        pytest.fail("the reward must rise for this test to see anything")
    make_engine(model_folders["llama"], tmp_path / "short", **options).train(result.best_iteration - 1)
    same_tensors(weights(tmp_path / "run" / "best"), weights(tmp_path / "short" / "final"))


def test_evaluating_changes_nothing_and_a_resume_remembers_the_start(model_folders, tmp_path):
    dataset = DatasetConfig(prompts=[f"prompt {n}" for n in range(30)], held_out=10)

    def engine(name, **options):
        return make_engine(model_folders["llama"], tmp_path / name, dataset=dataset, **options)

    plain, often = engine("plain").train(4), engine("often", eval_every=1).train(4)
    assert plain.get_reward_curve() == often.get_reward_curve()
    engine("parts").train(2)
    resumed = engine("parts").train(4, resume_from_checkpoint=True)
    assert resumed.before == plain.before
    assert resumed.after == plain.after
    assert resumed.held_out_gain == plain.held_out_gain


def test_eval_every_needs_held_out_prompts(model_folders):
    with pytest.raises(ConfigError, match=r"eval_every=5\) needs prompts to evaluate on"):
        make_agent(model_folders["llama"], dataset=DatasetConfig(prompts=["a"]), eval_every=5)


def test_saving_into_a_folder_keeps_what_else_is_there(model_folders, tmp_path):
    engine = make_engine(model_folders["llama"], tmp_path / "run")
    engine.train(1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for _ in range(2):
        engine.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "mine")
    engine.save_pretrained(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_resume_with_other_settings_is_refused_by_name(model_folders, tmp_path, caplog):
    make_engine(model_folders["llama"], tmp_path).train(2)
    before = metrics(tmp_path)
    possible = (
        ({"batch_size": 4}, "batch_size was 8 and is 4"),
        ({"seed": 9}, "seed was 0 and is 9"),
        ({"learning_rate": 0.02}, "learning_rate was 0.01 and is 0.02"),
        ({"dataset": DatasetConfig(prompts=PROMPTS)}, "run: dataset_config.held_out was 2 and is 0. Resume"),
    )
    for changes, told in possible:
        with pytest.raises(OutputError, match=f"{told}.*allow_changes=True.*--allow-changes"):
            make_engine(model_folders["llama"], tmp_path, **changes).train(3, resume_from_checkpoint=True)
    for allow in (False, True):
        engine = make_engine(model_folders["llama"], tmp_path, lora=False)
        with pytest.raises(OutputError, match=r"another model: .*use_lora was True and is False"):
            engine.train(3, resume_from_checkpoint=True, allow_changes=allow)
    with pytest.raises(OutputError, match="model_name was"):
        make_engine(model_folders["gpt2"], tmp_path, architecture="gpt2").train(3, resume_from_checkpoint=True)
    assert metrics(tmp_path) == before
    changed = make_engine(model_folders["llama"], tmp_path, learning_rate=0.02)
    changed.train(3, resume_from_checkpoint=True, allow_changes=True)
    assert "learning_rate was 0.01 and is 0.02" in caplog.text
    assert [row["learning_rate"] for row in metrics(tmp_path)] == [0.01, 0.01, 0.02]


@pytest.mark.parametrize("change", ["rewards", "generation", "seed"])
def test_after_a_change_of_what_is_measured_the_held_out_prompts_are_evaluated_anew(
    model_folders, tmp_path, caplog, change
):
    def engine(run, **more):
        return make_engine(model_folders["llama"], tmp_path / run, **more)

    other = {
        "rewards": {"composer": LetterRewards(reward_weights={"letters": 100.0})},
        "generation": {"generation": {"max_new_tokens": 3}},
        "seed": {"seed": 5},
    }[change]
    engine("run").train(2)
    before = engine("other", **other).evaluate()["rewards"]
    result = engine("run", **other).train(3, resume_from_checkpoint=True, allow_changes=True)
    assert result.before.rewards == before
    assert f"the evaluations so far are now in {tmp_path / 'run' / 'earlier-1'}" in caplog.text
    kept = sorted(path.name for path in (tmp_path / "run" / "earlier-1" / "evaluations").iterdir())
    assert kept == ["000000.parquet", "000002.parquet"]

    caplog.clear()
    again = engine("run", **other, learning_rate=0.02).train(4, resume_from_checkpoint=True, allow_changes=True)
    assert again.before.rewards == before and "anew" not in caplog.text, "another rate measures nothing else"


def test_metrics_torn_by_a_kill_are_written_anew_from_the_checkpoint(model_folders, tmp_path):
    make_engine(model_folders["llama"], tmp_path / "run").train(2)
    make_engine(model_folders["llama"], tmp_path / "whole").train(3)
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"iteration": 3, "rew')
    (tmp_path / "run" / ".checkpoint-3-abc").mkdir()
    (tmp_path / "run" / "completions" / ".000003").write_text("half")
    make_engine(model_folders["llama"], tmp_path / "run").train(3, resume_from_checkpoint=True)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert not list((tmp_path / "run").rglob(".*"))


def test_a_resume_from_an_earlier_checkpoint_keeps_what_came_after(model_folders, tmp_path, caplog):
    run, earlier = tmp_path / "run", tmp_path / "run" / "earlier-1"
    make_engine(model_folders["llama"], run).train(4, save_every=1)
    before, final, answers = metrics(run), weights(run / "final"), completions(run)
    again = make_engine(model_folders["llama"], run, learning_rate=0.02)
    again.train(3, resume_from_checkpoint=run / "checkpoint-2", allow_changes=True)
    assert f"What had been written after iteration 2 is now in {earlier}" in caplog.text
    assert metrics(earlier) == before
    same_tensors(weights(earlier / "final"), final)
    assert (earlier / "best").is_dir()
    assert sorted(path.name for path in earlier.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert completions(earlier) == answers[2:]
    assert [row["iteration"] for row in metrics(run)] == [1, 2, 3]
    assert len(completions(run)) == 3
    make_engine(model_folders["llama"], run, learning_rate=0.02).train(4, resume_from_checkpoint=True)
    assert not (run / "earlier-2").exists()


def test_a_refused_resume_names_the_fields_of_a_config_that_differ(model_folders, tmp_path):
    make_engine(model_folders["llama"], tmp_path).train(1)
    other = make_engine(model_folders["llama"], tmp_path, generation={"temperature": 0.5, "top_k": 3})
    with pytest.raises(OutputError) as caught:
        other.train(2, resume_from_checkpoint=True)
    for named in ("generation_config.temperature was 1.0 and is 0.5", "generation_config.top_k was"):
        assert named in str(caught.value)
    assert "max_new_tokens" not in str(caught.value)
    other = make_engine(model_folders["llama"], tmp_path)
    other.lora_config = LoraConfig(r=4, lora_alpha=3, target_modules=LORA_TARGETS["llama"])
    with pytest.raises(OutputError, match=r"another model: lora_config\.lora_alpha was 16 and is 3\.0\. Resume"):
        other.train(2, resume_from_checkpoint=True)


def test_a_finished_run_that_is_continued_and_killed_keeps_what_its_final_model_is(model_folders, tmp_path, caplog):
    make_engine(model_folders["llama"], tmp_path).train(2)
    final = weights(tmp_path / "final")

    class Killed(Silent):
        def on_iteration_end(self, result):
            if result.iteration == 5:
                raise SystemExit

    with pytest.raises(SystemExit):
        make_engine(model_folders["llama"], tmp_path, callback=Killed()).train(
            9, save_every=2, resume_from_checkpoint=True
        )
    same_tensors(weights(tmp_path / "final"), final)
    run = Run.read(tmp_path)
    newest = run.saved[-3]
    assert newest in ("checkpoint-4", "checkpoint-5") and run.saved[-2:] == ["final", "best"]
    assert run.iterations_of("final") == 2 and run.checkpoints[2] == "final"
    assert run.find_weights(None) == newest
    assert run.find_weights("checkpoint-2") == "checkpoint-2"
    make_engine(model_folders["llama"], tmp_path).train(6, resume_from_checkpoint=True)
    assert not (tmp_path / "earlier-1").exists(), "nothing there was of a later iteration"
    run = Run.read(tmp_path)
    assert run.find_weights(None) == "final" and run.iterations_of("final") == 6
    (tmp_path / "final" / "README.md").unlink()
    assert run.iterations_of("final") is None and run.find_weights(None) == "final"


def test_held_out_prompts_that_were_not_evaluated_after_ctrl_c_are_spoken_of(model_folders, tmp_path, caplog):
    class Interrupted(Silent):
        def on_iteration_end(self, result):
            raise KeyboardInterrupt

    make_engine(model_folders["llama"], tmp_path, callback=Interrupted()).train(3)
    assert "The held-out prompts were not evaluated. Resuming the run does it when that ends." in caplog.text


@pytest.mark.parametrize("lost", ["metrics.jsonl", "everything but final", "everything but a checkpoint"])
def test_results_without_their_metrics_are_set_aside_too(model_folders, tmp_path, lost):
    make_engine(model_folders["llama"], tmp_path).train(2)
    kept = {"everything but final": "final", "everything but a checkpoint": "checkpoint-2"}.get(lost)
    for path in list(tmp_path.iterdir()):
        if path.name == lost or (kept and path.name != kept):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / (kept or "final") / "mine.txt").write_text("kept")
    make_engine(model_folders["llama"], tmp_path).train(1)
    assert (tmp_path / "earlier-1" / (kept or "final") / "mine.txt").read_text() == "kept"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_checkpoint_behind_a_link_elsewhere_belongs_to_its_run(model_folders, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    make_engine(model_folders["llama"], run).train(3, save_every=1)
    other.mkdir()
    (other / "link").symlink_to(run / "checkpoint-2")
    engine = make_engine(model_folders["llama"], None)
    engine.train(3, resume_from_checkpoint=other / "link")
    assert [path.name for path in other.iterdir()] == ["link"]
    assert (run / "earlier-1").is_dir()
    (tmp_path / "same").symlink_to(run)
    again = make_engine(model_folders["llama"], tmp_path / "same")
    assert again.train(4, resume_from_checkpoint=run / "checkpoint-3").total_iterations == 4


def test_a_model_folder_that_is_a_link_is_replaced_and_what_it_points_to_stays(model_folders, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "mine.txt").write_text("kept")
    run = tmp_path / "run"
    make_engine(model_folders["llama"], run).train(1)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "best")
    (run / "final").symlink_to(tmp_path / "disk")
    (run / "best").symlink_to(tmp_path / "gone")
    result = make_engine(model_folders["llama"], run).train(2, resume_from_checkpoint=True)
    assert Path(result.model_path, "adapter_model.safetensors").is_file()
    assert not (run / "final").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["mine.txt"]


def test_what_a_callback_changes_of_a_result_changes_no_run(model_folders, tmp_path):
    class Clears(Silent):
        def on_iteration_end(self, result):
            result.reward_breakdown.clear()

        def on_reward_computed(self, rewards, reward_breakdown):
            rewards[:] = [9.0] * len(rewards)

    changed = make_engine(model_folders["llama"], tmp_path / "a", Clears()).train(2)
    plain = make_engine(model_folders["llama"], tmp_path / "b").train(2)
    assert [row.reward_breakdown for row in changed.history] == [row.reward_breakdown for row in plain.history]
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_a_resumed_stream_is_read_again_to_where_the_run_stood(model_folders, tmp_path, caplog):
    def engine(run):
        made = make_engine(model_folders["llama"], run, dataset=DatasetConfig(prompts=PROMPTS))
        first, *others = make_prompts(list(PROMPTS) * 9, DatasetConfig(), "stream")
        made._session._prompts = PromptSet(rows=[first], held_out=[], shuffle=True, shuffle_seed=3, stream=iter(others))
        return made

    engine(tmp_path / "whole").train(5)
    engine(tmp_path / "parts").train(2)
    engine(tmp_path / "parts").train(5, resume_from_checkpoint=True)
    assert "Read the first 16 rows of the stream again" in caplog.text
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert completions(tmp_path / "whole") == completions(tmp_path / "parts")


def test_a_checkpoint_resumed_from_is_not_written_again(model_folders, tmp_path):
    make_engine(model_folders["llama"], tmp_path / "run").train(2)
    before = (tmp_path / "run" / "checkpoint-2" / "complete.json").stat().st_mtime_ns
    make_engine(model_folders["llama"], tmp_path / "run").train(2, resume_from_checkpoint=True)
    assert (tmp_path / "run" / "checkpoint-2" / "complete.json").stat().st_mtime_ns == before
    there = make_engine(model_folders["llama"], tmp_path / "elsewhere")
    there.train(2, resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")
    assert newest_checkpoint(tmp_path / "elsewhere").name == "checkpoint-2"


class Slow(Silent):
    def on_iteration_begin(self, iteration):
        print(iteration, flush=True)


def run_child(model, run, body):
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_engine import *
        engine = make_engine({model!r}, {str(run)!r}, callback=Slow())
        """)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return warm.Popen(
        [sys.executable, "-c", script + textwrap.dedent(body)], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_sigterm_saves_what_is_done_and_then_ends_the_process(model_folders, tmp_path):
    child = run_child(model_folders["llama"], tmp_path / "run", "engine.train(10_000)\nprint('went on')")
    while child.stdout.readline().strip() != "4":
        pass
    second = make_engine(model_folders["llama"], tmp_path / "run")
    second._session.state.iteration = 1  # as one that has trained in this folder before
    with pytest.raises(OutputError, match=rf"another run is writing here \(process {child.pid} on "):
        second.train(1)
    child.terminate()
    assert "went on" not in child.communicate(timeout=60)[0]
    assert child.returncode == -signal.SIGTERM
    done = len(metrics(tmp_path / "run"))
    assert done >= 3
    assert (tmp_path / "run" / f"checkpoint-{done}" / "complete.json").is_file()
    make_engine(model_folders["llama"], tmp_path / "run").train(done + 1, resume_from_checkpoint=True)
    make_engine(model_folders["llama"], tmp_path / "whole").train(done + 1)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_training_inside_a_callback_of_its_own_says_why_it_cannot_start(model_folders, tmp_path):
    class Again(Silent):
        def on_iteration_end(self, result):
            engine.train(1)

    engine = make_engine(model_folders["llama"], tmp_path, callback=Again())
    with pytest.raises(OutputError, match=r"writing here \(a train\(\) of this process, .* A callback of that run"):
        engine.train(1)


def test_a_callback_that_changes_the_final_result_changes_its_own_copy(model_folders, tmp_path):
    class Clearing(Silent):
        def on_train_end(self, result):
            result.history.clear()

    assert make_engine(model_folders["llama"], tmp_path, callback=Clearing()).train(1).total_iterations == 1


def test_engines_that_load_in_threads_at_once_leave_the_model_classes_whole(model_folders, tmp_path):
    engines = [make_engine(model_folders["gpt2"], tmp_path / str(n), architecture="gpt2") for n in range(3)]
    threads = [threading.Thread(target=engine.setup) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    make_engine(model_folders["gpt2"], tmp_path / "after", architecture="gpt2").setup()
    assert all(engine.generate(["a"]) == engines[0].generate(["a"]) for engine in engines)


def test_two_engines_do_not_write_into_one_folder_and_a_lock_left_behind_is_free(model_folders, tmp_path):
    make_engine(model_folders["llama"], tmp_path).train(1)
    with RunFolder(tmp_path).locked():
        before = files_under(tmp_path)
        with pytest.raises(OutputError, match="another run is writing here"):
            make_engine(model_folders["llama"], tmp_path).train(2, resume_from_checkpoint=True)
        lock = {str(tmp_path / ".lock"): None}  # some versions of filelock touch it
        assert files_under(tmp_path) | lock == before | lock
    (tmp_path / ".lock").write_text("what a killed process left")
    assert make_engine(model_folders["llama"], tmp_path).train(2, resume_from_checkpoint=True).total_iterations == 2


def test_a_folder_that_becomes_read_only_ends_the_run_with_its_error_alone(model_folders, tmp_path, monkeypatch):
    class Remounts(Silent):
        def on_iteration_begin(self, iteration):
            if iteration == 2:
                for name in ("open", "unlink", "mkdir", "replace", "rename"):
                    monkeypatch.setattr(os, name, read_only)
                monkeypatch.setattr(Path, "open", read_only)
                monkeypatch.setattr(pyarrow.parquet, "write_table", read_only_in_arrow)

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def read_only_in_arrow(*_, **__):
        raise OSError(errno.EROFS, "Failed to open local file. Detail: [errno 30] Read-only file system")

    engine = make_engine(model_folders["llama"], tmp_path, callback=Remounts())
    with pytest.raises(OutputError, match=r"cannot be written: Read-only file system\.\ncheckpoint-1 is kept"):
        engine.train(3, save_every=1)
    monkeypatch.undo()
    assert make_engine(model_folders["llama"], tmp_path).train(3, resume_from_checkpoint=True).total_iterations == 3


def files_under(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_only_the_newest_checkpoints_are_kept(model_folders, tmp_path):
    recorder = Recorder()
    engine = make_engine(model_folders["llama"], tmp_path, callback=[Silent(), recorder])
    engine.train(5, save_every=1, save_total_limit=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    assert [name for name, _ in recorder.calls].count("on_checkpoint_saved") == 5
    with pytest.raises(ConfigError, match="save_total_limit=0"):
        engine.train(1, save_total_limit=0)


def test_without_save_every_a_checkpoint_is_written_when_the_last_is_old(model_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "SAVE_AFTER_SECONDS", 0.0)
    make_engine(model_folders["llama"], tmp_path / "a").train(3)
    assert len(list((tmp_path / "a").glob("checkpoint-*"))) == 3
    monkeypatch.setattr(saving, "SAVE_AFTER_SECONDS", 600.0)
    make_engine(model_folders["llama"], tmp_path / "b").train(3)
    assert [path.name for path in (tmp_path / "b").glob("checkpoint-*")] == ["checkpoint-3"]


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_at_the_checkpoint(path):
    if "checkpoint-3" in str(path):
        full_disk()


def full_disk_in_rust(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "where, fail",
    [
        ("konic.finetuning.system.files._sync", full_disk_at_the_checkpoint),
        ("konic.finetuning.run.checkpoint.save_file", full_disk_in_rust),
        ("konic.finetuning.run.checkpoint.seal", full_disk),
        ("peft.PeftModel.save_pretrained", full_disk),
    ],
)
def test_a_disk_that_fills_up_is_one_error_and_the_checkpoint_before_is_intact(
    model_folders, where, fail, tmp_path, monkeypatch
):
    make_engine(model_folders["llama"], tmp_path / "run").train(2)
    monkeypatch.setattr(where, fail)
    with pytest.raises(OutputError, match=r"checkpoint-3: cannot be written: .*No space left on device"):
        make_engine(model_folders["llama"], tmp_path / "run").train(5, save_every=1, resume_from_checkpoint=True)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-2"
    assert not [path for path in (tmp_path / "run").glob(".*") if path.name != ".lock"]
    make_engine(model_folders["llama"], tmp_path / "run").train(4, resume_from_checkpoint=True)
    make_engine(model_folders["llama"], tmp_path / "whole").train(4)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


class Vanishing(Silent):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def on_generation_begin(self, prompts):
        if len(metrics(self.run)) == 2:
            shutil.rmtree(self.run)


def test_a_folder_that_vanishes_is_one_error_and_the_work_is_kept(model_folders, tmp_path):
    run = tmp_path / "run"
    make_engine(model_folders["llama"], run).train(1)
    with pytest.raises(OutputError, match="completions: cannot be written"):
        make_engine(model_folders["llama"], run, callback=Vanishing(run)).train(5, resume_from_checkpoint=True)
    assert newest_checkpoint(run).name.startswith("checkpoint-")


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_run_killed_anywhere_is_resumed_to_the_same_run():
    """`make chaos` does this a hundred times."""
    script = os.path.join(os.path.dirname(__file__), "kill_test.py")
    ended = subprocess.run([sys.executable, script, "9"], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    assert "| **9** | **9** |" in ended.stdout


def test_a_resume_from_an_earlier_checkpoint_drops_the_branch_it_leaves(model_folders, tmp_path):
    make_engine(model_folders["llama"], tmp_path / "a").train(4, save_every=1)
    make_engine(model_folders["llama"], tmp_path / "a").train(3, resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")
    assert sorted(path.name for path in (tmp_path / "a").glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3)]
    assert [row["iteration"] for row in metrics(tmp_path / "a")] == [1, 2, 3]
    make_engine(model_folders["llama"], tmp_path / "b").train(1)
    with pytest.raises(OutputError, match="holds another run than"):
        make_engine(model_folders["llama"], tmp_path / "b").train(
            3, resume_from_checkpoint=tmp_path / "a" / "checkpoint-2"
        )
    with pytest.raises(OutputError, match=r"typo/x: there is no such folder\. Give another"):
        make_engine(model_folders["llama"], tmp_path / "c").train(3, resume_from_checkpoint=tmp_path / "typo" / "x")
    assert not (tmp_path / "c").exists()
    assert not (tmp_path / "typo").exists()


class Failing(Silent):
    def on_generation_begin(self, prompts):
        self.count = getattr(self, "count", 0) + 1
        if self.count == 3:
            raise RuntimeError("a callback of the user's")


def test_any_error_between_updates_leaves_a_checkpoint(model_folders, tmp_path):
    with pytest.raises(RuntimeError, match="a callback of the user's") as error:
        make_engine(model_folders["llama"], tmp_path, callback=Failing()).train(5)
    assert "checkpoint-2 is kept in" in error.value.__notes__[0]
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()
    result = make_engine(model_folders["llama"], tmp_path).train(3, resume_from_checkpoint=True)
    assert result.total_iterations == 3


@pytest.fixture
def second_update_fails(monkeypatch):
    """After its last step. Call it to let updates succeed again."""
    plain = trainer_module.update

    def fails(*arguments, **named):
        stats = plain(*arguments, **named)
        if arguments[-1].first_step:
            raise TrainingError("after its steps")
        return stats

    monkeypatch.setattr(trainer_module, "update", fails)
    return lambda: monkeypatch.setattr(trainer_module, "update", plain)


def test_an_error_in_an_update_leaves_the_best_weights_and_an_engine_that_says_why(
    model_folders, tmp_path, second_update_fails
):
    engine = make_engine(model_folders["llama"], tmp_path, lora=False)
    with pytest.raises(TrainingError, match="after its steps"):
        engine.train(5)
    assert "for 1 iterations" in (tmp_path / "best" / "README.md").read_text()
    assert not list(tmp_path.glob("checkpoint-*"))
    for call in (engine.evaluate, lambda: engine.train(5), lambda: engine.save_pretrained(tmp_path / "saved")):
        with pytest.raises(TrainingError, match="Create a new engine"):
            call()
    assert not (tmp_path / "saved").exists()


def test_an_error_in_an_update_of_an_adapter_undoes_the_update(model_folders, tmp_path, second_update_fails):
    engine = make_engine(model_folders["llama"], tmp_path / "failed")
    with pytest.raises(TrainingError, match="after its steps"):
        engine.train(5)
    second_update_fails()
    undisturbed = make_engine(model_folders["llama"], tmp_path / "undisturbed")
    undisturbed.train(1)
    same_tensors(weights(tmp_path / "failed" / "checkpoint-1"), weights(tmp_path / "undisturbed" / "checkpoint-1"))
    assert engine.evaluate() == undisturbed.evaluate()
    engine.train(3)
    undisturbed.train(3)
    same_tensors(weights(tmp_path / "failed" / "final"), weights(tmp_path / "undisturbed" / "final"))
    assert metrics(tmp_path / "failed") == metrics(tmp_path / "undisturbed")


def test_a_start_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        make_engine("./nope", tmp_path / "run").train(1)
    assert not (tmp_path / "run").exists()


class Meddling(Silent):
    def on_reward_computed(self, rewards, reward_breakdown):
        rewards[:] = [5.0] * len(rewards)


def test_hooks_cannot_change_what_is_trained(model_folders, tmp_path):
    assert make_engine(model_folders["llama"], tmp_path, callback=Meddling()).train(1).final_reward_mean < 5


def test_a_missing_column_is_said_before_the_model_is_loaded(tmp_path):
    engine = make_engine("./nope", tmp_path / "run", composer=AnswerRewards())
    with pytest.raises(RewardError, match="asks for the column 'answer'"):
        engine.train(1)


def test_a_time_limit_that_cut_nothing_is_not_mentioned(model_folders, tmp_path):
    assert make_engine(model_folders["llama"], tmp_path, max_minutes=1e-6).train(1).stopped_because is None


def test_a_session_without_a_source_file_works(model_folders, tmp_path):
    code = f"""
from konic.finetuning import *
class R(KonicLLMRewardComposer):
    @llm_reward
    def one(self, prompt, response): return 1.0
agent = KonicFinetuningAgent({model_folders["llama"]!r}, R(), LoraConfig(r=2), DatasetConfig(prompts=["a", "b"]),
    TrainingConfig(batch_size=2), GenerationConfig(max_new_tokens=3, max_prompt_length=8))
KonicFinetuningEngine.from_agent(agent, checkpoint_dir={str(tmp_path / "run")!r}).train(1)
"""
    code += """
import sys
print("loaded:", *sys.modules)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["rewards"]["file"] is None
    loaded = set(child.stdout.rpartition("loaded:")[2].split())
    assert "konic.finetuning.system.world" in loaded
    of_several = ("konic.finetuning.cluster", "konic.finetuning.system.group", "konic.finetuning.models.fsdp", "ray")
    assert not {name for name in loaded if name.startswith(of_several)}, "one process loads nothing for several"


@pytest.mark.parametrize("lora", [True, False])
def test_a_second_ctrl_c_in_an_update_loses_that_update_alone(lora, model_folders, tmp_path, monkeypatch):
    """Where every weight is trained, also what came after the last checkpoint, and the interruption stays one."""
    plain = trainer_module.update

    def interrupted(*arguments, **named):
        stats = plain(*arguments, **named)
        if arguments[-1].first_step:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return stats

    monkeypatch.setattr(trainer_module, "update", interrupted)
    save_every = 0 if lora else 1
    with nullcontext() if lora else pytest.raises(KeyboardInterrupt):
        make_engine(model_folders["llama"], tmp_path / "run", lora=lora).train(3, save_every=save_every)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "checkpoint-1" in names and "checkpoint-2" not in names
    assert ("final" in names) == lora
    monkeypatch.undo()
    make_engine(model_folders["llama"], tmp_path / "run", lora=lora).train(3, resume_from_checkpoint=True)
    make_engine(model_folders["llama"], tmp_path / "whole", lora=lora).train(3)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    same_tensors(weights(tmp_path / "run" / "final"), weights(tmp_path / "whole" / "final"))


def test_weights_that_are_not_numbers_are_not_saved_and_the_checkpoint_before_stays(model_folders, tmp_path):
    class Spoils(Silent):
        def on_iteration_end(self, result):
            if result.iteration == 2:
                with torch.no_grad():
                    next(iter(engine._session.learner.policy.trainable().values())).fill_(math.nan)

    engine = make_engine(model_folders["llama"], tmp_path, callback=Spoils())
    with pytest.raises(NotFiniteError, match="holds NaN or infinity after iteration 2: no checkpoint"):
        engine.train(3, save_every=1, save_total_limit=1)
    assert newest_checkpoint(tmp_path).name == "checkpoint-1"
    assert not (tmp_path / "checkpoint-2").exists()


def test_a_broken_checkpoint_is_put_aside_not_deleted(model_folders, tmp_path, caplog):
    make_engine(model_folders["llama"], tmp_path).train(3, save_every=1)
    (tmp_path / "checkpoint-3" / "value_head.safetensors").write_bytes(b"torn")
    (tmp_path / "checkpoint-2" / "README.md").write_text("a person's own notes")
    make_engine(model_folders["llama"], tmp_path).train(3, resume_from_checkpoint=True)
    assert "checkpoint-3 is skipped: value_head.safetensors has changed since it was written" in caplog.text
    assert (tmp_path / "broken-checkpoint-3" / "value_head.safetensors").read_bytes() == b"torn"
    assert newest_checkpoint(tmp_path).name == "checkpoint-3"


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(model_folders, tmp_path, caplog):
    make_engine(model_folders["llama"], tmp_path / "run").train(2)
    make_engine(model_folders["llama"], tmp_path / "whole").train(3)
    for name in ("checkpoint-2", "final", "best"):
        shutil.rmtree(tmp_path / "run" / name)
    make_engine(model_folders["llama"], tmp_path / "run").train(3, resume_from_checkpoint=True)
    assert len(metrics(tmp_path / "run" / "earlier-1")) == 2
    assert "It starts from the beginning" in caplog.text
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    with pytest.raises(OutputError, match="there is no whole checkpoint"):
        make_engine(model_folders["llama"], tmp_path / "nothing").train(3, resume_from_checkpoint=True)
    assert not (tmp_path / "nothing").exists()


def test_files_of_the_user_stay_in_the_folders_of_the_models(model_folders, tmp_path):
    run = tmp_path / "run"
    make_engine(model_folders["llama"], run).train(1, save_every=1)
    (run / "best" / "merged").mkdir()
    theirs = [run / "best" / "merged" / "model.gguf", run / "final" / "eval.json"]
    for file in theirs:
        file.write_text("theirs")
    engine = make_engine(model_folders["llama"], run)
    engine.train(3, resume_from_checkpoint=True, save_every=1)
    engine.train(1)
    assert [file.read_text() for file in theirs] == ["theirs", "theirs"]
    assert (run / "final" / "adapter_model.safetensors").read_bytes() == (
        run / "checkpoint-4" / "adapter_model.safetensors"
    ).read_bytes()
    for inside in ("final", "final/x/y", "checkpoint-2", "best/merged", "completions/x"):
        with pytest.raises(
            OutputError, match=f"is in {inside.split('/')[0]} of the run {run}, which that run replaces"
        ):
            make_engine(model_folders["llama"], run / inside).train(1)
    assert not (run / "final" / "metrics.jsonl").exists()
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(OutputError, match="is in final of the run"):
        make_engine(model_folders["llama"], tmp_path / "link" / "final").train(5, resume_from_checkpoint=True)
    shutil.rmtree(run / "final")
    (run / "final").write_text("a file")
    with pytest.raises(OutputError, match=r"run/final: is not a folder, and the run writes its model there\. Move it"):
        make_engine(model_folders["llama"], run).train(5, resume_from_checkpoint=True)


def test_what_is_no_checkpoint_leads_to_one(model_folders, tmp_path):
    run = tmp_path / "run"
    make_engine(model_folders["llama"], run).train(2, save_every=1)

    def complaint(resume, checkpoint_dir=run):
        with pytest.raises(OutputError) as error:
            make_engine(model_folders["llama"], checkpoint_dir).train(3, resume_from_checkpoint=resume)
        return str(error.value)

    newest = f"Name a checkpoint, such as {run / 'checkpoint-2'}; with checkpoint_dir='{run}', True takes the newest."
    assert complaint(run) == f"{run}: is not a whole checkpoint: it is the folder of a run. {newest}"
    assert complaint(run / "final").endswith(f"complete.json is missing. {newest}")
    assert complaint(run / "final", tmp_path / "other").endswith(newest)
    assert complaint(run / "metrics.jsonl").endswith(f"it is a file. {newest}")
    assert complaint(run / "checkpoint-9").endswith(f"there is no such folder. {newest}")
    assert complaint(tmp_path / "latest").endswith(f"there is no such folder. {newest}")
    for inside in ("trainer_state.json", "x/y"):
        assert complaint(run / "checkpoint-1" / inside).endswith(f"Name its folder: {run / 'checkpoint-1'}.")


@pytest.mark.parametrize(
    ("method", "argument", "message"),
    [
        ("train", "iterations", "train has no argument 'iterations'. Did you mean 'max_iterations'? It has: max_iter"),
        ("train", "resume", "It has: max_iterations, save_every, resume_from_checkpoint, save_total_limit, allow_ch"),
        ("evaluate", "prompt", "evaluate has no argument 'prompt'. Did you mean 'prompts'?"),
        ("generate", "max_new_tokens", "generate has no argument 'max_new_tokens'. It has: prompts"),
        ("save_pretrained", "merged", "save_pretrained has no argument 'merged'. Did you mean 'merge'?"),
    ],
)
def test_an_unknown_argument_is_refused_with_the_known_ones(method, argument, message, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(message)):
        getattr(make_engine("./nowhere", tmp_path), method)(**{argument: 3})


@pytest.mark.parametrize(
    ("make", "argument", "message"),
    [
        (
            KonicFinetuningCallback,
            "verbos",
            "KonicFinetuningCallback has no argument 'verbos'. Did you mean 'verbose'?",
        ),
        (LetterRewards, "reward_weight", "has no argument 'reward_weight'. Did you mean 'reward_weights'?"),
        (RemoteRewardModel, "nmae", "RemoteRewardModel has no argument 'nmae'. Did you mean 'name'?"),
        (TensorBoardCallback, "sample_every", "TensorBoardCallback has no argument 'sample_every'. Did you mean 'samp"),
    ],
)
def test_an_unknown_argument_of_a_class_is_refused_likewise(make, argument, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make(**{argument: 3})
    assert "self" in inspect.signature(make.__init__).parameters, "help() still shows what there is"


def test_models_of_iterations_that_are_dropped_go_with_them(model_folders, tmp_path):
    make_engine(model_folders["llama"], tmp_path).train(3, save_every=1)

    class Fails(Silent):
        def on_iteration_begin(self, iteration):
            assert not (tmp_path / "final").exists()
            raise ValueError("stop")

    engine = make_engine(model_folders["llama"], tmp_path, callback=Fails())
    with pytest.raises(ValueError, match="stop"):
        engine.train(4, resume_from_checkpoint=tmp_path / "checkpoint-2")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"dataset": DatasetConfig(prompts=[*PROMPTS[:-1], "another"], held_out=2)},
            "rows of the dataset are not the same",
        ),
        ({"composer": LetterRewards(reward_weights={"brief": 2.0})}, "reward_weights was"),
        ({"composer": LetterRewards(reducer=MeanReducer)}, "reducer was"),
    ],
)
def test_what_a_resume_would_score_or_ask_otherwise_is_named(model_folders, changes, told, tmp_path):
    make_engine(model_folders["llama"], tmp_path).train(1)
    with pytest.raises(OutputError, match=told):
        make_engine(model_folders["llama"], tmp_path, **changes).train(2, resume_from_checkpoint=True)


class Heavier(Silent):
    """Raises the weight of a reward after every iteration."""

    def __init__(self, composer):
        super().__init__()
        self.composer = composer

    def on_iteration_end(self, result):
        self.composer.set_reward_weight("brief", 1 + result.iteration)


def test_a_run_whose_callback_changes_weights_is_resumed_with_those_of_the_checkpoint(model_folders, tmp_path):
    def engine(run, weights=None):
        composer = LetterRewards(reward_weights=weights)
        return make_engine(model_folders["llama"], tmp_path / run, composer=composer, callback=Heavier(composer))

    whole = engine("whole")
    whole.train(4)
    engine("run").train(2)
    again = engine("run")
    again.train(4, resume_from_checkpoint=True)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    again.train(5, resume_from_checkpoint=True)  # in the engine that still has the weights of the end
    assert again.reward_composer.settings()["reward_weights"] == {"brief": 6}
    again.train(4, resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["reward_weights"] == {}

    again.reward_composer.set_reward_weight("brief", 0.5)
    with pytest.raises(OutputError, match=r"reward_weights was \{\} and is \{'brief': 0.5\}"):
        again.train(5, resume_from_checkpoint=True)
    with pytest.raises(OutputError, match=r"reward_weights was \{\} and is \{'brief': 2.0\}"):
        engine("run", {"brief": 2}).train(5, resume_from_checkpoint=True)
    engine("run", {"brief": 7}).train(5, resume_from_checkpoint=True, allow_changes=True)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["reward_weights"] == {"brief": 7.0}
    other = completions(tmp_path / "run")[4][0]
    assert other["reward"] == pytest.approx(other["reward/brief"] * 7 + other["reward/letters"])


def test_a_resume_of_a_run_that_is_done_says_so_and_keeps_it(model_folders, tmp_path, caplog):
    make_engine(model_folders["llama"], tmp_path).train(2)
    result = make_engine(model_folders["llama"], tmp_path).train(2, resume_from_checkpoint=True)
    assert "Nothing is left to train: 2 iterations are done, and max_iterations=2 is their total." in caplog.text
    assert result.total_iterations == len(metrics(tmp_path)) == 2


def rates_of(folder):
    return [row["learning_rate"] for row in metrics(folder)]


@pytest.mark.parametrize("resumed", [False, True])
def test_after_the_end_of_a_falling_rate_a_new_fall_begins_and_is_said(model_folders, tmp_path, caplog, resumed):
    settings = {"lr_scheduler": "linear", "ppo_epochs": 1, "learning_rate": 0.01}
    engine = make_engine(model_folders["llama"], tmp_path, **settings)
    engine.train(2)
    assert "learning rate" not in caplog.text
    if resumed:
        make_engine(model_folders["llama"], tmp_path, **settings).train(6, resume_from_checkpoint=True)
    else:
        engine.train(4)
    assert "begins a new fall, over iterations 3 to 6" in caplog.text
    assert rates_of(tmp_path) == pytest.approx([0.01, 0.005, 0.01, 0.0075, 0.005, 0.0025])


def test_a_fall_that_was_not_at_its_end_goes_on_to_the_new_end_and_says_so(model_folders, tmp_path, caplog):
    settings = {"lr_scheduler": "linear", "ppo_epochs": 1, "learning_rate": 0.01}
    make_engine(model_folders["llama"], tmp_path, **settings).train(4, save_every=2)
    shutil.rmtree(tmp_path / "checkpoint-4")
    make_engine(model_folders["llama"], tmp_path, **settings).train(8, resume_from_checkpoint=True)
    assert "falls until iteration 8; the training before planned it until iteration 4" in caplog.text
    assert rates_of(tmp_path) == pytest.approx([0.01, 0.0075, 0.0075, 0.00625, 0.005, 0.00375, 0.0025, 0.00125])


def test_a_resume_within_the_second_fall_gives_the_same_bits(model_folders, tmp_path, caplog):
    settings = {"lr_scheduler": "cosine", "warmup_steps": 2}
    for folder in ("whole", "resumed"):
        engine = make_engine(model_folders["llama"], tmp_path / folder, **settings)
        engine.train(2)
        engine.train(4, save_every=1)
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-6")
    caplog.clear()
    make_engine(model_folders["llama"], tmp_path / "resumed", **settings).train(6, resume_from_checkpoint=True)
    assert "learning rate" not in caplog.text
    assert rates_of(tmp_path / "resumed") == rates_of(tmp_path / "whole")
    trained = [(tmp_path / name / "final" / "adapter_model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert trained[0] == trained[1]


def test_where_the_rate_falls_with_the_steps_done_a_lengthened_run_is_the_long_one(model_folders, tmp_path, caplog):
    settings = {"lr_scheduler": "inverse_sqrt", "ppo_epochs": 2, "learning_rate": 0.01}
    make_engine(model_folders["llama"], tmp_path / "whole", **settings).train(3)
    make_engine(model_folders["llama"], tmp_path / "resumed", **settings).train(1)
    make_engine(model_folders["llama"], tmp_path / "resumed", **settings).train(3, resume_from_checkpoint=True)
    again = make_engine(model_folders["llama"], tmp_path / "again", **settings)
    again.train(2)
    again.train(1)
    assert "learning rate" not in caplog.text
    expected = [0.01 / (1 + step / TIMESCALE) ** 0.5 for step in (1, 3, 5)]  # of the last step of each iteration
    trained = set()
    for name in ("whole", "resumed", "again"):
        assert rates_of(tmp_path / name) == pytest.approx(expected)
        trained.add((tmp_path / name / "final" / "adapter_model.safetensors").read_bytes())
    assert len(trained) == 1


def test_a_changed_reward_or_base_model_is_named(model_folders, tmp_path):
    class Other(LetterRewards):
        @llm_reward
        def brief(self, prompt, response):
            return -len(response) / 40

    model = tmp_path / "model"
    shutil.copytree(model_folders["llama"], model)
    run = tmp_path / "run"
    make_engine(str(model), run, lr_scheduler="linear").train(2, save_every=1)
    with pytest.raises(OutputError, match="the code of the rewards is not the same"):
        make_engine(str(model), run, lr_scheduler="linear", composer=Other()).train(2, resume_from_checkpoint=True)
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(OutputError, match="the weights of base_model are not the same"):
        make_engine(str(model), run, lr_scheduler="linear").train(2, resume_from_checkpoint=True)


def test_early_stopping_counts_on_where_the_run_stood(model_folders, tmp_path):
    def stops():
        return KonicFinetuningCallback(verbose=False, early_stop_kl_threshold=0.0, early_stop_patience=4)

    make_engine(model_folders["llama"], tmp_path / "whole", callback=stops()).train(8)
    make_engine(model_folders["llama"], tmp_path / "run", callback=stops()).train(3)
    make_engine(model_folders["llama"], tmp_path / "run", callback=stops()).train(8, resume_from_checkpoint=True)
    assert len(metrics(tmp_path / "whole")) < 8
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_an_evaluation_that_cannot_be_read_is_made_anew(model_folders, tmp_path, caplog):
    make_engine(model_folders["llama"], tmp_path).train(1)
    (tmp_path / "evaluations" / "000000.parquet").write_bytes(b"torn")
    result = make_engine(model_folders["llama"], tmp_path).train(2, resume_from_checkpoint=True)
    assert "its prompts are evaluated again" in caplog.text
    assert result.before.prompts == result.after.prompts


def test_a_termination_that_a_reward_swallows_still_ends_the_run(model_folders, tmp_path):
    body = """
    class Swallows(LetterRewards):
        @llm_reward
        def greedy(self, prompt, response):
            try:
                if len(engine._session.state.history) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
            except:
                pass
            return 0.0
    engine = make_engine(engine.agent.get_base_model(), engine.checkpoint_dir, callback=Slow(), composer=Swallows())
    engine.train(10_000)
    """
    child = run_child(model_folders["llama"], tmp_path / "run", body)
    lines = child.communicate(timeout=120)[0].split()
    assert child.returncode == -signal.SIGTERM
    assert lines[-1] == "3"  # the iteration that it ended in, whose batch is not learned from
    assert (tmp_path / "run" / "checkpoint-2" / "complete.json").is_file()


def test_a_callback_cannot_use_a_model_that_several_processes_train(model_folders, tmp_path):
    engine = make_engine(model_folders["llama"], tmp_path)
    with engine._divided(True):
        for use in (engine.generate, engine.evaluate):
            with pytest.raises(ConfigError, match=f"{use.__name__}.. needs all processes of a training"):
                use(["x"])
        engine.save_pretrained(tmp_path / "adapter")  # this process has it whole
        engine._ray = SimpleNamespace(checkpoint=None)  # this process has none
        with pytest.raises(ConfigError, match=r"save_pretrained.. needs all .* or take the checkpoint of train\(save_"):
            engine.save_pretrained(tmp_path / "other")
        engine._ray = None
    assert len(engine.generate(["x"])) == 1
    full = make_engine(model_folders["llama"], tmp_path / "full", lora=None, sharding="fsdp")
    with full._divided(True), pytest.raises(ConfigError, match=r"save_pretrained.. needs all processes"):
        full.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


CHAT_ROWS = [{"prompt": [{"role": "user", "content": f"film {row}"}]} for row in range(6)]


def changed_template(folder):
    file = folder / "chat_template.jinja"
    file.write_text("{{ '!' }}" + file.read_text())


def swapped_tokens(folder):
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("change", [changed_template, swapped_tokens])
def test_a_run_is_not_resumed_with_another_tokenizer_or_chat_template(model_folders, change, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model_folders["llama"], base)
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    (base / "chat_template.jinja").write_text(template)
    dataset = DatasetConfig(prompts=CHAT_ROWS)
    make_engine(base, tmp_path / "run", dataset=dataset).train(1)
    change(base)
    with pytest.raises(OutputError, match="the tokenizer or the chat template of base_model is not the same"):
        make_engine(base, tmp_path / "run", dataset=dataset).train(2, resume_from_checkpoint=True)
    again = make_engine(base, tmp_path / "run", dataset=dataset)
    assert again.train(2, resume_from_checkpoint=True, allow_changes=True).total_iterations == 2


def test_a_checkpoint_that_does_not_name_its_tokenizer_is_resumed(model_folders, tmp_path, monkeypatch):
    settings = session_module.Session.settings

    def before(self, last_iteration):
        return {name: value for name, value in settings(self, last_iteration).items() if name != "tokenizer_sha256"}

    monkeypatch.setattr(session_module.Session, "settings", before)
    make_engine(model_folders["llama"], tmp_path).train(1)
    monkeypatch.undo()
    assert make_engine(model_folders["llama"], tmp_path).train(2, resume_from_checkpoint=True).total_iterations == 2


def test_prompts_that_are_cut_off_are_a_warning_wherever_they_are_read(model_folders, tmp_path, caplog):
    engine = make_engine(model_folders["llama"], tmp_path)
    for call in (engine.evaluate, engine.generate):
        caplog.clear()
        call(["short", "x" * 100])
        assert caplog.text.count("is cut off at max_prompt_length=48 tokens") == 1
        caplog.clear()
        call(["short"])
        assert "cut off" not in caplog.text


def test_held_out_prompts_that_are_cut_off_are_said_once(model_folders, tmp_path, caplog):
    dataset = DatasetConfig(prompts=[f"{row}" + "x" * 100 for row in range(8)], held_out=4)
    make_engine(model_folders["llama"], tmp_path, dataset=dataset, eval_every=1).train(3)
    assert caplog.text.count("is cut off at max_prompt_length=48 tokens") == 2  # those to learn on, and those held out


def test_an_attribute_of_the_engine_with_a_wrong_name_is_a_warning(model_folders, tmp_path, caplog):
    engine = make_engine(model_folders["llama"], tmp_path)
    engine.checkpoint_dri = tmp_path / "other"
    assert "The engine has no attribute 'checkpoint_dri'" in caplog.text
    assert "Did you mean 'checkpoint_dir'?" in caplog.text
    caplog.clear()
    engine.my_notes, engine.device, engine.callback = "fine", "cpu", None
    assert not caplog.text
    engine.learning_rate, engine.output_dir = 0.5, "x"
    assert "nothing reads it. It is TrainingConfig(learning_rate=...)." in caplog.text
    assert "It is KonicFinetuningEngine.from_agent(agent, checkpoint_dir=...)." in caplog.text


def test_a_flag_that_is_no_bool_is_refused(model_folders, tmp_path):
    engine = make_engine(model_folders["llama"], tmp_path / "run")
    with pytest.raises(ConfigError, match=r"save_pretrained\(merge='no'\): it must be True or False"):
        engine.save_pretrained(tmp_path / "model", merge="no")
    with pytest.raises(ConfigError, match=r"train\(allow_changes='false'\): it must be True or False"):
        engine.train(1, allow_changes="false")


def test_an_engine_that_has_not_loaded_the_checkpoints_of_its_folder_says_so_once(model_folders, tmp_path, caplog):
    def told(engine, *calls):
        caplog.clear()
        for call in calls:
            call(engine)
        return caplog.text.count("holds checkpoints that this engine has not loaded")

    def make(base=model_folders["llama"]):
        return make_engine(base, tmp_path / "run", eval_every=1)

    uses = (lambda e: e.evaluate(), lambda e: e.generate(["a"]), lambda e: e.save_pretrained(tmp_path / "model"))
    assert told(make(), *uses, lambda e: e.train(1), *uses) == 0
    for use in uses:
        assert told(make(), use, *uses) == 1
    assert told(make(), lambda e: e.train(2, resume_from_checkpoint=True), *uses) == 0
    assert told(make(str(tmp_path / "run" / "final")), uses[1]) == 0
    assert told(make(), lambda e: e.train(1), *uses) == 0


def test_a_value_warmup_as_long_as_the_training_is_a_warning(model_folders, tmp_path, caplog):
    engine = make_engine(model_folders["llama"], tmp_path, value_warmup_iterations=2)
    engine.train(1)
    engine.train(1)
    assert caplog.text.count("this training ends at iteration 1, so only the value head learns") == 1
    assert caplog.text.count("value head learns") == 1  # once, also where training goes on step by step


def test_an_attention_that_a_cpu_cannot_train_is_refused(model_folders, tmp_path):
    for name in ("flex_attention", {"": "flex_attention"}):
        engine = make_engine(model_folders["llama"], tmp_path, model_kwargs={"attn_implementation": name})
        with pytest.raises(ConfigError, match=r"'flex_attention' cannot train on a CPU\. Use 'sdpa'"):
            engine.train(1)


class BreaksLater(LetterRewards):
    calls = 0

    @llm_reward
    def breaks(self, prompt, response):
        self.calls += 1
        return 1.0 / (self.calls <= self.limit)


@pytest.mark.parametrize("num_good", [0, 2])
def test_the_error_that_ends_a_run_says_what_is_kept_and_how_to_go_on(model_folders, num_good, tmp_path):
    composer, dataset = BreaksLater(), DatasetConfig(prompts=PROMPTS)
    composer.limit = 8 * num_good
    with pytest.raises(RewardError) as error:
        make_engine(model_folders["llama"], tmp_path, composer=composer, dataset=dataset).train(4)
    if not num_good:
        assert not hasattr(error.value, "__notes__")
        return
    (note,) = error.value.__notes__
    assert note.startswith(f"checkpoint-2 is kept in {tmp_path}. With checkpoint_dir={str(tmp_path)!r}, ")
    for option in ("resume_from_checkpoint=True", "allow_changes=True", "on_reward_error='skip'"):
        assert option in note


def test_settings_changed_after_the_start_are_named_and_change_nothing(model_folders, tmp_path, caplog):
    engine = make_engine(model_folders["llama"], tmp_path)
    engine.train(1)
    engine.train(1)
    assert "were changed since" not in caplog.text
    engine.agent.get_training_config().learning_rate = 0.02
    engine.agent.get_generation_config().temperature = 0.5
    engine.train(1)
    assert "changed since: learning_rate was 0.01 and is 0.02; generation_config.temperature was 1.0 and is 0.5." in (
        caplog.text
    )
    engine.generate(["ab"])
    assert caplog.text.count("were changed since") == 1
    assert rates_of(tmp_path) == [0.01] * 3


def test_an_agent_of_ones_own_that_was_assigned_trains_and_has_not_changed(model_folders, tmp_path, caplog):
    agent = make_agent(model_folders["llama"])
    parts = "base_model reward_composer lora_config dataset_config training_config generation_config model_kwargs"
    engine = make_engine(model_folders["llama"], tmp_path)
    engine.agent = SimpleNamespace(**{f"get_{name}": getattr(agent, f"get_{name}") for name in parts.split()})
    assert engine.train(1).total_iterations == 1
    assert "were changed since" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"kl_horizon": 50}, "kl_horizon=50 has no effect, because kl_target is not set"),
     ({"divergence": "kl"}, "divergence='kl' has no effect, because divergence_limit is not set"),
     ({"overlong_share": 0.5}, "overlong_share=0.5 has no effect, because overlong_penalty is 0"),
     ({"resampling_budget": 9}, "resampling_budget=9 has no effect, because filter_equal_groups is not set"),
     ({"max_error_rate": 0.5}, "max_error_rate=0.5 has no effect, because on_reward_error is not 'skip'"),
     ({"algorithm": "grpo", "vf_coef": 0.5}, "vf_coef=0.5 has no effect, because algorithm='grpo' learns no values"),
     ({"algorithm": "rloo", "gamma": 0.5}, "gamma=0.5 has no effect, because algorithm='rloo' gives every token"),
     ({"algorithm": "reinforce++", "gamma": 0.5}, ""),
     ({"algorithm": "dapo", "resampling_budget": 9, "overlong_share": 0.5}, ""),
     ({"algorithm": "dppo", "divergence": "kl", "kl_target": 1.0, "kl_horizon": 50}, ""),
     ({"vf_coef": 0.5, "gae_lambda": 1.0, "on_reward_error": "skip", "max_error_rate": 0.5}, ""),
     ({"algorithm": "grpo", "vf_coef": 0.1, "kl_horizon": 100}, "")],
)  # fmt: skip
def test_a_setting_without_effect_is_a_warning(model_folders, tmp_path, caplog, settings, words):
    engine = make_engine(model_folders["llama"], tmp_path, **settings)
    engine.setup()
    engine.train(0)
    assert words in caplog.text
    assert caplog.text.count("has no effect") == bool(words)
