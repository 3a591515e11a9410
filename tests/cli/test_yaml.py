"""Jobs in YAML: what they may hold, and that a stranger's file costs little and runs nothing."""

import hashlib
import json
import os
import subprocess
import sys
import time

import pytest

from command import konic_here, script
from konic.cli.documents import Document
from konic.cli.jobs import load_job, load_rewards
from konic.finetuning import ConfigError, DatasetSource

REWARDS = """
from konic.finetuning import KonicLLMRewardComposer, llm_reward

class Brief(KonicLLMRewardComposer):
    @llm_reward
    def brief(self, prompt, response):
        return -len(response) / 80

class Other(Brief):
    def __init__(self, most=80, **arguments):
        super().__init__(**arguments)
        self.most = most

made = Brief()
number = 5

def build(weight):
    return Brief(reward_weights={"brief": weight})

def nothing():
    return None
"""
JOB = """\
base_model: any
reward_composer: my_rewards.py:Brief
dataset_config:
  prompts: [a, b, c]
"""


def job(folder, text=JOB, name="job.yaml"):
    script(folder, REWARDS, "my_rewards.py")
    path = folder / name
    path.write_bytes(text) if isinstance(text, bytes) else path.write_text(text)
    return path


def refused(path):
    with pytest.raises(ConfigError) as caught:
        load_job(path)
    return str(caught.value)


def test_a_yaml_file_trains_into_its_folder_and_run_json_names_it(model_folders, tmp_path, monkeypatch):
    (tmp_path / "jobs").mkdir()
    os.symlink(model_folders["llama"], tmp_path / "jobs" / "tiny")
    text = JOB.replace("any", "tiny") + (
        "lora_config: {r: 2}\ntraining_config:\n  batch_size: 2\n  learning_rate: 1e-3\n"
        "generation_config: {max_new_tokens: 4, max_prompt_length: 16}\n"
        "train: {max_iterations: 1, output: out, device: cpu, save_every: 1}\n"
    )
    path = job(tmp_path / "jobs", text)
    monkeypatch.chdir(tmp_path)
    run = konic_here("train", "jobs/job.yaml", "--set", "training_config.seed=3")
    assert run.returncode == 0, run.stderr
    assert "training_config.seed = 3 (the file: " in run.stderr
    record = json.loads((tmp_path / "jobs" / "out" / "run.json").read_text())
    assert record["job"] == {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert record["rewards"]["file"] == str(tmp_path / "jobs" / "my_rewards.py")
    assert (record["settings"]["seed"], record["settings"]["learning_rate"]) == (3, 0.001)
    assert (tmp_path / "jobs" / "out" / "checkpoint-1").is_dir()
    resumed = konic_here("train", "jobs/job.yaml", "--set", "training_config.seed=3", "--resume", "--max-iterations", 2)
    assert resumed.returncode == 0, resumed.stderr
    assert "[Iter    2]" in resumed.stdout


@pytest.mark.parametrize(
    ("composer", "weights"),
    [
        ("my_rewards.py:Brief", {}),
        ("my_rewards.py:made", {}),
        ("my_rewards.py", {}),
        ("my_rewards:Brief", {}),
        ("{path: 'my_rewards.py:Other', arguments: {most: 3, kl_penalty_weight: 0.1}}", {}),
        ("{path: 'my_rewards.py:build', arguments: {weight: 2.5}}", {"brief": 2.5}),
    ],
)
def test_a_composer_is_found_by_its_import_path(composer, weights, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    path = job(tmp_path, JOB.replace("my_rewards.py:Brief", composer))
    found = load_job(path).agent.get_reward_composer()
    assert found._reward_weights == weights
    assert type(load_rewards(path)[0]).__name__ == type(found).__name__
    if "Other" in composer:
        assert (found.most, found.kl_penalty_weight) == (3, 0.1)


@pytest.mark.parametrize(
    ("composer", "told"),
    [
        ("my_rewards.py:Brif", "line 2: reward_composer: my_rewards.py has no 'Brif'. Did you mean 'Brief'?"),
        ("absent.py:Brief", "there is no file"),
        ("Brief", "give file.py:Name or package.module:Name"),
        ("my_rewards.py:number", "is int 5, not a composer"),
        ("my_rewards.py:nothing", "gives NoneType, not a KonicLLMRewardComposer"),
        ("my_rewards.py:build", "raised TypeError while it was loaded"),
        ("no_such_package.rewards:Brief", "No module named 'no_such_package'"),
        ("{path: 'my_rewards.py:made', arguments: {most: 1}}", "is made already"),
        (
            "{path: 'my_rewards.py:Brief', arguments: {reward_weights: {brief: x}}}",
            "job.yaml, line 2: reward_composer: ",
        ),
        ("{pth: 'my_rewards.py:Brief'}", "line 2: reward_composer has no key 'pth'. Did you mean 'path'?"),
        ("[1]", "give file.py:Name"),
        ("{path: 'torch:save', arguments: {obj: 1, f: ran}}", "function of an installed package"),
        ("{path: 'psutil:Popen', arguments: {args: 'touch ran', shell: true}}", "not a composer"),
        ("{path: 'subprocess:run', arguments: {args: 'touch ran', shell: true}}", "is a module of Python itself"),
    ],
)
def test_a_composer_that_cannot_be_used_is_one_message(composer, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(job(tmp_path, JOB.replace("my_rewards.py:Brief", composer)))
    assert told in message and message.count("job.yaml") == 1
    assert not (tmp_path / "ran").exists()


def test_a_job_of_an_installed_class_runs_no_file_beside_it(tmp_path):
    """Modules that are imported later would be taken from there."""
    for name in ("datasets", "peft", "matplotlib", "colorsys"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    file = job(tmp_path, JOB.replace("my_rewards.py:Brief", "konic.cli.init:Nothing"))
    lines = ["import sys", "from pathlib import Path", "from konic.cli.jobs import load_job", "try:",
             f"    load_job(Path({str(file)!r}))", "except Exception as error:", "    print(error)",
             "import colorsys, datasets, peft"]  # fmt: skip
    child = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=100)
    assert "konic.cli.init has no 'Nothing'" in child.stdout, child.stderr
    assert child.returncode == 0 and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["antigravity", "this", "idlelib.idle"])
def test_a_job_imports_no_module_of_python_itself(name, tmp_path):
    """Some of them do something when they are imported, such as opening a browser."""
    told = "is a module of Python itself, which has no rewards"
    assert told in refused(job(tmp_path, JOB.replace("my_rewards.py:Brief", f"{name}:Rewards")))
    assert name not in sys.modules


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("trainig_config: {}", "line 5: there is no key 'trainig_config'. Did you mean 'training_config'?"),
        ("batch_size: 4", "line 5: there is no key 'batch_size'. It belongs under training_config:."),
        ("max_iterations: 4", "It belongs under train:."),
        (
            "training_config:\n  seed: 1\n  batch_sise: 4",
            "line 7: training_config has no field 'batch_sise'. Did you mean 'batch_size'?",
        ),
        ("training_config:\n  seed: 1\n  batch_size: many", "line 7: training_config.batch_size: it must be a whole"),
        ("train:\n  max_iteration: 4", "line 6: train has no field 'max_iteration'. Did you mean 'max_iterations'?"),
        ("train:\n  max_iterations: -4", "line 6: train.max_iterations: it must be at least 0"),
        ("train:\n  resume: true", "line 6: train.resume: it is given on the command line, as --resume"),
        ("training_config:\n  eval_every: 2", "line 6: training_config.eval_every=2 needs prompts to evaluate on"),
        ("training_config:\n  batch_size: 3\n  num_minibatches: 2", "line 6: "),
        ("training_config: 4", "line 5: training_config must be a mapping, got int 4"),
        ("model_kwargs:\n  trust_remote_code: true", "line 6: model_kwargs.trust_remote_code: a YAML file cannot"),
        ("model_kwargs:\n  token: hf_secret", "line 6: model_kwargs.token: a token does not belong into a file"),
        ("base_model: other", "line 5: 'base_model' is given twice, also in line 1"),
        ("training_config: {seed: 1, seed: 2}", "line 5: 'seed' is given twice, also in line 5"),
        ("training_config:\n\tseed: 1", "line 6: a tab: YAML is indented by spaces"),
        ("training_config:\n  filter_equal_groups: no", "line 6: no is a boolean in YAML 1.1 and text in 1.2"),
        ("training_config:\n  seed: 010", "line 6: 010 can be several numbers in YAML"),
        ("lora_config: None", "line 5: None is text in YAML. Write null"),
        ("training_config:\n  learning_rate: .nan", "training_config.learning_rate: it must be "),
        ("a: b: c", "line 5: a second `:` in one line"),
        ("training_config: {seed: 1", "expected ',' or '}'"),
        ("--- \nbase_model: x", "a second document starts"),
        ("x: !!python/object/apply:os.system [true]", "line 5: the tag tag:yaml.org,2002:python/object/apply:os.sys"),
        ("<<: {seed: 1}", "<< is not supported"),
        ("? [1, 2]\n: 3", "a key must be a word"),
        ("x: *nowhere", "undefined alias"),
        ("x: &a [*a]", "make it endless"),
        ("x: " + "[" * 30 + "]" * 30, "nested more than 20 deep"),
        ("x: &a 1\ny: [" + "*a, " * 2000 + "]", "more than 20 aliases"),
        ("x: \x01", "line 5: the character '\\x01' is not allowed"),
        ("x: " + "y" * 300_000, "may have 256 KB"),
    ],
)
def test_a_mistake_in_yaml_is_one_line_with_its_number(more, told, tmp_path):
    message = refused(job(tmp_path, JOB + more + "\n"))
    assert told in message
    assert message.startswith(str(tmp_path / "job.yaml"))
    assert "\n" not in message
    assert "hf_secret" not in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "it must hold settings"),
        (b"- a\n- b\n", "it must hold settings"),
        (b"just text", "it must hold settings"),
        (b"reward_composer: a:b\n", "it has no base_model"),
        (b"base_model: x\n", "it has no reward_composer"),
        (b"base_model: 5\nreward_composer: my_rewards.py:Brief\n", "line 1: base_model must be a text, got int 5"),
        ("base_model: x\nname: Grün".encode("latin-1"), "line 2: it is not UTF-8"),
        ("base_model: x".encode("utf-16"), "it is not UTF-8"),
    ],
)
def test_a_file_that_is_no_job_is_one_line(text, told, tmp_path):
    assert told in refused(job(tmp_path, text))


def test_a_file_that_unpacks_to_billions_is_refused_at_once(tmp_path):
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 2)}]" for n in range(1, 11)]
    wide = ["w: &w [" + "1, " * 4000 + "]", "x: [" + "*w, " * 19 + "]"]
    started = time.process_time()
    for lines in (levels, wide):
        with pytest.raises(ConfigError, match=r"aliases \(\*name\)|there is no key"):
            load_job(job(tmp_path, JOB + "\n".join(lines)))
    assert time.process_time() - started < 20


NEARLY_NUMBERS = ["1" * 200_000 + "x", "1" + "_" * 200_000 + "x", "0x" + "f" * 200_000, "1:" * 99_999 + "1x"]


@pytest.mark.parametrize("value", NEARLY_NUMBERS, ids=["digits", "underscores", "hexadecimal", "sixties"])
def test_a_long_value_is_text_and_read_at_once(value, tmp_path):
    (tmp_path / "x.yaml").write_text(f"a: {value}\n")
    started = time.process_time()
    assert Document(tmp_path / "x.yaml").values == {"a": value}
    assert time.process_time() - started < 10  # a quadratic pattern takes half an hour


def test_many_values_that_are_nearly_numbers_are_read_at_once(tmp_path):
    (tmp_path / "x.yaml").write_text("a:\n" + f"- {'1' * 900}x\n" * 280)
    started = time.process_time()
    assert len(Document(tmp_path / "x.yaml").values["a"]) == 280
    assert time.process_time() - started < 10


def test_values_are_what_they_look_like(tmp_path):
    (tmp_path / "x.yaml").write_text(
        "\ufeffa: 1e-3\nb: 2024-01-01\nc: ~\nd: 'no'\ne: true\nf: 12\ng: -.5\nh: 1:30x\ni: |\n  two\n  lines\n"
        "j: 007x\nk: [y, n]\nl: '010'\nm: 1.\n",
        encoding="utf-8",
    )
    assert Document(tmp_path / "x.yaml").values == {
        "a": 0.001, "b": "2024-01-01", "c": None, "d": "no", "e": True, "f": 12, "g": -0.5, "h": "1:30x",
        "i": "two\nlines\n", "j": "007x", "k": ["y", "n"], "l": "010", "m": 1.0,
    }  # fmt: skip


def test_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    folder = tmp_path / "jobs"
    (folder / "model").mkdir(parents=True)
    (folder / "rows.txt").write_text("a\nb\n")
    (tmp_path / "elsewhere").mkdir()
    text = JOB.replace("any", "model").replace("prompts: [a, b, c]", "name: rows.txt\n  prompt_column: text")
    path = job(folder, text + "train: {output: out}\n")
    monkeypatch.chdir(tmp_path)
    loaded = load_job(path)
    assert loaded.agent.get_base_model() == str(folder / "model")
    assert loaded.options.output == str(folder / "out")
    dataset = loaded.agent.get_dataset_config()
    assert (dataset.source, dataset.name) == (DatasetSource.LOCAL, str(folder / "rows.txt"))
    assert load_job(job(folder)).agent.get_base_model() == "any"  # of the Hub
    message = refused(job(folder, JOB.replace("any", "elsewhere")))
    assert "line 1: 'elsewhere' is not in the folder of this file, but in the current folder" in message


def test_rewards_takes_yaml(model_folders, tmp_path):
    path = job(
        tmp_path,
        JOB.replace("any", model_folders["llama"]) + "generation_config: {max_new_tokens: 4, max_prompt_length: 16}\n",
    )
    (tmp_path / "texts.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": "cc"}\n')
    for more in (["--samples", 2, "--device", "cpu"], ["--texts", tmp_path / "texts.jsonl"]):
        run = konic_here("rewards", path, *more)
        assert run.returncode == 0, run.stderr
        assert "brief" in run.stdout
