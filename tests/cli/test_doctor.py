"""`konic doctor`: each finding has a status and, where it is not well, what to do. Times are not tested."""

import json
import os
from types import SimpleNamespace

import pytest

from command import konic_here, script
from conftest import tiny_learner
from konic.doctor import job as doctor_job
from konic.doctor import limits as limits_of_sampling
from konic.finetuning import DatasetConfig, GenerationConfig, TrainingConfig
from konic.finetuning.data.prompts import PromptSet, make_prompts
from konic.finetuning.models.prepacked import DecodePlan
from konic.finetuning.rollout import decoding

SCRIPT = """
import random
from konic.finetuning import *

class Rewards(KonicLLMRewardComposer):
    @llm_reward
    def brief(self, prompt, response):
        return {value}

agent = KonicFinetuningAgent(
    base_model={model!r}, reward_composer=Rewards(), lora_config=LoraConfig(r=2),
    dataset_config=DatasetConfig(prompts=["a", "b", {prompt!r}, "d"], held_out={held_out}),
    training_config=TrainingConfig(batch_size=4, algorithm={algorithm!r}),
    generation_config=GenerationConfig(max_new_tokens=4, max_prompt_length=8),
)
"""
WELL = {"value": "-len(response) / 80", "prompt": "c", "held_out": 0, "algorithm": "ppo"}


def examine(tmp_path, model, *options, **changes):
    job = script(tmp_path, SCRIPT.format(model=model, **WELL | changes))
    run = konic_here("doctor", job, "--device", "cpu", "--json", *options)
    assert "Traceback" not in run.stderr
    return run, {finding["name"]: finding for finding in json.loads(run.stdout)}


OWN = """
class Own(KonicFinetuningAgent):
    def get_training_config(self):
        return TrainingConfig(batch_size=6)

agent = Own(base_model=agent.get_base_model(), reward_composer=Rewards(), dataset_config=agent.get_dataset_config(),
            generation_config=agent.get_generation_config())
"""


def test_an_agent_whose_own_getter_makes_its_settings_is_examined_with_these(model_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batch_sizes, whole_groups = [], doctor_job._whole_groups

    def noted(size, training):
        batch_sizes.append(training.batch_size)
        return whole_groups(size, training)

    monkeypatch.setattr(doctor_job, "_whole_groups", noted)
    job = script(tmp_path, SCRIPT.format(model=model_folders["llama"], **WELL) + OWN)
    run = konic_here("doctor", job, "--device", "cpu", "--json")
    found = {finding["name"]: finding for finding in json.loads(run.stdout)}
    assert run.returncode == 0, run.stdout
    assert found["time"]["status"] == found["before the first step"]["status"] == "ok"
    assert batch_sizes == [6, 6]


def test_the_machine_is_examined_without_a_job():
    run = konic_here("doctor")
    assert run.returncode == 0, run.stdout
    for name in ("Python", "packages", "device", "threads", "memory", "disk", "extras"):
        assert f"  {name}: " in run.stdout
    assert "Hub" not in run.stdout  # it is asked only where that is wanted
    asked = konic_here("doctor", "--hub")
    assert "Hub: not asked: HF_HUB_OFFLINE is set" in asked.stdout


@pytest.mark.parametrize("option", [("--set", "training_config.batch_size=4"), ("--max-iterations", 3)])
def test_options_of_a_job_need_one(option):
    run = konic_here("doctor", *option)
    assert run.returncode == 2 and "are about a job: name one" in run.stderr


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_job_that_is_well_is_tried_and_estimated(algorithm, model_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, found = examine(tmp_path, model_folders["llama"], algorithm=algorithm, held_out=1)
    assert run.returncode == 0, run.stdout
    for name in ("model", "prompts", "rollout", "reward brief", "before the first step", "time", "peak memory"):
        assert found[name]["status"] == "ok" or name == "peak memory", found[name]
    assert found["prompts"]["numbers"] == {"count": 4, "examined": 4, "cut": 0, "longest": 2}
    assert found["before the first step"]["numbers"]["kl"] < 1e-6
    numbers = found["time"]["numbers"]
    assert numbers["seconds"] > 100 * numbers["iteration_seconds"] > 0
    limits = found["what limits"]["numbers"]
    assert 0 < limits["share"] <= 1
    assert limits["sampling"] == (
        "bandwidth" if limits["reading_seconds"] > limits["multiplying_seconds"] else "multiplications"
    )
    assert limits["head_share"] == pytest.approx(259 * 32 / (259 * 32 + 2 * (3072 + 6144 + 64) + 32 + 2 * 224))
    assert found["peak memory"]["numbers"]["peak_bytes"] > 100e6
    assert set(os.listdir(tmp_path)) <= {"job.py", "__pycache__"}


@pytest.mark.parametrize("others", [0, 9])
def test_the_prompts_of_a_stream_are_read_to_be_examined(others):
    first, *rest = make_prompts(["ab"] * (1 + others), DatasetConfig(), "stream")
    session = session_of(tiny_learner())
    session.prompts = PromptSet(rows=[first], held_out=[], shuffle=True, shuffle_seed=3, stream=iter(rest))
    found, count = doctor_job._prompts(session), 1 + others
    assert found.what == f"a stream; the first {count}, of 3 tokens (median), 3 at most"
    assert found.numbers["count"] == found.numbers["examined"] == count


def test_what_is_not_well_has_a_fix(model_folders, tmp_path):
    run, found = examine(tmp_path, model_folders["llama"], value="random.random()", prompt="a long prompt" * 3)
    assert run.returncode == 0
    assert found["reward brief"]["status"] == found["prompts"]["status"] == "warn"
    assert "learns partly from noise" in found["reward brief"]["fix"]
    assert found["prompts"]["numbers"]["cut"] == 1
    assert "generation_config.max_prompt_length (8)" in found["prompts"]["fix"]
    run, found = examine(tmp_path, model_folders["llama"], value="1 / 0")
    assert run.returncode == 1
    assert found["reward brief"]["status"] == "fail"
    assert "ZeroDivisionError" in found["reward brief"]["what"]
    value = "None\n\n    @llm_reward\n    def other(self, prompt, response):\n        return len(response)"
    _, found = examine(tmp_path, model_folders["llama"], value=value)
    assert (found["reward brief"]["status"], found["reward brief"]["fix"]) == ("warn", "Is a `return` missing?")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--set", "training_config.batch_sise=4"], "--set training_config has no field 'batch_sise'"),
        (["--set", "generation_config.max_new_tokens=400"], "is over the 128 positions"),
    ],
)
def test_a_job_that_cannot_run_is_a_finding(options, told, model_folders, tmp_path):
    run, found = examine(tmp_path, model_folders["llama"], *options)
    assert (run.returncode, found["job"]["status"]) == (1, "fail")
    assert told in found["job"]["what"]


def test_a_job_for_a_cluster_is_examined_without_one(model_folders, tmp_path):
    cluster = ["training_config.reward_workers=1", 'training_config.reward_resources={"CPU": 1}']
    run, found = examine(tmp_path, model_folders["llama"], *(part for each in cluster for part in ("--set", each)))
    assert run.returncode == 0, run.stdout
    assert "job" not in found  # which is there where it fails


def session_of(learner):
    return SimpleNamespace(learner=learner, training=TrainingConfig(), generation=GenerationConfig())


@pytest.mark.parametrize(("threads", "said"), [(1, "onednn products, 1 thread"), (2, "onednn products, 2 threads")])
def test_the_layout_is_named_with_its_threads(monkeypatch, threads, said):
    monkeypatch.setattr(limits_of_sampling, "is_worth_packing", lambda *_: True)
    learner = tiny_learner()
    learner.policy.decode_plan = DecodePlan("onednn", threads)
    found = limits_of_sampling.decoding(session_of(learner))
    assert (found.what, found.numbers["way"]) == (said, "fused")


@pytest.mark.parametrize(
    ("is_known", "is_graphable", "way", "said"),
    [
        (True, False, "fused", "joined products"),
        (False, True, "replayed", "its own forward pass, each step replayed"),
        (False, False, "plain", "cannot be replayed"),
    ],
)
def test_how_steps_are_decoded_on_a_gpu_is_named(is_known, is_graphable, way, said, monkeypatch):
    monkeypatch.setattr(decoding, "can_be_fused", lambda _: is_known)
    learner = tiny_learner()
    model = learner.policy.language_model
    model.is_graphable = is_graphable
    monkeypatch.setattr(type(model.causal_lm), "device", SimpleNamespace(type="cuda"))
    found = limits_of_sampling.decoding(session_of(learner))
    assert found.numbers == {"way": way}
    assert said in found.what


def test_a_server_that_samples_is_not_described():
    session = session_of(tiny_learner())
    session.generation = GenerationConfig(engine="vllm", vllm_address="http://127.0.0.1:1")
    assert limits_of_sampling.decoding(session) is None
    assert limits_of_sampling.token_costs(session) is None
