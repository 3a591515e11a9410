"""Several processes as one world, through `torch.distributed`.

Messages are safetensors with JSON, so that no process unpickles what another one sent. All go through one collective
call, so a process that fails can tell the others at any time: they learn of it where they wait for its next message.
"""

import atexit
import datetime
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

import konic.finetuning.errors
from konic.finetuning.errors import ConfigError, KonicError, ProcessLostError, TrainingError, safe_cause
from konic.finetuning.system.signals import uninterrupted
from konic.output import get_logger
from konic.text import describe_error

_SECONDS_TO_START = 60.0
"""How much earlier than another a process may start, however short the limit."""


class Group:
    """The processes of a `torch.distributed` group, of which this is one."""

    def __init__(self, limit_seconds: float) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._limit = datetime.timedelta(seconds=limit_seconds)
        self._talk = dist.new_group(backend="gloo", timeout=self._limit)
        self._known: BaseException | None = None
        if self.rank > 0:
            get_logger("konic").setLevel(logging.ERROR)  # the first process warns for all

    @classmethod
    def joined(cls, limit_seconds: float) -> "Group":
        """Return the group, joined as the environment says that `torchrun` sets, if it is not joined yet.

        Raises:
            ConfigError: The environment is not complete, or the other processes cannot be reached.
        """
        if not dist.is_initialized():
            missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
            if missing:
                raise ConfigError(
                    f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that this is one of several processes, but "
                    f"{', '.join(missing)} is not set. Start them with torchrun, or unset WORLD_SIZE."
                )
            rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
            if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
                raise ConfigError(f"RANK={rank} and WORLD_SIZE={size}: a rank is a number from 0, below WORLD_SIZE.")
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            limit = datetime.timedelta(seconds=max(limit_seconds, _SECONDS_TO_START))
            try:
                dist.init_process_group(backend, timeout=limit)
            except (ValueError, RuntimeError) as error:
                where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                raise ConfigError(
                    f"The processes of this run cannot be joined at {where}: {describe_error(error)}"
                ) from safe_cause(error)
            atexit.register(_leave)
        return cls(limit_seconds)

    def own_rows(self, count: int) -> range:
        """Parts in order, as equal as they can be."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """All messages, by rank; an error that another process has sent is raised here."""
        messages, error = [], None
        try:
            with uninterrupted():  # the calls of an exchange are one: who left between them would wait for the others
                messages = [_read(received) for received in self._exchange(_write(message))]
                sent = [(rank, other["error"]) for rank, other in enumerate(messages) if "error" in other]
                error = next((_read_error(record, rank, self.size) for rank, record in sent), None)
        except KeyboardInterrupt:
            if error is None:
                raise
        if error is not None:
            self._known = error
            raise error
        return messages

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """The sums, by one call for each kind of number."""
        for kind in dict.fromkeys(tensor.dtype for tensor in tensors):
            same = [tensor for tensor in tensors if tensor.dtype == kind]
            flat = torch.cat([tensor.flatten() for tensor in same])
            with self._naming_the_lost():
                dist.all_reduce(flat)
            for tensor, total in zip(same, torch.split(flat, [tensor.numel() for tensor in same]), strict=True):
                tensor.copy_(total.view_as(tensor))

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """What torch raises when a process is gone becomes the error that says so."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            with self._naming_the_lost():
                raise

    def device(self, chosen: torch.device) -> torch.device:
        """On a machine with several GPUs, the one of the local rank."""
        if chosen.type != "cuda" or chosen.index is not None:
            return chosen
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device

    @contextmanager
    def propagating_errors(self) -> Iterator[None]:
        """Every process gets the error of one of them, by its next message; its own, if it has one."""
        try:
            yield
        except BaseException as error:
            if error is not self._known and not isinstance(error, ProcessLostError):
                self._known = error
                kind = type(error).__name__
                lines = list(error.args) if isinstance(error, KonicError) else [describe_error(error)]
                record = {"kind": kind, "lines": lines, "host": socket.gethostname()}
                with suppress(ProcessLostError, KeyboardInterrupt), uninterrupted():
                    self._exchange(_write({"error": record}))
            raise

    def _exchange(self, payload: bytes) -> list[bytes]:
        with self._naming_the_lost():
            if self.size > 1:
                dist.monitored_barrier(self._talk, self._limit, wait_all_ranks=True)
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(payload)]), group=self._talk)
            longest = int(max(sizes))
            own = torch.frombuffer(bytearray(payload.ljust(longest, b"\0")), dtype=torch.uint8)
            received = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(received, own, group=self._talk)
        return [bytes(part[: int(size)].numpy()) for part, size in zip(received, sizes, strict=True)]

    @contextmanager
    def _naming_the_lost(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ProcessLostError(
                f"Process {self.rank} of {self.size} on {socket.gethostname()} has lost another process of this run, "
                f"which ended, or did not answer for {self._limit.total_seconds():g} s: {describe_error(error)}"
            ) from safe_cause(error)


def _write(message: Mapping[str, Any]) -> bytes:
    """Return a message as bytes: the length of its JSON, the JSON, and its tensors."""
    tensors = {name: value.contiguous().cpu() for name, value in message.items() if isinstance(value, Tensor)}
    others = json.dumps({name: value for name, value in message.items() if name not in tensors}).encode()
    return len(others).to_bytes(8, "little") + others + safetensors.torch.save(tensors)


def _read(received: bytes) -> dict[str, Any]:
    """Return the message of another process.

    Raises:
        TrainingError: It is damaged, or of another version.
    """
    start = 8 + int.from_bytes(received[:8], "little")
    try:
        return {**json.loads(received[8:start]), **safetensors.torch.load(received[start:])}
    except (ValueError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise TrainingError(
            f"A message of another process of this run cannot be read: {describe_error(error)}. Start all processes "
            "with the same version of konic."
        ) from safe_cause(error)


def _read_error(record: Mapping[str, Any], rank: int, size: int) -> BaseException:
    """Return the error that another process has sent, as one of the same kind."""
    try:
        name, host = str(record["kind"]), record["host"]
        first, *more = map(str, record["lines"] or [name])
    except (KeyError, TypeError):
        return TrainingError(f"Process {rank} of {size} ended with an error that cannot be read.")
    if name == KeyboardInterrupt.__name__:
        return KeyboardInterrupt()
    kind = getattr(konic.finetuning.errors, name, None)
    is_ours = isinstance(kind, type) and issubclass(kind, KonicError)
    where = f"In process {rank} of {size} on {host}: "
    return (kind if is_ours else TrainingError)(where + first, *more)  # type: ignore[misc]


def _leave() -> None:
    """End the group's threads: where they are left to the end of the process, torch at times aborts it (SIGABRT)."""
    if dist.is_initialized():
        dist.destroy_process_group()
