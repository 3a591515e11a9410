"""A ScalingConfig -> Ray with room for it: the cluster that is named, or one for this process alone, on loopback."""

import importlib.util
import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from konic.finetuning.cluster.embedded import embedded, signals_kept
from konic.finetuning.cluster.nodes import require_room
from konic.finetuning.cluster.ray_inside import quiet
from konic.finetuning.errors import ConfigError, safe_cause
from konic.text import describe_error

_CONNECT_SECONDS = 10.0
_PRINTS_ADDRESS = "`ray start --head` prints the address of a cluster."
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000 04 00 00000000")
"""How a client of HTTP/2, which Ray's head speaks, begins: the preface and empty settings (RFC 9113, section 3.4)."""
_PLACEMENTS = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
_FRAME_BYTES, _TYPE, _SETTINGS = 9, 3, 4
"""The length of a frame's header, where its type stands, and the type with which a server begins."""


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
    if not hasattr(scaling, "min_workers"):
        raise ConfigError("RAY_TRAIN_V2_ENABLED=0 selects an earlier Ray Train, without which konic works: unset it.")
    if type(scaling.min_workers) is not int or type(scaling.max_workers) is not int or scaling.min_workers < 1:
        raise ConfigError(f"scaling: num_workers={scaling.num_workers}, and there must be at least 1.")
    if scaling.max_workers > batch_size:
        raise ConfigError(
            f"TrainingConfig: batch_size={batch_size} is fewer responses than num_workers={scaling.num_workers}. "
            "Raise it, or ask for fewer workers."
        )
    _check_resources(scaling)
    wanted = device.partition(":")[0]
    if wanted == "cuda" and not scaling.use_gpu:
        raise ConfigError(f"device={device!r} needs workers that have a GPU: ScalingConfig(use_gpu=True).")
    if wanted not in ("auto", "cuda") and scaling.use_gpu:
        raise ConfigError(f"ScalingConfig(use_gpu=True) keeps GPUs that device={device!r} would not use.")


def _check_resources(scaling: Any) -> None:
    amounts, placement = scaling.resources_per_worker, scaling.placement_strategy
    if amounts is not None:
        is_right = isinstance(amounts, dict) and all(
            isinstance(name, str) and type(amount) in (int, float) and 0 <= amount < math.inf
            for name, amount in amounts.items()
        )
        if not is_right or not any((amounts | ({"GPU": 1} if scaling.use_gpu else {})).values()):
            raise ConfigError(
                f"scaling: resources_per_worker={amounts!r:.200} must give each resource a number of at least 0, and "
                "one of them more, such as {'CPU': 2}."
            )
    if placement not in _PLACEMENTS:
        raise ConfigError(f"scaling: placement_strategy={placement!r:.200} must be one of {', '.join(_PLACEMENTS)}.")
    labels = getattr(scaling, "label_selector", None)
    of_workers = labels if isinstance(labels, list) else [{} if labels is None else labels]
    if not all(isinstance(own, dict) and all(map(_is_text, (*own, *own.values()))) for own in of_workers):
        raise ConfigError(
            f"scaling: label_selector={labels!r:.200} must be a dict of text by text, such as {{'ray.io/zone': 'a'}}, "
            "or a list of one for each worker."
        )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


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
            with quiet():
                yield ray, scaling
        finally:
            ray.shutdown()
        return
    with embedded(ray, scaling.max_workers):
        own = scaling
        if scaling.resources_per_worker is None:  # each worker gets as many threads as it has CPUs
            share = max(1, (os.cpu_count() or 1) // scaling.max_workers)
            own = replace(scaling, resources_per_worker={"CPU": share} | ({"GPU": 1} if scaling.use_gpu else {}))
        require_room(ray, own)
        with quiet():
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
            is_other = not _speaks_http2(host, int(port))
        except (OSError, ValueError) as error:  # a name that is none is a ValueError
            raise ConfigError(
                f"Ray address {address!r}: nothing answers there ({describe_error(error)}). {_PRINTS_ADDRESS}"
            ) from None
        if is_other:
            raise ConfigError(f"Ray address {address!r}: what answers there is no Ray. {_PRINTS_ADDRESS}")
    try:
        with signals_kept():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        has_token = os.environ.get("RAY_AUTH_MODE") == "token"
        hint = ". If the cluster asks for a token, set RAY_AUTH_MODE=token and its RAY_AUTH_TOKEN."
        raise ConfigError(
            f"Ray address {address!r}: this process cannot join the cluster: {describe_error(error)}"
            + (hint if isinstance(error, ConnectionError) and not has_token else "")
        ) from safe_cause(error)


def _speaks_http2(host: str, port: int) -> bool:
    """Return True unless a server answers otherwise; Ray itself would ask it again and again for minutes.

    Raises:
        OSError: Nothing listens there, or it says nothing.
        ValueError: The host is no name.
    """
    with socket.create_connection((host, port), _CONNECT_SECONDS) as server:
        if os.environ.get("RAY_USE_TLS") == "1":
            return True
        server.sendall(_HELLO)
        header = b""
        while len(header) < _FRAME_BYTES and (part := server.recv(_FRAME_BYTES - len(header))):
            header += part
    return len(header) == _FRAME_BYTES and header[_TYPE] == _SETTINGS
