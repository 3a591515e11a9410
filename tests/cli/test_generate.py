"""`konic generate`: responses of a run's weights and of its base model, as the engine gives them."""

import io
import json
import shutil
import sys

import pytest

from command import konic_here, script
from konic import output
from konic.cli import typewriter
from konic.cli.generate import _lines
from konic.finetuning import GenerationConfig, KonicFinetuningAgent, KonicFinetuningEngine, KonicLLMRewardComposer
from konic.finetuning import llm_reward as reward
from test_engine import make_engine

PROMPTS = ["a b", "c"]


class Nothing(KonicLLMRewardComposer):
    @reward
    def nothing(self, prompt, response):
        return 0.0


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folders):
    folder = tmp_path_factory.mktemp("generate") / "run"
    make_engine(model_folders["llama"], folder).train(2, save_every=1)
    return folder


def responses(run, model):
    """What an engine of its own gives, with the run's other settings."""
    own = json.loads((run / "run.json").read_text())["settings"]["generation_config"]
    generation = GenerationConfig(**own | {"max_new_tokens": 6, "temperature": 0.9})
    agent = KonicFinetuningAgent(str(model), Nothing(), generation_config=generation)
    return KonicFinetuningEngine.from_agent(agent, device="cpu").generate(PROMPTS)


def generated(run, *options):
    done = konic_here(
        "generate", run, *PROMPTS, "--json", "--max-new-tokens", 6, "--temperature", 0.9, "--device", "cpu", *options
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_responses_are_those_of_the_saved_weights_and_of_the_base(run, model_folders):
    rows = generated(run)
    assert [list(row) for row in rows] == [["prompt", "base", "final"]] * 2
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["base"] for row in rows] == responses(run, model_folders["llama"])
    assert [row["final"] for row in rows] == responses(run, run / "final")


def test_any_weights_of_the_run_can_be_named(run):
    rows = generated(run, "--weights", "checkpoint-1", "--no-base")
    assert [list(row) for row in rows] == [["prompt", "checkpoint-1"]] * 2
    assert [row["checkpoint-1"] for row in rows] == responses(run, run / "checkpoint-1")
    assert generated(run, "--no-base", "--seed", 5) != generated(run, "--no-base")


def test_without_json_each_response_is_a_line(run):
    done = konic_here("generate", run, "a b", "--max-new-tokens", 3, "--device", "cpu")
    assert [line.partition(":")[0] for line in done.stdout.splitlines()][:3] == ["prompt", "base", "final"]


def test_what_cannot_be_generated_is_one_error(run, tmp_path):
    for arguments, said in (
        ((run, "x", "--weights", "checkpoint-7"), "no weights 'checkpoint-7'. Did you mean 'checkpoint-2'?"),
        ((run, "x", "--weights", "../run/final"), "no weights '../run/final'"),
        ((tmp_path / "nowhere", "x"), "there is no such folder"),
        ((run / "final", "x"), "Did you mean"),
    ):
        done = konic_here("generate", *arguments)
        assert done.returncode == 1 and said in done.stderr, done.stderr


def test_a_run_of_a_stranger_is_not_trusted(run, tmp_path):
    """What its settings say about remote code, tokens and sizes reaches no model."""
    from konic.saved.agents import SavedRun

    record = json.loads((run / "run.json").read_text())
    record["settings"]["model_kwargs"] = {"trust_remote_code": True, "token": "x" * 9, "dtype": "float32"}
    record["settings"]["lora_config"]["r"] = 10**12
    (tmp_path / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    (tmp_path / "final").mkdir()
    (tmp_path / "run.json").write_text(json.dumps(record))
    saved = SavedRun.read(tmp_path)
    agents = {name: saved.agent(name) for name in ("base", saved.name_of(None))}
    assert [agent.get_model_kwargs() for agent in agents.values()] == [{"dtype": "float32"}] * 2
    assert agents["base"].get_lora_config().r == 1


def test_the_tokens_that_a_stranger_asks_for_have_a_bound(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    record["settings"]["generation_config"]["max_new_tokens"] = 10**9
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    done = konic_here("generate", tmp_path / "run", "a", "--device", "cpu")
    assert done.returncode == 1 and "Give --max-new-tokens" in done.stderr
    done = konic_here("generate", tmp_path / "run", "a", "--max-new-tokens", 2, "--no-base", "--device", "cpu")
    assert done.returncode == 0, done.stderr


REWARDS = """
from konic.finetuning import KonicLLMRewardComposer, llm_reward

class Rewards(KonicLLMRewardComposer):
    @llm_reward
    def length(self, prompt, response):
        return len(response)
"""


def test_prompts_come_from_a_file_or_from_standard_input(run, tmp_path, monkeypatch):
    file = tmp_path / "prompts.csv"
    file.write_text("question\na b\nc\n")
    options = run, "--json", "--max-new-tokens", 6, "--temperature", 0.9, "--device", "cpu"
    rows = generated(run)
    done = konic_here("generate", *options, "--prompts", file, "--prompt-column", "question")
    assert json.loads(done.stdout) == rows, done.stderr
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffa b\n\nc\n"))
    assert json.loads(konic_here("generate", *options, "-").stdout) == rows


def test_only_a_newline_ends_a_prompt_of_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\u2028b\x0cc\nd\r\ne", newline=""))
    assert _lines() == ["a\u2028b\x0cc", "d", "e"]


def test_rewards_are_shown_under_each_response(run, tmp_path):
    path = script(tmp_path, REWARDS, "rewards.py")
    rows = generated(run, "--rewards", path)
    for row in rows:
        assert row["rewards"] == {
            name: dict.fromkeys(("reward", "length"), float(len(row[name]))) for name in ("base", "final")
        }
    done = konic_here("generate", run, "a b", "--max-new-tokens", 3, "--device", "cpu", "--rewards", path)
    assert len([line for line in done.stdout.splitlines() if line.startswith("  reward ")]) == 2, done.stderr


def test_a_reward_that_is_called_reward_stands_beside_the_total(run, tmp_path):
    named = (
        REWARDS.replace("def length", "def reward")
        + """
    @llm_reward
    def one(self, prompt, response):
        return 1
"""
    )
    path = script(tmp_path, named, "rewards.py")
    for row in generated(run, "--rewards", path):
        length = len(row["final"])
        assert row["rewards"]["final"] == {"reward": length + 1, "reward/reward": length, "one": 1}
    done = konic_here("generate", run, "a b", "--max-new-tokens", 3, "--device", "cpu", "--rewards", path)
    assert done.stdout.count("| reward/reward ") == 2, done.stderr


def test_a_reward_that_fails_is_skipped_where_the_run_skipped_it(run, tmp_path):
    path = script(tmp_path, REWARDS.replace("len(response)", "1 / (prompt != 'c')"), "rewards.py")
    shutil.copytree(run, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    record["settings"]["on_reward_error"] = "skip"
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    rows = generated(tmp_path / "run", "--rewards", path, "--no-base")
    assert [row["rewards"]["final"]["reward"] for row in rows] == [1.0, None]


def test_a_terminal_gets_one_prompt_token_by_token_and_the_same_text(run, tmp_path, monkeypatch):
    piped = konic_here("generate", run, "a b", "--max-new-tokens", 8, "--device", "cpu")
    written = []
    monkeypatch.setattr(sys.modules["konic.cli.generate"], "is_terminal", lambda stream: True)
    plain = output.write_line

    def write(text, *rest, **end):
        written.append(text)
        plain(text, *rest, **end)

    monkeypatch.setattr(typewriter, "write_line", write)
    done = konic_here("generate", run, "a b", "--max-new-tokens", 8, "--device", "cpu")
    assert done.stdout.rstrip() == piped.stdout.rstrip(), done.stderr
    assert len([text for text in written if text]) > 4


def test_a_text_that_turns_into_another_is_written_again():
    stream = io.StringIO()
    write = typewriter.Typewriter(stream)
    for text in (" a\x1b", " a\x1b b", "other"):
        write(text)
    write.end("other")
    assert stream.getvalue() == "a\\x1b b\nother\n"


def test_prompts_that_are_missing_are_one_error(run, tmp_path, monkeypatch):
    for arguments, said in (
        ((run,), "give prompts"),
        ((run, "x", "--prompts", tmp_path / "x.txt"), "give prompts"),
        ((run, "x", "--prompt-column", "x"), "give --prompts"),
        ((run, "--prompts", tmp_path / "x.txt"), "there is no such file"),
        ((run, "-"), "holds no prompt"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
        done = konic_here("generate", *arguments)
        assert done.returncode in (1, 2) and said in done.stderr, done.stderr
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"gr\xfcn\n"), "utf-8", "surrogateescape"))
    done = konic_here("generate", run, "-")
    assert done.returncode == 1 and "Standard input is not UTF-8" in done.stderr, done.stderr


def test_a_base_model_is_found_from_another_folder_than_the_runs(model_folders, tmp_path, monkeypatch):
    from konic.saved.agents import SavedRun

    (tmp_path / "job").mkdir()
    (tmp_path / "tiny").symlink_to(model_folders["llama"])
    monkeypatch.chdir(tmp_path / "job")
    make_engine("../tiny", tmp_path / "run").train(1)
    monkeypatch.chdir(tmp_path)
    assert SavedRun.read(tmp_path / "run").agent("base").get_base_model() == str(tmp_path / "job" / "../tiny")
    done = konic_here("generate", tmp_path / "run", "x", "--weights", "base", "--max-new-tokens", 2)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run/run.json").read_text())
    for elsewhere in ({**record, "current_folder": "/nowhere"}, {**record, "current_folder": 3}):
        (tmp_path / "run/run.json").write_text(json.dumps(elsewhere))
        assert SavedRun.read(tmp_path / "run").base_model == "../tiny"
