"""The processes that train one model together: which rows each works on, and what they tell each other.

Every process holds all weights and takes every decision itself, from numbers that all of them have: only sampling,
rewards, and the passes of the update are divided. So one process alone is the case of a group of one.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

Message = Mapping[str, Any]
"""What a process tells the others: tensors and JSON values by name."""


class World(Protocol):
    """The processes of a run. Every process makes the same calls, in the same order."""

    rank: int
    """Number of this process, from 0. The first one writes the files and the output."""
    size: int
    """Number of processes."""

    def own_rows(self, count: int) -> range:
        """Return the rows of `count` that this process works on: parts in order, as equal as they can be."""

    def gather(self, message: Message) -> Sequence[Message]:
        """Return the messages of all processes, by rank.

        Raises:
            Exception: What another process said instead, in :meth:`propagating_errors`.
        """

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add to each tensor those of the other processes, in place. It follows a :meth:`gather` without a break."""

    def exchanging(self) -> AbstractContextManager[None]:
        """Return a context manager: a process that is lost, where torch itself exchanges tensors, is named."""

    def device(self, chosen: torch.device) -> torch.device:
        """Return the device of this process, where several share a machine."""

    def propagating_errors(self) -> AbstractContextManager[None]:
        """Return a context manager: an error inside of it, also Ctrl-C, ends the work of all processes."""


class Alone:
    """A run of one process."""

    rank, size = 0, 1

    def own_rows(self, count: int) -> range:
        """All rows."""
        return range(count)

    def gather(self, message: Message) -> Sequence[Message]:
        """The message."""
        return [message]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Nothing is added."""

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Nobody can be lost."""
        yield

    def device(self, chosen: torch.device) -> torch.device:
        """The device."""
        return chosen

    @contextmanager
    def propagating_errors(self) -> Iterator[None]:
        """There is no other process to end."""
        yield


ALONE = Alone()


def find_world(limit_seconds: float) -> World:
    """Return the processes that this one was started with, by Ray Train or torchrun, or itself alone.

    Args:
        limit_seconds: Seconds that a process waits for the others before it says which of them is missing.
    """
    if not is_one_of_several():
        return ALONE
    from konic.finetuning.system.group import Group

    return Group.joined(limit_seconds)


def is_one_of_several() -> bool:
    """Return True if this process was started with others, by Ray Train or torchrun."""
    distributed = sys.modules.get("torch.distributed")
    has_group = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return has_group or os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def from_first(world: World, value: Any) -> Any:
    """Return the first process's value, a JSON value, in every process."""
    return world.gather({"value": value if world.rank == 0 else None})[0]["value"]
