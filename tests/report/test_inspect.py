"""`konic inspect`: why a response got its advantage."""

import json

import pyarrow
import pytest
from test_report import HOSTILE, make_run, page_of, table

from command import konic_here
from konic.report import Run
from konic.report.replay import OLDER, _token_texts, choose, replays
from test_engine import make_engine

ROWS = {
    "prompt": ["a"] * 4, "response": [HOSTILE, "two", "three", "four"], "reward": [0.0, 2.0, 1.0, None],
    "kl": [0.5, 0.1, 0.2, 0.3], "ended": [True, True, False, True], "error": [None, None, None, "Reward 'kind' raised"],
    "left_out": [None, None, "cut off", None], "token_ids": [[5, 6], [7], [8], [9]],
    "reward/kind": [0.0, 2.0, 1.0, None], "seconds/kind": [0.002] * 4,
    "advantages": [[-1.0, -1.0], [1.0], None, None], "token_kl": [[0.4, 0.1], [0.1], [0.2], [0.3]],
    "log_probs": [[-1.0, -2.0], [-0.5], [-0.1], [-0.2]], "entropy": [[1.0, 1.0], [1.0], [1.0], [1.0]],
}  # fmt: skip


def recorded(folder, **changes):
    run = make_run(folder / "run", settings={"algorithm": "grpo"})
    columns = {name: values for name, values in (ROWS | changes).items() if values is not None}
    columns["left_out"] = pyarrow.array(columns["left_out"], pyarrow.string())
    table(run / "completions" / "000003.parquet", **columns)
    return run


def inspected(folder, *options, **changes):
    return konic_here("inspect", recorded(folder, **changes), *options)


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


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({"num_generations": 2}, {}),
        ({"num_generations": 4}, {"row": [1, 1, 2, 2]}),
        ({"num_generations": 4}, {"prompt": ["a", "a", "a", "b"]}),
        ({"algorithm": "dr_grpo"}, {"reward": [0.0, 3.0, 1.5, None]}),
        ({"algorithm": "ppo"}, {}),
        ({"algorithm": "reinforce++"}, {"left_out": [None] * 4, "advantages": [[-1.0, -1.0], [1.0], [2.0], None]}),
        ({}, {"values": [[0.1, 0.1], [0.1], [0.1], [0.1]]}),
    ],
)
def test_an_iteration_of_other_settings_is_not_explained_by_those_of_now(tmp_path, settings, changes):
    run = recorded(tmp_path, **changes)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"settings": record["settings"] | settings}))
    why = replays(Run.read(run), 3)[0].why
    assert why.startswith("Its reward is 0.000, and its advantage -1.000 for every token. The settings in run.json")
    assert "they may have changed since this iteration" in why


@pytest.mark.parametrize("settings", [{"kl_placement": "reward"}, {"overlong_penalty": 1.0}])
def test_penalties_are_named_where_the_rule_alone_gives_another_advantage(tmp_path, settings):
    run = recorded(tmp_path, advantages=[[-0.8, -0.8], [1.0], None, None])
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"settings": record["settings"] | settings}))
    first, second, *_ = replays(Run.read(run), 3)
    assert first.why.endswith("-0.800 for every token. Penalties for KL or length are in it too.")
    assert second.why.endswith("+1.000 for every token.")


def test_responses_are_listed_and_chosen(tmp_path):
    listed = inspected(tmp_path).stdout
    assert "Iteration 3: 4 responses" in listed and "(cut off) three" in listed and "\x1b" not in listed
    assert "sample 2" in inspected(tmp_path, "--best").stdout
    assert "sample 1" in inspected(tmp_path, "--worst").stdout
    assert "sample 1" in inspected(tmp_path, "--most-moved").stdout
    whole = json.loads(inspected(tmp_path, "--json").stdout)
    assert [one["reward"] for one in whole["samples"]] == [0.0, 2.0, 1.0, None]
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


def test_a_run_without_values_says_that_none_colour_its_tokens(tmp_path, monkeypatch):
    said = "The algorithm of this run learns no values, so --by value colours nothing."
    for colours in ("", "1"):
        monkeypatch.setenv("FORCE_COLOR", colours)
        assert said in inspected(tmp_path, "--best", "--by", "value").stdout
        assert said not in inspected(tmp_path, "--best", "--by", "kl").stdout
        values = [[0.1, 0.2], [0.1], [0.1], [0.1]]
        assert said not in inspected(tmp_path, "--best", "--by", "value", values=values).stdout


def test_a_real_run_is_replayed(tmp_path, model_folders):
    make_engine(model_folders["llama"], tmp_path / "run").train(2)
    samples = replays(Run.read(tmp_path / "run"), 2)
    for one in samples:
        assert len(one.tokens) == len(one.numbers["advantage"]) == len(one.numbers["value"])
        assert "the value head expected" in one.why
    assert set(choose(samples)) == {"best", "worst", "most moved"}
    assert any("".join(one.tokens).startswith(one.response) for one in samples)


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "final" / "tokenizer.json").write_text('{"model": ')
    done = inspected(tmp_path, "--best")
    assert done.returncode == 0 and "[7]" in done.stdout
    assert "Note: final/tokenizer.json cannot be read" in done.stderr


def test_the_report_colours_the_tokens_of_the_best_the_worst_and_the_most_moved(tmp_path):
    run = recorded(tmp_path, advantages=[[-1.0, 0.25], [1.0], [None], None], reward=[0.0, 1.0, 0.5, None])
    text, page = page_of(run, output=tmp_path / "report.html")
    assert "Best: sample 2" in page.text and "Worst and most moved: sample 1" in page.text
    assert '<span class="down" style="--s:1.00" title="advantage -1.000, kl 0.400,' in text
    assert '<span class="up" style="--s:0.25" title="advantage 0.250, kl 0.100,' in text
    assert "Its advantage is +1.000 for every token." in page.text and "&lt;b&gt;bold" in text and "<b>" not in text


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": [1, 2, 3, 4]},
        {"token_ids": [[2**40, 6], [7], [8], [9]]},
        {"reward": ["0", "high", "", None]},
        {"kl": None, "prompt": None, "response": None, "ended": None},
        {"advantages": [["a"], ["b"], None, None]},
        {"reward": [None] * 4, "token_kl": [[], [], [], []]},
    ],
)
def test_responses_with_other_columns_still_make_a_page(tmp_path, changes):
    _, page = page_of(recorded(tmp_path, **changes), output=tmp_path / "report.html")
    assert "Outcome" in page.text


def test_the_report_of_an_older_run_says_that_it_has_no_numbers_of_tokens(tmp_path):
    text, page = page_of(recorded(tmp_path, advantages=None, token_kl=None), output=tmp_path / "report.html")
    assert page.text.count(OLDER) == 1 and '<span class="up"' not in text


def test_long_responses_keep_the_report_small(tmp_path):
    count = 30_000
    rows = {
        "prompt": ["a"] * 3, "response": ["b" * count] * 3, "reward": [0.0, 1.0, 0.5], "kl": [0.0, 0.1, 9.0],
        "token_ids": [[5] * count] * 3, "advantages": [[0.123456] * count] * 3, "ended": [True] * 3,
        "error": [None] * 3, "left_out": [None] * 3, "reward/kind": [0.0] * 3, "seconds/kind": [0.0] * 3,
        "token_kl": [[0.1] * count] * 3, "log_probs": [[-1.0] * count] * 3, "entropy": [[1.0] * count] * 3,
    }  # fmt: skip
    text, page = page_of(recorded(tmp_path, **rows), output=tmp_path / "report.html")
    assert len(text) < 1_000_000 and "The first 500 of 30000 tokens." in page.text
