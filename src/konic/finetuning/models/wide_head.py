"""A head in bfloat16 -> logits in fp32: the factors of each product are rounded, the sums are not.

Why: a product of two bfloat16 matrices comes back in bfloat16, where a logit of 20 is rounded by up to 0.06. The noise
would be in every log-prob and every KL. The same hardware can hand over the sums that it forms in fp32.

Shapes: n tokens, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from konic.finetuning.models.prepacked import Prepacking, Product


class WideHead:
    """Computes the logits of a frozen linear layer in bfloat16. On a CPU, it keeps a copy of the weights in fp32."""

    def __init__(self, head: nn.Linear) -> None:
        self._head = head
        self._copy = None if head.weight.device.type == "cuda" else head.weight.detach().float()

    def keep_nothing(self) -> None:
        """From now on, read the weights of the layer in each call: they are divided among processes."""
        self._copy = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] of hidden states [..., H], in fp32. Gradients flow to the hidden states."""
        return _Logits.apply(hidden, self)  # type: ignore[no-untyped-call]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the same without gradient."""
        weight, bias = self._weight(), self._bias()
        if weight.dtype == torch.bfloat16:
            rows = hidden.reshape(-1, hidden.shape[-1])
            logits = torch.mm(rows, weight.T, out_dtype=torch.float32).view(*hidden.shape[:-1], -1)
            return logits if bias is None else logits.add_(bias)
        with bfloat16_products():
            return functional.linear(hidden.float(), weight, bias)

    def packed(self, prepacking: Prepacking) -> Product | None:
        """Return the product that gives the same logits [n, V] for hidden states [n, H] in fp32, packed; CPU only."""
        return None if self._copy is None else Product([self._copy], self._bias(), prepacking)

    def gradient(self, of_logits: Tensor) -> Tensor:
        """Return the gradient [..., H] of the hidden states for that of the logits [..., V]."""
        weight = self._weight()
        with bfloat16_products():
            return of_logits.to(weight.dtype) @ weight

    def _weight(self) -> Tensor:
        """Return the weights [V, H], in fp32 on a CPU."""
        if self._copy is not None:
            return self._copy
        weight = self._head.weight.detach()
        return weight if weight.device.type == "cuda" else weight.float()

    def _bias(self) -> Tensor | None:
        return None if self._head.bias is None else self._head.bias.detach().float()


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: WideHead) -> Tensor:
        ctx.head, ctx.dtype = head, hidden.dtype
        return head.logits(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.head.gradient(gradient).to(ctx.dtype), None


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let the CPU round the factors of fp32 products to bfloat16 inside the context; it still adds in fp32.

    A CPU without such products, and torch before 2.9, compute in fp32 instead.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
