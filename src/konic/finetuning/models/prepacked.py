"""Layers -> packed layers: weights in a memory layout that makes matrix products of few rows fast on a CPU.

Decoding consists of such products. With PyTorch's own layout, a product of 8 rows reads the weight at a third of the
speed of the memory. The layouts of oneDNN and MKL, chosen for the number of rows, close most of that gap. They cost one
copy of the weights. Which of them is faster is measured (`decode_probe.py`).

Why by hand: PyTorch packs weights this way inside `torch.compile`, when it freezes a model. This module calls the same
operators on the layers directly, without compiling the model. With packed layers and the model's own forward
pass, sampling 8 responses of 48 tokens from SmolLM2-135M takes 1.62 s on two cores. `transformers` generate takes
3.38 s. Without packing, a decode step takes about as long as a step of `transformers` (docs/speed.md).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from konic.finetuning.system.signals import uninterrupted

MIN_TOKENS = 16
"""Fewest tokens for which weights are packed: packing a model takes about as long as ten decode steps save."""
TRAINED_MEMORY_SHARE = 8
"""Weights that are trained are packed only if the machine's memory is at least this many times their size: they have
gradients, two moments of Adam and a frozen copy beside them."""
FROZEN_MEMORY_SHARE = 4
"""The same for weights of which an adapter trains less than half: they are there once, and packed once more."""
Layout = Literal["plain", "onednn", "mkl"]
"""Where the numbers of a weight stand in memory: as PyTorch has them, or as one of its libraries packs them."""


@dataclass(frozen=True)
class DecodePlan:
    """How responses are sampled on a CPU, in fp32 or bfloat16. Every plan gives the same numbers, up to rounding."""

    layout: Layout = "onednn"
    """Of the weights, but for the head, which oneDNN packs unless the layout is "plain"."""
    threads: int | None = None
    """Threads; None means all that torch has in this process."""


@dataclass(frozen=True)
class Prepacking:
    """How weights are packed."""

    num_rows: int
    """Rows of the products that the weights are packed for."""
    layout: Layout = "onednn"
    """Another one than "plain"."""
    _joined: dict[torch.Size, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def join(self, weights: Sequence[Tensor]) -> Tensor:
        """Return weights [out, in], joined along `out`, in memory that the next ones of the same shape overwrite."""
        if len(weights) == 1:
            return weights[0].contiguous()
        shape = torch.Size((sum(len(weight) for weight in weights), weights[0].shape[1]))
        if shape not in self._joined:  # new memory for each layer would take longer than the copy itself
            self._joined[shape] = weights[0].new_empty(shape)
        return torch.cat(tuple(weights), out=self._joined[shape])


@contextmanager
def threads_of(plan: DecodePlan) -> Iterator[None]:
    """Compute with the threads of a plan inside the context."""
    before = torch.get_num_threads()
    if plan.threads in (None, before):
        yield
        return
    torch.set_num_threads(plan.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def layouts(dtype: torch.dtype = torch.float32) -> tuple[Layout, ...]:
    """Return the layouts that this build of PyTorch has on this processor for weights of a dtype."""
    found: list[Layout] = ["plain"]
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return tuple(found)
    if dtype == torch.float32:
        found += ["onednn"]
        has_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        if has_mkl and hasattr(torch.ops.mkl, "_mkl_linear"):
            found += ["mkl"]
    elif dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        found += ["onednn"]
    return tuple(found)


class Product:
    """Computes x Wᵀ + b for rows x [n, in]. W [out, in] may be the weights of several layers, joined along `out`."""

    def __init__(self, weights: Sequence[Tensor], bias: Tensor | None, prepacking: Prepacking | None) -> None:
        """Join W and pack it; None leaves it in PyTorch's own layout."""
        weights = [weight.detach() for weight in weights]
        self._prepacking, self._bias = prepacking, None if bias is None else bias.detach()
        if prepacking is None:
            self._weight = weights[0] if len(weights) == 1 else torch.cat(weights)
            return
        weight = prepacking.join(weights)
        if prepacking.layout == "onednn":
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, prepacking.num_rows)
        else:
            self._weight = torch.ops.mkl._mkl_reorder_linear_weight(weight, prepacking.num_rows)
            self._originals = weights  # for other numbers of rows; not joined, which would be a copy
            self._shape = weight.new_empty(1).expand(weight.shape)

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Return the product [n, out], plus `add` [n, out] if given, which may be overwritten."""
        if self._prepacking is None:
            if add is not None and self._bias is None and x.device.type != "cpu":
                return add.addmm_(x, self._weight.T)  # one kernel on a GPU
            product = functional.linear(x, self._weight, self._bias)
            return product if add is None else product + add
        if self._prepacking.layout == "mkl":
            product = self._mkl(x, self._prepacking.num_rows)
            return product if add is None else product.add_(add)
        if add is None:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, add, self._weight, self._bias, "add")

    @property
    def num_rows(self) -> int:
        """Rows that W is packed for; 0 if it is not."""
        return self._prepacking.num_rows if self._prepacking else 0

    @property
    def dtype(self) -> torch.dtype:
        """Of W, x and the product."""
        return self._weight.dtype

    def _mkl(self, x: Tensor, num_rows: int) -> Tensor:
        """MKL multiplies exactly as many rows as it packed for. Fewer are padded, more use the original weights."""
        if len(x) > num_rows:
            parts = [functional.linear(x, weight) for weight in self._originals]
            product = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
            return product if self._bias is None else product.add_(self._bias)
        padded = x if len(x) == num_rows else functional.pad(x, (0, 0, 0, num_rows - len(x)))
        return torch.ops.mkl._mkl_linear(padded, self._weight, self._shape, self._bias, num_rows)[: len(x)]


class PrepackedLinear(nn.Module):
    """Replaces an nn.Linear or Conv1D while responses are sampled."""

    def __init__(self, layer: nn.Linear | Conv1D, prepacking: Prepacking) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        weight, bias = weight_and_bias(layer)
        self._product = Product([weight], bias, prepacking)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output [..., out] for x [..., in]."""
        return self._product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def weight_and_bias(layer: nn.Linear | Conv1D) -> tuple[Tensor, Tensor | None]:
    """Return a layer's W [out, in] and b [out]; b is None if the layer has no bias."""
    return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight), layer.bias


def is_worth_packing(causal_lm: PreTrainedModel, num_tokens: int) -> bool:
    """Return True if the weights of a model can be packed, and so many tokens of each response are worth the time.

    Packing needs a CPU, weights of a dtype that oneDNN packs, memory for a copy of them, and at least
    :data:`MIN_TOKENS` tokens.
    """
    if causal_lm.device.type != "cpu" or "onednn" not in layouts(causal_lm.dtype) or num_tokens < MIN_TOKENS:
        return False
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    weights = [(weight.numel() * weight.element_size(), weight.requires_grad) for weight in causal_lm.parameters()]
    size = sum(part for part, _ in weights)
    is_trained = 2 * sum(part for part, learns in weights if learns) > size
    return size * (TRAINED_MEMORY_SHARE if is_trained else FROZEN_MEMORY_SHARE) <= memory


def plain_layers(causal_lm: PreTrainedModel) -> Iterator[tuple[nn.Module, str, nn.Linear | Conv1D]]:
    """Yield each plain layer of a model except its head: the module that it is in, its name there, the layer."""
    head = causal_lm.get_output_embeddings()
    for parent in causal_lm.modules():
        for name, layer in parent.named_children():
            if type(layer) in (nn.Linear, Conv1D) and layer is not head:
                yield parent, name, layer


@contextmanager
def prepacked_layers(causal_lm: PreTrainedModel, prepacking: Prepacking | None) -> Iterator[None]:
    """Pack every plain layer of a model except its head inside the context; with None no layer is packed."""
    if prepacking is None:
        yield
        return
    originals = list(plain_layers(causal_lm))
    try:
        for parent, name, layer in originals:
            setattr(parent, name, PrepackedLinear(layer, prepacking))
        yield
    finally:
        with uninterrupted():
            for parent, name, layer in originals:
                setattr(parent, name, layer)
