"""Weights laid out anew for the CPU's matrix products of few rows, which decoding is made of.

A product of 8 rows with a weight as PyTorch keeps it runs at a third of the speed at which memory gives the weight.
oneDNN's blocked layout, made for the number of rows, closes most of that gap at the price of one copy of the weights.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from konic.finetuning.system.signals import uninterrupted

MIN_TOKENS = 16
"""Laying out a model's weights takes as long as some ten decode steps save."""
MEMORY_SHARE = 8
"""Weights are copied where the machine's memory is at least this many times theirs."""


class Product:
    """x Wᵀ + b of rows x [n, in], with W [out, in] packed or as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None, num_rows: int | None) -> None:
        """`num_rows` is what W is packed for; None leaves it as it is."""
        self._is_prepacked = num_rows is not None
        self._weight, self._bias = weight.detach(), None if bias is None else bias.detach()
        if num_rows is not None:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight.contiguous(), num_rows)

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """The product [n, out], plus `add` [n, out]."""
        if not self._is_prepacked:
            product = functional.linear(x, self._weight, self._bias)
            return product if add is None else product + add
        if add is None:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, add, self._weight, self._bias, "add")


class PrepackedLinear(nn.Module):
    """Stands in for an nn.Linear or Conv1D while responses are sampled."""

    def __init__(self, layer: nn.Linear | Conv1D, num_rows: int) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self._product = Product(*weight_and_bias(layer), num_rows)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output [..., out] for x [..., in]."""
        return self._product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def weight_and_bias(layer: nn.Linear | Conv1D) -> tuple[Tensor, Tensor | None]:
    """A layer's W [out, in] and b [out]."""
    return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight), layer.bias


def rows_to_prepack(causal_lm: PreTrainedModel, num_rows: int, num_tokens: int) -> int | None:
    """`num_rows` where packing pays and is possible, else None: fp32 on a CPU with memory for a copy, enough tokens."""
    if causal_lm.device.type != "cpu" or causal_lm.dtype != torch.float32 or num_tokens < MIN_TOKENS:
        return None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    size = sum(weight.numel() * weight.element_size() for weight in causal_lm.parameters())
    fits = size * MEMORY_SHARE <= memory
    return num_rows if fits and torch.backends.mkldnn.is_available() else None  # type: ignore[no-untyped-call]


@contextmanager
def prepacked_layers(causal_lm: PreTrainedModel, num_rows: int | None) -> Iterator[None]:
    """Within it every plain layer of a model but its head is packed; with None nothing is."""
    if num_rows is None:
        yield
        return
    head = causal_lm.get_output_embeddings()
    originals = [
        (parent, name, layer)
        for parent in causal_lm.modules()
        for name, layer in parent.named_children()
        if type(layer) in (nn.Linear, Conv1D) and layer is not head
    ]
    try:
        for parent, name, layer in originals:
            setattr(parent, name, PrepackedLinear(layer, num_rows))
        yield
    finally:
        with uninterrupted():
            for parent, name, layer in originals:
                setattr(parent, name, layer)
