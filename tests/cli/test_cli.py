import pytest

from command import konic, script
from konic.cli.scripts import load_agent
from konic.finetuning import ConfigError, KonicFinetuningAgent

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
    assert "demo" in run.stdout
    assert "train" in run.stdout
    for command in ("demo", "train"):
        assert f"Example: konic {command}" in konic(command, "--help").stdout
    assert konic("--version").stdout.startswith("konic 0.")


def test_train_runs_a_scripts_agent_into_the_folder_named(model_folders, tmp_path):
    path = script(tmp_path, SCRIPT.format(name="build_agent", model=model_folders["llama"]))
    run = konic("train", path, "--max-iterations", 2, "--device", "cpu", "--output", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    assert "[Iter    2] Reward:" in run.stdout
    assert run.stderr == f"Loading {path} ...\n"
    assert (tmp_path / "out" / "final" / "adapter_model.safetensors").exists()


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
    run = konic("train", script(tmp_path, text))
    assert run.returncode == 1
    assert run.stdout == ""
    assert told in run.stderr
    assert "konic/" not in run.stderr.partition("\n")[2]
    if "helper" in text:
        assert 'job.py", line 4, in helper' in run.stderr


def test_a_users_mistake_has_no_traceback(model_folders, tmp_path):
    text = SCRIPT.format(name="build_agent", model="./not-there")
    run = konic("train", script(tmp_path, text), cwd=tmp_path)
    assert run.returncode == 1
    assert "Error: base_model='./not-there': there is no such folder" in run.stderr
    assert "Traceback" not in run.stderr
    missing = konic("train", tmp_path / "absent.py")
    assert "there is no such file" in missing.stderr


def test_a_module_level_agent_and_a_sibling_import_work(model_folders, tmp_path):
    script(tmp_path, f"MODEL = {model_folders['llama']!r}", "settings_here.py")
    text = (
        "from settings_here import MODEL\n"
        + SCRIPT.format(name="make", model=model_folders["llama"])
        + "agent = make()"
    )
    assert isinstance(load_agent(script(tmp_path, text, "other-name.py")), KonicFinetuningAgent)


def test_a_scripts_own_konic_error_stays_itself(tmp_path):
    text = "from konic.finetuning import TrainingConfig\nTrainingConfig(batch_sise=4)"
    with pytest.raises(ConfigError, match="Did you mean 'batch_size'"):
        load_agent(script(tmp_path, text))
