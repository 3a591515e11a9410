"""The workers of Ray Train -> one process group of torch, joined at an address that only their nodes listen on.

Ray's own way of joining them (`TorchConfig`) opens a port on all interfaces, without asking who calls.
"""

import datetime
import os
import socket
from ipaddress import ip_address
from typing import Any

import torch.distributed as dist

_SOCKETS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def join_workers(limit_seconds: float) -> None:
    """Make this worker a process of the group of all workers, under the variables that `torchrun` sets.

    The first worker listens on the address by which Ray knows its node: on loopback, where Ray runs for this training
    alone. There the workers exchange numbers on loopback too.

    Args:
        limit_seconds: How long a worker waits for the others.
    """
    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero
    from ray.train.torch import get_device

    context = get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    address = ray.util.get_node_ip_address()
    if ip_address(address).is_loopback:
        os.environ |= dict.fromkeys(_SOCKETS, _loopback())
    limit = datetime.timedelta(seconds=limit_seconds)
    store: dict[str, Any] = {"world_size": size, "timeout": limit}
    listening = None
    if rank == 0:
        listening = socket.create_server((address, 0), family=_family(address), backlog=size)
        store |= {"is_master": True, "master_listen_fd": listening.fileno()}
    host, port = broadcast_from_rank_zero(listening and listening.getsockname()[:2])
    os.environ |= {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }
    made = dist.TCPStore(host, port, **store)  # type: ignore[attr-defined]
    if listening is not None:
        listening.detach()  # the store closes it
    backend = "cpu:gloo,cuda:nccl" if get_device().type == "cuda" else "gloo"
    dist.init_process_group(backend, store=made, rank=rank, world_size=size, timeout=limit)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _loopback() -> str:
    """Return the name of the loopback interface: `lo`, or `lo0` on a Mac."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
