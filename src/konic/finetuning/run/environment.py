"""The machine -> what must be equal, besides settings and seed, for a run to be the same bit for bit."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from konic.finetuning.system.processor import processor_name

_LIBRARIES = ("konic", "torch", "transformers", "peft", "datasets", "numpy")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, processor, threads and device, by name."""
    return {name: version_of(name) for name in _LIBRARIES} | {
        "python": platform.python_version(),
        "machine": processor_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def version_of(package: str) -> str:
    """The version of an installed package; "not installed" if it runs from a folder of source files."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
