"""Models, datasets and runs that others made: nothing in them runs, and they read and write only where they are."""

import json
import logging
import os
import pty
import py_compile
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import peft
import pyarrow
import pyarrow.ipc
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaForSequenceClassification

import konic
from conftest import PROMPTS, byte_tokenizer, tiny_model
from konic.cli.scripts import import_script
from konic.finetuning import (
    BaseKonicFinetuningCallback,
    ConfigError,
    DatasetConfig,
    DatasetError,
    DatasetSource,
    HuggingFaceRewardModel,
    ModelError,
    OutputError,
)
from konic.finetuning.data.hub import read_hub
from konic.finetuning.data.loaders import is_local, read_local
from konic.finetuning.models import locations
from konic.finetuning.models.loading import load_model
from konic.finetuning.models.locations import locate_model
from konic.finetuning.reward_models.feedback import read_preferences
from konic.finetuning.reward_models.training import RewardTrainingConfig, train_reward_model
from konic.finetuning.rewards.workers import _Context
from konic.finetuning.run.checkpoint import read_record
from konic.finetuning.system import places
from konic.finetuning.system.files import (
    SEAL_FILE,
    filling_folder,
    find_corruption,
    replacing_file,
    replacing_folder,
    write_text,
)
from konic.finetuning.system.places import open_no_link
from test_engine import make_engine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_hangs():
    """A pipe that is read never ends: the test fails instead."""

    def hang(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def edit(path, **values):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


@pytest.fixture
def model(model_folders, tmp_path):
    return Path(shutil.copytree(model_folders["llama"], tmp_path / "model"))


@pytest.fixture(scope="module")
def adapter_folder(model_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny_model("llama", torch.float32), config).save_pretrained(folder)
    edit(folder / "adapter_config.json", base_model_name_or_path=model_folders["llama"])
    return folder


@pytest.fixture
def adapter(adapter_folder, tmp_path):
    return Path(shutil.copytree(adapter_folder, tmp_path / "adapter"))


# ---- code ----

ON_A_TERMINAL = """
    import sys, torch
    from konic.finetuning import DatasetConfig, HuggingFaceRewardModel
    from konic.finetuning.models.loading import load_model
    from konic.finetuning.reward_models.feedback import Preference
    from konic.finetuning.reward_models.training import RewardTrainingConfig, train_reward_model

    pairs = [Preference("p", f"chosen {n}", "rejected") for n in range(8)]
    calls = {
        "model": lambda name: load_model(name, {}, torch.device("cpu")),
        "base": lambda name: load_model(name, {"trust_remote_code": True}, torch.device("cpu")),
        "reward": lambda name: HuggingFaceRewardModel(name, device="cpu").score_batch(["p"], ["r"]),
        "fit": lambda name: train_reward_model(pairs, name, "out", RewardTrainingConfig(), device="cpu"),
    }
    for argument in sys.argv[1:]:
        call, name = argument.split("=")
        try:
            calls[call](name)
        except Exception as error:
            print("REFUSED", name, type(error).__name__, " ".join(str(error).split()))
"""


def test_on_a_terminal_nobody_is_asked_whether_a_models_code_may_run(model_folders, adapter, tmp_path):
    """Also where every question would be answered with yes."""
    for name in ("of-model", "of-tokenizer", "of-base", "of-reward", "of-reward-tokenizer", "of-fit"):
        folder = Path(shutil.copytree(model_folders["llama"], tmp_path / name))
        (folder / "mine.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / f'{name}-ran')!r}).touch()\n")
        if "tokenizer" in name:
            edit(folder / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.T", None]})
        else:
            kinds = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
            edit(folder / "config.json", model_type="mine", auto_map=dict.fromkeys(kinds, "mine.M"))
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "of-base"))
    asked = ["model=of-model", "model=of-tokenizer", "base=adapter", "reward=of-reward", "fit=of-fit"]
    here = {"PYTHONPATH": str(Path(konic.__file__).parents[1]), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    ours, theirs = pty.openpty()
    os.write(ours, b"y\n" * 20)
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ON_A_TERMINAL), *asked],
        stdin=theirs, capture_output=True, text=True, cwd=tmp_path, timeout=100,
        env={**os.environ, **here, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(ours)
    os.close(theirs)
    assert "[y/N]" not in child.stdout + child.stderr
    assert not list(tmp_path.glob("*-ran"))
    refused = [line for line in child.stdout.splitlines() if line.startswith("REFUSED")]
    assert len(refused) == len(asked), child.stdout + child.stderr
    assert all("ModelError" in line and "contains its own code" in line for line in refused)
    assert "does not reach through an adapter" in refused[2]


@pytest.mark.parametrize("value", [None, "false", "False", 0, 1, "yes"])
def test_trust_is_given_by_true_alone(model, value):
    with pytest.raises(ConfigError, match=r"trust_remote_code=.* is neither True nor False"):
        load_model(str(model), {"trust_remote_code": value}, CPU)
    with pytest.raises(ConfigError, match=r"trust_remote_code=.* is neither True nor False"):
        HuggingFaceRewardModel(str(model), model_kwargs={"trust_remote_code": value}, device="cpu")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_cannot_ask_for_native_code_of_the_hub(model, key):
    edit(model / "config.json", **{key: "someone/kernel"})
    with pytest.raises(ModelError, match=r"config\.json asks for 'someone/kernel', native code"):
        load_model(str(model), {}, CPU)
    with pytest.raises(ModelError, match="native code"):
        load_model(str(model), {"attn_implementation": "eager"}, CPU)


def test_native_code_of_the_hub_needs_trust_also_where_kernels_is_installed(model, tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("someone/kernel", "flash_attention_2", "flash_attention_3", {"": "flash_attention_2"}):
        with pytest.raises(ModelError, match=r"attn_implementation=.* fetches native code from the Hub"):
            load_model(str(model), {"attn_implementation": name}, CPU)
        with pytest.raises(ModelError, match=r"attn_implementation=.* fetches native code from the Hub"):
            HuggingFaceRewardModel(str(model), model_kwargs={"attn_implementation": name}, device="cpu")


def test_a_record_of_a_run_has_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "LARGEST_RECORD", 10)
    (tmp_path / "trainer_state.json").write_text('{"iteration": 1}')
    with pytest.raises(OutputError, match=r"trainer_state\.json has .* MB allowed"):
        read_record(tmp_path)


def test_a_compiled_copy_beside_a_script_is_not_run(tmp_path):
    """Who reads the script reads what runs: Python itself would take a copy with its size and time."""
    script = tmp_path / "rewards_of_others.py"
    script.write_text("found = 'hidden'\n")
    py_compile.compile(str(script))
    times = script.stat()
    script.write_text("found = 'shown!'\n")
    os.utime(script, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert import_script(script).found == "shown!"
    shutil.copyfile(next((tmp_path / "__pycache__").iterdir()), tmp_path / "compiled.pyc")
    with pytest.raises(ConfigError, match="is not a Python file"):
        import_script(tmp_path / "compiled.pyc")


def test_an_adapter_imports_no_module_that_it_names(adapter, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit(adapter / "adapter_config.json", megatron_config={"a": 1}, megatron_core="planted")
    with pytest.raises(ModelError, match="megatron_config is not supported"):
        make_engine(str(adapter), tmp_path / "run", lora=False).train(1)
    assert not (tmp_path / "ran").exists()


def test_a_dependency_with_a_known_hole_is_not_allowed():
    """Each was closed in the version given here."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for name, version in {"peft": (0, 20), "jinja2": (3, 1, 6), "filelock": (3, 20, 3), "datasets": (5, 0)}.items():
        lowest = re.search(rf'"{name}>=([0-9.]+)"', text).group(1)
        assert tuple(map(int, lowest.split("."))) >= version, name


def test_a_worker_without_a_process_kills_nothing(monkeypatch):
    killed = []
    monkeypatch.setattr(os, "killpg", lambda *group: killed.append(group))
    _Context().Process(target=print).terminate()
    assert killed == []


def test_a_tokenizer_of_another_model_is_one_error(model, tmp_path):
    rules = json.loads((model / "tokenizer.json").read_text())
    rules["model"]["vocab"]["e"] = 5000
    (model / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(ModelError, match=r"makes the token id 5000 of dataset row [0-9]+, outside the"):
        make_engine(str(model), tmp_path / "run").train(1)


# ---- reads ----


def test_a_file_of_a_dataset_that_is_elsewhere_is_refused(tmp_path):
    (tmp_path / "secret.txt").write_text("hf_secret\n")
    for number, target in enumerate(["/proc/self/environ", "../secret.txt", "/dev/zero", "gone.txt"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "train.txt").symlink_to(target)
        with pytest.raises(DatasetError, match=r"train\.txt (leads to|cannot be read|is not)"):
            read_local(str(folder))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "pairs.jsonl").symlink_to("/proc/self/environ")
    with pytest.raises(DatasetError, match=r"pairs\.jsonl leads to"):
        read_preferences(str(tmp_path / "sub"))


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.parquet", "a.txt.zst"])
def test_a_pipe_is_no_dataset(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for given in (tmp_path, tmp_path / name):
        with pytest.raises(DatasetError, match="is not a regular file"):
            read_local(str(given))


def test_links_that_the_user_gave_and_those_of_the_hubs_cache_are_followed(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "a.txt").write_text("one\n")
    (tmp_path / "big" / "b.txt").symlink_to("a.txt")
    (tmp_path / "data").symlink_to("big")
    (tmp_path / "named.txt").symlink_to("big/a.txt")
    cache = tmp_path / "datasets--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "0af3").write_text("one\n")
    (cache / "snapshots" / "rev" / "data").mkdir(parents=True)
    (cache / "snapshots" / "rev" / "data" / "train.txt").symlink_to("../../../blobs/0af3")
    assert len(read_local(str(tmp_path / "data"))) == 2
    assert len(read_local(str(tmp_path / "named.txt"))) == 1
    assert len(read_local(str(cache / "snapshots" / "rev" / "data"))) == 1
    shutil.move(cache / "blobs" / "0af3", tmp_path / "elsewhere")
    (cache / "blobs" / "0af3").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DatasetError, match="outside of the folder"):
        read_local(str(cache / "snapshots" / "rev" / "data"))


def test_a_saved_dataset_reads_no_file_outside_of_its_folder(tmp_path):
    arrow = "data-00000-of-00001.arrow"
    datasets.disable_progress_bars()
    for name in ("other", "names", "linked", "piped"):
        datasets.Dataset.from_dict({"prompt": [name]}).save_to_disk(tmp_path / name)
    datasets.enable_progress_bars()
    edit(tmp_path / "names" / "state.json", _data_files=[{"filename": f"../other/{arrow}"}])
    for name in ("linked", "piped"):
        (tmp_path / name / arrow).unlink()
    (tmp_path / "linked" / arrow).symlink_to(tmp_path / "other" / arrow)
    os.mkfifo(tmp_path / "piped" / arrow)
    (tmp_path / "splits").mkdir()
    edit(tmp_path / "splits" / "dataset_dict.json", splits=["../other"])
    assert read_local(str(tmp_path / "other")) == [{"prompt": "other"}]
    for name, split, said in (
        ("names", "train", "not a name inside"), ("linked", "train", "outside of the folder"),
        ("piped", "train", "not a regular file"), ("splits", "../other", "not a name inside"),
    ):  # fmt: skip
        with pytest.raises(DatasetError, match=said):
            read_local(str(tmp_path / name), split)


def test_a_saved_dataset_has_the_bounds_of_its_files(tmp_path):
    datasets.disable_progress_bars()
    for name in ("bomb", "other"):
        datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk(tmp_path / name)
    datasets.enable_progress_bars()
    (data,) = (tmp_path / "bomb").glob("*.arrow")
    table = pyarrow.table({"prompt": ["a" * 1_000_000] * 250})
    with pyarrow.ipc.new_stream(
        str(data), table.schema, options=pyarrow.ipc.IpcWriteOptions(compression="zstd")
    ) as file:
        file.write_table(table)
    with pytest.raises(DatasetError, match="far more than its"):
        read_local(str(tmp_path / "bomb"))
    (data,) = (tmp_path / "other").glob("*.arrow")
    data.rename(tmp_path / "other" / "data.bin")
    edit(tmp_path / "other" / "state.json", _data_files=[{"filename": "data.bin"}])
    with pytest.raises(DatasetError, match=r"only \.arrow files are read"):
        read_local(str(tmp_path / "other"))


def test_a_saved_dataset_opens_no_image_that_is_elsewhere(tmp_path):
    image = {"bytes": None, "path": str(Path(__file__).parents[1] / "docs" / "demo.png")}
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    datasets.disable_progress_bars()
    for name, kind, value in (("one", stored, image), ("many", datasets.List(stored), [image])):
        features = datasets.Features({"prompt": datasets.Value("string"), "seen": kind})
        rows = {"prompt": ["a"], "seen": [value]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / name)
    datasets.enable_progress_bars()
    opened = datasets.Features({"prompt": datasets.Value("string"), "seen": datasets.Image()})
    edit(tmp_path / "one" / "dataset_info.json", features=opened.to_dict())
    assert read_local(str(tmp_path / "one")) == [{"prompt": "a", "seen": image}]
    assert read_local(str(tmp_path / "many")) == [{"prompt": "a", "seen": [image]}]


NOT_ON_THE_HUB = [
    "clients/acme.csv", "clients/acme.xlsx", "clients/acme.csv.gz", "acme.docx", "runs/final", "out/final", "out/best",
    "out/checkpoint-30", "runs/acme", "a/b/c", "C:\\data\\acme", "~/acme", "./acme", "here/acme",
]  # fmt: skip


@pytest.mark.parametrize("name", NOT_ON_THE_HUB)
def test_a_name_that_looks_like_a_path_is_never_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_local(name)
    assert DatasetConfig(name=name).source is DatasetSource.LOCAL
    with pytest.raises(DatasetError, match="no such file or folder"):
        read_local(name)
    with pytest.raises(ModelError, match=r"no such (folder|GGUF)"):
        locate_model(name)


@pytest.mark.parametrize("name", ["gpt2", "org/model", "Qwen/Qwen2.5-0.5B", "org/phi-1.5", "openai/gsm8k", "best-of/x"])
def test_a_name_of_the_hub_is_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_local(name)
    assert locate_model(name) == name


@pytest.mark.parametrize("name", ["clients/acme.csv", "here/rows"])
def test_a_dataset_of_the_hub_cannot_be_a_file_or_a_folder_here(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "rows").mkdir(parents=True)
    with pytest.raises(DatasetError, match="the Hub is not asked"):
        read_hub(name, None, "train", None, None, streaming=False)


def test_an_adapters_base_that_looks_like_a_path_is_not_asked_of_the_hub_and_a_base_is_named(adapter, model, caplog):
    base = str(model)
    edit(adapter / "adapter_config.json", base_model_name_or_path="runs/final")
    with pytest.raises(ModelError, match=r"adapter_config\.json: base_model_name_or_path='runs/final'.*not asked"):
        load_model(str(adapter), {}, CPU)
    edit(adapter / "adapter_config.json", base_model_name_or_path=base)
    with caplog.at_level(logging.WARNING):
        load_model(str(adapter), {}, CPU)
    assert f"Its base model, which it names itself, is {base}." in caplog.text


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer_config.json", "config.json", "generation_config.json"]
)
def test_a_file_of_a_model_that_is_elsewhere_is_refused(model, adapter, name, tmp_path):
    for folder in (model, adapter):
        file = folder / name
        elsewhere = tmp_path / f"{folder.name}-{name}"
        if file.exists():
            shutil.move(file, elsewhere)
        else:
            elsewhere.write_text("hf_secret")
        file.symlink_to(elsewhere)
        with pytest.raises(ModelError, match=f"{name} leads to .*outside of the folder"):
            load_model(str(folder), {}, CPU)


def test_a_template_in_a_linked_folder_is_refused_and_linked_weights_are_not(model, tmp_path):
    shutil.move(model / "model.safetensors", tmp_path / "weights")
    (model / "model.safetensors").symlink_to(tmp_path / "weights")
    load_model(str(model), {}, CPU)
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "tool_use.jinja").write_text("hf_secret")
    (model / "additional_chat_templates").symlink_to(tmp_path / "templates")
    with pytest.raises(ModelError, match=r"tool_use\.jinja leads to"):
        load_model(str(model), {}, CPU)


def test_an_index_cannot_name_weights_elsewhere(model, tmp_path):
    names = list(load_file(model / "model.safetensors"))
    shutil.move(model / "model.safetensors", tmp_path / "other.safetensors")
    for shard in ("../other.safetensors", str(tmp_path / "other.safetensors")):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match=r"names .*outside of the folder"):
            load_model(str(model), {}, CPU)


def test_an_adapter_beside_a_model_loads_no_other_model(model, adapter, tmp_path):
    config = AutoConfig.from_pretrained(model)
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    byte_tokenizer("llama").save_pretrained(tmp_path / "classifier")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, tmp_path / "classifier")
    with pytest.raises(ModelError, match=r"has an adapter_config\.json"):
        HuggingFaceRewardModel(str(tmp_path / "classifier"), device="cpu").score_batch(["p"], ["r"])
    pairs = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(8)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    with pytest.raises(ModelError, match=r"has an adapter_config\.json"):
        train_reward_model(
            read_preferences(str(tmp_path / "pairs.json")), str(tmp_path / "classifier"), tmp_path / "out",
            RewardTrainingConfig(), device="cpu",
        )  # fmt: skip


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    """A file whose unpacking notes the folder that `transformers` would see, and its name."""
    monkeypatch.setenv("KONIC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "models").mkdir()
    file = tmp_path / "models" / "a.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    (tmp_path / "models" / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    seen = []

    class Model:
        @staticmethod
        def from_pretrained(source, gguf_file, **kwargs):
            seen.append((sorted(os.listdir(source)), gguf_file, kwargs["trust_remote_code"]))
            return Model()

        def save_pretrained(self, folder):
            (folder / "config.json").write_text("{}")

    monkeypatch.setattr(locations, "AutoModelForCausalLM", Model)
    monkeypatch.setattr(locations, "AutoTokenizer", Model)
    return file, seen


def test_what_lies_beside_a_gguf_is_not_read(gguf):
    file, seen = gguf
    locate_model(str(file))
    assert seen == [(["a.gguf"], "a.gguf", False)] * 2


def test_a_cache_that_others_can_write_is_not_trusted(gguf, tmp_path, monkeypatch):
    file, seen = gguf
    before = os.umask(0)
    try:
        folder = Path(locate_model(str(file)))
    finally:
        os.umask(before)
    assert locate_model(str(file)) == str(folder)
    assert len(seen) == 2
    for path in (folder.parent, folder, folder / "config.json"):
        mode = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode | 0o002)
        with pytest.raises(ModelError, match=f"{path}: can be written by everybody.*KONIC_CACHE"):
            locate_model(str(file))
        path.chmod(mode)
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    owner = folder.stat().st_uid
    if owner == 0:
        for path in (folder.parent, folder, folder / "config.json"):
            os.chown(path, 1234, -1)
    with pytest.raises(ModelError, match=r"belongs to another user.*KONIC_CACHE"):
        locate_model(str(file))


# ---- writes ----


@pytest.fixture
def outside(tmp_path):
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("000001.parquet", "000007.parquet", "precious.txt"):
        (folder / name).write_text("precious")
    return folder


def unchanged(outside):
    return {path.name: path.read_text() for path in outside.iterdir()} == dict.fromkeys(
        ("000001.parquet", "000007.parquet", "precious.txt"), "precious"
    )


@pytest.fixture(scope="module")
def a_run(model_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_engine(model_folders["llama"], folder).train(2, save_every=1)
    return folder


@pytest.fixture
def run(a_run, tmp_path):
    return Path(shutil.copytree(a_run, tmp_path / "run"))


def plant(path, outside):
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(outside)


@pytest.mark.parametrize("name", ["completions", "evaluations", "metrics.jsonl"])
def test_a_run_is_not_resumed_through_a_link_and_starts_anew_beside_it(name, run, model_folders, outside):
    plant(run / name, outside / "precious.txt" if "." in name else outside)
    engine = make_engine(model_folders["llama"], run)
    with pytest.raises(OutputError, match=f"{name}: is a link to .*nothing is written through it"):
        engine.train(3, resume_from_checkpoint=True)
    with pytest.raises(OutputError, match=f"{name}: is a link to "):
        engine.train(3, resume_from_checkpoint=run / "checkpoint-1")
    assert unchanged(outside)
    make_engine(model_folders["llama"], run).train(1)
    assert unchanged(outside)
    assert not (run / name).is_symlink()
    assert (run / "earlier-1" / name).is_symlink()


@pytest.mark.parametrize("name", ["trackers", "trackers/tensorboard", "trackers/runs.json"])
def test_a_tracker_writes_nothing_through_a_link(name, run, model_folders, outside):
    (run / "trackers").mkdir()
    plant(run / name, outside / "precious.txt" if "." in name else outside)
    with pytest.raises(OutputError, match=f"{name}: is a link to "):
        make_engine(model_folders["llama"], run).train(3, resume_from_checkpoint=True)
    assert unchanged(outside)


def test_a_file_that_becomes_a_link_while_it_is_written_is_not_followed(run, model_folders, outside):
    class Swap(BaseKonicFinetuningCallback):
        def on_iteration_begin(self, iteration):
            plant(run / "metrics.jsonl", outside / "precious.txt")

    with pytest.raises(OutputError, match=r"metrics\.jsonl: is a link to"):
        make_engine(model_folders["llama"], run, callback=Swap()).train(3, resume_from_checkpoint=True)
    assert unchanged(outside)
    with pytest.raises(OSError, match="symbolic link"):
        open_no_link(str(run / "metrics.jsonl"), os.O_WRONLY)
    with replacing_file(run / "page.html") as file:
        plant(run / ".page.html", outside / "precious.txt")
        file.write(b"mine")
    assert unchanged(outside)


@pytest.mark.parametrize("name", ["completions", "evaluations"])
def test_a_folder_that_becomes_a_link_while_the_run_goes_on_is_not_written_into(name, run, model_folders, outside):
    class Swap(BaseKonicFinetuningCallback):
        def on_iteration_begin(self, iteration):
            plant(run / name, outside)

    engine = make_engine(
        model_folders["llama"], run, callback=Swap(), dataset=DatasetConfig(prompts=PROMPTS, held_out=2), eval_every=1
    )
    with pytest.raises(OutputError, match=f"{name}: is a link to"):
        engine.train(1)
    assert unchanged(outside)


def test_half_written_files_that_are_links_are_removed_and_not_written_through(run, model_folders, outside):
    for name in (".run.json", ".metrics.jsonl", "completions/.000003.parquet", "completions/000003.parquet"):
        plant(run / name, outside / "precious.txt")
    for name in (".checkpoint-3-abc", ".final-abc", "broken-checkpoint-2", "final"):
        plant(run / name, outside)
    (run / "checkpoint-2" / SEAL_FILE).unlink()  # so that it is renamed to broken-checkpoint-2
    (run / "completions" / "1².parquet").touch()
    make_engine(model_folders["llama"], run).train(3, resume_from_checkpoint=True)
    assert unchanged(outside)
    assert not [path for path in run.rglob("*") if path.is_symlink() and "earlier-1" not in path.parts]
    assert (run / "completions" / "1².parquet").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint-2/trainer_state.json", "checkpoint-2/complete.json"])
def test_a_pipe_in_a_run_does_not_hang_a_resume(name, run, model_folders, caplog):
    (run / name).unlink()
    os.mkfifo(run / name)
    engine = make_engine(model_folders["llama"], run)
    if name == "metrics.jsonl":
        with pytest.raises(OutputError, match=r"metrics\.jsonl is not a regular file"):
            engine.train(3, resume_from_checkpoint=True)
    else:
        engine.train(3, resume_from_checkpoint=True)
        assert "is not a regular file" in caplog.text


def test_a_checkpoint_reads_nothing_outside_of_it(run, tmp_path):
    checkpoint = run / "checkpoint-2"
    (run / "checkpoint-1" / "trainer_state.json").unlink()
    os.mkfifo(run / "checkpoint-1" / "trainer_state.json")
    with pytest.raises(OutputError, match="not a regular file"):
        read_record(run / "checkpoint-1")
    shutil.move(checkpoint / "optimizer.safetensors", tmp_path / "elsewhere")
    (checkpoint / "optimizer.safetensors").symlink_to(tmp_path / "elsewhere")
    assert "outside of the folder" in find_corruption(checkpoint)


def test_a_lock_that_is_a_link_is_not_followed(run, model_folders, outside):
    (run / ".lock").symlink_to(outside / "made")
    with pytest.raises(OutputError):
        make_engine(model_folders["llama"], run).train(3, resume_from_checkpoint=True)
    assert unchanged(outside)


def test_a_run_folder_that_is_itself_a_link_is_used(run, model_folders, tmp_path):
    (tmp_path / "named").symlink_to(run)
    assert make_engine(model_folders["llama"], tmp_path / "named").train(3, resume_from_checkpoint=True)
    assert (run / "completions" / "000003.parquet").exists()


def test_a_model_is_not_saved_through_a_link(outside, tmp_path):
    target = tmp_path / "saved"
    target.mkdir()
    (target / "additional_chat_templates").symlink_to(outside)
    (target / "config.json").symlink_to(outside / "precious.txt")
    source = tmp_path / "source" / "additional_chat_templates"
    source.mkdir(parents=True)
    (source / "precious.txt").write_text("x")
    with (
        pytest.raises(OutputError, match="additional_chat_templates: is a link to"),
        filling_folder(target) as filled,
    ):
        shutil.copytree(source.parent, filled, dirs_exist_ok=True)
    with filling_folder(target) as filled:
        (filled / "config.json").write_text("x")
    assert unchanged(outside)


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o022])
def test_the_umask_holds_for_everything_that_is_written(mask, tmp_path, model_folders):
    before = os.umask(mask)
    try:
        with replacing_folder(tmp_path / "a" / "final") as folder:
            (folder / "weights").touch(mode=0o600)  # as safetensors makes its files
        write_text(tmp_path / "a" / "run.json", "{}")
        if mask == 0o077:
            make_engine(model_folders["llama"], tmp_path / "a" / "run").train(1)
    finally:
        os.umask(before)
    written = [tmp_path / "a", *(tmp_path / "a").rglob("*")]
    assert len(written) > 3
    for path in written:
        allowed = 0o777 & ~mask if path.is_dir() else 0o666 & ~mask
        assert stat.S_IMODE(path.stat().st_mode) | allowed == allowed, path
    assert stat.S_IMODE((tmp_path / "a" / "final").stat().st_mode) == 0o777 & ~mask
    assert stat.S_IMODE((tmp_path / "a" / "final" / "weights").stat().st_mode) == 0o666 & ~mask
