"""Samples of each process -> samples of all: tokens and numbers are exchanged, hidden states stay where they are.

Shapes: B sequences of all processes, R response tokens.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from konic.finetuning.rollout.sampler import Samples
from konic.finetuning.system.world import World


def share_samples(
    world: World, rows: range, samples: Samples, numbers: Mapping[str, Tensor]
) -> tuple[Samples, dict[str, Tensor]]:
    """Return the samples and numbers of all rows [B, ...], without hidden states.

    Args:
        world: The processes.
        rows: The rows that this process has worked on.
        samples: Their responses; a process without rows gives some that nobody gets.
        numbers: Tensors [rows, R] or [rows] by name.
    """
    drawn = {name: value for name, value in vars(samples).items() if name != "hidden"}
    if world.size == 1:
        return Samples(**drawn), dict(numbers)
    own = {f"samples.{name}": value for name, value in drawn.items()} | dict(numbers)
    parts = world.gather({name: value[: len(rows)] for name, value in own.items()})
    whole = {name: join_rows([part[name].to(value.device) for part in parts]) for name, value in own.items()}
    return Samples(**{name: whole.pop(f"samples.{name}") for name in drawn}), whole


def join_rows(tensors: Sequence[Tensor], pads_left: bool = False) -> Tensor:
    """Return the rows of tensors [rows, length, ...] or [rows] as one tensor, padded with 0 to the longest length."""
    if tensors[0].ndim == 1:
        return torch.cat([*tensors])
    length = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([pad_rows(tensor, length, pads_left) for tensor in tensors])


def pad_rows(tensor: Tensor, length: int, on_left: bool = False) -> Tensor:
    """Return a tensor [rows, shorter, ...] as [rows, length, ...]."""
    missing = length - tensor.shape[1]
    ends = (missing, 0) if on_left else (0, missing)
    return functional.pad(tensor, (*(0, 0) * (tensor.ndim - 2), *ends))
