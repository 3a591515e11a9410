"""The processor of this machine."""

import platform
from pathlib import Path


def processor_name() -> str:
    """Return the name of the processor if the system has it, else its kind."""
    return _field("model name") or platform.machine()


def is_amd() -> bool:
    """Return True if the processor says that AMD made it."""
    return "AuthenticAMD" in _maker()


def is_intel() -> bool:
    """Return True if the processor says that Intel made it."""
    return "GenuineIntel" in _maker()


def has_bfloat16() -> bool:
    """Return True if the processor has instructions for products in bfloat16: those of AVX-512, or Intel's AMX."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(_field("flags").split())


def _maker() -> str:
    return _field("vendor_id") or platform.processor()


def _field(name: str) -> str:
    """Return what the system says of the first core; empty where it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
