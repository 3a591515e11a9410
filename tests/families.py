"""Tiny random models of every family that docs/families.md lists, and how far konic's numbers are from plain ones.

`python tests/families.py docs/families.md` writes the page.
"""

import copy
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import byte_tokenizer, prompt_batch, roll, shake_adapter
from konic.finetuning import KonicError, KonicFinetuningAgent, KonicLLMRewardComposer, LoraConfig
from konic.finetuning.learning.learner import build_learner
from konic.finetuning.models.policy_files import save_merged, save_model
from konic.finetuning.models.positions import position_ids
from konic.finetuning.rollout.local_sampler import draw, uniforms
from konic.finetuning.rollout.sampler import RandomKey

SIZES = {
    "vocab_size": 272, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.2,
    "bos_token_id": 257, "eos_token_id": 0, "pad_token_id": 258,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_d_ssm": 64,
    "mamba_dt_rank": 4, "use_mamba_kernels": False, "shared_intermediate_size": 32,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
FAMILIES = {
    "llama": ("dense", {}),
    "gpt2": ("dense, learned positions, Conv1D", GPT),
    "gpt_neo": ("dense, local attention", {
        "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8,
    }),
    "gpt_neox": ("dense, parallel blocks", {}),
    "gptj": ("dense, partly rotated heads", GPT | {"rotary_dim": 4}),
    "gpt_bigcode": ("dense, one key-value head", GPT),
    "opt": ("dense, learned positions with an offset", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": ("dense, ALiBi", {"n_layer": 2, "n_head": 4}),
    "mpt": ("dense, ALiBi", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}),
    "falcon": ("dense, parallel blocks, dropout from the config", {
        "hidden_dropout": 0.1, "attention_dropout": 0.1, "head_dim": None,
    }),
    "phi": ("dense, parallel blocks", {}),
    "phi3": ("dense, longrope within its short length", {
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 64,
        },
    }),
    "mistral": ("dense, sliding window", {"sliding_window": 8}),
    "ministral3": ("dense, attention scaled by position", {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    }),
    "qwen2": ("dense, tied head", {"tie_word_embeddings": True}),
    "qwen3": ("dense, normed queries and keys", {}),
    "gemma2": ("dense, sliding window, soft caps", {
        "sliding_window": 8, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8,
    }),
    "gemma3_text": ("dense, sliding window, tied head", {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3": ("text part of a multimodal model", {
        "text_config": SIZES | {"sliding_window": 8, "query_pre_attn_scalar": 8}, "vision_config": VISION,
        "mm_tokens_per_image": 4, "image_token_index": 270, "boi_token_index": 268, "eoi_token_index": 269,
    }),
    "gemma4": ("text part of a multimodal model", {
        "text_config": SIZES | {
            "sliding_window": 8, "vocab_size_per_layer_input": 272, "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8,
        },
        "vision_config": VISION, "image_token_id": 270,
    }),
    "olmo2": ("dense, norms after the layers", {}),
    "granite": ("dense, scaled logits", {"logits_scaling": 8.0}),
    "cohere2": ("dense, sliding window, scaled logits", {"sliding_window": 8, "logit_scale": 0.25}),
    "smollm3": ("dense, some layers without positions", {}),
    "glm4": ("dense, partly rotated heads", {}),
    "persimmon": ("dense, dropout from the config", {"hidden_dropout": 0.1}),
    "stablelm": ("dense, partly rotated heads", {}),
    "mixtral": ("mixture of experts, noise in the router", EXPERTS | {"router_jitter_noise": 0.1}),
    "phimoe": ("mixture of experts, noise in the router", EXPERTS),
    "qwen3_moe": ("mixture of experts", EXPERTS),
    "qwen2_moe": ("mixture of experts, shared expert", EXPERTS),
    "granitemoe": ("mixture of experts", EXPERTS),
    "olmoe": ("mixture of experts", EXPERTS),
    "gpt_oss": ("mixture of experts, sliding window, attention sinks", EXPERTS | {
        "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
    }),
    "deepseek_v3": ("mixture of experts, latent attention", EXPERTS | LATENT),
    "llama4_text": ("mixture of experts, chunked attention", EXPERTS | {
        "attention_chunk_size": 8, "intermediate_size_mlp": 64, "attn_temperature_tuning": False,
        "no_rope_layers": [1, 0], "layer_types": ["chunked_attention", "full_attention"],
    }),
    "lfm2": ("hybrid: convolutions", {
        "layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False,
    }),
    "jamba": ("hybrid: Mamba", EXPERTS | MAMBA | {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    }),
    "bamba": ("hybrid: Mamba 2", MAMBA | {"attn_layer_indices": [1]}),
    "falcon_h1": ("hybrid: Mamba 2", MAMBA),
    "granitemoehybrid": ("hybrid: Mamba 2", EXPERTS | MAMBA | {"layer_types": ["mamba", "attention"]}),
    "qwen3_next": ("hybrid: linear attention", EXPERTS | {
        "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    }),
    "minimax": ("hybrid: linear attention", EXPERTS),
    "recurrent_gemma": ("hybrid: linear recurrence", {
        "lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"],
    }),
    "mamba": ("state space", {"state_size": 4, "time_step_rank": 4}),
    "falcon_mamba": ("state space", {"state_size": 4, "time_step_rank": 4}),
    "rwkv": ("state space", {"attention_hidden_size": 32, "context_length": 128}),
    "modernbert-decoder": ("dense, a head of several layers", {}),
}  # fmt: skip
"""Name in `transformers` -> what is special about it, and its sizes beside :data:`SIZES`."""
PROMPTS = ("ab", "the film was", "x", "a longer prompt than the others here")
IDS = torch.tensor([[5, 40, 77, 100, 13, 200, 9, 31, 62, 8]])
TEMPERATURE = 0.8


def save_base(kind, folder):
    """Write a random model with a byte tokenizer; return the model as plain `transformers` loads it."""
    sizes = FAMILIES[kind][1]
    sizes = sizes if "text_config" in sizes else SIZES | sizes
    config = AutoConfig.for_model(kind, **{name: size for name, size in sizes.items() if size is not None})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1 and weight.std() < 0.1:  # some families ignore initializer_range
                weight.normal_(std=0.2)
    model.save_pretrained(folder)
    byte_tokenizer("llama").save_pretrained(folder)
    return model


def learner_of(folder, lora):
    def length(prompt, response):
        return float(len(response))

    agent = KonicFinetuningAgent(
        str(folder), KonicLLMRewardComposer(reward_functions=[length]), lora, {"prompts": ["a"]},
        {"batch_size": 4, "gradient_checkpointing": True},
        {"max_new_tokens": 6, "max_prompt_length": 40, "temperature": TEMPERATURE, "eos_token_id": 271},
    )  # fmt: skip
    return build_learner(agent, torch.device("cpu")), agent.get_generation_config()


@torch.no_grad()
def logits_of(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits.float()


def largest(one, other):
    return (one - other).abs().max().item()


def sampled_difference(learner, generation, plain):
    """How far log-probs are from plain passes over each row alone: the sampler's, the trainer's; and the exact KL.

    The tokens drawn from the plain passes must be those sampled.
    """
    batch, rng_key = prompt_batch(learner, PROMPTS, 40), RandomKey(0, 1)
    rollout = roll(learner, batch, generation, rng_key)
    worst = 0.0
    for row in range(len(batch)):
        tokens = rollout.samples.response_ids[row][rollout.response_mask[row]]
        ids = torch.cat([batch.ids[row][batch.mask[row]], tokens])[None]
        logits = logits_of(plain, ids)[0, -len(tokens) - 1 : -1] / TEMPERATURE
        expected = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        worst = max(worst, largest(expected, rollout.log_probs[row, : len(tokens)]))
        numbers = uniforms(rng_key, batch.prompts[row].row, batch.sample_indices[row], generation.max_new_tokens)
        drawn = draw(logits, torch.from_numpy(np.asarray(numbers[: len(tokens)])))
        assert drawn.tolist() == tokens.tolist(), "a plain forward pass draws other tokens"
    return worst, rollout


def trained_numbers(policy, rollout):
    """The trainer's log-probs, and the gradients of their sum."""
    model, tokens = policy.language_model, rollout.samples.response_ids
    for weight in policy.trainable().values():
        weight.grad = None
    with policy.saving_memory():
        hidden = model.response_hidden(rollout.ids, rollout.mask, tokens.shape[1])
        log_probs = (model.logits(hidden) / TEMPERATURE).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        (log_probs * rollout.response_mask).sum().backward()
    return log_probs.detach(), {name: w.grad.clone() for name, w in policy.trainable().items() if w.grad is not None}


def check_training(policy, rollout):
    """The largest first log-ratio, with and without gradient checkpointing, whose gradients must be the same."""
    checkpointed, gradients = trained_numbers(policy, rollout)
    policy._gradient_checkpointing = False
    plain, expected = trained_numbers(policy, rollout)
    assert expected
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, name
    both = [largest(found * rollout.response_mask, rollout.log_probs) for found in (checkpointed, plain)]
    return max(both)


def differences(base, folder, lora):
    """Name of a check -> the largest difference of log-probs or logits from plain `transformers` and PEFT."""
    learner, generation = learner_of(folder / "base", lora)
    policy, found = learner.policy, {}
    found["sampler"], rollout = sampled_difference(learner, generation, base)
    found["first log-ratio"] = check_training(policy, rollout)
    found["first KL"] = rollout.kl.max().item()
    shake_adapter(policy)
    own = logits_of(policy.model)
    assert largest(own, logits_of(base)) > 0.01
    with policy.reference() as reference, torch.no_grad():
        mask = torch.ones_like(IDS, dtype=torch.bool)
        hidden = reference.decode(IDS, mask, position_ids(mask))
    found["reference"] = largest(policy.reference_logits(hidden), logits_of(base))
    save_merged(policy, folder / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    found["saved"] = largest(logits_of(merged), own)
    found["sampler, trained"], _ = sampled_difference(learner, generation, merged)
    if lora is not None:
        save_model(policy, folder / "adapter")
        plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "adapter")
        found["adapter"] = largest(logits_of(plain.eval()), own)
    return found


def examine(kind):
    """The differences of a family by LoRA and full finetuning, or the message with which it is refused."""
    transformers.logging.disable_progress_bar()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = save_base(kind, folder / "base")
        for mode, lora in (("LoRA", LoraConfig(r=4, target_modules="all-linear")), ("full", None)):
            try:
                found |= {f"{mode}: {check}": value for check, value in differences(base, folder, lora).items()}
            except KonicError as error:
                return str(error).replace(f"base_model='{folder}/base'", "base_model")
    return found


PAGE = """# Families of models

Which families of `transformers` konic trains, and which it refuses by name before anything is sampled. Each row is a
tiny random model of the family (fp32, two layers), compared with plain `transformers` and PEFT, for LoRA on all linear
layers and for full finetuning:

- the sampler's log-probs and tokens, in a padded batch with a cache, against a forward pass of each row alone,
- the log-ratio and the KL before the first step, with and without gradient checkpointing, and the gradients of both,
- the reference policy, after the weights have moved, against the model as it was loaded,
- the merged model, the full model and the adapter, saved and loaded again, against the policy.

The number is the largest difference of a log-prob or logit. `make families` measured the table on {machine}. The test
`test_a_family_is_right_or_refused_as_the_page_says` measures it again.

| family | what is special | verdict |
|---|---|---|
{rows}

A family that is not listed goes through the same checks when its model is loaded: a running state, logits that its head
does not give, or a row that is computed differently beside others is an error that names it. The adapter is checked in
the same way: it must be possible to switch it off and to merge it without a difference.
"""


def verdict(kind):
    """The cell of the table: the largest difference, or what the family is refused for."""
    found = examine(kind)
    return f"refused: {found}" if isinstance(found, str) else f"right, {max(found.values()):.1e}"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    rows = []
    for kind, (special, _) in FAMILIES.items():
        rows.append(f"| `{kind}` | {special} | {verdict(kind)} |")
        print(rows[-1], flush=True)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__} and PEFT {peft.__version__}"
    machine = f"a CPU ({platform.machine()}) with {versions}"
    Path(sys.argv[1]).write_text(PAGE.format(machine=machine, rows="\n".join(rows)), encoding="utf-8")
