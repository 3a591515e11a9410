"""Layers -> packed layers: weights in a memory layout that makes matrix products of few rows fast on a CPU.

Decoding consists of such products. With PyTorch's own layout, a product of 8 rows reads the weight at a third of the
speed of the memory. oneDNN's blocked layout, chosen for the number of rows, closes most of that gap. It costs one copy
of the weights.

Why by hand: PyTorch packs weights this way inside `torch.compile`, when it freezes a model. This module calls the same
oneDNN operators on the layers directly, without compiling the model. With packed layers and the model's own forward
pass, sampling 8 responses of 48 tokens from SmolLM2-135M takes 1.62 s on two cores. `transformers` generate takes
3.38 s. Without packing, a decode step takes about as long as a step of `transformers` (docs/speed.md).
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
"""Fewest tokens for which weights are packed: packing a model takes about as long as ten decode steps save."""
MEMORY_SHARE = 8
"""Weights are packed only if the machine's memory is at least this many times their size."""


class Product:
    """Computes x Wᵀ + b for rows x [n, in], with W [out, in] packed or in PyTorch's own layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None, num_rows: int | None) -> None:
        """Pack W for products of `num_rows` rows; None leaves W in PyTorch's own layout."""
        self._is_prepacked = num_rows is not None
        self._weight, self._bias = weight.detach(), None if bias is None else bias.detach()
        if num_rows is not None:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight.contiguous(), num_rows)

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Return the product [n, out], plus `add` [n, out] if given, which may be overwritten."""
        if not self._is_prepacked:
            if add is not None and self._bias is None and x.device.type != "cpu":
                return add.addmm_(x, self._weight.T)  # one kernel on a GPU
            product = functional.linear(x, self._weight, self._bias)
            return product if add is None else product + add
        if add is None:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, add, self._weight, self._bias, "add")


class PrepackedLinear(nn.Module):
    """Replaces an nn.Linear or Conv1D while responses are sampled."""

    def __init__(self, layer: nn.Linear | Conv1D, num_rows: int) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self._product = Product(*weight_and_bias(layer), num_rows)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output [..., out] for x [..., in]."""
        return self._product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def weight_and_bias(layer: nn.Linear | Conv1D) -> tuple[Tensor, Tensor | None]:
    """Return a layer's W [out, in] and b [out]; b is None if the layer has no bias."""
    return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight), layer.bias


def rows_to_prepack(causal_lm: PreTrainedModel, num_rows: int, num_tokens: int) -> int | None:
    """Return `num_rows` if packing is possible and worth its time, else None.

    Packing needs fp32 weights on a CPU, oneDNN, memory for a copy of the weights, and at least :data:`MIN_TOKENS`
    tokens.
    """
    if causal_lm.device.type != "cpu" or causal_lm.dtype != torch.float32 or num_tokens < MIN_TOKENS:
        return None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    size = sum(weight.numel() * weight.element_size() for weight in causal_lm.parameters())
    fits = size * MEMORY_SHARE <= memory
    return num_rows if fits and torch.backends.mkldnn.is_available() else None  # type: ignore[no-untyped-call]


@contextmanager
def prepacked_layers(causal_lm: PreTrainedModel, num_rows: int | None) -> Iterator[None]:
    """Pack every plain layer of a model except its head inside the context; with None no layer is packed."""
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
