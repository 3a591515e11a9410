"""The processes of a run -> one error if they would not compute the same run."""

import hashlib
import json
import socket
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from konic.finetuning.errors import ConfigError
from konic.finetuning.models.sharding import is_divided
from konic.finetuning.run.environment import version_of
from konic.finetuning.system.world import World

_MAY_DIFFER = ("device", "model_name")
"""Settings that name a place; what is found there is compared by its hash."""


def require_equal_processes(world: World, settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Raise ConfigError if a process has other versions, settings, data or weights than the first one."""
    if world.size == 1:
        return
    own = {name: _digest(value) for name, value in settings.items() if name not in _MAY_DIFFER}
    own |= {f"the version of {name}": version_of(name) for name in ("konic", "torch", "transformers", "peft")}
    own["the weights that are trained"] = hashlib.sha256(
        b"".join(
            weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            for weight in weights.values()
            if not is_divided(weight)
        )
    ).hexdigest()
    processes = world.gather({"host": socket.gethostname(), "values": own})
    first = processes[0]["values"]
    for rank, process in enumerate(processes):
        differing = [name for name in first | process["values"] if first.get(name) != process["values"].get(name)]
        if differing:
            raise ConfigError(
                f"Process {rank} of {world.size} on {process['host']} differs from the first one on "
                f"{processes[0]['host']} in: {', '.join(differing)}. Every process needs the same script, data, model "
                "and packages."
            )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()
