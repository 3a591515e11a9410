"""Layers -> layers whose products oneDNN computes, on processors where that is faster than what PyTorch takes.

PyTorch multiplies in fp32 with MKL, which is made for Intel's processors. On two cores of an AMD EPYC the products of
an update take 5.1 s with oneDNN instead of 5.7 to 6.5 s, from the same weights in the same layout (docs/speed.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from konic.finetuning.models.prepacked import weight_and_bias
from konic.finetuning.system.processor import is_amd
from konic.finetuning.system.signals import uninterrupted

SMALLEST = 2**16
"""Fewest numbers of a weight: with fewer, calling oneDNN takes longer than it saves."""


@contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """Compute the model's frozen fp32 layers by the faster library inside the context. It changes rounding only."""
    layers = [layer for layer in model.modules() if _can_be_faster(layer)] if is_faster() else []
    try:
        for layer in layers:
            layer.forward = partial(_forward, layer)
        yield
    finally:
        with uninterrupted():
            for layer in layers:
                vars(layer).pop("forward", None)


@cache
def is_faster() -> bool:
    """Return True where oneDNN is faster.

    The maker of the processor decides, and not a measurement, so that a run repeats itself bit for bit.
    """
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return is_amd() and has_onednn and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]


def back_through(layer: nn.Linear, of_result: Tensor) -> Tensor:
    """Return the gradient [n, in] of a layer's input for that of its result [n, out]."""
    if "forward" in vars(layer):
        return _product(of_result, layer.weight.T, None)
    return of_result.to(layer.weight.dtype) @ layer.weight


def _can_be_faster(layer: Any) -> bool:
    if type(layer) not in (nn.Linear, Conv1D) or layer.weight.numel() < SMALLEST:
        return False
    return all(
        type(tensor) is nn.Parameter
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and not tensor.requires_grad
        for tensor in (layer.weight, layer.bias)
        if tensor is not None
    )


def _forward(layer: nn.Linear | Conv1D, x: Tensor) -> Tensor:
    """Return the layer's output [..., out] for x [..., in]."""
    weight, bias = weight_and_bias(layer)
    if x.dtype != torch.float32 or x.numel() == 0:
        plain: Tensor = type(layer).forward(layer, x)
        return plain
    result: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
    return result.view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """Computes x Wᵀ + b; the gradient of x is that of the result, times W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *of_result: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return _product(of_result[0], weight.T, None), None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result
