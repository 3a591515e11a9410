"""Nodes of a Ray -> an error where they cannot run the workers: too little room, another konic, no GPU."""

from collections.abc import Mapping, Sequence
from typing import Any

import konic
from konic.finetuning.cluster.ray_inside import may_grow, worker_resources
from konic.finetuning.errors import ConfigError, safe_cause
from konic.text import describe_error

_PROBE_SECONDS = 120.0


def require_room(ray: Any, scaling: Any) -> None:
    """Raise ConfigError if the nodes lack what the workers need, and no autoscaler can add any."""
    per_worker, labels = worker_resources(scaling), _wanted_labels(scaling)
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [node["Resources"] for node in alive if labels.items() <= node.get("Labels", {}).items()]
    room = _room([_most_workers(node, per_worker, scaling.max_workers) for node in nodes], scaling.placement_strategy)
    if room < scaling.min_workers and not may_grow():
        raise ConfigError(
            f"num_workers={scaling.num_workers}: each worker takes {describe_resources(per_worker)}, and this Ray of "
            f"{len(alive)} nodes has room for {room}{_by_placement(scaling.placement_strategy)}{_on_nodes(labels)}. "
            "Ask for fewer workers or resources, or add nodes."
        )


def _wanted_labels(scaling: Any) -> dict[str, str]:
    """Return the labels that the node of every worker must have; what else a selector of Ray can say is left to Ray."""
    selector = getattr(scaling, "label_selector", None)
    if not isinstance(selector, dict):
        return {}
    return {name: value for name, value in selector.items() if not value.startswith(("!", "in("))}


def _on_nodes(labels: Mapping[str, str]) -> str:
    wanted = ", ".join(f"{name}={value}" for name, value in labels.items())
    return f" on nodes with the labels {wanted}" if wanted else ""


def _most_workers(node: Mapping[str, float], per_worker: Mapping[str, float], most: int) -> int:
    """Return how many workers a node has resources for, at most `most`."""
    return min((int(node.get(name, 0) // amount) for name, amount in per_worker.items() if amount), default=most)


def _room(by_node: Sequence[int], placement: str) -> int:
    """Return how many workers there is room for, where a placement wants them all apart, or all together."""
    if placement == "STRICT_SPREAD":
        return sum(count > 0 for count in by_node)
    return max(by_node, default=0) if placement == "STRICT_PACK" else sum(by_node)


def _by_placement(placement: str) -> str:
    return f" by placement_strategy={placement!r}" if placement.startswith("STRICT") else ""


def describe_resources(amounts: Mapping[str, float]) -> str:
    """Return amounts by resource, such as {"CPU": 2, "GPU": 1}, as "2 CPU, 1 GPU"."""
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())


def require_equal_nodes(ray: Any, scaling: Any) -> None:
    """Check that every node which can take a worker has this konic, and a GPU for torch where workers need one.

    Raises:
        ConfigError: One has another version, or none, or torch finds no GPU; the message names the node.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def found(needs_gpu: bool) -> tuple[str, str, bool]:  # sent by value: the node may have no konic
        import os
        import socket

        try:
            import konic
        except ImportError:
            return socket.gethostname(), "no konic", False
        has_gpu = False
        if needs_gpu:
            import torch

            os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides the GPUs from a task that takes none
            has_gpu = torch.cuda.is_available()
        return socket.gethostname(), f"konic {konic.__version__}", has_gpu

    per_worker, task = worker_resources(scaling), ray.remote(num_cpus=0, max_retries=0)(found)
    nodes = [
        node
        for node in ray.nodes()
        if node["Alive"] and all(node["Resources"].get(name, 0) >= amount for name, amount in per_worker.items())
    ]
    affinities = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    answers = [task.options(scheduling_strategy=affinity).remote(scaling.use_gpu) for affinity in affinities]
    for node, answer in zip(nodes, answers, strict=True):
        where = f"Node {node['NodeManagerAddress']}"
        try:
            host, version, has_gpu = ray.get(answer, timeout=_PROBE_SECONDS)
        except Exception as error:
            raise ConfigError(f"{where} cannot start a worker: {describe_error(error)}") from safe_cause(error)
        if version != f"konic {konic.__version__}":
            raise ConfigError(
                f"{where} ({host}) has {version}, and this process has konic {konic.__version__}. Install the same "
                "version on every node."
            )
        if scaling.use_gpu and not has_gpu:
            raise ConfigError(
                f"{where} ({host}): torch finds no GPU there, and every worker needs one. Install the driver and a "
                "torch for CUDA on it, or train with device='cpu'."
            )
