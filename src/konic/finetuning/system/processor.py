"""The name of this machine's processor."""

import platform
from pathlib import Path


def processor_name() -> str:
    """Return the name of the processor if the system has it, else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
