"""A ScalingConfig -> Ray with room for it: the cluster that is named, or one for this process alone, on loopback."""

import importlib.util
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import konic
from konic.finetuning.errors import ConfigError, safe_cause
from konic.finetuning.system.signals import in_main_thread
from konic.text import describe_error

_CONNECT_SECONDS = 10.0
_OBJECT_STORE_BYTES = 100 * 2**20
"""Weights do not pass through it: results and messages are small."""
_PROBE_SECONDS = 120.0
_MOST_CHARACTERS = 16
"""Of the folder for temporary files: the system takes 103 to 107 in the name of a socket, and Ray's are long."""


def require_ray() -> None:
    """Raise ConfigError where Ray Train is not installed."""
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError("Training with several workers needs Ray: pip install 'konic[ray]'.")


def check_scaling(scaling: Any, device: str, batch_size: int) -> None:
    """Check what can be checked without Ray running.

    Raises:
        ConfigError: It is no ScalingConfig, or does not go with the device or the batch.
    """
    require_ray()
    from ray.train import ScalingConfig

    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise ConfigError("scaling lets Ray start the processes: start the script without torchrun, or leave it out.")
    if not isinstance(scaling, ScalingConfig):
        raise ConfigError(f"scaling must be a ray.train.ScalingConfig, got {scaling!r:.200}.")
    if scaling.min_workers < 1:
        raise ConfigError(f"scaling: num_workers={scaling.num_workers}, and there must be at least 1.")
    if scaling.max_workers > batch_size:
        raise ConfigError(
            f"TrainingConfig: batch_size={batch_size} is fewer responses than num_workers={scaling.num_workers}. "
            "Raise it, or ask for fewer workers."
        )
    wanted = device.partition(":")[0]
    if wanted == "cuda" and not scaling.use_gpu:
        raise ConfigError(f"device={device!r} needs workers that have a GPU: ScalingConfig(use_gpu=True).")
    if wanted not in ("auto", "cuda") and scaling.use_gpu:
        raise ConfigError(f"ScalingConfig(use_gpu=True) keeps GPUs that device={device!r} would not use.")


@contextmanager
def connected(scaling: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the module `ray`, connected, and the ScalingConfig with resources for every worker.

    That is the cluster that this process is connected to, or that of RAY_ADDRESS; without either, a new one with the
    CPUs of this machine, which nobody else can reach and which ends with the block.

    Raises:
        ConfigError: There is no Ray at the address, or none of this version, or it has no room for the workers.
    """
    import ray

    if ray.is_initialized():
        require_room(ray, scaling)
        yield ray, scaling
        return
    address = os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        _connect(ray, address)
        try:
            require_room(ray, scaling)
            with _quiet():
                yield ray, scaling
        finally:
            ray.shutdown()
        return
    with _embedded(ray, scaling.max_workers):
        own = scaling
        if scaling.resources_per_worker is None:  # each worker gets as many threads as it has CPUs
            share = max(1, (os.cpu_count() or 1) // scaling.max_workers)
            own = replace(scaling, resources_per_worker={"CPU": share} | ({"GPU": 1} if scaling.use_gpu else {}))
        require_room(ray, own)
        with _quiet():
            yield ray, own


def _connect(ray: Any, address: str) -> None:
    host, _, port = address.rpartition(":")
    if "://" in address:
        raise ConfigError(
            f"Ray address {address!r}: give host:port of the cluster's head, from a machine of the cluster. From "
            f"elsewhere, `ray job submit --address {address} -- konic train ...` starts the command there."
        )
    if address != "auto":
        host = host.removeprefix("[").removesuffix("]")  # of IPv6
        if not host or not (port.isascii() and port.isdigit() and int(port) < 2**16):
            raise ConfigError(f"Ray address {address!r}: give host:port of the cluster's head, such as 10.0.0.1:6379.")
        try:
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        except (OSError, ValueError) as error:  # a name that is none is a ValueError
            raise ConfigError(
                f"Ray address {address!r}: nothing answers there ({describe_error(error)}). `ray start --head` prints "
                "the address of a cluster."
            ) from None
    try:
        with _signals_kept():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise ConfigError(
            f"Ray address {address!r}: this process cannot join the cluster: {describe_error(error)}"
        ) from safe_cause(error)


@contextmanager
def _embedded(ray: Any, num_workers: int) -> Iterator[None]:
    """Within it a Ray runs on this machine: it listens on loopback only, to the holder of a token."""
    from ray._private import ray_constants

    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ["RAY_AUTH_TOKEN"] = _token()  # Ray asks for one, and would keep its own in a file
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray's own switch; it has no setting for Linux
    folder = tempfile.mkdtemp(prefix="konic-ray-", dir=_short_folder())
    was_cluster, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        try:
            with _environment(loopback), _signals_kept():
                ray.init(
                    address="local",
                    num_cpus=max(os.cpu_count() or 1, num_workers),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=os.path.join(folder, "ray"),  # Ray opens it to everybody, and `folder` is ours alone
                )
        except Exception as error:
            raise ConfigError(f"Ray cannot start on this machine: {describe_error(error)}") from safe_cause(error)
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = was_cluster
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _short_folder() -> str | None:
    """Return a folder for temporary files in which the names of Ray's sockets are not too long; None is the usual one.

    Raises:
        ConfigError: There is none.
    """
    usual = tempfile.gettempdir()
    if len(os.path.abspath(usual)) <= _MOST_CHARACTERS:
        return None
    short = "/tmp"  # noqa: S108  what is made in it is ours alone
    if os.access(short, os.W_OK | os.X_OK):
        return short
    raise ConfigError(f"Ray's sockets cannot be in {usual}, whose name is too long: set TMPDIR to a short one.")


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Put the handler of SIGTERM back on exit: Ray replaces it by one that ends the process without saving."""
    if not in_main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@cache
def _token() -> str:
    """One for this process, because Ray reads it once."""
    return secrets.token_hex(32)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it Ray prints nothing of its own: of a lost worker it has ten lines, and konic one."""
    from ray._private import worker

    before, worker._worker_logs_enabled = worker._worker_logs_enabled, False
    try:
        yield
    finally:
        worker._worker_logs_enabled = before


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def require_room(ray: Any, scaling: Any) -> None:
    """Raise ConfigError if the nodes lack what the workers need, and no autoscaler can add any."""
    from ray._private.state import state

    per_worker = scaling._resources_per_worker_not_none
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = _room([_most_workers(node, per_worker, scaling.max_workers) for node in nodes], scaling.placement_strategy)
    if room < scaling.min_workers and not state.get_max_resources_from_cluster_config():
        raise ConfigError(
            f"num_workers={scaling.num_workers}: each worker takes {describe_resources(per_worker)}, and this Ray of "
            f"{len(nodes)} nodes has room for {room}{_by_placement(scaling.placement_strategy)}. Ask for fewer workers "
            "or resources, or add nodes."
        )


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

    per_worker, task = scaling._resources_per_worker_not_none, ray.remote(num_cpus=0, max_retries=0)(found)
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
