"""Layers of bitsandbytes -> the same layers, whose products sampling and training compute alike.

Without this, bitsandbytes computes by rules that differ from pass to pass. On a CPU, a 4-bit layer packs its weight for
bf16 products at the first pass without gradients, which later passes with gradients do not undo: no gradient passes a
packed layer. On a GPU it multiplies a single row by another kernel than several rows. An 8-bit layer rounds its input,
and which columns it spares depends on all rows of the batch. The logits of a row in a batch and alone differed by 4 %
and 10 % of their spread for SmolLM2-135M (4 and 8 bits; bitsandbytes 0.50, AMD Zen 4).
"""

from collections.abc import Mapping
from importlib import import_module
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from konic.finetuning.errors import ModelError, safe_cause
from konic.finetuning.models.locations import quiet_transformers

_KINDS = ("Linear4bit", "Linear8bitLt")
"""The layers of bitsandbytes, by name: the library is an extra."""


def unify_products(causal_lm: PreTrainedModel) -> None:
    """Replace how the layers of bitsandbytes compute, if a model has such layers.

    Their weights stay quantised, and are unpacked for each product. The product itself is in the precision of its
    input; of 4-bit layers on a GPU, in that of `bnb_4bit_compute_dtype`.
    """
    for layer in _layers(causal_lm):
        layer.forward = MethodType(_forward, layer)


def keep_scales(causal_lm: PreTrainedModel, device: torch.device) -> None:
    """Let every layer of bitsandbytes hold the scales of its weight, on a device: a divided weight has none."""
    for layer in _layers(causal_lm):
        if _has_4_bits(layer):
            layer.scales = layer.weight.quant_state
            layer.scales.to(device)  # in place
        else:
            layer.scales = layer.weight.SCB.to(device)


def multiplies_in_16_bits(causal_lm: PreTrainedModel) -> bool:
    """Return True if products with quantised weights are computed in 16 bits."""
    dtypes = (_product_dtype(layer) for layer in _layers(causal_lm))
    return any(dtype is not None and dtype.itemsize < 4 for dtype in dtypes)


def _layers(causal_lm: PreTrainedModel) -> list[Any]:
    if not getattr(causal_lm, "is_quantized", False):
        return []
    return [layer for layer in causal_lm.modules() if type(layer).__name__ in _KINDS]


def _product_dtype(layer: Any) -> torch.dtype | None:
    """Return the dtype of a layer's products, or None for that of its input."""
    dtype = getattr(layer, "compute_dtype", None)
    return dtype if layer.weight.device.type != "cpu" and isinstance(dtype, torch.dtype) else None


def recorded_quantisation(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return how bitsandbytes quantised the base, from the `model_kwargs` that a run recorded; empty if it did not.

    The record may be a stranger's. Other kinds of quantisation, some of which load packages, are not taken from it.
    """
    config = model_kwargs.get("quantization_config")
    if not isinstance(config, dict):
        return {}
    has_bits = config.get("load_in_4bit") or config.get("load_in_8bit")  # a dict of the user's may say no more
    return {"quantization_config": config} if config.get("quant_method", has_bits) in ("bitsandbytes", True) else {}


def dequantised(causal_lm: PreTrainedModel) -> PreTrainedModel:
    """Return the model with plain layers that hold the unpacked weights; unchanged if nothing in it is quantised.

    Raises:
        ModelError: `transformers` cannot unpack weights of this kind.
    """
    if not getattr(causal_lm, "is_quantized", False):
        return causal_lm
    layers = dict(causal_lm.named_modules())
    transposed = [name for name, layer in layers.items() if getattr(layer, "source_cls", None) is Conv1D]
    try:
        with quiet_transformers():
            plain: PreTrainedModel = causal_lm.dequantize()
    except NotImplementedError as error:
        raise ModelError(f"Its quantised weights cannot be unpacked: {error}") from safe_cause(error)
    for name in transposed:
        plain.set_submodule(name, _transposed(plain.get_submodule(name)))
    plain._weight_conversions = None  # saving would undo how the packed weights were read
    return plain


def _transposed(linear: Any) -> Conv1D:
    layer = Conv1D(0, 0)
    layer.nf, layer.nx = linear.out_features, linear.in_features
    layer.weight, layer.bias = nn.Parameter(linear.weight.detach().T.contiguous()), linear.bias
    return layer


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    product: Tensor = _FrozenProduct.apply(x.to(_product_dtype(layer) or x.dtype), layer)  # type: ignore[no-untyped-call]
    product = product.to(x.dtype)
    return product if layer.bias is None else product + layer.bias.to(product.dtype)


class _FrozenProduct(torch.autograd.Function):
    """Input x [..., I], a layer with the weight W [O, I] -> x Wᵀ [..., O].

    The unpacked weight is not kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, _unpacked(layer, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ _unpacked(ctx.layer, gradient.dtype), None


def _unpacked(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    scales: Any = getattr(layer, "scales", None)
    if scales is None:
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # it imports bitsandbytes

        weight: Tensor = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
    else:
        packed = import_module("bitsandbytes.functional")
        unpack = packed.dequantize_4bit if _has_4_bits(layer) else packed.int8_vectorwise_dequant
        weight = unpack(layer.weight.data, scales)
    return weight.to(dtype)


def _has_4_bits(layer: nn.Module) -> bool:
    return type(layer).__name__ == _KINDS[0]
