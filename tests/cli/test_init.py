"""What `konic init` writes is trained as it is."""

import os

import pytest

from command import konic_here
from konic.cli.jobs import load_job

SHORT = (
    "--set", "training_config.batch_size=2", "--set", "generation_config.max_new_tokens=4",
    "--set", "dataset_config.held_out=2", "--max-iterations", 1, "--device", "cpu",
)  # fmt: skip


@pytest.mark.parametrize("file", ["job.yaml", "job.py"])
def test_what_is_written_is_trained_as_it_is(file, model_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = konic_here("init", "new/job", "--model", model_folders["llama"])
    assert made.returncode == 0, made.stderr
    assert sorted(os.listdir("new/job")) == ["job.py", "job.yaml", "my_rewards.py"]
    run = konic_here("train", f"new/job/{file}", "--output", "out", *SHORT)
    assert run.returncode == 0, run.stderr
    assert "[Iter    1]" in run.stdout


def test_both_files_are_the_same_job_of_the_packaged_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my prompts.csv").write_text("text,label\na,0\nb,1\n")
    assert konic_here("init", "x", "--dataset", "my prompts.csv", "--column", "te: xt").returncode == 0
    settings = [load_job(tmp_path / "x" / name).agent.settings(uses_lora=True) for name in ("job.yaml", "job.py")]
    assert settings[0] == settings[1]
    assert settings[0]["model_name"] == "smollm2-135m"
    assert settings[0]["dataset_config"]["name"] == str(tmp_path / "my prompts.csv")
    assert settings[0]["dataset_config"]["prompt_column"] == "te: xt"


def test_no_file_is_overwritten(tmp_path):
    (tmp_path / "job.py").symlink_to("nowhere")
    run = konic_here("init", tmp_path)
    assert run.returncode == 1
    assert "job.py: it exists, and nothing is overwritten" in run.stderr
    assert os.listdir(tmp_path) == ["job.py"]
    (tmp_path / "file").write_text("")
    blocked = konic_here("init", tmp_path / "file" / "x")
    assert (blocked.returncode, "cannot be written" in blocked.stderr) == (1, True)


def test_a_column_is_one_of_a_dataset(tmp_path):
    made = konic_here("init", tmp_path / "x", "--column", "text")
    assert made.returncode == 2 and "give --dataset too" in made.stderr
    assert not (tmp_path / "x").exists()


def test_what_it_says_to_run_next_can_be_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = konic_here("init", "my job")
    assert "Next: konic rewards 'my job/job.yaml', then konic train 'my job/job.yaml'" in made.stdout
    (tmp_path / "my run").mkdir()
    (tmp_path / "my run" / "run.json").write_text("{}")
    assert "--output 'my run' and --resume" in konic_here("train", "my run").stderr


def test_without_a_folder_it_writes_into_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = konic_here("init")
    assert made.returncode == 0, made.stderr
    assert sorted(os.listdir()) == ["job.py", "job.yaml", "my_rewards.py"]
