import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from conftest import shake_adapter, tiny_learner
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.prepacked import Prepacking, layouts
from konic.finetuning.rollout.fused_decoder import FusedDecoder
from konic.finetuning.rollout.fused_transformer import can_be_fused, fused_transformer

VOCABULARY = 50
PROMPT_LENGTHS = {"padded": (1, 7, 4), "equal": (5, 5, 5), "one token": (1, 1, 1)}
STEPS = 6

ROPE = {"rope_theta": 100.0}
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
KNOWN = {
    "gpt2": (GPT2Config, {}),
    "gpt2 with relu": (GPT2Config, {"activation_function": "relu"}),
    "gpt2 with a narrow MLP": (GPT2Config, {"n_inner": 40}),
    "gpt2 untied": (GPT2Config, {"tie_word_embeddings": False}),
    "llama": (LlamaConfig, {}),
    "llama without grouped queries": (LlamaConfig, {"num_key_value_heads": 4}),
    "llama with one key head": (LlamaConfig, {"num_key_value_heads": 1}),
    "llama with biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama with wide heads": (LlamaConfig, {"head_dim": 12}),
    "llama with linear rope": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, **ROPE}}),
    "llama with llama3 rope": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, **LLAMA3_ROPE, **ROPE}},
    ),
    "llama with yarn rope": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **ROPE}},
    ),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral with wide heads": (MistralConfig, {"sliding_window": None, "head_dim": 12}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "qwen3 with wide heads": (Qwen3Config, {"head_dim": 12, "attention_bias": True}),
    "qwen2 whose window no layer uses": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"] * 2},
    ),
}
UNKNOWN = {
    "mistral with a window": (MistralConfig, {"sliding_window": 4}),
    "mistral with a window beside layer types": (
        MistralConfig,
        {"sliding_window": 4, "layer_types": ["full_attention"] * 2},
    ),
    "qwen2 with a window": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3 with a window": (Qwen3Config, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "llama with dynamic rope": (LlamaConfig, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **ROPE}}),
    "llama with gelu": (LlamaConfig, {"hidden_act": "gelu"}),
    "gpt2 scaled by layer": (GPT2Config, {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2 without scaling": (GPT2Config, {"scale_attn_weights": False}),
    "gpt2 with cross-attention": (GPT2Config, {"add_cross_attention": True}),
    "gpt_neox": (GPTNeoXConfig, {}),
}


def model_of(kind, options, dtype=torch.float64):
    """A model in which no bias is 0 and no norm's weight is 1, so that each of them matters."""
    if kind is GPT2Config:
        size = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    else:
        size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        size["max_position_embeddings"] = 64
        if kind is not GPTNeoXConfig:
            size["num_key_value_heads"] = 2
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}
    causal_lm = AutoModelForCausalLM.from_config(kind(**common, **{**size, **options}))
    with torch.no_grad():
        for weight in causal_lm.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.3)
    return LanguageModel(causal_lm.to(dtype).eval())


def sequences_of(lengths, count=STEPS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (length + count,), generator=generator) for length in lengths]


def left_padded(prompts, pad=3):
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, True
    return ids, mask


@torch.no_grad()
def decoded(decoder, sequences, lengths):
    """Hidden states [B, steps + 1, H] and logits [B, steps + 1, V] after each prompt and each token past it."""
    prompts = [sequence[:length] for sequence, length in zip(sequences, lengths, strict=True)]
    hidden = [decoder.prefill(*left_padded(prompts))]
    for step in range(len(sequences[0]) - lengths[0]):
        tokens = torch.stack([sequence[length + step] for sequence, length in zip(sequences, lengths, strict=True)])
        hidden.append(decoder.step(tokens, torch.ones(len(tokens), dtype=torch.bool)))
    return torch.stack(hidden, dim=1), torch.stack([decoder.logits(h) for h in hidden], dim=1)


@torch.no_grad()
def of_whole_passes(model, sequences, lengths):
    """The same from the model's own pass over each sequence alone, without padding."""
    hidden, logits = [], []
    for sequence, length in zip(sequences, lengths, strict=True):
        hidden.append(model.causal_lm.base_model(sequence[None]).last_hidden_state[0, length - 1 :])
        logits.append(model.causal_lm(sequence[None]).logits[0, length - 1 :])
    return torch.stack(hidden), torch.stack(logits)


@pytest.mark.parametrize("lengths", PROMPT_LENGTHS.values(), ids=PROMPT_LENGTHS)
@pytest.mark.parametrize("name", KNOWN)
def test_hidden_states_and_logits_are_those_of_whole_passes_without_padding(name, lengths):
    model = model_of(*KNOWN[name])
    assert can_be_fused(model)
    sequences = sequences_of(lengths)
    hidden, logits = decoded(FusedDecoder(model, fused_transformer(model, None), STEPS), sequences, lengths)
    expected_hidden, expected_logits = of_whole_passes(model, sequences, lengths)
    assert (hidden - expected_hidden).abs().max() < 1e-9
    assert (logits - expected_logits).abs().max() < 1e-9


@pytest.mark.parametrize("layout", [layout for layout in layouts() if layout != "plain"])
@pytest.mark.parametrize("name", ["gpt2", "gpt2 untied", "llama", "llama with biases", "llama tied", "qwen2", "qwen3"])
def test_packed_products_give_the_same_to_rounding(name, layout):
    model, lengths = model_of(*KNOWN[name], dtype=torch.float32), PROMPT_LENGTHS["padded"]
    before = {key: weight.clone() for key, weight in model.causal_lm.state_dict().items()}
    sequences = sequences_of(lengths)
    expected_hidden, expected_logits = of_whole_passes(model, sequences, lengths)
    decoder = FusedDecoder(model, fused_transformer(model, Prepacking(len(lengths), layout)), STEPS)
    hidden, logits = decoded(decoder, sequences, lengths)
    assert (hidden - expected_hidden).abs().max() < 1e-4
    assert (logits - expected_logits).abs().max() < 1e-4
    assert all(weight.equal(before[key]) for key, weight in model.causal_lm.state_dict().items())


def test_scale_and_softcap_apply_to_the_fused_logits():
    model = model_of(*KNOWN["llama"])
    model.scale, model.softcap = 0.5, 2.0
    lengths = PROMPT_LENGTHS["padded"]
    sequences = sequences_of(lengths)
    _, logits = decoded(FusedDecoder(model, fused_transformer(model, None), STEPS), sequences, lengths)
    _, plain = of_whole_passes(model, sequences, lengths)
    assert (logits - 2.0 * torch.tanh(plain * 0.5 / 2.0)).abs().max() < 1e-9


def test_sixteen_bits_give_fp32_logits_near_the_models_own():
    model, lengths = model_of(*KNOWN["llama"], dtype=torch.bfloat16), PROMPT_LENGTHS["padded"]
    sequences = sequences_of(lengths)
    hidden, logits = decoded(FusedDecoder(model, fused_transformer(model, None), STEPS), sequences, lengths)
    expected_hidden, expected_logits = of_whole_passes(model, sequences, lengths)
    assert hidden.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert (hidden - expected_hidden).abs().mean() < 0.03 * expected_hidden.abs().mean()
    assert (logits - expected_logits).abs().mean() < 0.03 * expected_logits.abs().mean()


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_shape_that_is_not_known_is_not_fused(name):
    assert not can_be_fused(model_of(*UNKNOWN[name]))


def test_an_adapter_is_fused_only_once_it_is_merged(architecture):
    policy = tiny_learner(architecture).policy
    shake_adapter(policy)
    model, lengths = policy.language_model, PROMPT_LENGTHS["padded"]
    sequences = sequences_of(lengths)
    expected_hidden, expected_logits = of_whole_passes(model, sequences, lengths)
    assert not can_be_fused(model)
    with policy.merged_adapter():
        assert can_be_fused(model)
        decoder = FusedDecoder(model, fused_transformer(model, None), STEPS)
    hidden, logits = decoded(decoder, sequences, lengths)
    assert (hidden - expected_hidden).abs().max() < 1e-9
    assert (logits - expected_logits).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_head_that_may_compute_anything_is_asked_and_not_packed(name):
    class OwnHead(nn.Linear):
        def forward(self, x):
            return super().forward(x).square()

    model, lengths = model_of(*KNOWN[name]), PROMPT_LENGTHS["padded"]
    model.causal_lm.set_output_embeddings(OwnHead(32, VOCABULARY, bias=False, dtype=torch.float64))
    sequences = sequences_of(lengths)
    with model.prepacked_head(len(lengths)):
        _, logits = decoded(FusedDecoder(model, fused_transformer(model, None), STEPS), sequences, lengths)
    assert (logits - of_whole_passes(model, sequences, lengths)[1]).abs().max() < 1e-9
    assert (logits >= 0).all()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_heads_bias_counts(name):
    model, lengths = model_of(*KNOWN[name]), PROMPT_LENGTHS["padded"]
    model.causal_lm.set_output_embeddings(nn.Linear(32, VOCABULARY, dtype=torch.float64))
    sequences = sequences_of(lengths)
    _, logits = decoded(FusedDecoder(model, fused_transformer(model, None), STEPS), sequences, lengths)
    assert (logits - of_whole_passes(model, sequences, lengths)[1]).abs().max() < 1e-9
