"""Several processes train one model: the numbers of one process, one set of files, and one error for all.

The model is GPT-2's shape: in float64 nothing in it rounds to fp32, as the norms of Llama do.
"""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

import warm
from conftest import byte_tokenizer, tiny_model
from first_step import LIMITS, differences, sizes
from konic.finetuning import ConfigError
from konic.finetuning.system.world import find_world
from ranks import free_port, start_ranks

JOB = Path(__file__).with_name("processes_job.py")
VARIANTS = ["minibatches", "kl in the loss", "full", "uneven", "skipped", "half", "normalised", "whole batch"]
SHARDED = ["sharded ppo", "sharded grpo", "sharded full", "sharded full grpo", "sharded half", "sharded normalised"]
OF_LLAMA = ["sharded llama", "sharded llama full"]
IN_FLOAT32 = ["float32", "float32 grpo"]
IN_BFLOAT16 = ["bfloat16", "sharded bfloat16", "sharded bfloat16 in step"]
MORE_SHARDED = [
    "sharded ppo in step", "sharded grpo whole", "sharded full in step", "sharded full grpo whole", "sharded uneven",
    "sharded value warm-up",
]  # fmt: skip
EQUAL = ["ppo", "grpo", "dapo", *VARIANTS, *SHARDED]
"""The others of the table: `make processes`."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_models(folder)
    return folder


def save_models(folder):
    """GPT-2 in the folder, Llama in one inside of it."""
    for name, place in (("gpt2", folder), ("llama", folder / "llama")):
        tiny_model(name).save_pretrained(place)
        byte_tokenizer(name).save_pretrained(place)


def run(model, folder, size, *cases, seconds=300, act=lambda _: None):
    """The job in `size` processes, to which `act` does something: their exit codes, and their standard error."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", JOB, model, folder, *cases]
    started = start_ranks(command, size, warm.Popen, stderr=subprocess.PIPE, text=True)
    try:
        act(started)
        errors = [process.communicate(timeout=seconds)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], errors


def told(folder, case, rank=0):
    return json.loads((folder / f"{case}-{rank}.json").read_text())


def own_tokens(folder, case, rank):
    """How many tokens of each optimizer step that process had an advantage for."""
    return json.loads((folder / f"{case}-{rank}-tokens.json").read_text())


def numbers(value):
    """All numbers of a nested value but the times, by where they stand."""
    if isinstance(value, dict):
        found = ((f"{key}.{name}", n) for key, part in value.items() for name, n in numbers(part).items())
        return {name: number for name, number in found if not re.match(r"seconds/|\w+_sec\b", name)}
    if isinstance(value, list):
        return {f"{i}.{name}": number for i, part in enumerate(value) for name, number in numbers(part).items()}
    return {"": value}


def difference(left, right):
    """The largest difference of two numbers that stand at the same place, and that place.

    It is infinite where other values differ, or one is no number.
    """
    left, right = numbers(left), numbers(right)
    assert left.keys() == right.keys()
    gaps = ((gap(value, right[name]), name) for name, value in left.items())
    return max((found for found in gaps if found[0]), default=(0.0, ""))


def gap(left, right):
    if left == right or (left != left and right != right):
        return 0.0
    both = all(isinstance(value, int | float) and not math.isnan(value) for value in (left, right))
    return abs(left - right) if both else math.inf


def same(left, right):
    assert difference(left, right) < (1e-9,)


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    codes, errors = run(model, folder, 1, *EQUAL, *OF_LLAMA, *IN_FLOAT32, "longer", "alone")
    assert codes == [0], errors
    return folder


@pytest.fixture(scope="module")
def two(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    codes, errors = run(model, folder, 2, *EQUAL, *OF_LLAMA, *IN_FLOAT32, *IN_BFLOAT16)
    assert codes == [0, 0], errors
    return folder


@pytest.fixture(scope="module")
def wrong(model, tmp_path_factory):
    """Runs that go wrong, one after the other in the same two processes; the last one ends them."""
    folder = tmp_path_factory.mktemp("wrong")
    cases = [
        "error", "other settings", "too many", "no device", "interrupted", "sharded not finite", "sharded callback",
        "killed",
    ]  # fmt: skip
    codes, errors = run(model, folder, 2, *cases)
    assert codes == [0, 9], errors
    return folder


@pytest.mark.parametrize("case", EQUAL)
def test_two_processes_give_the_numbers_of_one(alone, two, case):
    one = told(alone, case)
    assert len(one["history"]) == 3
    for rank in range(2):
        same(one, told(two, case, rank))
    assert told(two, case)["weights"] == told(two, case, 1)["weights"]
    folders = [folder / case.replace(" ", "-") for folder in (alone, two)]
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in folders]
    assert names[0] == names[1]
    for number in (1, 3):
        tables = [pyarrow.parquet.read_table(f / "completions" / f"{number:06d}.parquet").to_pylist() for f in folders]
        same(*tables)


@pytest.mark.parametrize("case", OF_LLAMA)
def test_divided_weights_give_the_numbers_of_whole_ones_up_to_the_rounding_of_llamas_norms(alone, two, case):
    assert difference(told(alone, case), told(two, case, 1)) < (1e-6,)


@pytest.mark.parametrize("case", IN_FLOAT32)
def test_in_fp32_the_first_step_is_that_of_one_process_up_to_rounding(alone, two, case):
    one = alone / f"{case}-0.safetensors"
    assert sizes(one)["exact KL"] > 1e-3
    for rank in range(2):
        found = differences(one, two / f"{case}-{rank}.safetensors")
        assert {name: found[name] for name, limit in LIMITS.items() if not found[name] <= limit} == {}


@pytest.mark.parametrize("case", ["half", "sharded half"])
def test_one_of_the_processes_can_have_no_token_to_learn_from(alone, two, case):
    """That its numbers are those of one process is tested with the other cases."""
    steps = own_tokens(alone, case, 0)
    assert min(steps) > 0
    assert own_tokens(two, case, 0) == steps
    assert own_tokens(two, case, 1) == [0] * len(steps)


def test_a_difference_names_the_place_also_where_only_one_value_is_a_number():
    assert difference({"a": [1.0, None]}, {"a": [1.5, None]}) == (0.5, "a.0.")
    for other in (1.0, "text", math.nan):
        assert difference({"a": [2.0, None]}, {"a": [2.0, other]}) == (math.inf, "a.1.")
    assert difference({"a": math.nan}, {"a": 1.0}) == (math.inf, "a.")
    assert difference({"a": math.nan}, {"a": float("nan")}) == (0.0, "")


def test_divided_weights_in_bfloat16_give_the_numbers_of_whole_ones(two):
    whole, divided, in_step = (told(two, case) for case in IN_BFLOAT16)
    same(whole, divided)
    # one step at a time rounds otherwise, and a token may differ
    assert in_step["history"][0]["kl_divergence"] == whole["history"][0]["kl_divergence"] == 0
    assert in_step["history"][0]["reward_mean"] == pytest.approx(whole["history"][0]["reward_mean"], abs=0.3)
    assert 0 < in_step["history"][2]["kl_divergence"] < 10 * whole["history"][2]["kl_divergence"]


def test_a_run_with_divided_weights_goes_on_without_and_back(model, alone, two, tmp_path):
    cases = ["sharded full", "sharded ppo"]  # all weights, and LoRA
    for start, size in ((two, 1), (alone, 2)):
        for case in cases:
            name = case.replace(" ", "-")
            shutil.copytree(start / name, tmp_path / str(size) / name)
    resumed = [f"{case}:4" for case in cases]
    codes, errors = run(model, tmp_path / "1", 1, *resumed)
    assert codes == [0], errors
    codes, errors = run(model, tmp_path / "2", 2, *resumed, "sharded killed")
    assert codes == [0, 9], errors
    for case in cases:
        one, several = told(tmp_path / "1", case), told(tmp_path / "2", case, 1)
        assert len(one["history"]) == 4
        same(one, several)
    kind, what = told(tmp_path / "2", "sharded killed")["error"]
    assert kind == "ProcessLostError" and what.startswith("Process 0 of 2") and "has lost another process" in what


def test_four_processes_go_on_with_the_run_of_one_though_one_has_the_fewest_rows(model, alone, tmp_path):
    shutil.copytree(alone / "uneven", tmp_path / "uneven")
    codes, errors = run(model, tmp_path, 4, "uneven:5", "dapo")
    assert codes == [0] * 4, errors
    same(told(alone, "longer"), told(tmp_path, "uneven", 3))
    same(told(alone, "dapo"), told(tmp_path, "dapo", 3))


def test_an_error_of_one_process_ends_all_with_it(wrong):
    what = "Reward 'vowels' raised ValueError: no such word"
    first, second = (told(wrong, "error", rank)["error"] for rank in range(2))
    assert first[0] == second[0] == "RewardError"
    assert second[1].startswith(what)
    assert first[1].startswith(f"In process 1 of 2 on {socket.gethostname()}: {what}") and 'File "' in first[1]


def test_a_device_that_one_process_lacks_is_named_with_it_before_the_training(wrong):
    first, second = (told(wrong, "no device", rank)["error"] for rank in range(2))
    assert first[0] == second[0] == "ConfigError"
    assert second[1].startswith("device='cuda:99' is not available.")
    assert first[1].startswith(f"In process 1 of 2 on {socket.gethostname()}: device='cuda:99' is not available.")
    assert not (wrong / "no-device").exists()


def test_a_loss_that_is_not_finite_in_one_process_leaves_no_other_waiting_for_its_passes(wrong):
    errors = [told(wrong, "sharded not finite", rank)["error"] for rank in range(2)]
    assert all(kind == "NotFiniteError" and "The loss is not finite for the sample" in what for kind, what in errors)


def test_an_error_just_before_all_gather_the_weights_leaves_nobody_waiting(wrong):
    first, second = (told(wrong, "sharded callback", rank)["error"][1] for rank in range(2))
    assert "the callback has failed" in first
    assert second.startswith("In process 0 of 2 on") and "the callback has failed" in second


def test_the_best_weights_are_those_of_one_iteration_in_every_process(alone, two):
    ours, theirs = (load_file(folder / "sharded-normalised" / "best" / "model.safetensors") for folder in (alone, two))
    assert len({result["eval_reward_mean"] for result in told(two, "sharded normalised", 1)["history"]}) == 3
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("rank", "size"), [("5", "2"), ("-1", "2"), ("2", "2"), ("x", "2")])
def test_a_rank_that_cannot_be_is_refused_at_once(monkeypatch, rank, size):
    for name, value in {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"RANK={rank} and WORLD_SIZE={size}: a rank is a number from 0"):
        find_world(1.0)


def test_one_process_has_nobody_to_divide_its_weights_with(alone):
    kind, what = told(alone, "alone")["error"]
    assert kind == "ConfigError" and "sharding='fsdp' divides the weights among the processes of a run" in what


def test_ctrl_c_in_one_process_ends_all_and_saves(wrong):
    assert [told(wrong, "interrupted", rank)["stopped"] for rank in range(2)] == ["interrupted"] * 2
    assert (wrong / "interrupted" / "final").is_dir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_while_one_waits_for_another_saves_and_ends_them(number, model, tmp_path):
    def act(started):
        metrics, limit = tmp_path / "signalled" / "metrics.jsonl", time.monotonic() + 120
        while time.monotonic() < limit and (not metrics.exists() or metrics.read_text().count("\n") < 2):
            time.sleep(0.02)
        time.sleep(0.1)
        for process in started:
            process.send_signal(number)

    codes, errors = run(model, tmp_path, 2, "signalled:500", seconds=60, act=act)
    assert codes == ([0, 0] if number == signal.SIGINT else [-number] * 2), errors
    assert (tmp_path / "signalled" / "final").is_dir()
    assert len(list((tmp_path / "signalled").glob("checkpoint-*"))) == 1


def test_a_process_that_is_killed_ends_the_others(wrong):
    kind, what = told(wrong, "killed")["error"]
    assert kind == "ProcessLostError" and what.startswith("Process 0 of 2") and "has lost another process" in what


def test_a_process_that_hangs_is_named_after_the_limit(model, tmp_path):
    codes, errors = run(model, tmp_path, 2, "hung")
    assert codes == [0, 9], errors
    kind, what = told(tmp_path, "hung")["error"]
    assert kind == "ProcessLostError" and "did not answer for 2 s" in what
    assert re.search(r"[Rr]anks? 1\b", what), what


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("other settings", "Process 1 of 2 on .* differs from the first one on .* in: learning_rate"),
        ("too many", "batch_size=1 is fewer responses than the 2 processes"),
    ],
)
def test_processes_that_cannot_work_together_are_refused(wrong, case, message):
    assert all(re.search(message, told(wrong, case, rank)["error"][1]) for rank in range(2))
    assert not (wrong / case.replace(" ", "-") / "metrics.jsonl").exists()


def test_a_process_leaves_its_group_before_its_end():
    code = """
import atexit
import torch.distributed as dist
atexit.register(lambda: print("is a member:", dist.is_initialized()))  # what is registered first is called last
from konic.finetuning.system.group import Group
Group.joined(60)
print("is a member:", dist.is_initialized())
"""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | alone, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "is a member: True\nis a member: False\n"), done.stderr
