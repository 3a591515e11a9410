"""Help, completion, exit codes, and the words of the command line."""

import os
import subprocess
import sys

import pytest

from command import konic, konic_here, script
from konic.cli.completion import complete_run
from konic.cli.wording import as_of_set, with_config_names, with_options


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("train(max_iterations=-1): it must be", "--max-iterations -1: it must be"),
        ("resume with train(resume_from_checkpoint=...).", "resume with --resume."),
        ("with checkpoint_dir='runs/x', True", "with --output='runs/x', True"),
        ("or name another checkpoint_dir.", "or name another --output."),
        (
            "another run: train(..., allow_changes=True), konic train ... --allow-changes.",
            "another run: --allow-changes.",
        ),
        ("device='cud' is not a device", "--device 'cud' is not a device"),
        ("It is engine.train(max_iterations=...).", "It is --max-iterations."),
        ("It is engine.train(resume_from_checkpoint=...).", "It is --resume."),
        ("runs/max_iterations.txt, checkpoint_dir.py and 'save_every'", ""),
        ("train.max_iterations: it must be", ""),
        ("x.py: raised\n  engine.train(max_iterations=3)", ""),
    ],
)
def test_arguments_are_named_as_options(text, shown):
    assert with_options(text) == (shown or text)


def test_settings_are_named_as_they_are_set():
    text = "TrainingConfig(a=(1, 2), b=3): set DatasetConfig(held_out=...), GenerationConfig.stop or LoraConfig."
    shown = "training_config.a=(1, 2), training_config.b=3: set dataset_config.held_out=..., generation_config.stop or "
    assert with_config_names(text) == shown + "lora_config."
    assert as_of_set("TrainingConfig.seed: no; TrainingConfig.b", ["training_config.seed"]) == (
        "--set training_config.seed: no; training_config.b"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--help"], 0, ""),
        (["train", "absent.py"], 1, "there is no such file"),
        (["train", "."], 1, ".: is a folder. Name a Python or YAML file."),
        (["train", "absent.yaml"], 1, "there is no such file"),
        (["trian"], 2, "Did you mean 'train'?"),
        (["train", "x.py", "--max-iteration", 3], 2, "--max-iterations"),
        (["train"], 2, "Missing argument"),
        (["train", "stopped.py"], 130, ""),
        (["train", "fault.py", "--device", "cud"], 1, "--device 'cud' is not a device"),
    ],
)
def test_exit_codes(arguments, code, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script(tmp_path, "raise KeyboardInterrupt", "stopped.py")
    script(
        tmp_path,
        """
        from konic.finetuning import *
        class R(KonicLLMRewardComposer):
            @llm_reward
            def r(self, prompt, response): return 1.0
        agent = KonicFinetuningAgent(base_model="x", reward_composer=R())
        """,
        "fault.py",
    )
    run = konic_here(*arguments)
    assert run.returncode == code, run.stderr
    assert told in " ".join(run.stderr.replace("│", " ").split())
    assert "Traceback" not in run.stderr


def complete(line, cwd):
    environment = os.environ | {
        "_KONIC_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1),
    }  # fmt: skip
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'konic'; from konic.cli import main; main()"]
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)
    return done.stdout.split()


def test_a_shell_completes_commands_runs_and_weights(tmp_path, monkeypatch):
    for name in ("best", "final", "checkpoint-5"):
        (tmp_path / "runs" / "kind" / name).mkdir(parents=True)
    (tmp_path / "runs" / "kind" / "run.json").write_text("{}")
    (tmp_path / "runs" / "other").mkdir()
    assert {"train", "init"} <= set(complete("konic ", tmp_path))
    assert complete("konic report ru", tmp_path) == ["runs/kind"]
    assert complete("konic generate runs/kind --weights ch", tmp_path) == ["checkpoint-5"]
    assert "--max-iterations" in complete("konic train --max", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert complete_run("") == complete_run("runs/k") == ["runs/kind"]
    assert complete_run("nowhere/") == complete_run("/proc/self/mem/") == []
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # the shell is the one named
    assert "complete -o default -F" in konic("--show-completion", "bash").stdout


def test_the_module_is_the_command_and_takes_nothing_from_the_current_folder(tmp_path):
    (tmp_path / "typer.py").write_text("print('taken')")
    done = konic("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout.startswith("konic "), done.stderr) == (0, True, "")
