"""Models -> models whose weights are divided among processes, by FSDP2 of torch.

Each decoder layer is a unit, and what is left of the model, embedding and head, is one more. A unit is gathered when it
computes and divided again after it, so a pass through the model takes all processes. They hold the same number of
passes: a process with less to do makes empty ones (:meth:`Sharded.padded`).

Left out on purpose: what an adapter trains is small, and every process holds all of it.
"""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from konic.finetuning.errors import ConfigError, safe_cause
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.quantised import keep_scales
from konic.finetuning.models.sharding import Part
from konic.finetuning.system.memory import available_memory, return_freed_memory
from konic.finetuning.system.signals import uninterrupted
from konic.finetuning.system.world import World
from konic.output import get_logger
from konic.text import describe_error

logger = get_logger(__name__)

ROOM_TO_SAMPLE = 2
"""Whole weights are gathered for a rollout if so many times their size is free: adapters are merged into copies."""
_GIB = 2**30


class Sharded:
    """The models of a policy, divided among the processes of a world."""

    def __init__(
        self,
        models: Sequence[LanguageModel],
        kept_whole: set[nn.Parameter],
        world: World,
        device: torch.device,
        sharded_sampling: bool | None,
    ) -> None:
        """Divide the weights of models that are on the CPU, and move the parts to a device.

        Args:
            models: The policy's model, and the reference where it is a model of its own.
            kept_whole: Weights that every process keeps.
            world: The processes.
            device: "cpu" or a GPU.
            sharded_sampling: See `TrainingConfig`.
        """
        self._world, self._models, self._device = world, models, device
        # no name may hold a whole weight while the weights are divided one after the other
        size = sum(weight.nbytes for model in models for weight in model.causal_lm.parameters())
        self._samples_whole = not sharded_sampling if sharded_sampling is not None else self._fits(size, device)
        self.divides_trained = not kept_whole
        mesh = init_device_mesh(device.type, (world.size,))
        self._units: list[Any] = []
        self._roots: list[Any] = []
        kind = type(models[0].causal_lm).__name__
        try:
            for model in models:
                self._divide_model(model, mesh, kept_whole)
        except (AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
            raise ConfigError(
                f"sharding='fsdp': the weights of {kind} cannot be divided: {describe_error(error)}. Use another "
                "model, or leave sharding out."
            ) from safe_cause(error)
        return_freed_memory()

    def _divide_model(self, model: LanguageModel, mesh: DeviceMesh, kept_whole: set[nn.Parameter]) -> None:
        root: Any = model.causal_lm
        layers: list[Any] = [*model.outer_layers]
        keep_scales(root, self._device)
        if not layers:
            raise ValueError("it has no layers of the kind that transformers marks")
        try:
            for module in (*layers, root):
                fully_shard(module, mesh=mesh, ignored_params=kept_whole)
        except RuntimeError as error:  # of a torch that takes a gradient of every weight, also of integers
            if getattr(root, "is_quantized", False):
                raise TypeError(f"torch {torch.__version__} divides no quantised ones") from safe_cause(error)
            raise
        self._units += [*layers, root]
        self._roots.append(root)
        root.set_gradient_divide_factor(1.0)  # gradients are sums; losses are divided by the tokens of all processes
        for layer, before in zip(layers, [root, *layers], strict=False):
            layer.set_gradient_divide_factor(1.0)
            # by default, what is gathered next depends on earlier passes, which differ between processes
            layer.set_modules_to_backward_prefetch([before])
        # embedding and head are read without a call of the root
        model.body.register_forward_pre_hook(lambda *_: root.unshard())
        model.in_step = True
        with self.passes(), torch.no_grad():  # FSDP2 takes the first module that is called for the root
            root(input_ids=model.probe_ids(1)[None], use_cache=False)

    def _fits(self, size: int, device: torch.device) -> bool:
        """Return True if every process has room for the whole weights, and say so."""
        on_gpu, host = device.type == "cuda", socket.gethostname()
        free = torch.cuda.mem_get_info(device)[0] if on_gpu else available_memory()
        messages = self._world.gather({"free": free, "host": host})
        sharing = [1 if on_gpu else sum(other["host"] == each["host"] for other in messages) for each in messages]
        known = [(each["free"], number) for each, number in zip(messages, sharing, strict=True)]
        rooms = [free / number for free, number in known if free is not None]
        fits = not rooms or ROOM_TO_SAMPLE * size <= min(rooms)
        logger.warning(
            "The weights, %.1f GiB, are divided among %d processes. %s; sharded_sampling in TrainingConfig decides it.",
            size / _GIB, self._world.size,
            "Each process gathers them all to sample" if fits else "They stay divided in sampling, which is slower",
        )  # fmt: skip
        return fits

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """Gather the whole weights once, if they fit; else the context is one of :meth:`passes`.

        An error that another process has sent ends it before that.
        """
        if not self._samples_whole:
            with self.passes():
                yield
            return
        self._world.gather({})
        try:
            with uninterrupted(), self._world.exchanging():
                for unit in self._units:
                    unit.unshard()
            self._keep_whole(True)
            yield
        finally:
            with uninterrupted():
                self._keep_whole(False)
                self._divide()
            return_freed_memory()

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Ctrl-C waits for the end: the other processes would wait for this one.

        An error that one of them has sent, or Ctrl-C there, ends all of them before the weights are gathered.
        """
        with uninterrupted():
            self._world.gather({})
            try:
                with self._world.exchanging():
                    for root in self._roots:  # a KL in the loss reads the head of the reference alone
                        root.unshard()
                    yield
            finally:
                self._divide()

    def padded(self, parts: Sequence[Part]) -> Sequence[Part | None]:
        """The parts, and None until no process has more."""
        return [*parts, *[None] * (self.most(len(parts)) - len(parts))]

    def most(self, count: int) -> int:
        """The largest count of any process."""
        if not self._models[0].in_step:
            return count
        return max(message["count"] for message in self._world.gather({"count": count}))

    def _keep_whole(self, on: bool) -> None:
        for model, root in zip(self._models, self._roots, strict=True):
            root.set_reshard_after_forward(not on)
            model.in_step = not on

    def _divide(self) -> None:
        for unit in self._units:
            unit.reshard()
