"""What the rest of konic knows of weights that are divided among the processes of a run. Loads no `torch.distributed`.

`fsdp.py` divides them. Between rollouts and updates, a process then holds its part of every weight.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")


class Sharding(Protocol):
    """How the weights of a policy are divided among the processes."""

    divides_trained: bool
    """True if weights that are trained are divided too: then all processes take part in saving them."""

    def rollout(self) -> AbstractContextManager[None]:
        """Return a context manager for sampling and scoring: the whole weights are here inside of it, if they fit."""

    def passes(self) -> AbstractContextManager[None]:
        """Return a context manager for passes that every process makes equally often; all parts are apart after it."""

    def padded(self, parts: Sequence[Part]) -> Sequence[Part | None]:
        """Return the parts of this process's work, with None added until no process has more, inside :meth:`passes`."""

    def most(self, count: int) -> int:
        """Return the largest count of all processes where they make the same passes, else the count."""


class NotSharded:
    """Every process holds all weights."""

    divides_trained = False

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """Nothing to do."""
        yield

    passes = rollout

    def padded(self, parts: Sequence[Part]) -> Sequence[Part | None]:
        """The parts."""
        return parts

    def most(self, count: int) -> int:
        """The count."""
        return count


NOT_SHARDED = NotSharded()


def is_divided(tensor: Tensor) -> bool:
    """Return True for a tensor of which each process holds a part."""
    return hasattr(tensor, "to_local")


def own_part(tensor: Tensor) -> Tensor:
    """Return the part of a divided tensor that is here, sharing its memory; any other tensor itself."""
    return tensor.to_local() if is_divided(tensor) else tensor  # type: ignore[attr-defined]


def divided_like(other: Any, whole: Tensor) -> Tensor:
    """Return a whole tensor, which every process has, divided like another one if that is divided."""
    if not is_divided(other):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


@torch.no_grad()
def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Return the tensors whole and on the CPU; {} without `keep`. With divided ones, all processes have to call it."""
    kept = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if is_divided(tensor) else tensor  # type: ignore[attr-defined]
        if keep:
            kept[name] = whole.detach().cpu().contiguous()
    return kept
