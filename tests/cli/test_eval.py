"""`konic eval`: the numbers of a run's weights, as the run itself found them; and what it refuses."""

import gzip
import json
import math
import os
import shutil
import statistics
import types

import pyarrow.parquet
import pytest

from command import konic_here, script
from konic.cli.eval import _cell, _digits
from konic.finetuning import DatasetConfig
from konic.finetuning.errors import DatasetError, OutputError
from konic.finetuning.results.evaluation import Evaluation
from konic.finetuning.results.intervals import Interval, bootstrap, proportion
from konic.finetuning.system import files
from konic.report.run import Run
from konic.saved.evaluation import Comparison
from konic.saved.prompts import held_out_prompts, read_prompts
from test_engine import make_engine

REWARDS = """
from konic.finetuning import KonicLLMRewardComposer, llm_reward

class Rewards(KonicLLMRewardComposer):
    @llm_reward
    def letters(self, prompt, response):
        return sum(char.isalpha() for char in response) / 8

    @llm_reward
    def brief(self, prompt, response):
        return -len(response) / 80
"""
PASSES = """
from konic.finetuning import KonicLLMRewardComposer, llm_reward

class Rewards(KonicLLMRewardComposer):
    @llm_reward
    def even(self, prompt, response):
        return len(response) % 2 == 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("eval")


@pytest.fixture(scope="module")
def data(folder):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "id": n}) + "\n" for n, text in enumerate("abcdefgh")))
    return path


@pytest.fixture(scope="module")
def run(folder, data, model_folders):
    dataset = DatasetConfig(name=str(data), held_out=3)
    make_engine(model_folders["llama"], folder / "run", dataset=dataset).train(2, save_every=1)
    return folder / "run"


@pytest.fixture(scope="module")
def rewards(folder):
    return script(folder, REWARDS)


def evaluated(run, *options):
    done = konic_here("eval", run, "--json", "--device", "cpu", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(*arguments):
    done = konic_here("eval", *arguments)
    assert done.returncode in (1, 2) and "\nTraceback" not in done.stderr, done.stderr
    return done.stderr


@pytest.mark.parametrize("lora", [True, False])
def test_on_the_held_out_prompts_it_finds_what_the_run_found(model_folders, data, rewards, tmp_path, lora):
    """The KL too: the run computes it with its adapter off or from a frozen copy, and eval from another model."""
    dataset = DatasetConfig(name=str(data), held_out=3)
    make_engine(model_folders["llama"], tmp_path / "run", dataset=dataset, lora=lora).train(2)
    found = evaluated(tmp_path / "run", "--rewards", rewards, "--output", tmp_path / "all.json")
    assert (found["against"], found["weights"], found["num_prompts"]) == ("base", "final", 3)
    pairs = json.loads((tmp_path / "all.json").read_text())["responses"]
    for side, iteration in (("against", 0), ("weights", 2)):
        table = pyarrow.parquet.read_table(tmp_path / "run" / "evaluations" / f"{iteration:06d}.parquet").to_pydict()
        assert [pair[side]["response"] for pair in pairs] == table["response"]
        assert [pair[side]["reward"] for pair in pairs] == pytest.approx(table["reward"])
        assert [pair[side]["kl"] for pair in pairs] == pytest.approx(table["kl"], rel=1e-3, abs=1e-5)
        assert found["measures"]["mean reward"][side]["mean"] == pytest.approx(statistics.fmean(table["reward"]))
        letters = found["measures"]["letters"][side]["mean"]
        assert letters == pytest.approx(statistics.fmean(table["reward/letters"]))
    gain = found["measures"]["mean reward"]["difference"]
    assert (gain["low"], gain["high"]) == (None, None)  # of three prompts
    assert found["measures"]["KL (nats/response)"]["weights"]["mean"] > 0


def test_a_yaml_file_has_the_rewards_with_their_weights(run, rewards, folder):
    job = folder / "job.yaml"
    composer = f"{{path: '{rewards.name}:Rewards', arguments: {{reward_weights: {{letters: 10}}}}}}"
    job.write_text(f"base_model: not/loaded\nreward_composer: {composer}\n")
    plain, weighted = (evaluated(run, "--rewards", file)["measures"] for file in (rewards, job))
    for side in ("against", "weights"):
        letters = plain["letters"][side]["mean"]
        assert weighted["mean reward"][side]["mean"] == pytest.approx(plain["mean reward"][side]["mean"] + 9 * letters)


def test_any_weights_against_any_on_a_file_with_several_responses(run, folder, tmp_path):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("question\none\ntwo\nthree\n")
    passes = script(folder, PASSES, "passes.py")
    options = "--prompts", prompts, "--prompt-column", "question", "--rewards", passes, "--samples", 4
    found = evaluated(
        run, *options, "--weights", "checkpoint-1", "--against", "final", "--k", 1, "--k", 3, "--max-prompts", 2,
        "--output", tmp_path / "all.json",
    )  # fmt: skip
    assert (found["against"], found["weights"], found["num_prompts"], found["k"]) == (
        "final",
        "checkpoint-1",
        2,
        [1, 3],
    )
    pairs = json.loads((tmp_path / "all.json").read_text())["responses"]
    assert [(pair["prompt"], pair["sample"]) for pair in pairs] == [
        (text, n) for text in ("one", "two") for n in range(4)
    ]
    assert len({pair["weights"]["response"] for pair in pairs[:4]}) > 1  # each has random numbers of its own
    scores = [pair["weights"]["reward"] for pair in pairs]
    mean = found["measures"]["mean reward"]["weights"]["mean"]
    assert mean == pytest.approx(statistics.fmean(scores))
    for name in ("best@1", "pass@1 reward", "pass@1 even"):
        assert found["measures"][name]["weights"]["mean"] == pytest.approx(mean)
    assert found["measures"]["best@3"]["weights"]["mean"] == found["measures"]["pass@3 even"]["weights"]["mean"]


def test_the_table_shows_both_sides_and_progress_goes_to_standard_error(run, rewards):
    done = konic_here("eval", run, "--rewards", rewards, "--samples", 2, "--device", "cpu")
    assert done.stdout.startswith("final against base on 3 prompts, 2 responses to each"), done.stderr
    names = [
        line.split("  ")[1].strip() for line in done.stdout.splitlines() if line.startswith("  ") and line[2] != " "
    ]
    assert names == ["mean reward", "letters", "brief", "best@2", "KL (nats/response)", "length (tokens)", "distinct-2"]
    assert "final: 6 of 6 responses" in done.stderr


def test_a_chat_gets_the_models_template_and_text_files_are_read_by_lines(run, rewards, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\nyou\n")
    options = "--prompts", prompts, "--rewards", rewards, "--output", tmp_path / "all.json"
    plain = evaluated(run, *options)
    assert evaluated(run, *options, "--chat")["measures"] != plain["measures"]
    assert [pair["prompt"] for pair in json.loads((tmp_path / "all.json").read_text())["responses"]] == ["hello", "you"]


def test_what_cannot_be_evaluated_is_one_error(run, rewards, data, folder, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    fails = script(folder, REWARDS.replace("/ 80", "/ 0"), "fails.py")
    needs = script(folder, REWARDS.replace("(self, prompt, response)", "(self, prompt, response, answer)"), "needs.py")
    scored = run, "--rewards", rewards, "--device", "cpu"
    assert "there is no such folder" in refused(tmp_path / "nowhere", "--rewards", rewards)
    assert "is not the folder of a run" in refused(folder, "--rewards", rewards)
    assert "no weights 'bets'. Did you mean 'best'?" in refused(*scored, "--weights", "bets")
    assert "no weights '../run/final'" in refused(*scored, "--against", "../run/final")
    assert "both 'final'" in refused(*scored, "--against", "final")
    assert "there is no such file" in refused(*scored, "--prompts", tmp_path / "no.csv")
    assert "empty.txt" in refused(*scored, "--prompts", empty)
    wrong_column = refused(*scored, "--prompts", data, "--prompt-column", "text")
    assert "no column 'text'" in wrong_column
    assert "Name the right one in --prompt-column." in wrong_column
    assert "give --prompts" in refused(*scored, "--prompt-column", "text")
    assert "give --prompts" in refused(*scored, "--chat")
    into_a_folder = refused(*scored, "--output", tmp_path)
    assert "is a folder. Name a file." in into_a_folder and "responses" not in into_a_folder
    assert "--k 3 is more than --samples 2" in refused(*scored, "--samples", 2, "--k", 3)
    assert "--output" in refused(*scored, "--output", tmp_path / "no" / "all.json")
    assert "ZeroDivisionError" in refused(run, "--rewards", fails, "--device", "cpu")
    assert "answer" in refused(run, "--rewards", needs, "--device", "cpu")
    assert "not both" in refused(*scored, "--recorded-rewards")


def test_prompts_that_are_not_kept_must_be_named(model_folders, rewards, tmp_path):
    make_engine(model_folders["llama"], tmp_path / "run").train(1)
    assert "came from 'memory'" in refused(tmp_path / "run", "--rewards", rewards)
    edit(tmp_path / "run", lambda record: record["settings"]["dataset_config"].update(source="bundled", held_out=0))
    assert "held out no prompts" in refused(tmp_path / "run", "--rewards", rewards)
    private = tmp_path / "private.csv"
    private.write_text("prompt\nsecret 1\nsecret 2\n")
    of_mine = {"source": "local", "name": str(private), "held_out": 1, "prompts": None}
    edit(tmp_path / "run", lambda record: record["settings"]["dataset_config"].update(of_mine))
    assert "is not what the run read its prompts from" in refused(tmp_path / "run", "--rewards", rewards)


def test_held_out_prompts_are_found_from_another_folder_than_the_runs(model_folders, data, tmp_path, monkeypatch):
    (tmp_path / "job").mkdir()
    shutil.copy(data, tmp_path / "job" / "rows.jsonl")
    monkeypatch.chdir(tmp_path / "job")
    dataset = DatasetConfig(name="rows.jsonl", held_out=3)
    make_engine(model_folders["llama"], tmp_path / "run", dataset=dataset).train(1)
    monkeypatch.chdir(tmp_path)
    assert len(held_out_prompts(Run.read(tmp_path / "run"))) == 3
    (tmp_path / "job" / "rows.jsonl").unlink()
    with pytest.raises(DatasetError, match=r"no such file or folder.* Name a file: --prompts FILE\."):
        held_out_prompts(Run.read(tmp_path / "run"))


def test_a_txt_file_is_one_by_the_end_of_its_name(tmp_path):
    run = types.SimpleNamespace(settings={"dataset_config": {"prompt_column": "question"}})
    (tmp_path / "v1.txt.2.csv").write_text("question\none\n")
    (tmp_path / "two.txt.gz").write_bytes(gzip.compress(b"two\n"))
    for name, text in (("v1.txt.2.csv", "one"), ("two.txt.gz", "two")):
        prompts = read_prompts(str(tmp_path / name), run, None, None, None, as_chats=False)
        assert [prompt.content for prompt in prompts] == [text]


def test_a_template_of_the_run_that_is_not_applied_is_said(tmp_path, caplog):
    run = types.SimpleNamespace(settings={"dataset_config": {"prompt_template": "Q: {question}"}})
    (tmp_path / "a.csv").write_text("question\none\n")
    (tmp_path / "a.txt").write_text("one\n")
    for name, column, text in (("a.csv", None, "Q: one"), ("a.csv", "question", "one"), ("a.txt", None, "one")):
        caplog.clear()
        (prompt,) = read_prompts(str(tmp_path / name), run, column, None, None, as_chats=False)
        assert prompt.content == text
        assert ("The run's prompt_template, 'Q: {question}', is not applied" in caplog.text) == (text == "one")


def test_a_reward_that_fails_is_skipped_where_the_run_skipped_it(run, folder, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    fails = script(folder, REWARDS.replace("/ 80", "/ (prompt != 'one')"), "fails_once.py")
    options = tmp_path / "run", "--prompts", prompts, "--rewards", fails
    assert "ZeroDivisionError" in refused(*options, "--device", "cpu")
    edit(tmp_path / "run", lambda record: record["settings"].update(on_reward_error="skip"))
    evaluated(*options, "--output", tmp_path / "all.json")
    pairs = json.loads((tmp_path / "all.json").read_text())["responses"]
    assert [pair["weights"]["reward"] is None for pair in pairs] == [True, False]
    edit(tmp_path / "run", lambda record: record["settings"].update(max_error_rate=0.0))
    assert "more than max_error_rate=0" in refused(*options, "--device", "cpu")


def test_numbers_are_shown_also_where_they_cannot_be_written(run, rewards, tmp_path, monkeypatch):
    def full(path, text):
        raise OutputError(f"{path}: cannot be written: No space left on device.")

    monkeypatch.setattr(files, "write_text", full)
    done = konic_here("eval", run, "--rewards", rewards, "--json", "--device", "cpu", "--output", tmp_path / "all.json")
    assert done.returncode == 1 and "No space left" in done.stderr
    assert json.loads(done.stdout)["num_prompts"] == 3


def edit(run, change):
    record = json.loads((run / "run.json").read_text())
    change(record)
    (run / "run.json").write_text(json.dumps(record))


def test_the_recorded_script_is_imported_only_if_asked_for_unchanged_ones_own_and_elsewhere(
    run, folder, tmp_path, monkeypatch
):
    """A stranger's folder names a script and its hash: a hash that fits proves nothing."""
    shutil.copytree(run, tmp_path / "run")
    run = tmp_path / "run"
    own = script(tmp_path, REWARDS, "own_rewards.py")
    known = __import__("hashlib").sha256(own.read_bytes()).hexdigest()
    edit(run, lambda record: record.update(rewards={"class": "Rewards", "file": str(own), "sha256": known}))
    assert f"or --recorded-rewards, which imports {own}" in refused(run)
    done = konic_here("eval", run, "--recorded-rewards", "--json", "--device", "cpu")
    assert done.returncode == 0 and f"Importing {own}" in done.stderr, done.stderr
    assert "not those of the run" not in done.stderr

    monkeypatch.setattr(os, "getuid", lambda: own.stat().st_uid + 1)
    assert "is not your file" in refused(run, "--recorded-rewards")
    monkeypatch.undo()
    own.write_text(REWARDS + "\n")
    assert "has changed since the run" in refused(run, "--recorded-rewards")
    inside, link = script(run, REWARDS, "planted.py"), tmp_path / "link.py"
    link.symlink_to(inside)
    for file in (inside, link):
        edit(run, lambda record, file=file: record["rewards"].update(file=str(file)))
        assert "lies in the run's own folder" in refused(run, "--recorded-rewards")
    monkeypatch.chdir(tmp_path)
    edit(run, lambda record: record["rewards"].update(file="own_rewards.py"))
    assert "is not a whole path" in refused(run, "--recorded-rewards")
    edit(run, lambda record: record["rewards"].update(file="/dev/zero"))
    assert "cannot be read" in refused(run, "--recorded-rewards")
    edit(run, lambda record: record.update(rewards=5))
    assert refused(run).endswith("Give the rewards: --rewards SCRIPT.\n")
    assert "names no script" in refused(run, "--recorded-rewards")


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (-0.2, 0.1, "-0.050 [-0.20, 0.10]"),
        (-0.003, 0.12, "+0.058 [-0.003, 0.120]"),  # on both sides of 0, so that two decimals would not show it
        (0.00004, 0.2, "+0.10002 [0.00004, 0.20000]"),
        (-1e-12, 0.2, "+0.100 [0.00, 0.20]"),
        (-3e-7, 4e-7, "+0.000 [0.00, 0.00]"),  # rounding, not a difference
        (math.nan, math.nan, "+0.100"),
    ],
)
def test_an_interval_has_as_many_decimals_as_show_on_which_side_of_0_it_ends(low, high, shown):
    interval = Interval(0.1 if math.isnan(low) else (low + high) / 2, low, high)
    assert _cell(interval, _digits(interval), "+") == shown


@pytest.mark.parametrize("abstains", [0, 1])
def test_a_part_that_abstained_from_every_response_of_a_side_has_no_mean_there(abstains):
    texts = {"prompts": ["p"] * 6, "responses": ["a b"] * 6, "response_lengths": [1] * 6, "kl_per_response": [0.0] * 6}
    parts = {"rare": [0.5] * 6, "part": [1.0] * 6}
    both = [{"part": parts["part"]} if side == abstains else parts for side in (0, 1)]
    sides = [Evaluation(rewards=[1.0] * 6, breakdown=own, **texts) for own in both]
    found = Comparison(against=("base", sides[0]), weights=("final", sides[1]), num_samples=1, ks=[])
    rare = next(measure for measure in found.measures() if measure.name == "rare")
    means = [rare.against.mean, rare.weights.mean]
    assert math.isnan(means[abstains]) and means[1 - abstains] == 0.5 and math.isnan(rare.difference.mean)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_part_with_a_name_of_the_total_stands_beside_it():
    texts = {"prompts": ["p"] * 6, "responses": ["a b"] * 6, "response_lengths": [1] * 6, "kl_per_response": [0.0] * 6}
    parts = {"reward": [1.0] * 6, "mean reward": [0.5] * 6}
    side = Evaluation(rewards=[0.0] * 6, breakdown=parts, **texts)
    found = Comparison(against=("base", side), weights=("final", side), num_samples=1, ks=[1]).to_dict()["measures"]
    means = {name: measure["weights"]["mean"] for name, measure in found.items()}
    assert (means["mean reward"], means["reward/reward"], means["reward/mean reward"]) == (0.0, 1.0, 0.5)
    assert (means["pass@1 reward"], means["pass@1 reward/reward"]) == (0.0, 1.0)


def test_intervals_of_a_reward_that_is_0_or_1_end_there():
    def side(rewards):
        rest = {"prompts": ["p"] * 12, "responses": ["a b"] * 12, "breakdown": {}}
        return Evaluation(rewards=rewards, kl_per_response=[0.0] * 12, response_lengths=[3] * 12, **rest)

    sides = side([0.0] * 11 + [1.0]), side([1.0] * 11 + [0.0])
    plain = bootstrap([1.0] * 5 + [0.5])
    assert plain.high > 1
    found = Comparison(against=("base", sides[0]), weights=("final", sides[1]), num_samples=2, ks=[1])
    reward, *at_k, _, _, _ = found.measures()
    for measure in (reward, *at_k):
        assert (measure.against.low, measure.weights.low) == (0.0, plain.low), measure
        assert measure.weights.high == measure.difference.high == 1.0


def test_only_the_mean_of_a_reward_that_is_0_or_1_has_the_interval_of_a_share():
    def side(rewards, kl):
        rest = {"prompts": ["p"] * 8, "responses": ["a b"] * 8, "breakdown": {"part": [0.5] * 8}}
        return Evaluation(rewards=rewards, kl_per_response=kl, response_lengths=[1] * 8, **rest)

    sides = side([0.0] * 8, [0.0] * 8), side([1.0] * 7 + [math.nan], [1.0] * 8)
    found = Comparison(against=("base", sides[0]), weights=("final", sides[1]), num_samples=1, ks=[])
    reward, part, kl, length, _ = found.measures()
    assert (reward.against, reward.weights) == (proportion(0, 8), proportion(7, 7))
    assert (part.against.low, part.against.high) == (0.5, 0.5)
    for measure in (kl, length):
        assert (measure.against.low, measure.against.high) == (measure.against.mean,) * 2
