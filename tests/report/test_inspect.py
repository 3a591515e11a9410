"""`konic inspect`: why a response got its advantage."""

import json

import pyarrow
import pytest
from test_report import HOSTILE, make_run, table

from command import konic_here
from konic.report import Run
from konic.report.replay import OLDER, _token_texts, choose, replays
from test_engine import make_engine

ROWS = {
    "prompt": ["a"] * 4, "response": [HOSTILE, "two", "three", "four"], "reward": [0.0, 1.0, 2.0, None],
    "kl": [0.5, 0.1, 0.2, 0.3], "ended": [True, True, False, True], "error": [None, None, None, "Reward 'kind' raised"],
    "left_out": [None, None, "cut off", None], "token_ids": [[5, 6], [7], [8], [9]],
    "reward/kind": [0.0, 1.0, 2.0, None], "seconds/kind": [0.002] * 4,
    "advantages": [[-1.0, -1.0], [1.0], None, None], "token_kl": [[0.4, 0.1], [0.1], [0.2], [0.3]],
    "log_probs": [[-1.0, -2.0], [-0.5], [-0.1], [-0.2]], "entropy": [[1.0, 1.0], [1.0], [1.0], [1.0]],
}  # fmt: skip


def inspected(folder, *options, **changes):
    run = make_run(folder / "run", settings={"algorithm": "grpo"})
    columns = {name: values for name, values in (ROWS | changes).items() if values is not None}
    columns["left_out"] = pyarrow.array(columns["left_out"], pyarrow.string())
    table(run / "completions" / "000003.parquet", **columns)
    return konic_here("inspect", run, *options)


@pytest.mark.parametrize(
    ("sample", "why"),
    [
        (1, "-1.000 from the mean 1.000 of the 3 responses to its prompt, whose standard deviation is 1.000"),
        (2, "Its advantage is +1.000 for every token."),
        (3, "It was left out of the loss: cut off."),
        (4, "It has no reward, because a reward failed on it: nothing was learned from it."),
    ],
)
def test_a_response_says_why_it_got_its_advantage(tmp_path, sample, why):
    done = inspected(tmp_path, "--sample", sample)
    assert done.returncode == 0, done.stderr
    assert why in done.stdout
    assert "\x1b" not in done.stdout and "\u202e" not in done.stdout
    assert "in 2.0 ms" in done.stdout


def test_responses_are_listed_and_chosen(tmp_path):
    listed = inspected(tmp_path).stdout
    assert "Iteration 3: 4 responses" in listed and "(cut off) three" in listed and "\x1b" not in listed
    assert "sample 3" in inspected(tmp_path, "--best").stdout
    assert "sample 1" in inspected(tmp_path, "--worst").stdout
    assert "sample 1" in inspected(tmp_path, "--most-moved").stdout
    whole = json.loads(inspected(tmp_path, "--json").stdout)
    assert [one["reward"] for one in whole["samples"]] == [0.0, 1.0, 2.0, None]
    assert whole["samples"][0]["numbers"]["advantage"] == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--sample", 5], "iteration 3 has 4 responses, counted from 1"),
        (["--iteration", 9], "has no responses of iteration 9 that can be read. It has iterations 3 to 3."),
    ],
)
def test_what_is_not_there_is_one_error(tmp_path, options, error):
    done = inspected(tmp_path, *options)
    assert done.returncode == 1 and error in done.stderr and "Traceback" not in done.stderr
    assert inspected(tmp_path, "--best", "--worst").returncode == 2


def test_a_run_of_an_older_konic_is_shown_without_numbers(tmp_path):
    names = ("advantages", "token_kl", "log_probs", "entropy", "seconds/kind")
    done = inspected(tmp_path, "--best", **dict.fromkeys(names))
    assert done.returncode == 0 and OLDER in done.stdout, done.stderr


def test_a_character_of_several_tokens_stands_at_its_last():
    text = "aé€\U0001f600z".encode()
    decode = lambda ids: bytes(ids).decode("utf-8", "replace")  # noqa: E731
    assert _token_texts([*text], decode) == ["a", "", "é", "", "", "€", "", "", "", "\U0001f600", "z"]
    assert "".join(_token_texts([255, 254, 253, 252, 97], decode)) == "\ufffd" * 4 + "a"
    assert _token_texts([3, 4], None) == ["[3]", "[4]"]


def test_a_real_run_is_replayed(tmp_path, model_folders):
    make_engine(model_folders["llama"], tmp_path / "run").train(2)
    samples = replays(Run.read(tmp_path / "run"), 2)
    for one in samples:
        assert len(one.tokens) == len(one.numbers["advantage"]) == len(one.numbers["value"])
        assert "the value head expected" in one.why
    assert set(choose(samples)) == {"best", "worst", "most moved"}
    assert any("".join(one.tokens).startswith(one.response) for one in samples)
