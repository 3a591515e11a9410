"""LanguageModel -> Transformer: a model of the Llama or GPT-2 shape, computed as few large matrix products.

Queries, keys and values are one product. The gate and up projections of an MLP are one product.

Why by hand: the forward pass of `transformers` computes these as separate products, and small products are slow on a
CPU. With SmolLM2-135M and 8 rows on two cores, a decode step takes 27 ms here and 34 ms in the model's own forward pass
with packed weights. Sampling 8 responses of 48 tokens takes 1.31 s, and `transformers` generate takes 2.99 s; for the
GPT-2 shape it is 1.09 s and 2.93 s (docs/speed.md).

Shapes: B rows, T tokens of this call, S tokens so far, H hidden size, N heads, K key-value heads, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.prepacked import Prepacking, Product, weight_and_bias

Function = Callable[[Tensor], Tensor]
LLAMA_SHAPED = ("llama", "mistral", "qwen2", "qwen3")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles do not depend on the length of the sequence so far."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """One layer. Its functions take rows [B·T, H]."""

    attention_norm: Function
    queries_keys_values: Product
    head_norm: Function | None = None
    """Queries and keys [B, T, N + K, D] -> the same normalised; None does not normalise them."""
    attention_output: Product
    mlp_norm: Function
    up: Product
    activation: Function
    """Output of the MLP's first product -> input of its second product."""
    down: Product


@dataclass(frozen=True)
class Transformer:
    """A decoder-only model, computed without gradient."""

    embed: Callable[[Tensor, Tensor], Tensor]
    """(ids [B, T], positions [B, T]) -> [B, T, H]."""
    angles: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    """(x, positions [B, T]) -> cosines and sines [B, T, D] of the rotary embedding; None without one."""
    blocks: tuple[Block, ...]
    norm: Function
    num_heads: int
    num_kv_heads: int
    head_size: int
    like: Tensor
    """A tensor with the dtype and device of the cache."""

    def new_cache(self, num_rows: int, num_tokens: int) -> Tensor:
        """Return a cache for keys and values [layers, 2, B, K, tokens, D]. Creating it does not touch its memory."""
        shape = (len(self.blocks), 2, num_rows, self.num_kv_heads, num_tokens, self.head_size)
        return self.like.new_empty(shape)

    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: Tensor,
        length: int,
        mask: Tensor | None,
        slot: Tensor | None = None,
    ) -> Tensor:
        """Return the last hidden states [B, T, H].

        Args:
            ids: [B, T]; either whole prompts (T = S) or one token of each row (T = 1).
            positions: [B, T].
            cache: From :meth:`new_cache`. It holds the S − T earlier tokens; the call adds the T given tokens.
            length: S.
            mask: [B, 1, T, S], bool or added to the attention scores; None if only the causal order hides tokens.
            slot: [1] the position in the cache for the keys and values of one token, for a step that keeps all its
                numbers in tensors; None means the last of the S positions.
        """
        num_rows, num_tokens = ids.shape
        x = self.embed(ids, positions).reshape(num_rows * num_tokens, -1)
        rotation = None
        if self.angles is not None:
            cosines, sines = self.angles(x, positions)
            rotation = cosines[:, :, None], _halves_signed(sines[:, :, None])
        for block, kept in zip(self.blocks, cache, strict=True):
            joined = block.queries_keys_values(block.attention_norm(x))
            joined = joined.view(num_rows, num_tokens, self.num_heads + 2 * self.num_kv_heads, self.head_size)
            if block.head_norm is not None:
                to_norm = joined[:, :, : self.num_heads + self.num_kv_heads]
                to_norm.copy_(block.head_norm(to_norm))
            attended = self._attention(joined, kept, length, mask, slot, rotation)
            x = block.attention_output(attended.reshape(num_rows * num_tokens, -1), add=x)
            x = block.down(block.activation(block.up(block.mlp_norm(x))), add=x)
        return self.norm(x).view(num_rows, num_tokens, -1)

    def _attention(
        self,
        joined: Tensor,
        kept: Tensor,
        length: int,
        mask: Tensor | None,
        slot: Tensor | None,
        rotation: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Return the attention output [B, T, N, D] from joined queries, keys and values [B, T, N + 2K, D].

        Overwrites `joined` with its rotated form, and writes keys and values into `kept` [2, B, K, tokens, D].
        """
        num_rows, num_tokens = joined.shape[:2]
        if rotation is not None:
            _rotate_(joined[:, :, : self.num_heads + self.num_kv_heads], *rotation)
        queries, keys_values = joined[:, :, : self.num_heads], joined[:, :, self.num_heads :]
        new = keys_values.view(num_rows, num_tokens, 2, self.num_kv_heads, -1).permute(2, 0, 3, 1, 4)
        if slot is None:
            kept[..., length - num_tokens : length, :] = new
        else:
            kept.index_copy_(3, slot, new)
        all_keys, all_values = kept[:, :, :, :length].unbind()
        if num_tokens == 1:  # queries that share keys are treated like tokens of one head
            grouped = queries.reshape(num_rows, self.num_kv_heads, -1, self.head_size)
            return functional.scaled_dot_product_attention(grouped, all_keys, all_values, attn_mask=mask)
        return functional.scaled_dot_product_attention(
            queries.transpose(1, 2), all_keys, all_values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        ).transpose(1, 2)


def fused_transformer(model: LanguageModel, prepacking: Prepacking | None) -> Transformer:
    """Return a model in its fused form.

    Args:
        model: One for which :func:`can_be_fused` is True.
        prepacking: How the products are packed; None does not pack them.
    """
    build = _gpt2 if model.causal_lm.config.model_type == "gpt2" else _llama
    return build(model.causal_lm, prepacking)


def can_be_fused(model: LanguageModel) -> bool:
    """Return True if a model has the Llama or GPT-2 shape, in all that its config can change."""
    config, body = model.causal_lm.config, model.causal_lm.base_model
    if config.model_type == "gpt2":
        plain = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
        layers = [layer for b in body.h for layer in (b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj)]
        return plain and not config.add_cross_attention and all(type(layer) is Conv1D for layer in layers)
    if config.model_type not in LLAMA_SHAPED:
        return False
    plain = config.hidden_act == "silu" and body.rotary_emb.rope_type in STATIC_ROPE and _sees_everything(config)
    return plain and all(type(layer) is nn.Linear for block in body.layers for layer in _projections(block))


def _llama(causal_lm: Any, prepacking: Prepacking | None) -> Transformer:
    config, body = causal_lm.config, causal_lm.base_model

    def product(*layers: nn.Linear) -> Product:
        return _joined(layers, prepacking)

    blocks = tuple(
        Block(
            attention_norm=_rms_norm(block.input_layernorm),
            queries_keys_values=product(block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj),
            head_norm=_head_norm(block.self_attn, config) if config.model_type == "qwen3" else None,
            attention_output=product(block.self_attn.o_proj),
            mlp_norm=_rms_norm(block.post_attention_layernorm),
            up=product(block.mlp.gate_proj, block.mlp.up_proj),
            activation=_gated_silu,
            down=product(block.mlp.down_proj),
        )
        for block in body.layers
    )
    attention = body.layers[0].self_attn
    return Transformer(
        embed=lambda ids, _: body.embed_tokens(ids),
        angles=body.rotary_emb,
        blocks=blocks,
        norm=_rms_norm(body.norm),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_size=attention.head_dim,
        like=body.embed_tokens.weight,
    )


def _gpt2(causal_lm: Any, prepacking: Prepacking | None) -> Transformer:
    config, body = causal_lm.config, causal_lm.base_model

    def product(layer: nn.Linear | Conv1D) -> Product:
        return _joined([layer], prepacking)

    blocks = tuple(
        Block(
            attention_norm=block.ln_1,
            queries_keys_values=product(block.attn.c_attn),
            attention_output=product(block.attn.c_proj),
            mlp_norm=block.ln_2,
            up=product(block.mlp.c_fc),
            activation=block.mlp.act,
            down=product(block.mlp.c_proj),
        )
        for block in body.h
    )
    return Transformer(
        embed=lambda ids, positions: body.wte(ids) + body.wpe(positions),
        angles=None,
        blocks=blocks,
        norm=body.ln_f,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_size=config.hidden_size // config.num_attention_heads,
        like=body.wte.weight,
    )


def _projections(block: Any) -> tuple[nn.Module, ...]:
    attention, mlp = block.self_attn, block.mlp
    of_attention = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    return *of_attention, mlp.gate_proj, mlp.up_proj, mlp.down_proj


def _sees_everything(config: Any) -> bool:
    """Return True if no layer's attention is limited to a window."""
    if config.model_type == "mistral":  # Mistral uses only `sliding_window`, never `layer_types`
        return config.sliding_window is None
    return set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}


def _joined(layers: Any, prepacking: Prepacking | None) -> Product:
    """Return one product for several layers with the same input. It concatenates their outputs."""
    weights, biases = zip(*(weight_and_bias(layer) for layer in layers), strict=True)
    if all(bias is None for bias in biases):
        return Product(weights, None, prepacking)
    filled = [torch.zeros_like(w[:, 0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    return Product(weights, torch.cat(filled), prepacking)


def _rms_norm(layer: Any) -> Function:
    """Return the function x / √(mean x² + ε) · weight. It normalises in fp32 for any dtype, as `transformers` does."""
    return _rms_norm_of(layer.weight.detach(), layer.variance_epsilon)


def _head_norm(attention: Any, config: Any) -> Function:
    """Return one function that normalises every query and key head, each by the weight of its own norm."""
    norms = [attention.q_norm] * config.num_attention_heads + [attention.k_norm] * config.num_key_value_heads
    weights = torch.stack([norm.weight.detach() for norm in norms])
    return _rms_norm_of(weights, attention.q_norm.variance_epsilon)


def _rms_norm_of(weight: Tensor, epsilon: float) -> Function:
    """Return the function over the last dimension; `weight` may have one row for every row of x."""
    if weight.device.type != "cpu":  # one kernel, where a CPU is slower with it
        if weight.dim() == 1:
            return lambda x: functional.rms_norm(x, weight.shape, weight, epsilon)
        return lambda x: weight * functional.rms_norm(x, weight.shape[-1:], None, epsilon)

    def normed(x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
        return weight * (wide * scale).to(x.dtype)

    return normed


def _gated_silu(joined: Tensor) -> Tensor:
    gate, up = joined.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def _halves_signed(sines: Tensor) -> Tensor:
    """Return the sines with the sign of the first half flipped, for :func:`_rotate_`."""
    half = sines.shape[-1] // 2
    return torch.cat([-sines[..., :half], sines[..., half:]], dim=-1)


def _rotate_(x: Tensor, cosines: Tensor, signed_sines: Tensor) -> None:
    """Apply the rotary embedding to heads [B, T, n, D] in place; the second half of a head is the imaginary part."""
    turned = x.roll(x.shape[-1] // 2, dims=-1)
    x.mul_(cosines).addcmul_(turned, signed_sines)
