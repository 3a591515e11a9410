"""Tiny random models of the families that docs/families.md lists."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import byte_tokenizer

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
DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
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
    "gpt_oss": ("mixture of experts, sliding window, attention sinks", EXPERTS | SLIDING),
    "deepseek_v3": ("mixture of experts, latent attention", EXPERTS | LATENT),
    "llama4_text": ("mixture of experts, chunked attention", EXPERTS | {
        "attention_chunk_size": 8, "intermediate_size_mlp": 64, "attn_temperature_tuning": False,
        "no_rope_layers": [1, 0], "layer_types": ["chunked_attention", "full_attention"],
    }),
    "gemma": ("dense, tied head", {"tie_word_embeddings": True}),
    "gemma3n_text": ("dense, sliding window, an embedding for each layer", {
        "sliding_window": 8, "vocab_size_per_layer_input": 272, "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"], "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.0],
    }),
    "cohere": ("dense, parallel blocks, scaled logits", {}),
    "glm": ("dense, partly rotated heads", {}),
    "codegen": ("dense, partly rotated heads", GPT | {"rotary_dim": 4}),
    "xglm": ("dense, computed positions", {
        "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "pad_token_id": 1,
    }),
    "biogpt": ("dense, learned positions", {}),
    "starcoder2": ("dense, sliding window", {"sliding_window": 8}),
    "nemotron": ("dense, norms of 1 + weight", {}),
    "arcee": ("dense, squared ReLU", {}),
    "apertus": ("dense, xIELU", {}),
    "seed_oss": ("dense, biases of attention", {}),
    "ernie4_5": ("dense", {}),
    "exaone4": ("dense, sliding window, norms after the layers", SLIDING),
    "olmo3": ("dense, sliding window, norms after the layers", SLIDING),
    "hunyuan_v1_dense": ("dense, normed queries and keys", {}),
    "minicpm3": ("dense, latent attention", LATENT),
    "hunyuan_v1_moe": ("mixture of experts", EXPERTS),
    "glm4_moe": ("mixture of experts", EXPERTS | LATENT),
    "dots1": ("mixture of experts", EXPERTS | LATENT),
    "minimax_m2": ("mixture of experts", EXPERTS),
    "ernie4_5_moe": ("mixture of experts", EXPERTS),
    "mimo_v2_flash": ("mixture of experts, sliding window, attention sinks", EXPERTS | SLIDING),
    "deepseek_v2": ("mixture of experts, latent attention", EXPERTS | LATENT),
    "deepseek_v32": ("mixture of experts, sparse attention", EXPERTS | LATENT | {
        "index_topk": 64, "index_head_dim": 8, "index_n_heads": 2,
    }),
    "laguna": ("mixture of experts, sliding window", EXPERTS | SLIDING),
    "youtu": ("dense, latent attention, loading clears the row of padding", LATENT),
    "lfm2": ("hybrid: convolutions", {
        "layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False,
    }),
    "jamba": ("hybrid: Mamba", EXPERTS | MAMBA | {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    }),
    "bamba": ("hybrid: Mamba 2", MAMBA | {"attn_layer_indices": [1]}),
    "falcon_h1": ("hybrid: Mamba 2", MAMBA),
    "granitemoehybrid": ("hybrid: Mamba 2", EXPERTS | MAMBA | {"layer_types": ["mamba", "attention"]}),
    "qwen3_next": ("hybrid: linear attention", EXPERTS | DELTA_NET),
    "minimax": ("hybrid: linear attention", EXPERTS),
    "recurrent_gemma": ("hybrid: linear recurrence", {
        "lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"],
    }),
    "mamba": ("state space", {"state_size": 4, "time_step_rank": 4}),
    "falcon_mamba": ("state space", {"state_size": 4, "time_step_rank": 4}),
    "rwkv": ("state space", {"attention_hidden_size": 32, "context_length": 128}),
    "lfm2_moe": ("hybrid: convolutions", EXPERTS | {
        "layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "num_dense_layers": 1,
    }),
    "nemotron_h": ("hybrid: Mamba 2", MAMBA | {
        "layer_types": ["linear_attention", "full_attention", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 8,
        "ssm_state_size": 4,
    }),
    "qwen3_5_text": ("hybrid: linear attention", DELTA_NET),
    "kimi_linear": ("hybrid: linear attention", EXPERTS | LATENT | {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_heads": 4, "linear_head_dim": 8,
    }),
    "zamba": ("hybrid: Mamba, attention that layers share", MAMBA | {
        "layers_block_type": ["hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 3,
        "attention_head_dim": 16, "mamba_d_state": 4, "num_key_value_heads": 4,
    }),
    "zamba2": ("hybrid: Mamba 2, attention that layers share", MAMBA | {
        "layers_block_type": ["hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 3, "mamba_ngroups": 1,
        "num_key_value_heads": 4,
    }),
    "olmo_hybrid": ("hybrid: linear attention", DELTA_NET | {"linear_num_key_heads": 4}),
    "qwen3_5_moe_text": ("hybrid: linear attention, mixture of experts", EXPERTS | DELTA_NET),
    "qwen3_5": ("text part of a multimodal model", {
        "text_config": SIZES | DELTA_NET, "vision_config": VISION, "image_token_id": 270,
    }),
    "mamba2": ("state space", {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 1}),
    "xlstm": ("state space", {}),
    "openai-gpt": ("dense, learned positions", GPT),
    "xlnet": ("dense, permuted", {
        "max_position_embeddings": None, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64,
    }),
    "xlm": ("encoder", {"emb_dim": 32, "n_layers": 2, "n_heads": 4}),
    "bart": ("decoder of an encoder-decoder", {}),
    "modernbert-decoder": ("dense, a head of several layers", {}),
}  # fmt: skip
"""Name in `transformers` -> what is special about it, and its sizes beside :data:`SIZES`."""


def family_model(kind):
    """Return a random model of a family."""
    sizes = FAMILIES[kind][1]
    sizes = sizes if "text_config" in sizes else SIZES | sizes
    config = AutoConfig.for_model(kind, **{name: size for name, size in sizes.items() if size is not None})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1 and weight.std() < 0.1:  # some families ignore initializer_range
                weight.normal_(std=0.2)
    return model


def save_base(kind, folder):
    """Write a random model with a byte tokenizer; return the model as plain `transformers` loads it."""
    model = family_model(kind)
    model.save_pretrained(folder)
    byte_tokenizer("llama").save_pretrained(folder)
    return model
