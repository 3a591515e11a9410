"""MLPs -> MLPs that keep less for the backward pass: two tensors of the inner size for each token, not three.

A gated MLP computes down(act(gate(x)) · up(x)). Autograd keeps gate(x), act(gate(x)) and up(x). Here act(gate(x)) is
computed again: for SmolLM2-135M that is 88 MB less of 505 MB that 8 rows of 60 tokens keep, at no measurable time.
Values and gradients are the same bit for bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaMLP

from konic.finetuning.system.signals import uninterrupted


@contextmanager
def lean_mlps(model: nn.Module) -> Iterator[None]:
    """Let the model's gated MLPs keep less inside the context."""
    mlps = [module for module in model.modules() if _is_gated(module)]
    try:
        for mlp in mlps:
            mlp.forward = partial(_forward, mlp)
        yield
    finally:
        with uninterrupted():
            for mlp in mlps:
                vars(mlp).pop("forward", None)


def _is_gated(module: Any) -> bool:
    """Return True for a module whose forward pass has the very code of Llama's MLP, whatever its name."""
    code, of_llama = getattr(type(module).forward, "__code__", None), LlamaMLP.forward.__code__
    if code is None or (code.co_code, code.co_names) != (of_llama.co_code, of_llama.co_names):
        return False
    activation = module.act_fn
    return "forward" not in vars(module) and not (isinstance(activation, nn.Module) and any(activation.parameters()))


def _forward(mlp: Any, x: Tensor) -> Tensor:
    product: Tensor = _Gated.apply(mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn)  # type: ignore[no-untyped-call]
    result: Tensor = mlp.down_proj(product)
    return result


class _Gated(torch.autograd.Function):
    """Computes act(gate) · up for an elementwise act."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_result: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.activation(gate)
        of_up = of_result[0] * activated.detach()
        (of_gate,) = torch.autograd.grad(activated, gate, of_result[0] * up)
        return of_gate, of_up, None
