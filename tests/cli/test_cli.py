import json

import pytest
import typer

from command import konic, konic_here, script
from konic.cli.paths import read_path, read_run
from konic.cli.scripts import load_agent
from konic.cli.settings import set_settings
from konic.finetuning import ConfigError, DatasetSource, KonicFinetuningAgent, TrainingConfig

SCRIPT = """
from konic.finetuning import *

class Rewards(KonicLLMRewardComposer):
    @llm_reward
    def brief(self, prompt, response):
        return -len(response) / 80

def {name}():
    return KonicFinetuningAgent(
        base_model={model!r}, reward_composer=Rewards(),
        dataset_config=DatasetConfig(prompts=["a", "b", "c"]), lora_config=LoraConfig(r=2),
        generation_config=GenerationConfig(max_new_tokens=4, max_prompt_length=16),
    )
assert __name__ != "__main__"
"""


def test_help_shows_every_command_and_an_example():
    run = konic("--help")
    assert run.returncode == 0
    for command in ("demo", "train", "report", "eval", "generate", "chat"):
        assert command in run.stdout
        assert f"Example: konic {command}" in konic_here(command, "--help").stdout
    assert konic_here("--version").stdout.startswith("konic 0.")


def test_train_runs_a_scripts_agent_into_the_folder_named(model_folders, tmp_path):
    path = script(tmp_path, SCRIPT.format(name="build_agent", model=model_folders["llama"]))
    run = konic("train", path, "--max-iterations", 2, "--device", "cpu", "--output", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    assert "[Iter    2] Reward:" in run.stdout
    assert run.stderr == f"Loading {path} ...\n"
    assert (tmp_path / "out" / "final" / "adapter_model.safetensors").exists()


def test_settings_are_changed_from_the_command_line_and_what_follows_is_printed(model_folders, tmp_path):
    path = script(tmp_path, SCRIPT.format(name="build_agent", model=model_folders["llama"]))
    changes = ["training_config.algorithm=dapo", "training_config.batch_size=4", 'generation_config.stop=["x"]']
    options = [part for change in changes for part in ("--set", change)]
    run = konic("train", path, "--max-iterations", 1, "--device", "cpu", "--output", tmp_path / "out", *options)
    assert run.returncode == 0, run.stderr
    assert "Batch Size: 4\n" in run.stdout
    lines = run.stderr.splitlines()
    assert "training_config.algorithm = 'dapo' (the file: 'ppo')" in lines
    assert "training_config.kl_penalty_weight = 0.0 (the file: 0.05)" in lines  # DAPO's own
    assert "training_config.filter_equal_groups = True (the file: False)" in lines
    assert "generation_config.stop = ('x',) (the file: None)" in lines
    assert "training_config.num_generations = 4 (the file: 1)" in lines
    assert "training_config.clip_ratio_high = 0.28 (the file: 0.2)" in lines
    assert sum("(the file:" in line for line in lines) == 8
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert (settings["algorithm"], settings["generation_config"]["stop"]) == ("dapo", ["x"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("algorithm=dapo", "--set 'algorithm=dapo': give config.field=value"),
        ("training_config.algorithm", "give config.field=value"),
        ("training.algorithm=dapo", "no settings 'training'. Did you mean 'training_config'?"),
        ("training_config.algoritm=dapo", "--set training_config has no field 'algoritm'. Did you mean 'algorithm'?"),
        ("training_config.algorithm=dappo", "--set training_config.algorithm: it must be"),
        ("training_config.batch_size=many", "--set training_config.batch_size: it must be a whole number"),
        (
            "training_config.eval_every=2",
            "--set training_config.eval_every=2 needs prompts to evaluate on",
        ),
        ("lora_config.target_modules=nowhere", "nowhere"),
    ],
)
def test_a_change_that_cannot_be_is_one_message(model_folders, tmp_path, change, told):
    path = script(tmp_path, SCRIPT.format(name="build_agent", model=model_folders["llama"]))
    run = konic_here("train", path, "--set", change, "--output", tmp_path / "out")
    assert run.returncode == 1
    assert told in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_an_access_token_is_not_printed(tmp_path):
    load = tmp_path / "agent.py"
    text = SCRIPT.format(name="build_agent", model="any")
    load.write_text(text.replace('prompts=["a", "b", "c"]', 'name="some/data"'))
    agent = load_agent(load)
    changed, lines = set_settings(agent, ["dataset_config.token=SECRET"])
    assert lines == ["dataset_config.token = *** (the file: None)"]
    assert set_settings(changed, ["dataset_config.token=OTHER"])[1] == ["dataset_config.token = *** (the file: ***)"]
    with pytest.raises(ConfigError, match="--set 'token=\\*\\*\\*'"):
        set_settings(agent, ["token=SECRET"])


def test_a_changed_agent_leaves_the_first_as_it_was_and_keeps_what_the_script_said(tmp_path):
    load = tmp_path / "agent.py"
    load.write_text(SCRIPT.format(name="build_agent", model="any"))
    agent = load_agent(load)
    given = agent.with_settings({"training_config": {"algorithm": "grpo", "kl_penalty_weight": 0.2}})
    kept = given.with_settings({"training_config": {"algorithm": "dapo"}})
    assert kept.get_training_config().kl_penalty_weight == 0.2
    assert kept.get_training_config().filter_equal_groups
    assert not given.with_settings({"training_config": {"algorithm": "ppo"}}).get_training_config().filter_equal_groups
    assert agent.get_training_config().algorithm == "ppo"
    file = tmp_path / "rows.txt"
    file.write_text("one\ntwo\n")
    other = agent.with_settings({"dataset_config": {"prompts": None, "name": str(file), "prompt_column": "text"}})
    assert other.get_dataset_config().source == DatasetSource.LOCAL

    class Own(type(agent)):
        def get_training_config(self):
            return TrainingConfig(batch_size=4)

    own = Own(base_model="any", reward_composer=agent.get_reward_composer())
    with pytest.raises(ConfigError, match=r"Own\.get_training_config\(\) makes its own config"):
        own.with_settings({"training_config": {"algorithm": "dapo"}})


@pytest.mark.parametrize(
    "text, told",
    [
        ("x = 1", "defines neither a module-level `agent` nor a function `build_agent()`"),
        ("def build_agnet(): pass", "It defines 'build_agnet': rename it."),
        ("agent = 5", "its agent is a int, not a KonicFinetuningAgent"),
        ("import math\n\ndef helper():\n    return 1 / 0\n\nhelper()", "raised ZeroDivisionError while it was loaded"),
        ("def build_agent(:", "raised SyntaxError"),
    ],
)
def test_a_script_that_cannot_be_used_is_one_message(text, told, tmp_path):
    run = konic_here("train", script(tmp_path, text))
    assert run.returncode == 1
    assert run.stdout == ""
    assert told in run.stderr
    assert "konic/" not in run.stderr.partition("\n")[2]
    if "helper" in text:
        assert 'job.py", line 4, in helper' in run.stderr


def test_no_iterations_train_nothing_and_that_is_said(model_folders, tmp_path):
    path = script(tmp_path, SCRIPT.format(name="build_agent", model=model_folders["llama"]))
    run = konic_here("train", path, "--max-iterations", 0, "--output", tmp_path / "out")
    assert run.returncode == 0
    assert run.stderr.endswith("--max-iterations 0: nothing is trained.\n")
    assert not (tmp_path / "out").exists()


def test_a_users_mistake_has_no_traceback(model_folders, tmp_path):
    text = SCRIPT.format(name="build_agent", model="./not-there")
    run = konic("train", script(tmp_path, text), cwd=tmp_path)
    assert run.returncode == 1
    assert "Error: base_model='./not-there': there is no such folder" in run.stderr
    assert "Traceback" not in run.stderr
    missing = konic_here("train", tmp_path / "absent.py")
    assert "there is no such file" in missing.stderr


def test_a_module_level_agent_and_a_sibling_import_work(model_folders, tmp_path):
    script(tmp_path, f"MODEL = {model_folders['llama']!r}", "settings_here.py")
    text = (
        "from settings_here import MODEL\n"
        + SCRIPT.format(name="make", model=model_folders["llama"])
        + "agent = make()"
    )
    assert isinstance(load_agent(script(tmp_path, text, "other-name.py")), KonicFinetuningAgent)


def test_a_script_inside_a_package_may_import_what_is_beside_it(model_folders, tmp_path):
    script(tmp_path, "MODEL = 1", "beside_a_konic_script.py")
    (tmp_path / "outer_of_scripts" / "inner").mkdir(parents=True)
    for folder in ("outer_of_scripts", "outer_of_scripts/inner"):
        script(tmp_path / folder, "", "__init__.py")
    script(tmp_path / "outer_of_scripts", "NAME = 2", "settings.py")
    text = "from ..settings import NAME\n" + SCRIPT.format(name="make", model=model_folders["llama"]) + "agent = make()"
    assert isinstance(load_agent(script(tmp_path / "outer_of_scripts" / "inner", text, "job.py")), KonicFinetuningAgent)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["job.py", "--resume"], "give --output"),
        (["job.py", "--max-iterations", -1], "--max-iterations"),
        (["job.py", "--save-total-limit", 0], "--save-total-limit"),
    ],
)
def test_mistakes_on_the_command_line_speak_of_its_options(arguments, told):
    run = konic_here("train", *arguments)
    assert run.returncode == 2
    assert told in run.stderr
    assert "resume_from" not in run.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", ""], "SCRIPT_OR_YAML"),
        (["train", "job.py", "--output", ""], "--output"),
        (["demo", "--output", " "], "--output"),
        (["rewards", ""], "SCRIPT_OR_YAML"),
        (["rewards", "job.py", "--texts", ""], "--texts"),
        (["reward-model", "train", "", "--base", "any"], "DATA"),
        (["reward-model", "train", "rows.csv", "--base", ""], "--base"),
        (["reward-model", "train", "rows.csv", "--base", "any", "--output", ""], "--output"),
        (["reward-model", "train", "rows.csv", "--base", "any", "--test", ""], "--test"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(arguments, named):
    run = konic_here(*arguments)
    assert (run.returncode, run.stdout) == (2, "")
    assert f"Invalid value for '{named}': it is empty." in run.stderr


def test_a_home_folder_is_found_also_where_the_shell_left_its_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_run("~/run") == tmp_path / "run"
    with pytest.raises(typer.BadParameter, match="~nobody-here/run"):
        read_path("~nobody-here/run")


def test_a_scripts_own_konic_error_stays_itself(tmp_path):
    text = "from konic.finetuning import TrainingConfig\nTrainingConfig(batch_sise=4)"
    with pytest.raises(ConfigError, match="Did you mean 'batch_size'"):
        load_agent(script(tmp_path, text))


def test_json_gives_one_object_per_event_and_nothing_else_on_standard_output(model_folders, tmp_path):
    text = SCRIPT.format(name="build_agent", model=model_folders["llama"])
    noise = "print('from a reward'); import os, warnings; os.system('echo from a shell'); warnings.warn('w')"
    text = text.replace("return -len(response) / 80", f"{noise}; return None if prompt == 'a' else 1.0")
    path = script(tmp_path, "print('from a script')\n" + text)
    changes = ("--set", "training_config.kl_limit=null", "--set", "training_config.eval_every=null")
    run = konic("train", path, "--json", "--max-iterations", 2, "--device", "cpu", "--output", tmp_path / "o", *changes)
    assert run.returncode == 0, run.stderr

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    events = [json.loads(line, parse_constant=refuse) for line in run.stdout.splitlines()]
    kinds = [event["event"] for event in events if event["event"] != "warning"]
    assert kinds == ["begin", "iteration", "iteration", "checkpoint", "end"]
    assert events[0]["settings"]["max_iterations"] == 2
    metrics = [json.loads(line) for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    assert [event for event in events if event["event"] == "iteration"] == [{"event": "iteration"} | m for m in metrics]
    assert events[-1]["model_path"] == str(tmp_path / "o" / "final") and "history" not in events[-1]
    for words in ("from a script", "from a reward", "from a shell"):
        assert words in run.stderr


def test_json_of_an_error_is_an_event_too(model_folders, tmp_path):
    text = SCRIPT.format(name="build_agent", model=model_folders["llama"]).replace("-len(response) / 80", "1 / 0")
    run = konic_here("train", script(tmp_path, text), "--json", "--max-iterations", 1, "--output", tmp_path / "o")
    last = json.loads(run.stdout.splitlines()[-1])
    assert run.returncode == 1 and last["event"] == "error" and "brief" in last["message"]
