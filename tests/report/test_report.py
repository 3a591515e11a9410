"""A run's folder -> one page: what it says, what it escapes, and what it does with broken runs."""

import base64
import hashlib
import html.parser
import json
import math
import os
import re
import subprocess
import sys
from urllib.parse import urljoin, urlsplit
from urllib.request import url2pathname

import pyarrow
import pyarrow.parquet
import pytest

from command import konic_here
from konic.finetuning.errors import OutputError
from konic.finetuning.results.intervals import Interval
from konic.report import Run, write_report
from konic.report import run as report_run
from konic.report.words import duration, outcome, suspicions, thinned

HOSTILE = "<script>alert(1)</script> <b>bold</b> & \x1b[2J \u202e\u0645\u0631\u062d\u0628\u0627"


def table(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def evaluation(folder, number, rewards, responses=None, kl=0.0, length=10, prompts=None, **parts):
    count = len(rewards)
    table(
        folder / "evaluations" / f"{number:06d}.parquet",
        prompt=prompts or [f"prompt {index}" for index in range(count)],
        response=responses or [f"the answer number {index} is long" for index in range(count)],
        reward=rewards, kl=[kl] * count, length=[length] * count,
        error=pyarrow.array([None] * count, pyarrow.string()),
        **{f"reward/{name}": values for name, values in parts.items()},
    )  # fmt: skip


def metrics(iteration, reward, **others):
    values = {
        "iteration": iteration, "reward_mean": reward, "reward_std": 0.5, "kl_per_response": 0.1 * iteration,
        "objective": reward, "response_length_mean": 10.0, "entropy": 2.0, "policy_loss": 0.0, "value_loss": 0.1,
        "kl_loss": 0.0, "clip_fraction": 0.0, "generation_time_sec": 1.0, "reward_compute_time_sec": 0.5,
        "update_time_sec": 2.0, "total_time_sec": 4.0, "num_samples": 8, "distinct_2": 0.9, "checks": [],
        "reward_breakdown": {"kind": reward},
    }  # fmt: skip
    return values | others


def make_run(folder, rewards=(0.1, 0.2, 0.3), settings=None, **others):
    """The files of a run with these mean rewards."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model_name": "tiny", "algorithm": "ppo", "learning_rate": 0.001, "reward_weights": {}} | (
        settings or {}
    )
    record = {"settings": settings, "environment": {"torch": "2.13.0"}, "machine": {"platform": "Linux"}, "rewards": {}}
    (folder / "run.json").write_text(json.dumps(record | {"command": "konic train job.py"}))
    lines = [json.dumps(metrics(at, reward, **others)) for at, reward in enumerate(rewards, 1)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


class Page(html.parser.HTMLParser):
    """The tags, the attributes and the visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.inside = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.inside.append(tag)

    def handle_endtag(self, tag):
        self.inside = self.inside[: len(self.inside) - 1 - self.inside[::-1].index(tag)] if tag in self.inside else []

    def handle_data(self, data):
        if not {"script", "style"} & set(self.inside[-1:]):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def page_of(*folders, output):
    write_report([Run.read(folder) for folder in folders], output)
    text = output.read_text(encoding="utf-8")
    return text, Page(text)


# --- what it says ---


def test_the_outcome_is_that_of_the_held_out_prompts(tmp_path):
    run = make_run(tmp_path / "run")
    evaluation(run, 0, [0.0, 0.0, 0.5, 1.0, 1.0], kind=[0.0, 0.0, 0.5, 1.0, 1.0])
    evaluation(run, 3, [1.0, 1.0, 1.5, 2.0, 2.0], kl=2.5, kind=[1.0, 1.0, 1.5, 2.0, 2.0])
    _, page = page_of(run, output=tmp_path / "report.html")
    said = "On 5 held-out prompts, the mean reward rose from 0.500 to 1.500: +1.000 (95 % interval +1.000 to +1.000)"
    assert f"{said}, for a KL of 2.50 nats per response." in page.text
    assert "konic train job.py" in page.text
    assert "2.13.0" in page.text
    assert "prompt 3" in page.text


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ([1.0] * 5, [0.0] * 5, "fell from 1.000 to 0.000"),
        (
            [0.0],
            [1.0],
            "On 1 held-out prompt, the mean reward went from 0.000 to 1.000, which may be chance",
        ),
        ([0.0] * 4, [1.0] * 4, "+1.000 (fewer than 5 prompts: too few for an interval)"),
        ([0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.2], "which may be chance"),
        ([None, None], [None, None], "no reward to compare"),
    ],
)
def test_an_outcome_that_is_no_gain_is_called_so(tmp_path, before, after, said):
    run = make_run(tmp_path / "run")
    evaluation(run, 0, pyarrow.array(before, pyarrow.float64()))
    evaluation(run, 3, pyarrow.array(after, pyarrow.float64()))
    result = outcome(Run.read(run))
    assert said in result.sentence()
    assert not result.rose
    assert suspicions(Run.read(run), result) == []


def test_without_held_out_prompts_the_ends_of_the_run_are_compared(tmp_path):
    run = Run.read(make_run(tmp_path / "run", [0.0] * 2 + [0.5] * 16 + [1.0] * 2))
    result = outcome(run)
    error = math.sqrt(4 * 0.5**2 / 8) / 2  # of four batches of 8 rewards with deviation 0.5, two at each end
    assert (result.before, result.after) == (0.0, 1.0)
    assert result.gain == pytest.approx(Interval(1.0, 1.0 - 1.96 * error, 1.0 + 1.96 * error))
    assert "first and the last 2 iterations" in result.sentence()
    _, page = page_of(make_run(tmp_path / "run", [0.0, 0.2, *[0.5] * 16, 0.8, 1.0]), output=tmp_path / "report.html")
    assert "rose from 0.100 to 0.900" in page.text
    assert "kind 1.0 0.100 0.900 +0.800" in page.text, "each reward is compared where the whole is"


def test_a_gain_of_batches_that_may_be_chance_is_called_so(tmp_path):
    run = Run.read(make_run(tmp_path / "run", [0.3, 0.5]))
    result = outcome(run)
    assert "went from 0.300 to 0.500, which may be chance: +0.200 (95 % interval -0.290 to +0.690)" in result.sentence()
    assert not result.rose and suspicions(run, result) == []
    without = outcome(Run.read(make_run(tmp_path / "run", [0.3, 0.5], reward_std=None)))
    assert without.gain is None and "rose from 0.300 to 0.500, for" in without.sentence()
    unscored = outcome(Run.read(make_run(tmp_path / "run", [0.3, 0.5], num_unscored=6)))
    assert unscored.gain.high == pytest.approx(0.2 + 1.96 * 0.5)


def test_a_batch_without_rewards_makes_no_gain_surer(tmp_path):
    run = make_run(tmp_path / "run", [0.0] * 2 + [0.5] * 16 + [1.0] * 2)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[1] |= {"reward_mean": None, "reward_std": 0.0, "num_unscored": 8}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    error = math.hypot(0.5 / math.sqrt(8), 0.5 / math.sqrt(16))  # of one batch and of two
    assert outcome(Run.read(run)).gain == pytest.approx(Interval(1.0, 1.0 - 1.96 * error, 1.0 + 1.96 * error))


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([0.2501, 0.2499], "Between the first and the last iteration, the mean reward was 0.250,"),
        ([0.25], "In the only iteration, the mean reward was 0.250"),
        ([0.25, 0.25], "Between the first and the last iteration, the mean reward was 0.250"),
    ],
)
def test_a_reward_that_did_not_move_is_said_once(tmp_path, rewards, said):
    assert outcome(Run.read(make_run(tmp_path / "run", rewards))).sentence().startswith(said)


def test_a_rise_is_questioned_where_length_words_or_one_reward_explain_it(tmp_path):
    run = make_run(tmp_path / "run", settings={"reward_weights": {"kind": 2.0, "short": 1.0}},
                   reward_breakdown={"kind": 0.0, "short": 0.0})  # fmt: skip
    evaluation(run, 0, [0.0] * 5, length=10, kind=[0.0] * 5, short=[0.5] * 5)
    evaluation(run, 3, [1.0] * 5, ["yes yes yes yes yes"] * 5, length=20, kind=[0.5] * 5, short=[0.5] * 5)
    found = suspicions(Run.read(run), outcome(Run.read(run)))
    assert len(found) == 3
    assert "from 10 to 20 tokens" in found[0]
    assert "5% of their pairs of words" in found[1]  # one of twenty
    assert "100% came from kind" in found[2]


@pytest.mark.parametrize("weights", [{"r": 3.0}, {"r.a": 3.0, "r.b": 3.0}, {"a": 3.0, "b": 3.0}])
def test_a_part_has_the_weight_of_its_own_or_of_its_key_or_of_its_reward(tmp_path, weights):
    run = make_run(tmp_path / "run", settings={"rewards": ["r", "s"], "reward_weights": weights},
                   reward_breakdown={"r.a": 0.0, "r.b": 0.0, "s": 0.0})  # fmt: skip
    evaluation(run, 0, [0.0] * 5, **{"r.a": [0.0] * 5, "r.b": [0.0] * 5, "s": [0.0] * 5})
    evaluation(run, 3, [4.0] * 5, **{"r.a": [1.0] * 5, "r.b": [0.0] * 5, "s": [0.5] * 5})
    _, page = page_of(run, output=tmp_path / "report.html")
    assert "r.a 3.0 0.000 1.000 +1.000 r.b 3.0 0.000 0.000 +0.000 s 1.0 0.000 0.500 +0.500" in page.text
    assert "86% came from r.a" in page.text


@pytest.mark.parametrize(
    "settings",
    [
        {"rewards": ["r", "s"], "reward_weights": {"a": 2.0}},
        {"rewards": ["r"]},
        {"rewards": ["r", 7]},
        {"rewards": ["r", "s"], "reward_weights": {"r": "much"}},
    ],
)
def test_a_weight_that_is_not_known_is_not_said(tmp_path, settings):
    run = make_run(tmp_path / "run", settings=settings, reward_breakdown={"r.a": 0.5, "s.a": 0.5})
    _, page = page_of(run, output=tmp_path / "report.html")
    assert "r.a – 0.500 0.500 +0.000 s.a – 0.500 0.500" in page.text


def test_a_part_that_the_last_iteration_has_not_is_shown(tmp_path):
    run = make_run(tmp_path / "run", reward_breakdown={"r.a": 1.0, "r.b": 2.0})
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics(4, 0.3, reward_breakdown={"r.c": 3.0, "r.a": 1.0})) + "\n")
    text, page = page_of(run, output=tmp_path / "report.html")
    assert "r.a 1.0 1.000 1.000 +0.000 r.b 1.0 2.000 – – r.c 1.0 – 3.000 –" in page.text
    assert "r.b from 2 to 2" in text


def test_self_checks_and_what_a_run_was_made_with_are_shown(tmp_path):
    run = make_run(tmp_path / "run", checks=["kl_runaway"])
    _, page = page_of(run, output=tmp_path / "report.html")
    assert "kl_runaway reported in iteration 1" in page.text


def test_a_self_check_says_what_to_try_and_older_runs_only_name_it(tmp_path):
    said = {"kl_runaway": f"It is far. Set kl_limit. {HOSTILE}"}
    run = make_run(tmp_path / "run", [0.1], checks=["kl_runaway", "no_rewards", 3], check_messages=said)
    text, page = page_of(run, output=tmp_path / "report.html")
    assert "kl_runaway reported in iteration 1: It is far. Set kl_limit. <script>" in page.text
    assert "no_rewards reported in iteration 1." in page.text and "<script>alert" not in text
    page_of(make_run(tmp_path / "odd", [0.1], checks=7, check_messages=[1]), output=tmp_path / "odd.html")


def test_runs_are_compared_by_what_differs(tmp_path):
    first = make_run(tmp_path / "a", settings={"algorithm": "grpo"})
    second = make_run(tmp_path / "b", [0.3, 0.6], settings={"learning_rate": 0.01})
    _, page = page_of(first, second, output=tmp_path / "report.html")
    settings = page.text[page.text.index("Settings that differ") :]
    assert "algorithm grpo ppo" in settings
    assert "learning_rate 0.001 0.01" in settings
    assert "model_name" not in settings


def test_saved_weights_are_linked_from_where_the_page_is(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "checkpoint-2").mkdir()
    (run / "final").mkdir()
    for output, start in ((run / "report.html", ""), (tmp_path / "report.html", "run/")):
        _, page = page_of(run, output=output)
        links = [value for tag, name, value in page.attributes if tag == "a" and name in ("href", "xlink:href")]
        assert {f"{start}checkpoint-2/", f"{start}final/"} <= set(links)


@pytest.mark.parametrize("name", ["a#b c", "c?d", "50%25", "ppo:1", "ünï & <b>"])
def test_links_lead_into_a_folder_of_any_name(tmp_path, name):
    run = make_run(tmp_path / name)
    (run / "final").mkdir()
    _, page = page_of(run, output=tmp_path / "report.html")
    links = [value for tag, attribute, value in page.attributes if (tag, attribute) == ("a", "href")]
    found = [urlsplit(urljoin(f"{tmp_path.as_uri()}/report.html", link)) for link in links if not link.startswith("#")]
    assert [url2pathname(link.path) for link in found] == [f"{run / 'final'}/"]
    assert all(not link.query and not link.fragment for link in found) and f"{name}/final/: 0.3 at" in page.text


# --- what it escapes ---


def test_text_of_others_is_only_text(tmp_path):
    name = "<i>kind</i>"
    run = make_run(tmp_path / "run", settings={"model_name": HOSTILE}, reward_breakdown={name: 0.5, "a": 0.1})
    evaluation(run, 0, [0.0] * 2, [HOSTILE] * 2, prompts=[HOSTILE] * 2, **{name: [0.0] * 2})
    evaluation(run, 3, [1.0] * 2, ["\ud83d</script>".encode("utf-8", "replace").decode()] * 2, prompts=[HOSTILE] * 2)
    table(run / "completions" / "000003.parquet", prompt=[HOSTILE], response=[HOSTILE], reward=[1.0], kl=[0.1],
          ended=[True], **{f"reward/{name}": [0.5]})  # fmt: skip
    text, page = page_of(run, output=tmp_path / "report.html")
    assert page.tags.count("script") == 2  # the data and the program
    assert "b" not in page.tags and "i" not in page.tags
    assert page.text.count("<script>alert(1)</script>") == 12  # model 2, prompts 2, before 2, samples 3 x 2
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "alert(1)</script>" not in text


@pytest.mark.parametrize("name", ["half a character \ud83d", r"a \d backslash \1", "\x1b[31mred\0\x0b", "\ufffe\uffff"])
def test_a_reward_may_have_any_name(tmp_path, name):
    run = make_run(tmp_path / "run", reward_breakdown={name: 0.5, "other": 0.1}, settings={name: name})
    text, _ = page_of(run, output=tmp_path / "report.html")
    shown = name.encode("utf-8", "replace").decode()
    assert f"{shown} from 0.5 to 0.5" in text


def test_the_page_loads_nothing_and_runs_only_its_own_program(tmp_path):
    text, page = page_of(make_run(tmp_path / "run"), output=tmp_path / "report.html")
    policy = next(value for tag, name, value in page.attributes if name == "content" and "default-src" in value)
    program = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not [name for _, name, _ in page.attributes if name in ("src", "srcset", "action")]
    addresses = [value for _, name, value in page.attributes if "://" in value]
    assert set(addresses) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["run"]["reward_mean"] == [0.1, 0.2, 0.3]


# --- broken and unusual runs ---


def test_what_is_no_run_is_one_error(tmp_path):
    with pytest.raises(OutputError, match="there is no such folder"):
        Run.read(tmp_path / "nowhere")
    make_run(tmp_path / "runs" / "mine")
    with pytest.raises(OutputError, match=r"it has no run.json. Did you mean .*runs/mine\?"):
        Run.read(tmp_path / "runs")
    (tmp_path / "runs" / "mine" / "final").mkdir()
    with pytest.raises(OutputError, match=r"Did you mean .*runs/mine\?"):
        Run.read(tmp_path / "runs" / "mine" / "final")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "inner").mkdir()
    with pytest.raises(
        OutputError, match=r"no run.json\. Give the folder that a training wrote, not an exported model\."
    ):
        Run.read(tmp_path / "model" / "inner")
    (tmp_path / "runs" / "mine" / "metrics.jsonl").unlink()
    with pytest.raises(OutputError, match=r"has not finished an iteration yet, so there is nothing to show\.$"):
        Run.read(tmp_path / "runs" / "mine")
    (tmp_path / "runs" / "mine" / "metrics.jsonl").write_text('{"iteration": 1, "rew')
    with pytest.raises(OutputError, match=r"nothing to show\. metrics\.jsonl, line 1 is left out: "):
        Run.read(tmp_path / "runs" / "mine")


def test_a_run_that_was_cut_off_or_is_of_another_version_still_has_a_page(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "reward_mean": 0.4}\n[1]\n{"iteration": 5, "rew')
    (run / "run.json").write_text('{"settings": ')
    evaluation(run, 0, [0.0])
    evaluation(run, 3, [1.0])
    whole = (run / "evaluations" / "000003.parquet").read_bytes()
    (run / "evaluations" / "000003.parquet").write_bytes(whole[: len(whole) // 2])
    _, page = page_of(run, output=tmp_path / "report.html")
    notes = page.text[page.text.index("Not read") :]
    for what in (
        "metrics.jsonl, line 5",
        "metrics.jsonl, line 6",
        "run.json cannot be read",
        "evaluations/000003.parquet",
    ):
        assert what in notes
    assert "model not known" in page.text and "4 iterations" in page.text


def test_what_leads_out_of_the_run_is_not_read(tmp_path):
    run = make_run(tmp_path / "run")
    table(tmp_path / "elsewhere" / "000003.parquet", prompt=["private"], response=["private"], reward=[1.0], kl=[0.0],
          ended=[True])  # fmt: skip
    (run / "completions").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe")
    text, page = page_of(run, output=tmp_path / "report.html")
    assert "private" not in text
    assert "completions/000003.parquet is left out" in page.text


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_a_record_that_lies_elsewhere_is_not_read(name, tmp_path):
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", settings={"model_name": "private"})
    (run / name).unlink()
    (run / name).symlink_to(other / name)
    if name == "metrics.jsonl":
        with pytest.raises(OutputError, match=r"metrics\.jsonl cannot be read: .*outside of the folder"):
            Run.read(run)
    else:
        text, page = page_of(run, output=tmp_path / "report.html")
        assert "private" not in text and "outside of the folder" in page.text


def test_a_record_of_others_has_bounds(tmp_path):
    """Deep, wide, of other types: a page is made in time, and says what was left out."""
    deep = json.loads("[" * 900 + "]" * 900)
    run = make_run(tmp_path / "run", settings={"deep": deep})
    text, page = page_of(run, output=tmp_path / "report.html")
    assert "nested more than 50 deep" in page.text
    run = make_run(tmp_path / "types")
    odd = {"settings": {"reward_weights": 1}, "environment": "x", "machine": [1], "rewards": 2}
    (run / "run.json").write_text(json.dumps(odd))
    assert "3 iterations" in page_of(run, output=tmp_path / "report.html")[1].text
    breakdown = {f"part{number}": 1.0 for number in range(20_000)} | {"x" * 1_000_000: 1.0}
    run = make_run(tmp_path / "wide", reward_breakdown=breakdown)
    text, page = page_of(run, output=tmp_path / "report.html")
    assert len(text) < 2_000_000 and "part99" in page.text and "part100" not in page.text


def test_metrics_of_others_have_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("konic.report.run._MOST_BYTES", 100_000)
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4}\n' * 1000)
    read = Run.read(run)
    assert len(read.history) < 200 and "is left out from line" in read.notes[-1]


def test_a_fiftieth_of_the_bound_is_two_thousand_iterations(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    row = {"iteration": 1, "reward_mean": 0.5} | {f"metric_{number}": 0.5 for number in range(60)}
    (run / "metrics.jsonl").write_text((json.dumps(row) + "\n") * 2000)
    monkeypatch.setattr(report_run, "_MOST_BYTES", report_run._MOST_BYTES / 50)  # so 100,000 fit into the whole
    read = Run.read(run)
    assert len(read.history) == 2000 and read.notes == []


def test_a_small_table_that_unpacks_to_gigabytes_is_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    text = pyarrow.array(["x" * 1_000_000]).dictionary_encode().take(pyarrow.array([0] * 300))
    for name, number in (("completions", 3), ("evaluations", 0), ("evaluations", 3)):
        path = run / name / f"{number:06d}.parquet"
        table(path, prompt=["a"] * 300, response=text, reward=[1.0] * 300, kl=[0.0] * 300, length=[1] * 300)
        assert path.stat().st_size < 3_000_000
    read = Run.read(run)
    assert read.evaluations == {} and read.samples(3) == []
    assert len(read.notes) == 3 and all("far more than its" in note for note in read.notes)


def test_iterations_keep_their_numbers_when_a_line_before_them_is_damaged(tmp_path):
    run = make_run(tmp_path / "run", [0.1, 0.2, 0.3, 0.4, 0.5])
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[1] = lines[1][:30]
    lines[2] = json.dumps(metrics(3, 0.3) | {"iteration": 10**400})
    lines[3] = json.dumps(metrics(4, 0.4, entropy=10**400))
    (run / "metrics.jsonl").write_text("\n".join(lines))
    (run / "final").mkdir()
    (run / "checkpoint-2").mkdir()
    text, page = page_of(run, output=run / "report.html")
    assert Run.read(run).checkpoints == {2: "checkpoint-2", 5: "final"}
    assert Run.read(run).curve("reward_mean") == {1: 0.1, 4: 0.4, 5: 0.5}
    assert "iteration 4, reward: 0.4" in text and "iteration 5: 0.5 at 0.50 nats" in text
    assert "final/: 0.5 at" in text and "checkpoint-2/: 0.4 at" in text
    assert "iteration 2," not in text and "iteration 3," not in text
    assert "metrics.jsonl, line 2 is left out" in page.text and "metrics.jsonl, line 3 is left out" in page.text


def test_a_link_in_place_of_the_page_is_replaced_and_not_followed(tmp_path):
    run, other = make_run(tmp_path / "run"), tmp_path / "other.txt"
    other.write_text("mine")
    (run / "report.html").symlink_to(other)
    page_of(run, output=run / "report.html")
    assert other.read_text() == "mine" and not (run / "report.html").is_symlink()


def test_a_long_run_has_a_small_page(tmp_path):
    run = make_run(tmp_path / "run", [0.1 + 0.001 * (at % 7) for at in range(5000)])
    text, page = page_of(run, output=tmp_path / "report.html")
    assert len(text) < 1_000_000
    assert "5000 iterations" in page.text


def test_values_that_are_missing_break_nothing(tmp_path):
    run = make_run(tmp_path / "run", [0.1, 0.2], reward_mean=None, kl_per_response=None, entropy="high",
                   reward_breakdown=None, num_samples=None)  # fmt: skip
    _, page = page_of(run, output=tmp_path / "report.html")
    assert "There is no reward to compare" in page.text


def test_a_duration_is_said_as_people_do():
    assert [duration(seconds) for seconds in (0.4, 59.6, 125, 3 * 3600 + 62, math.nan)] == [
        "0 s", "1 min 0 s", "2 min 5 s", "3 h 1 min", "–",
    ]  # fmt: skip


@pytest.mark.parametrize(("count", "most"), [(0, 5), (1, 5), (5, 5), (6, 5), (1003, 250)])
def test_every_iteration_is_in_one_group(count, most):
    groups = thinned(count, most)
    assert [index for group in groups for index in group] == list(range(count))
    assert len(groups) == min(count, most)
    assert not groups or max(map(len, groups)) - min(map(len, groups)) <= 1


# --- the command ---


def test_the_command_writes_the_page_into_the_run_and_says_the_outcome(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    done = konic_here("report", run)
    assert done.returncode == 0, done.stderr
    assert (
        "run: Between the first and the last iteration, the mean reward went from 0.100 to 0.300, which may"
        in done.stdout
    )
    assert f"Open {run / 'report.html'} in a browser." in done.stdout
    assert (run / "report.html").is_file()
    monkeypatch.chdir(tmp_path)
    assert konic_here("report", run, make_run(tmp_path / "other")).returncode == 0
    assert (tmp_path / "report.html").is_file()
    twice = konic_here("report", run, tmp_path / "other", run)
    assert twice.returncode == 2 and "name each run once." in twice.stderr
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file" / "report.html", tmp_path / "run"):
        failed = konic_here("report", run, "--output", where)
        assert failed.returncode == 1 and "cannot be written" in failed.stderr, failed.stderr


def test_a_real_run_has_a_page(tmp_path, model_folders):
    from test_engine import make_engine

    make_engine(model_folders["llama"], tmp_path / "run").train(2)
    text, page = page_of(tmp_path / "run", output=tmp_path / "run" / "report.html")
    assert "2 iterations" in page.text
    assert "Samples of the last iteration" in page.text
    assert "final/" in text
    assert "Not read" not in page.text
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["command"] in html.unescape(text)


def test_a_page_is_made_without_torch():
    code = "import konic.report, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
