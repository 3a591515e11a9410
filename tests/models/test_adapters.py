"""Adapters of PEFT beyond plain LoRA: right as plain PEFT has them, or one error that names the option."""

import json
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import ROUNDING
from transformers import AutoModelForCausalLM

from conftest import loaded_model, shake_adapter
from families import IDS, differences, largest, learner_of, logits_of
from family_models import EXPERTS, FAMILIES, LATENT, save_base
from konic.finetuning import ConfigError, LoraConfig, ModelError
from konic.finetuning.models.adapter_config import peft_config
from konic.finetuning.models.adapters import attach_adapter
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.loading import load_model
from konic.finetuning.models.merging import merge_into_base
from konic.finetuning.models.policy import Policy
from konic.finetuning.models.policy_files import save_policy

ATTENTION = ["q_proj", "v_proj"]
ADAPTERS = {
    "tokens of a tied model": ("qwen2", {"trainable_token_indices": [66, 67]}),
    "tokens of a tied head": ("qwen2", {"trainable_token_indices": {"lm_head": [66, 67]}}),
    "other tokens at both ends": (
        "gpt2",
        {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [66, 67], "lm_head": [33]}},
    ),
    "tokens": ("llama", {"trainable_token_indices": [66, 67]}),
    "tied head": ("qwen2", {"target_modules": ["q_proj", "lm_head"]}),
    "tied embedding": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}),
    "both of a tied model": ("qwen2", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied head of GPT-2": ("gpt2", {"target_modules": ["c_attn", "lm_head"]}),
    "tied embedding of Gemma": ("gemma3_text", {"target_modules": ["q_proj", "embed_tokens"]}),
    "whole head of a tied model": ("qwen2", {"modules_to_save": ["lm_head"]}),
    "whole embedding of a tied model": ("qwen2", {"modules_to_save": ["embed_tokens"]}),
    "norms": ("llama", {"modules_to_save": ["norm", "input_layernorm"]}),
    "dora": ("qwen2", {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}),
    "lora_bias": ("qwen2", {"lora_bias": True}),
    "ranks": ("llama", {"use_rslora": True, "rank_pattern": {"v_proj": 2}}),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "olora": ("llama", {"init_lora_weights": "olora"}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "mica": ("llama", {"init_lora_weights": "mica"}),
    "whole blocks": ("llama", {"modules_to_save": ["mlp"]}),
    "dropout": ("llama", {"lora_dropout": 0.5}),
    "experts": ("mixtral", {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}),
}


def adapter(**options):
    return peft.LoraConfig(**{"r": 4, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"} | options)


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:fan_in_fan_out is set to"
)  # plain PEFT's
@pytest.mark.filterwarnings(r"ignore:Adapter '\w+'. \d+ LoRA tensor.s. have invalid shape")
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_switched_off_merged_saved_and_gone_on_from_without_a_difference(name, tmp_path):
    kind, options = ADAPTERS[name]
    base = save_base(kind, tmp_path / "base")
    found = differences(base, tmp_path, adapter(**options))
    assert {check: value for check, value in found.items() if value > ROUNDING} == {}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    saved = logits_of(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval())
    policy = learner_of(tmp_path / "adapter", None)[0].policy
    assert largest(logits_of(policy.model), saved) < ROUNDING
    shake_adapter(policy)
    assert largest(logits_of(policy.model), saved) > 0.01
    with policy.reference() as reference, torch.no_grad():
        hidden = reference.decode(IDS, torch.ones_like(IDS, dtype=torch.bool), torch.arange(IDS.shape[1])[None])
        assert largest(policy.reference_logits(hidden), saved) < ROUNDING
    assert not any("start" in weight for weight in policy.trainable())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is not supported"),
        ({"ensure_weight_tying": True, "modules_to_save": ["lm_head"]}, "ensure_weight_tying is not supported"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication is not supported"),
        ({"lora_bias": True}, r"lora_bias=True needs layers with a bias, and model.layers.0.self_attn.q_proj has none"),
        ({"init_lora_weights": "eva"}, "init_lora_weights='eva' starts from data"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda' starts from data"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights='pissa_niter_4' starts from data or random numbers",
        ),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save: 'lm_haed' matches no module .* Did you mean 'lm_head'"),
        ({"trainable_token_indices": [9999]}, "index 9999 is out of bounds"),
        ({"layers_to_transform": [7]}, r"layers_to_transform=\[7\] names layers that .* Its layers: 0 to 1\."),
        ({"layers_to_transform": 2}, "layers_to_transform=2 names layers that LlamaForCausalLM does not have"),
        ({"layers_to_transform": [1, 7]}, "layers_to_transform: layer 7 has none of the target_modules. .*: 1."),
        ({"target_modules": r".*\.nothing"}, r"target_modules=.* matches no layer of LlamaForCausalLM.*: .*q_proj"),
        ({"target_modules": "q_proj"}, r'A text is a regular expression for the whole name .* write .*\["q_proj"\]'),
        ({"target_modules": "all_linear"}, "target_modules='all_linear' .* Did you mean 'all-linear'"),
        ({"target_modules": ["all-linear"]}, 'Write target_modules="all-linear"'),
        ({"target_modules": ""}, "target_modules='' matches no layer"),
        ({"target_modules": "*bad("}, "target_modules=.* is not a regular expression"),
        ({"modules_to_save": "lm_head"}, r'modules_to_save must be a list. Write \["lm_head"\]'),
        ({"exclude_modules": ["v_porj"]}, "exclude_modules: 'v_porj' matches no module .* Did you mean 'v_proj'"),
        ({"exclude_modules": r".*v_porj"}, "exclude_modules: .* matches no module"),
        ({"exclude_modules": "*bad("}, "exclude_modules: .* is not a regular expression"),
        ({"rank_pattern": {"q_porj": 2}}, "rank_pattern: 'q_porj' matches no adapted layer. Did you mean 'q_proj'"),
        ({"alpha_pattern": {"k_proj": 2}}, "alpha_pattern: 'k_proj' matches no adapted layer"),
        ({"rank_pattern": {"*bad(": 2}}, "multiple repeat|nothing to repeat"),
        (
            {"target_parameters": ["mlp.up_porj.weight"]},
            "target_parameters: 'mlp.up_porj.weight' matches no parameter .* Did you mean 'mlp.up_proj.weight'",
        ),
        (
            {"target_parameters": ["mlp.up_proj.weight"], "target_modules": ["q_porj"]},
            "target_modules: 'q_porj' matches no layer .* Did you mean 'q_proj'",
        ),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices: index -1 is out of bounds"),
        ({"trainable_token_indices": {"lm_head": [-1]}}, "trainable_token_indices: index -1 is out of bounds"),
        ({"lora_alpha": 0}, "lora_alpha=0 multiplies what it names by 0"),
        ({"alpha_pattern": {"q_proj": 0}}, r"alpha_pattern=\{'q_proj': 0\} multiplies .* Use a positive number"),
        ({"task_type": peft.TaskType.TOKEN_CLS}, "task_type='TOKEN_CLS' is for another kind of model"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS' is for another kind of model"),
        ({"velora_config": peft.VeloraConfig()}, "velora_config has no effect: .* Leave it out"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:`init_lora_weights` is")
def test_an_option_that_cannot_be_right_is_one_error_that_names_it(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        Policy(loaded_model("llama", torch.float32), adapter(**options))
    assert "Traceback" not in str(error.value)


def test_dora_on_a_row_of_zeros_is_refused_before_anything_is_sampled():
    loaded = loaded_model("llama", torch.float32)
    with torch.no_grad():
        loaded.model.lm_head.weight[258] = 0  # as a tied head has for the padding token
    with pytest.raises(ConfigError, match=r"use_dora=True divides by the norm .* lm_head has a row of zeros"):
        Policy(loaded, adapter(use_dora=True, target_modules=["q_proj", "lm_head"]))


def test_the_config_of_a_saved_adapter_starts_a_new_one(tmp_path):
    peft.get_peft_model(loaded_model("llama").model, adapter()).save_pretrained(tmp_path)
    saved = peft.LoraConfig.from_pretrained(tmp_path)
    assert saved.inference_mode
    policy = Policy(loaded_model("llama"), saved)
    assert any("lora_A" in name for name in policy.trainable())
    assert saved.inference_mode  # the user's own config stays as it was


def test_a_saved_adapter_names_the_revision_of_its_base(tmp_path):
    save_policy(Policy(replace(loaded_model("llama"), revision="v1"), adapter()), tmp_path)
    saved = peft.LoraConfig.from_pretrained(tmp_path)
    assert saved.revision == "v1"
    with pytest.raises(ConfigError, match=r"lora_config: revision='v1' is not the revision .* Set model_kwargs="):
        Policy(loaded_model("llama"), saved)


def test_an_adapter_that_peft_itself_cannot_run_is_one_error():
    with pytest.raises(ConfigError, match="lora_config: GPT2LMHeadModel cannot be run with this adapter: RuntimeError"):
        Policy(loaded_model("gpt2", torch.float32), adapter(target_modules=["c_attn"], init_lora_weights="olora"))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's
def test_a_start_that_rewrites_a_tied_weight_is_one_error(tmp_path):
    save_base("qwen2", tmp_path)
    loaded = load_model(str(tmp_path), {}, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"with the untrained adapter, the logits .* Set init_lora_weights=True"):
        Policy(loaded, adapter(target_modules=["q_proj", "lm_head"], init_lora_weights="pissa"))


def test_an_adapter_that_peft_does_not_find_again_on_loading_is_one_error(tmp_path):
    save_base("laguna", tmp_path)
    loaded = load_model(str(tmp_path), {}, torch.device("cpu"))
    with pytest.raises(
        ConfigError, match=r"PEFT saves an adapter of model.layers.1.mlp.shared_experts.\w+, and does not find it again"
    ):
        Policy(loaded, LoraConfig())
    assert Policy(load_model(str(tmp_path), {}, torch.device("cpu")), adapter()).uses_lora


def test_a_saved_adapter_that_peft_reads_in_part_is_one_error(tmp_path, monkeypatch):
    saved_adapter(tmp_path)
    read = peft.set_peft_model_state_dict
    monkeypatch.setattr(
        "peft.peft_model.set_peft_model_state_dict",
        lambda model, weights, *args, **kwargs: read(
            model, {name: weight for name, weight in weights.items() if "v_proj" not in name}, *args, **kwargs
        ),
    )
    with pytest.raises(ModelError, match=r"PEFT does not read '\S+v_proj\S+' as adapter_model.safetensors holds it"):
        continued(tmp_path)


def test_an_adapter_that_changes_the_base_at_random_is_not_gone_on_from(tmp_path):
    base = save_base("llama", tmp_path / "base")
    peft.get_peft_model(base, adapter(init_lora_weights="pissa_niter_4")).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    values = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    config.write_text(json.dumps(values))
    with pytest.raises(
        ModelError, match="init_lora_weights='pissa_niter_4' changes the base model by data or random numbers"
    ):
        Policy(load_model(str(tmp_path / "adapter"), {}, torch.device("cpu")), None)


def saved_adapter(folder, kind="llama", resized=False, saving=None, changes=None, **options):
    """A trained adapter that plain PEFT has saved, beside its base model; the model with the adapter."""
    base = save_base(kind, folder / "base")
    if resized:
        base.resize_token_embeddings(280)
    model = peft.get_peft_model(base, adapter(**options)).eval()
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    with torch.no_grad():
        for weight in (weight for weight in model.parameters() if weight.requires_grad):
            weight.add_(torch.randn(weight.shape) * 0.05)
    model.save_pretrained(folder / "adapter", **(saving or {}))
    config = folder / "adapter/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | (changes or {})))
    return model


def merged(folder):
    base = load_model(str(folder / "base"), {}, torch.device("cpu"))
    return merge_into_base(attach_adapter(base.model, folder / "adapter"))


def continued(folder):
    return Policy(load_model(str(folder / "adapter"), {}, torch.device("cpu")), None)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("qwen2", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", {"saving": {"save_embedding_layers": True}}),
        ("llama", {"modules_to_save": ["lm_head"], "saving": {"save_embedding_layers": True}}),
    ],
)
def test_an_adapter_saved_with_copies_of_the_embeddings_is_continued_and_merged(kind, options, tmp_path):
    expected = logits_of(saved_adapter(tmp_path, kind, **options))
    assert largest(logits_of(continued(tmp_path).model), expected) < ROUNDING
    assert largest(logits_of(merged(tmp_path)), expected) < ROUNDING


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_an_adapter_with_trained_biases_is_merged_with_them(bias, tmp_path):
    expected = logits_of(saved_adapter(tmp_path, "qwen2", bias=bias))
    assert largest(logits_of(merged(tmp_path)), expected) < ROUNDING
    with pytest.raises(ModelError, match=f"bias='{bias}'"):
        continued(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda weight: weight * float("nan"), r"weights \S+q_proj\S+ are not finite .* Use an undamaged adapter"),
        (lambda weight: weight[:1].contiguous(), "the adapter cannot be loaded|has the rank|have the rank"),
        (None, r"q_proj\S+ and 0 more are in only one of the two files"),
    ],
)
@pytest.mark.parametrize("read", ["continued", "merged"])
def test_a_damaged_adapter_is_the_same_error_whether_continued_or_merged(read, damage, message, tmp_path):
    saved_adapter(tmp_path)
    file = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in sorted(weights) if "q_proj.lora_A" in name)
    weights |= {name: damage(weights[name])} if damage else {}
    if damage is None:
        del weights[name]
    save_file(weights, file)
    with pytest.raises(ModelError, match=message) as error:
        globals()[read](tmp_path)
    assert str(error.value).startswith(str(tmp_path / "adapter"))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:`lora_bias=True` was passed")
@pytest.mark.filterwarnings("ignore:`init_lora_weights` is '(corda|lora_ga)' but")
@pytest.mark.filterwarnings(r"ignore:Adapter '\w+'. \d+ LoRA tensor.s. have invalid shape")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resized": True}, "its embeddings were trained or resized. Merge this adapter"),
        ({"resized": True, "modules_to_save": ["lm_head"]}, "its embeddings were trained or resized. Merge this"),
        (
            {"init_lora_weights": "pissa", "target_modules": ["q_proj", "lm_head"]},
            "its embeddings were trained or resized. Merge this adapter",
        ),
        ({"lora_bias": True}, "lora_bias=True needs layers with a bias, and .* train the adapter again"),
        ({"changes": {"rank_pattern": None}}, "the adapter cannot be loaded: AttributeError"),
        ({"changes": {"target_modules": "*bad("}}, "the adapter cannot be loaded"),
        ({"changes": {"layers_pattern": "x"}}, "the adapter cannot be loaded: ValueError: .*layers_to_transform"),
        ({"changes": {"init_lora_weights": "loftq"}}, "the adapter cannot be loaded: .*(scipy|loftq_config)"),
        ({"changes": {"init_lora_weights": "corda"}}, "init_lora_weights='corda' changes the base model .* Merge this"),
        ({"changes": {"init_lora_weights": "lora_ga"}}, "init_lora_weights='lora_ga' changes the base model"),
        ({"changes": {"lora_alpha": 0}}, "lora_alpha=0 multiplies what it names by 0, .* Merge this adapter"),
        (
            {"changes": {"r": 8}},
            r"adapter_config.json says r=8 for \S+q_proj, but its weights have the rank \d\. Use both",
        ),
        ({"changes": {"rank_pattern": {r"layers\.1\..*q_proj": 5}}}, r"says r=5 for \S+layers.1\S+q_proj, but"),
        ({"r": 2, "rank_pattern": {"q_proj": 3}, "changes": {"rank_pattern": {}}}, "says r=2 for .* the rank 3"),
    ],
)
def test_a_saved_adapter_that_cannot_be_continued_is_one_error(options, message, tmp_path):
    saved_adapter(tmp_path, **options)
    with pytest.raises(ModelError, match=message) as error:
        continued(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "adapter"))
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva' but")
@pytest.mark.parametrize("start", ["eva", False, "gaussian"])
def test_how_a_saved_adapter_once_started_does_not_matter(start, tmp_path):
    expected = logits_of(saved_adapter(tmp_path, changes={"init_lora_weights": start}))
    assert largest(logits_of(continued(tmp_path).model), expected) < ROUNDING


def test_the_advice_about_a_saved_adapter_is_not_about_lora_config(tmp_path):
    saved_adapter(tmp_path, trainable_token_indices=[-1])
    with pytest.raises(ConfigError, match=r"cannot be run with this adapter: IndexError.* Train the adapter again"):
        continued(tmp_path)


def test_peft_names_the_default_layers_of_some_models_by_a_pattern(tmp_path):
    save_base("gemma4", tmp_path)
    names = list(Policy(load_model(str(tmp_path), {}, torch.device("cpu")), LoraConfig()).trainable())[:-2]
    assert names
    assert all("language_model" in name and ("q_proj" in name or "v_proj" in name) for name in names)


def test_all_linear_leaves_out_a_layer_that_its_router_never_calls(tmp_path, monkeypatch):
    sizes = (
        EXPERTS | LATENT | {"ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "moe_topk": 2, "zero_expert_num": 2}
    )
    monkeypatch.setitem(FAMILIES, "longcat_flash", ("", sizes))
    save_base("longcat_flash", tmp_path)
    loaded = load_model(str(tmp_path), {}, torch.device("cpu"))
    layers = {name for name, layer in loaded.model.named_modules() if name.endswith("router.classifier")}
    assert layers
    assert peft_config(LoraConfig(target_modules="all-linear"), loaded.model).exclude_modules == layers
    Policy(loaded, LoraConfig(target_modules="all-linear"))


@pytest.mark.parametrize("kind", ["phimoe", "llama4_text"])
def test_an_adapted_router_is_one_error_and_all_linear_leaves_routers_out(kind, tmp_path):
    save_base(kind, tmp_path)
    with pytest.raises(ConfigError, match="routers cannot be adapted"):
        Policy(load_model(str(tmp_path), {}, torch.device("cpu")), LoraConfig(target_modules=["q_proj", "router"]))
    policy = Policy(load_model(str(tmp_path), {}, torch.device("cpu")), LoraConfig())
    assert not any("router" in name for name in policy.trainable())


def test_layers_that_read_no_text_are_refused(tmp_path):
    save_base("gemma3", tmp_path)
    with pytest.raises(ConfigError, match="take no part when Gemma3ForConditionalGeneration reads text"):
        Policy(load_model(str(tmp_path), {}, torch.device("cpu")), LoraConfig(target_modules=["out_proj"]))


@pytest.mark.parametrize("kind", ["falcon", "phimoe", "mixtral"])
def test_in_16_bits_too_nothing_is_random_under_gradient_checkpointing(kind, tmp_path):
    save_base(kind, tmp_path)
    loaded = load_model(str(tmp_path), {"dtype": torch.bfloat16}, torch.device("cpu"))
    policy = Policy(loaded, LoraConfig(), gradient_checkpointing=True)
    ids, mask = IDS.repeat(2, 1), torch.ones(2, IDS.shape[1], dtype=torch.bool)
    with torch.no_grad():
        expected = policy.language_model.response_hidden(ids, mask, 4)
    with policy.saving_memory():
        assert torch.equal(policy.language_model.response_hidden(ids, mask, 4), expected)


def test_gradient_checkpointing_without_layers_for_it_is_one_error(monkeypatch):
    monkeypatch.setattr(LanguageModel, "checkpointed_layers", [])
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no layers that support it"):
        Policy(loaded_model("llama"), LoraConfig(), gradient_checkpointing=True)
