"""Several processes train one model: the numbers of one process, one set of files, and one error for all.

The model is GPT-2's shape: in float64 nothing in it rounds to fp32, as the norms of Llama do.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from conftest import byte_tokenizer, tiny_model
from konic.finetuning.algorithms import ALGORITHMS

JOB = Path(__file__).with_name("processes_job.py")
EQUAL = [*ALGORITHMS, "minibatches", "kl in the loss", "full", "uneven", "skipped", "normalised"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("gpt2").save_pretrained(folder)
    byte_tokenizer("gpt2").save_pretrained(folder)
    return folder


def run(model, folder, size, *cases, seconds=300):
    """The job in `size` processes: their exit codes and what each wrote to standard error."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    several = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if size > 1 else {}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", JOB, model, folder, *cases], stderr=subprocess.PIPE, text=True,
            env=os.environ | several | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if several else {}),
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=seconds)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], errors


def told(folder, case, rank=0):
    return json.loads((folder / f"{case}-{rank}.json").read_text())


def numbers(value):
    """All numbers of a nested value but the times, by where they stand."""
    if isinstance(value, dict):
        found = ((f"{key}.{name}", n) for key, part in value.items() for name, n in numbers(part).items())
        return {name: number for name, number in found if not name.split(".")[0].endswith(("_sec", "seconds"))}
    if isinstance(value, list):
        return {f"{i}.{name}": number for i, part in enumerate(value) for name, number in numbers(part).items()}
    return {"": value}


def same(left, right, within=1e-9):
    left, right = numbers(left), numbers(right)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value == right[name] or value == pytest.approx(right[name], abs=within, nan_ok=True), name


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    codes, errors = run(model, folder, 1, *EQUAL)
    assert codes == [0], errors
    return folder


@pytest.fixture(scope="module")
def two(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    codes, errors = run(model, folder, 2, *EQUAL)
    assert codes == [0, 0], errors
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


def test_four_processes_of_which_one_has_no_row_left_and_a_resume_by_another_number(model, alone, tmp_path):
    codes, errors = run(model, tmp_path, 4, "uneven", "dapo")
    assert codes == [0] * 4, errors
    for case in ("uneven", "dapo"):
        same(told(alone, case), told(tmp_path, case, 3))
    assert run(model, tmp_path, 1, "uneven:5")[0] == [0]
    by_one = told(tmp_path, "uneven")
    assert run(model, tmp_path / "again", 2, "uneven", "uneven:5")[0] == [0, 0]
    same(by_one, told(tmp_path / "again", "uneven"))


def test_an_error_of_one_process_ends_all_with_it(model, tmp_path):
    codes, errors = run(model, tmp_path, 2, "error")
    assert codes == [1, 1]
    assert "RewardError: Reward 'vowels' raised ValueError: no such word" in errors[1]
    assert f"RewardError: In process 1 of 2 on {socket.gethostname()}: Reward 'vowels' raised ValueError" in errors[0]
    assert 'File "' in errors[0] and "no such word" in errors[0].splitlines()[-1]


def test_ctrl_c_in_one_process_ends_all_and_saves(model, tmp_path):
    codes, errors = run(model, tmp_path, 2, "interrupted")
    assert codes == [0, 0], errors
    assert [told(tmp_path, "interrupted", rank)["stopped"] for rank in range(2)] == ["interrupted"] * 2
    assert (tmp_path / "interrupted" / "final").is_dir()


def test_a_process_that_is_killed_ends_the_others(model, tmp_path):
    codes, errors = run(model, tmp_path, 2, "killed")
    assert codes == [1, 9]
    assert "ProcessLostError: Process 0 of 2" in errors[0] and "has lost another process" in errors[0]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("other settings", "Process 1 of 2 on .* differs from the first one on .* in: learning_rate"),
        ("too many", "batch_size=1 is fewer responses than the 2 processes"),
    ],
)
def test_processes_that_cannot_work_together_are_refused(model, tmp_path, case, message):
    codes, errors = run(model, tmp_path, 2, case)
    assert codes == [1, 1]
    for text in errors:
        assert re.search(message, text)
    assert not list(tmp_path.glob("*/metrics.jsonl"))
