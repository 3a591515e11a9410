"""vLLM as a sampler, against a small server that speaks its API: what is asked, what is refused, how a run goes on."""

import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import peft
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import LORA_TARGETS, files_with, shake_adapter, tiny_learner
from konic.finetuning import (
    ConfigError,
    GenerationConfig,
    KonicError,
    KonicLLMRewardComposer,
    OutputError,
    SamplerError,
)
from konic.finetuning.rollout import vllm_guard
from konic.finetuning.rollout.sampler import RandomKey
from konic.finetuning.rollout.vllm_client import RequestRefusedError
from konic.finetuning.rollout.vllm_sampler import _is_log_prob, request_seed
from konic.finetuning.rollout.vllm_server import require_vllm
from konic.finetuning.rollout.vllm_weights import save_untied
from konic.finetuning.run import session
from konic.finetuning.run.served import TOKENS_TO_JUDGE, ServedCheck, _any_is_other, is_other, share_of_other
from konic.finetuning.system.group import ProcessLostError
from loopback_vllm import FAULTS, KEY, LoopbackVllm
from test_engine import completions, make_engine, metrics

SCRIPT = Path(__file__).parent.parent / "loopback_vllm.py"
GUARD = vllm_guard.__file__


@pytest.fixture
def server(model_folders, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with LoopbackVllm(model_folders["llama"]) as running:
        yield running


def served(server, folder, run, generation=None, **options):
    settings = {"engine": "vllm", "vllm_address": server.address, "vllm_timeout_seconds": 30} | (generation or {})
    return make_engine(folder, run, generation=settings, **options)


@pytest.mark.parametrize(("algorithm", "lora"), [("ppo", True), ("grpo", True), ("grpo", False)])
def test_a_run_samples_on_the_server_with_the_weights_of_each_iteration(
    server, model_folders, tmp_path, algorithm, lora
):
    history = served(server, model_folders["llama"], tmp_path, algorithm=algorithm, lora=lora).train(3).history
    assert all(result.sampler_gap < 1e-5 and result.effective_sample_size > 0.999 for result in history)
    assert history[0].kl_divergence < 1e-7 < history[2].kl_divergence
    assert [result.num_steps for result in history] == [2, 2, 2]
    assert len(server.requests) == 24
    names = list(dict.fromkeys(request["model"] for request in server.requests))
    loads = [path for path in server.log if "load" in path or "rpc" in path or "reset" in path]
    if lora:
        assert [name.rpartition("-")[2] for name in names] == ["1", "2", "3"]
        load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
        assert loads == [load, load, unload, load, unload, unload]
    else:
        assert names == ["base"]
        assert loads == ["/collective_rpc", "/reset_prefix_cache"] * 3
    assert not server.adapters
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["settings"]["generation_config"]["engine"] == "vllm"
    assert not files_with(KEY, tmp_path)


def test_each_request_names_every_setting_and_has_a_seed_of_its_own(server, model_folders, tmp_path):
    generation = {"temperature": 0.7, "stop": ("q",), "eos_token_id": (0, 5), "skip_special_tokens": True}
    served(server, model_folders["llama"], tmp_path / "a", generation, algorithm="grpo").train(2)
    first = server.requests.copy()
    request = first[0]
    assert {name: request[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")} == {
        "temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
    }  # fmt: skip
    assert request["stop"] == ["q"] and request["stop_token_ids"] == [0, 5] and request["ignore_eos"]
    assert request["skip_special_tokens"] and "min_tokens" not in request
    assert len({request["seed"] for request in first}) == 16
    served(server, model_folders["llama"], tmp_path / "b", generation, algorithm="grpo").train(2)

    def told(requests):  # their order is that of the threads
        return {request.pop("seed"): request | {"model": None} for request in requests}

    assert told(server.requests[16:]) == told(first)


def test_the_seed_of_a_request_depends_on_the_whole_key():
    seeds = {
        request_seed(RandomKey(seed, iteration), row, sample)
        for seed in (0, 1) for iteration in (1, 2) for row in (0, 1) for sample in (0, 1)
    }  # fmt: skip
    assert len(seeds) == 16 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_response_ends_where_konic_says_that_it_does(server, model_folders, tmp_path):
    """The same responses come from a server that looks for stop strings, and from one that does not."""
    generation, found = {"stop": ("e", "a"), "max_new_tokens": 8}, []
    for name in (None, "ignores stop"):
        server.fault_name = name
        engine = served(server, model_folders["llama"], tmp_path / str(name), generation, batch_size=16)
        result = engine.train(1).history[0]
        responses = [row["response"] for part in completions(tmp_path / str(name)) for row in part]
        assert not any(string in response for response in responses for string in generation["stop"])
        found.append((responses, result.ended_fraction, result.response_length_mean, result.total_loss))
    assert found[0] == found[1]
    assert 0 < found[0][1] < 1


@pytest.mark.parametrize("fault", FAULTS)
def test_each_misbehaviour_is_one_clear_error_before_an_update(server, model_folders, tmp_path, fault):
    """Those of the weights show from the third iteration on, when an adapter has moved twice."""
    of_weights = fault in ("no adapter", "stale adapter")
    generation = {"vllm_timeout_seconds": 2} if fault == "late" else {}
    generation |= {"temperature": 0.5} if fault == "raw log-probs" else {}
    engine = served(server, model_folders["llama"], tmp_path, generation, learning_rate=3e-2)
    engine.setup()
    server.fault_name, server.fault_from = fault, 16 if of_weights else 0
    start = time.monotonic()
    with pytest.raises(SamplerError, match=f"(?s){FAULTS[fault]}") as caught:
        engine.train(3)
    assert time.monotonic() - start < 20
    assert KEY not in "".join(map(str, (caught.value, caught.value.__cause__)))
    assert engine._session.state.iteration == (2 if of_weights else 0)
    assert engine._session.weights_are_whole
    assert not files_with(KEY, tmp_path)


def test_a_server_that_dies_loses_nothing_and_another_one_goes_on(server, model_folders, tmp_path):
    whole = served(server, model_folders["llama"], tmp_path / "whole").train(4)
    server.requests.clear()
    server.fault_name, server.fault_from = "broken", 19
    engine = served(server, model_folders["llama"], tmp_path / "parts")
    with pytest.raises(SamplerError, match="status 500"):
        engine.train(4)
    assert (tmp_path / "parts" / "checkpoint-2").is_dir()
    with LoopbackVllm(model_folders["llama"]) as other:
        resumed = served(other, model_folders["llama"], tmp_path / "parts").train(4, resume_from_checkpoint=True)
        assert len(other.requests) == 16
    assert resumed.get_reward_curve() == whole.get_reward_curve()
    assert [row["total_loss"] for row in metrics(tmp_path / "parts")] == pytest.approx(
        [row["total_loss"] for row in metrics(tmp_path / "whole")], abs=1e-6
    )
    with pytest.raises(OutputError, match="generation_config"):  # another engine draws other responses
        make_engine(model_folders["llama"], tmp_path / "parts").train(5, resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"vllm_address": "http://127.0.0.1:9"}, "cannot be reached"),
        ({"vllm_address": "127.0.0.1:8000"}, "must be http://HOST:PORT"),
        ({"vllm_address": "http://me:pw@127.0.0.1:8000"}, "A key is not written there"),
        ({"vllm_address": "ftp://127.0.0.1"}, "must be http://HOST:PORT"),
        ({"vllm_address": "http://127.0.0.1:99999"}, "must be http://HOST:PORT"),
        ({"vllm_address": "unix:/no/such/socket"}, "cannot be reached"),
        ({"max_new_tokens": 9}, "takes 56 tokens, and max_prompt_length=48"),
    ],
)
def test_what_is_wrong_with_an_address_is_said_before_the_model_is_loaded(
    server, model_folders, tmp_path, options, told
):
    engine = served(server, model_folders["llama"], tmp_path, options)
    with pytest.raises(KonicError, match=told) as caught:
        engine.train(1)
    assert "pw" not in str(caught.value)
    assert engine._session._learner is None


def test_a_wrong_key_is_refused_by_name_and_never_shown(server, model_folders, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "an0ther-key-entirely")
    with pytest.raises(SamplerError, match="refuses the key: set the variable VLLM_API_KEY") as caught:
        served(server, model_folders["llama"], tmp_path).train(1)
    assert "an0ther" not in str(caught.value)
    monkeypatch.setenv("VLLM_API_KEY", "an0ther\u2028key")
    with pytest.raises(ConfigError, match="VLLM_API_KEY holds characters that no key has") as caught:
        served(server, model_folders["llama"], tmp_path).train(1)
    assert "an0ther" not in str(caught.value)
    monkeypatch.setenv("VLLM_API_KEY", f"{KEY}\n")
    served(server, model_folders["llama"], tmp_path).train(1)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]},
        {"init_lora_weights": "pissa"}, {"rank_pattern": {"q_proj": 1}}, {"alpha_pattern": {"v_proj": 2}},
    ],
    ids=str,
)  # fmt: skip
def test_an_adapter_that_vllm_cannot_serve_is_merged(server, model_folders, tmp_path, options):
    engine = served(server, model_folders["llama"], tmp_path)
    adapter = peft.LoraConfig(r=4, target_modules=list(LORA_TARGETS["llama"]), **options)
    engine.lora_config = adapter
    history = engine.train(2).history
    assert all(result.sampler_gap < 1e-5 for result in history)
    assert server.log.count("/collective_rpc") == 2
    assert "/v1/load_lora_adapter" not in server.log


def test_a_server_that_was_started_again_between_two_iterations_is_no_error(server, model_folders, tmp_path):
    load = server.load

    def forget_first(name, path):
        server.adapters.clear()
        load(name, path)

    server.load = forget_first
    assert served(server, model_folders["llama"], tmp_path).train(3).total_iterations == 3


def test_an_adapter_that_is_loaded_but_not_listed_does_not_stay_on_the_server(server, model_folders, tmp_path):
    server.fault_name = "not listed"
    with pytest.raises(SamplerError, match="does not list it"):
        served(server, model_folders["llama"], tmp_path).train(1)
    assert not server.adapters


def other_weights(server, by):
    torch.manual_seed(7)
    for weight in server.base.parameters():
        weight.data += by * torch.randn_like(weight)


def test_a_server_with_other_numbers_than_fp32s_is_one_warning_and_an_error_if_it_is_our_own(
    server, model_folders, tmp_path, caplog, monkeypatch
):
    other_weights(server, 0.002)
    history = served(server, model_folders["llama"], tmp_path / "given").train(3).history
    assert all(1e-3 < result.sampler_gap < 0.1 for result in history)
    assert caplog.text.count("nats per token on average from the trainer's in fp32") == 1
    monkeypatch.setattr(session, "ServedCheck", lambda policy, sampler, is_own: ServedCheck(policy, sampler, True))
    engine = served(server, model_folders["llama"], tmp_path / "own")
    with pytest.raises(SamplerError, match=r"rounding explains at most 0\.001\. Nothing was updated"):
        engine.train(1)
    assert engine._session.state.iteration == 0


def test_the_gap_is_measured_where_nothing_is_learned_too(server, model_folders, tmp_path):
    other_weights(server, 0.002)
    composer = KonicLLMRewardComposer().add_reward_function(lambda prompt, response: 1.0, name="same")
    engine = served(server, model_folders["llama"], tmp_path, algorithm="grpo", composer=composer)
    result = engine.train(1).history[0]
    assert result.num_steps == 0 and result.sampler_gap > 1e-3


def test_a_server_without_the_adapter_that_training_goes_on_from_is_reported(server, model_folders, tmp_path):
    make_engine(model_folders["llama"], tmp_path / "before", learning_rate=3e-2).train(3)
    engine = served(server, tmp_path / "before" / "final", tmp_path / "after", learning_rate=1e-4)
    server.fault_name = "no adapter"
    with pytest.raises(SamplerError, match="has sampled from the base model without its adapter"):
        engine.train(1)


def test_one_response_of_other_weights_is_enough_if_it_is_long():
    generator = np.random.default_rng(0)
    current = generator.normal(-2, 1, (4, 50))
    other = current + generator.normal(0, 0.05, current.shape)
    sampled = current + generator.normal(0, 0.001, current.shape)
    sampled[2] = other[2]
    tensors = [torch.from_numpy(part) for part in (sampled, current, other)]
    assert not is_other(*tensors, torch.ones(4, 50, dtype=torch.bool))
    assert _any_is_other(*tensors, torch.ones(4, 50, dtype=torch.bool))
    assert not _any_is_other(*tensors, torch.arange(50).expand(4, 50) < TOKENS_TO_JUDGE - 1)
    tensors[0] = tensors[1] + 1e-3
    assert not _any_is_other(*tensors, torch.ones(4, 50, dtype=torch.bool))


def test_the_share_of_another_policy_in_the_log_probs_of_a_sampler():
    generator = np.random.default_rng(0)
    current = generator.normal(-2, 1, (4, 50))
    other = current + generator.normal(0, 0.05, current.shape)
    noise = generator.normal(0, 0.02, current.shape)
    mask = generator.random(current.shape) < 0.8
    for truth in (current, other, 0.3 * other + 0.7 * current):
        sampled = truth + noise
        x, y = (other - current)[mask], (sampled - current)[mask]
        share = float(np.linalg.lstsq(x[:, None], y, rcond=None)[0][0])
        error = math.sqrt(((y - share * x) ** 2).sum() / (len(x) - 1) / (x**2).sum())
        tensors = [torch.from_numpy(part) for part in (sampled, current, other, mask)]
        assert share_of_other(*tensors) == pytest.approx((share, error), rel=1e-9)
        assert is_other(*tensors) == (truth is other)
    near = current + (other - current) / 100  # what cannot be told apart is not accused
    for sampled in (near + noise, current + noise, other):
        assert not is_other(*(torch.from_numpy(part) for part in (sampled, current, near, mask)))
    tensors = [torch.from_numpy(part) for part in (other, current, current, mask)]
    assert share_of_other(*tensors) == (0.0, math.inf)


@pytest.fixture
def python(tmp_path, monkeypatch):
    """A file that stands for the Python of an environment with vLLM."""
    path = tmp_path / "bin" / "python"
    path.parent.mkdir()
    source = os.pathsep.join(sys.path)
    path.write_text(
        '#!/bin/sh\ncase "$*" in\n-c*) exit 0;;\n'  # konic asks whether vLLM is there
        "*--fail*) echo ValueError: gpt2 does not support LoRA yet; exit 1;;\nesac\n"
        f"PYTHONPATH='{source}' exec {sys.executable} -W ignore {SCRIPT} \"$@\"\n"
    )
    path.chmod(0o755)
    monkeypatch.setenv("LOOPBACK_PID", str(tmp_path / "pid"))
    return str(path)


def own_server(python, folder, run, *arguments, seconds=60.0):
    settings = {"engine": "vllm", "vllm_python": python, "vllm_arguments": arguments, "vllm_timeout_seconds": seconds}
    return make_engine(folder, run, generation=settings)


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def read_pid(folder):
    pid, _, arguments = (folder / "pid").read_text().partition(" ")
    return int(pid), arguments


def test_a_server_of_our_own_is_private_and_ends_with_the_run(python, model_folders, tmp_path):
    history = own_server(python, model_folders["llama"], tmp_path / "run", "--seed=1").train(2).history
    assert all(result.sampler_gap < 1e-5 for result in history)
    pid, arguments = read_pid(tmp_path)
    assert is_gone(pid)
    for wanted in (
        f"--model {model_folders['llama']} --dtype float32 --max-model-len 56 --enable-lora", "--max-lora-rank 8",
        "--seed=1 --uds ", "--logprobs-mode processed_logprobs",
    ):  # fmt: skip
        assert wanted in arguments
    assert "key" not in arguments and "trust" not in arguments and "--port" not in arguments
    socket = re.search(r"--uds (\S+)", arguments)[1]
    assert not Path(socket).parent.exists()


@pytest.mark.parametrize(("argument", "told"), [("--fail", "ValueError: gpt2 does not support"), ("--die", "code 3")])
def test_a_server_of_our_own_that_ends_says_why(python, model_folders, tmp_path, argument, told):
    with pytest.raises(SamplerError, match=f"(?s)has ended.*{told}"):
        own_server(python, model_folders["llama"], tmp_path / "run", argument).train(1)
    assert argument == "--fail" or is_gone(read_pid(tmp_path)[0])


def test_a_server_of_our_own_that_does_not_start_in_time_is_ended(python, model_folders, tmp_path):
    with pytest.raises(SamplerError, match=r"did not start within 0\.5 s"):
        own_server(python, model_folders["llama"], tmp_path / "run", seconds=0.5).train(1)
    assert not [child for child in psutil.Process().children(recursive=True) if "vllm" in str(child.cmdline())]


SLEEPER = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep({})"


@pytest.mark.parametrize("seconds", [60, 0.1])
def test_what_a_server_has_started_ends_with_the_run_or_with_the_server(seconds):
    command = [sys.executable, "-P", GUARD, sys.executable, "-c", SLEEPER.format(seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        grandchild = int(process.stdout.readline())
        assert not is_gone(grandchild) or seconds < 1
        if seconds > 1:
            process.stdin.close()  # as when konic is killed
        process.wait(15)
    until = time.monotonic() + 5
    while not is_gone(grandchild):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_server_of_our_own_ends_with_its_run_however_that_ends(python, model_folders, tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys; sys.path[:0] = {[str(SCRIPT.parent), str(Path(__file__).parent), *sys.path]!r}
        from pathlib import Path
        from test_vllm import own_server
        from test_engine import Silent
        class Loud(Silent):
            def on_iteration_end(self, result):
                print("iteration", flush=True)
        if __name__ == "__main__":
            engine = own_server({python!r}, {model_folders["llama"]!r}, Path({str(tmp_path / "run")!r}))
            engine.callback = Loud()
            engine.train(1000)
        """)
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"iteration\n"
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    until = time.monotonic() + 15
    while not is_gone(read_pid(tmp_path)[0]):
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("python", "told"), [("no/such/python", "is not a Python that runs"), (sys.executable, "has no vLLM")]
)
def test_a_python_without_vllm_is_refused_before_the_model_is_loaded(model_folders, tmp_path, python, told):
    engine = own_server(python, model_folders["llama"], tmp_path / "run")
    with pytest.raises(ConfigError, match=told):
        engine.train(1)
    assert engine._session._learner is None


def test_vllm_is_not_taken_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="has no vLLM"):
        require_vllm(sys.executable)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "needs either vllm_address"),
        ({"vllm_address": "http://x", "vllm_python": "python"}, "needs either vllm_address"),
        ({"vllm_address": "http://x", "vllm_arguments": ("--seed=1",)}, "vllm_arguments are for a server"),
        ({"vllm_python": "python", "vllm_arguments": ("--trust_remote_code",)}, "--trust-remote-code, which konic"),
        ({"vllm_python": "python", "vllm_arguments": ("--api-key=x",)}, "--api-key, which konic decides"),
        ({"vllm_address": "http://x", "top_p": 0.9}, "cannot take top_p=0.9"),
        ({"vllm_address": "http://x", "top_k": 5}, "cannot take top_k=5"),
        ({"vllm_address": "http://x", "do_sample": False}, "cannot take do_sample=False"),
        ({"vllm_address": "http://x", "repetition_penalty": 1.1}, "cannot take repetition_penalty=1.1"),
        ({"vllm_address": "http://x", "min_new_tokens": 2}, "cannot take min_new_tokens=2"),
        ({"vllm_address": "http://x", "temperature": 0.001}, "temperature=0.001 is below 0.01"),
    ],
)
def test_what_vllm_cannot_do_is_refused_by_name(settings, told):
    with pytest.raises(ConfigError, match=told):
        GenerationConfig(engine="vllm", **settings)


def test_a_setting_of_vllm_without_the_engine_is_refused():
    with pytest.raises(ConfigError, match="set engine='vllm' too"):
        GenerationConfig(vllm_address="http://127.0.0.1:8000")


@pytest.mark.parametrize("value", [0.5, -(10**400), 10**400, float("nan"), -float("inf"), "-1.0", None])
def test_what_is_no_log_prob_is_not_taken_for_one(value):
    assert not _is_log_prob(value)
    assert _is_log_prob(-1.5)


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
def test_a_tied_head_is_served_as_weights_of_its_own(model_folders, tmp_path, shard_size, monkeypatch):
    """vLLM packs a tied head once, on a CPU, and would sample with the old one after weights were reloaded."""
    policy = tiny_learner("gpt2", lora=False, dtype=torch.float32).policy
    shake_adapter(policy)
    model = policy.language_model.causal_lm
    save = type(model).save_pretrained
    monkeypatch.setattr(
        type(model), "save_pretrained", lambda self, *a, **k: save(self, *a, **{**k, "max_shard_size": shard_size})
    )
    assert model.config.tie_word_embeddings
    save_untied(policy, tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert not found.config.tie_word_embeddings
    assert found.lm_head.weight is not found.transformer.wte.weight
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(found.eval()(ids).logits, model(ids).logits)


def test_every_error_can_be_made_again_from_its_words_as_other_processes_do():
    kinds = [KonicError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert {RequestRefusedError, ProcessLostError} < set(kinds)
    for kind in (kind for kind in kinds if kind.__module__.startswith("konic.")):
        again = pickle.loads(pickle.dumps(kind("what", "a line")))
        assert (type(again), str(again)) == (kind, str(kind("what", "a line")))
