"""Full model + tokenizer -> a GGUF file for llama.cpp, with the names, layouts and keys that llama.cpp expects.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Layouts: convert_hf_to_gguf.py of llama.cpp.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from konic.export.gguf_tokenizer import add_tokenizer
from konic.finetuning.errors import ModelError

INSTEAD = "Use --format merged, and the convert_hf_to_gguf.py of llama.cpp, which knows more models."
FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_QUANTISED = {"float16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
_LARGEST_HALF = 65504.0
_GPT2_TRANSPOSED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, name: str, dtype: str) -> None:
    """Write a model of the shape of Llama or GPT-2, in float32, as a GGUF file.

    Args:
        model: The full model.
        tokenizer: Its tokenizer.
        path: The file.
        name: What tools show as the name of the model.
        dtype: float32, float16 or q8_0 of the matrices; vectors and positions stay in float32.

    Raises:
        ModelError: llama.cpp computes this model, or its tokens, in another way.
    """
    kind = require_known(model)
    writer = gguf.GGUFWriter(path, kind)
    try:
        writer.add_name(name)
        writer.add_file_type(FILE_TYPES[dtype])
        _add_shape(writer, model.config)
        add_tokenizer(writer, tokenizer, model)
        names = gguf.get_tensor_name_map(_architecture(kind), model.config.num_hidden_layers)
        for tensor_name, weight in _tensors(model, names):
            _add_tensor(writer, tensor_name, weight, dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def require_known(model: PreTrainedModel) -> str:
    """Return the name of the architecture in GGUF.

    Raises:
        ModelError: It is another, or a variant that llama.cpp does not compute.
    """
    config, kind = model.config, str(model.config.model_type)
    if kind not in ("llama", "gpt2"):
        raise ModelError(f"--format gguf: models of the kind {kind!r} are not written, only Llama and GPT-2. {INSTEAD}")
    if kind == "llama":
        rope = getattr(config, "rope_parameters", None) or {}
        odd = {"rope_type": rope.get("rope_type", "default") != "default", "hidden_act": config.hidden_act != "silu"}
        odd["partial_rotary_factor"] = rope.get("partial_rotary_factor", 1.0) != 1.0
    else:
        odd = {
            "activation_function": config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": not config.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        }
    wrong = next((name for name, is_odd in odd.items() if is_odd), None)
    if wrong is not None:
        raise ModelError(f"--format gguf: a {kind} model with another {wrong} than the usual is not written. {INSTEAD}")
    return kind


def _architecture(kind: str) -> Any:
    return {"llama": gguf.MODEL_ARCH.LLAMA, "gpt2": gguf.MODEL_ARCH.GPT2}[kind]


def _add_shape(writer: Any, config: Any) -> None:
    """Write the sizes of the model."""
    heads, width = config.num_attention_heads, config.hidden_size
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * width)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    head = getattr(config, "head_dim", None) or width // heads
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10000.0)))
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)


def _tensors(model: PreTrainedModel, names: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor by its name in GGUF, in llama.cpp's layout. Of tied embeddings there is one."""
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    is_tied = head is embedding or torch.equal(head, embedding)
    config = model.config
    for name, weight in model.state_dict().items():
        if is_tied and name == "lm_head.weight":
            continue
        stem, _, end = name.rpartition(".")
        known = names.get_name(stem)
        if known is None:
            raise ModelError(f"--format gguf: llama.cpp has no place for the weights {name!r}. {INSTEAD}")
        named = f"{known}.{end}"
        if config.model_type == "gpt2" and named.endswith(_GPT2_TRANSPOSED):
            weight = weight.T  # Conv1D keeps [in, out]
        if config.model_type == "llama" and ".attn_q." in named:
            weight = _interleaved(weight, config.num_attention_heads)
        if config.model_type == "llama" and ".attn_k." in named:
            weight = _interleaved(weight, config.num_key_value_heads)
        yield named, weight


def _interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of each head [two halves] to [pairs]: llama.cpp rotates neighbours, transformers halves."""
    rows = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, 2, rows, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _add_tensor(writer: Any, name: str, weight: Tensor, dtype: str) -> None:
    """Write a tensor; vectors and position embeddings in float32, as llama.cpp wants them."""
    data = np.ascontiguousarray(weight.detach().float().numpy())
    quantised = _QUANTISED.get(dtype)
    if quantised is None or data.ndim < 2 or name.startswith("position_embd"):
        writer.add_tensor(name, data)
        return
    if dtype == "float16" and np.abs(data).max() > _LARGEST_HALF:
        raise ModelError(f"--dtype float16: {name} holds numbers above {_LARGEST_HALF:.0f}. Use --dtype float32.")
    if dtype == "q8_0" and data.shape[-1] % 32:
        writer.add_tensor(name, data.astype(np.float16))  # a block of Q8_0 is 32 numbers of a row
        return
    writer.add_tensor(name, gguf.quants.quantize(data, quantised), raw_dtype=quantised)
