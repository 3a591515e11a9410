"""The processes of one run on this machine, started without torchrun, so that each can be watched and killed."""

import os
import socket
import subprocess


def free_port():
    """A port of this machine that nothing listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_ranks(command, size, popen=subprocess.Popen, **options):
    """The command, started in `size` processes that find each other; one is started without any others."""
    meeting = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        popen(
            command,
            env=os.environ | (meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}),
            **options,
        )
        for rank in range(size)
    ]
