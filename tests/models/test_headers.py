"""The claims of a stranger's files are compared with the files before anything is built."""

import json
import resource
import shutil
import struct
import time

import peft
import pytest
import torch

from conftest import byte_tokenizer, loaded_model, tiny_model
from konic.finetuning import ConfigError, HuggingFaceRewardModel, LoraConfig, ModelError
from konic.finetuning.models import adapter_config, headers
from konic.finetuning.models.headers import gguf_header
from konic.finetuning.models.loading import load_model
from konic.finetuning.models.locations import locate_model
from konic.finetuning.models.policy import Policy

CPU = torch.device("cpu")


def text(value):
    return struct.pack("<Q", len(value)) + value


def gguf(*values, tensors=0, count=None, rest=b""):
    count = len(values) if count is None else count
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + b"".join(values) + rest


def array(kind, count, rest=b""):
    return text(b"a") + struct.pack("<IIQ", 9, kind, count) + rest


def tensor(*shape, kind=0):
    return text(b"w") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, 0)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (gguf(array(0, 2**40)), "1099511627776 values in a list"),
        (gguf(array(8, 2**40)), "1099511627776 values in a list"),
        (gguf(array(9, 2**40)), "1099511627776 values in a list"),
        (gguf(array(9, 1, struct.pack("<IQ", 0, 4))), "unknown type 9"),
        (gguf(array(0, 5_000_000, bytes(5_000_000))), "more than 4000000 values"),
        (gguf(count=2**60), "values, more than the file"),
        (gguf(tensors=2**60), "tensors, more than the file"),
        (gguf(struct.pack("<Q", 2**62) + bytes(20)), "bytes of text"),
        (gguf(text(b"a") + struct.pack("<IQ", 99, 0)), "unknown type 99"),
        (gguf(tensors=1, rest=text(b"w") + struct.pack("<I", 2**31) + bytes(64)), "dimensions"),
        (gguf(tensors=1, rest=tensor(2**20, 2**20)), "bytes of tensors"),
        (gguf(tensors=3, rest=tensor(64) * 3 + bytes(256)), "bytes of tensors"),  # each has the same 256 bytes
        (gguf(tensors=1, rest=tensor(1, kind=999) + bytes(64)), "unknown type 999"),
        (b"GGUF\3\0", "ends within its header"),
        (b"GGML" + bytes(60), "does not begin with GGUF"),
        (b"GGUF\0\0\0\3" + bytes(60), "version"),
    ],
)
def test_a_gguf_file_cannot_claim_more_than_it_holds(content, problem, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    start = time.monotonic()
    with pytest.raises(ModelError, match=rf"model\.gguf: is not a complete GGUF file: .*{problem}"):
        locate_model(str(tmp_path / "model.gguf"))
    assert time.monotonic() - start < 2


def test_a_whole_gguf_file_is_measured(tmp_path):
    values = array(8, 2, text(b"x") + text(b"")), array(5, 3, bytes(12)), text(b"n") + struct.pack("<II", 4, 7)
    (tmp_path / "model.gguf").write_bytes(gguf(*values, tensors=2, rest=tensor(4, 8) + tensor(32, kind=2) + bytes(146)))
    header = gguf_header(tmp_path / "model.gguf")
    assert (header.num_tensors, header.num_elements) == (2, 64)


def changed_model(folder, architecture, **changes):
    tiny_model(architecture, torch.float32).save_pretrained(folder)
    byte_tokenizer(architecture).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


CLAIMS = [
    ("llama", {"num_hidden_layers": 10**6}),
    ("llama", {"num_hidden_layers": 10**5}),
    ("llama", {"hidden_size": 10**6}),
    ("llama", {"vocab_size": 10**9}),
    ("llama", {"num_labels": 10**9}),
    ("gpt2", {"n_layer": 10**9}),
    ("gpt2", {"n_positions": 10**9}),
]


@pytest.mark.parametrize(("architecture", "claim"), CLAIMS, ids=str)
@pytest.mark.parametrize("load", [lambda name: load_model(name, {}, CPU), HuggingFaceRewardModel])
def test_a_config_cannot_claim_a_larger_model_than_the_weights(architecture, claim, load, tmp_path):
    folder = changed_model(tmp_path / "model", architecture, **claim)
    start, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=r"config\.json: (num_\w+|n_layer|the config describes a far larger model)"):
        load(folder)
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000  # kB


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        ("[]", "has no .weight_map.|is damaged"),
        ('{"weight_map": {"w": "../outside.safetensors"}}', "outside of the folder"),
    ],
)
def test_an_index_names_files_beside_it(index, problem, tmp_path):
    folder = changed_model(tmp_path / "model", "llama")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=rf"base_model=.*model\.safetensors\.index\.json.*{problem}"):
        load_model(folder, {}, CPU)


def test_a_config_cannot_hide_its_weights_from_the_comparison(tmp_path):
    folder = changed_model(tmp_path / "model", "llama", num_hidden_layers=5000, transformers_weights="w.safetensors")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "w.safetensors")
    with pytest.raises(ModelError, match="far larger model"):
        load_model(folder, {}, CPU)


def test_the_header_of_a_safetensors_file_has_a_bound(tmp_path, monkeypatch):
    folder = changed_model(tmp_path / "model", "llama")
    monkeypatch.setattr(headers, "_LARGEST_HEADER", 100)
    with pytest.raises(ModelError, match=r"model\.safetensors: its header has .* MB, which no list of weights needs"):
        load_model(folder, {}, CPU)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    base = changed_model(folder / "base", "llama")
    model = load_model(base, {}, CPU).model
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder / "adapter"


BACKTRACKS = "(([a-z_.0-9]+)+)+!"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"r": 10**6}, "have the rank 4"),
        ({"r": 10**12}, "have the rank 4"),
        ({"rank_pattern": {"q_proj": 10**6}}, "have the rank 4"),
        ({"target_modules": BACKTRACKS}, "target_modules: the regular expression .* takes more than"),
        ({"exclude_modules": BACKTRACKS}, "exclude_modules: the regular expression"),
        ({"rank_pattern": {BACKTRACKS: 4}}, "rank_pattern: the regular expression"),
        (
            {"layers_to_transform": [0], "layers_pattern": f"layers{BACKTRACKS}"},
            "layers_pattern: the regular expression",
        ),
        ({"target_modules": "a" * 10_001}, "more than 10000 characters"),
    ],
    ids=str,
)
def test_an_adapter_cannot_claim_more_than_its_weights_or_backtrack(changes, problem, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_config, "_PATTERN_SECONDS", 0.5)
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    start, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = load_model(str(folder), {}, CPU)
    with pytest.raises(ModelError, match=problem):
        Policy(loaded, None)
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000  # kB


def test_all_expressions_of_an_adapter_share_one_process_and_its_time(monkeypatch):
    calls, run = [], adapter_config.subprocess.run
    monkeypatch.setattr(
        adapter_config.subprocess, "run", lambda *args, **kwargs: calls.append(1) or run(*args, **kwargs)
    )
    monkeypatch.setattr(adapter_config, "_PATTERN_SECONDS", 0.5)
    patterns = {f"{i}+": 4 for i in range(300)}
    model = loaded_model("llama").model
    adapter_config.require_quick_patterns(peft.LoraConfig(rank_pattern=patterns), model)
    with pytest.raises(ConfigError, match=r"rank_pattern: the regular expression '\(\(\["):
        adapter_config.require_quick_patterns(peft.LoraConfig(rank_pattern=patterns | {BACKTRACKS: 4, "z+": 4}), model)
    assert len(calls) == 2


def test_an_expression_of_ones_own_is_tried_too(monkeypatch):
    monkeypatch.setattr(adapter_config, "_PATTERN_SECONDS", 0.5)
    with pytest.raises(ConfigError, match="takes more than"):
        Policy(loaded_model("llama"), LoraConfig(target_modules=BACKTRACKS))
    Policy(loaded_model("llama"), LoraConfig(target_modules=r".*\.(q|v)_proj"))
