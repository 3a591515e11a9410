"""Checkpoints: everything a resume needs, in safetensors and json alone; nothing that is read can run."""

import json
import logging
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from konic.finetuning.errors import ConfigError, NotFiniteError, OutputError, printable
from konic.finetuning.folders import flaw, seal, written_whole
from konic.finetuning.moments import RunningMoments
from konic.finetuning.paths import as_path
from konic.finetuning.policy import Policy
from konic.finetuning.results import FinetuningIterationResult
from konic.finetuning.state import TrainerState

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
BEST_FILE = "best.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_FIXED = ("model_name", "use_lora", "lora_config")
"""Settings that the weights of a checkpoint depend on."""
_RECORDED = ("iteration", "num_steps", "elapsed_seconds", "reward_moments", "settings", "environment", "history")
_FREE = (
    "max_iterations", "iterations_done", "max_minutes", "eval_every", "device", "on_reward_error", "max_error_rate",
    "reward_workers", "reward_timeout_seconds",
)  # fmt: skip
"""Settings that change no number of an iteration that both runs would do."""
_NAMED = re.compile(r"checkpoint-[0-9]+")
LIBRARIES = ("konic", "torch", "transformers", "peft", "datasets", "numpy")


def environment(device: torch.device) -> dict[str, Any]:
    """What decides, besides settings and seed, whether a run comes out the same bit for bit."""
    return {name: version(name) for name in LIBRARIES} | {
        "python": platform.python_version(),
        "machine": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def save_checkpoint(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, state: TrainerState, settings: dict[str, Any]
) -> None:
    """Write everything a resume needs: weights, optimizer, counters, history, best weights, settings.

    Raises:
        NotFiniteError: A weight or a moment of the optimizer is NaN or infinite; nothing is written.
        OutputError: The folder cannot be written.
    """
    for name, tensor in (policy.trainable() | _optimizer_tensors(policy, optimizer)).items():
        if not tensor.isfinite().all():
            raise NotFiniteError(
                f"{name} holds NaN or infinity after iteration {state.iteration}: no checkpoint of it is written. "
                "Resume the one before, with a lower learning_rate or max_grad_norm."
            )
    with written_whole(folder) as target:
        policy.save(target)
        save_file(_optimizer_tensors(policy, optimizer), target / OPTIMIZER_FILE)
        if state.best_weights is not None:
            save_file(state.best_weights, target / BEST_FILE)
        record = {
            "iteration": state.iteration,
            "num_steps": state.num_steps,
            "elapsed_seconds": state.elapsed_seconds,
            "reward_moments": {name: asdict(moments) for name, moments in state.reward_moments.items()},
            "settings": settings,
            "environment": environment(policy.device),
            "history": [result.to_dict() for result in state.history],
        }
        (target / STATE_FILE).write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
        seal(target)


def read_record(folder: Path) -> dict[str, Any]:
    """Where the run of a checkpoint stood, and its settings: what can be read without its weights.

    Raises:
        OutputError: There is no checkpoint in the folder.
    """
    try:
        record = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        _require_kinds(record)
        return {name: record[name] for name in _RECORDED}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise OutputError(
            f"{folder}: is not a whole checkpoint: {type(error).__name__}: {error}. Give another one."
        ) from error


def require_same_run(
    folder: Path, record: dict[str, Any], settings: dict[str, Any], device: torch.device, allow_changes: bool
) -> None:
    """See that a checkpoint belongs to the run that is to go on; what keeps it from being the same is named.

    Raises:
        OutputError: A setting differs without `allow_changes`, or one that the weights depend on.
    """
    now, saved = json.loads(json.dumps(settings, default=str)), record["settings"]
    falls = now.get("lr_scheduler", "constant") != "constant"  # its rates depend on the run's whole length
    free = set(_FREE) - ({"max_iterations"} if falls else set())
    changed = [name for name, value in now.items() if saved.get(name) != value and name not in free]
    named = "; ".join(f"{name} was {saved.get(name)!r} and is {now[name]!r}" for name in changed)
    if any(name in _FIXED for name in changed):
        raise OutputError(f"{folder}: is a checkpoint of another model: {named}. Resume with what it was made with.")
    if changed and not allow_changes:
        raise OutputError(
            f"{folder}: is a checkpoint of another run: {named}. Resume with the settings it was made with, or go on "
            "with the new ones as another run: train(..., allow_changes=True), konic train ... --allow-changes."
        )
    if changed:
        logger.warning("Going on with other settings: %s. It is no longer the run that was begun.", named)
    here, there = environment(device), record["environment"]
    differing = [
        f"{name} was {there.get(name)} and is {value}" for name, value in here.items() if there.get(name) != value
    ]
    if differing:
        logger.warning(
            "Resumed elsewhere than it was begun (%s): numbers go on equal but for rounding, not bit for bit.",
            printable("; ".join(differing)),
        )


def load_checkpoint(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> TrainerState:
    """Put weights and optimizer back as :func:`save_checkpoint` found them, and return where the run stood.

    Raises:
        OutputError: The folder is not a whole checkpoint of this policy.
    """
    record = read_record(folder)
    try:
        policy.load(folder)
        _restore_optimizer(policy, optimizer, load_file(folder / OPTIMIZER_FILE))
        best_file = folder / BEST_FILE
        return TrainerState(
            iteration=record["iteration"],
            num_steps=record["num_steps"],
            elapsed_seconds=record["elapsed_seconds"],
            reward_moments={name: RunningMoments(**values) for name, values in record["reward_moments"].items()},
            history=[FinetuningIterationResult.from_dict(values) for values in record["history"]],
            best_weights=_own(load_file(best_file), policy) if best_file.is_file() else None,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise OutputError(
            f"{folder}: is not a whole checkpoint of this run: {type(error).__name__}: {error}. "
            "Give another checkpoint, and the same model and adapter that wrote it."
        ) from error


def checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, whole or not, by iteration."""
    named = [path for path in run_folder.glob("checkpoint-*") if _NAMED.fullmatch(path.name)]
    return sorted((path for path in named if path.is_dir() and not path.is_symlink()), key=iteration_of)


def iteration_of(checkpoint: Path) -> int:
    """The iteration that a checkpoint's folder is named by."""
    return int(checkpoint.name.rpartition("-")[2])


def newest_checkpoint(run_folder: Path) -> Path:
    """The whole checkpoint of the highest iteration in a run's folder; broken ones are named and passed over.

    Raises:
        OutputError: There is none.
    """
    for folder in reversed(checkpoints(run_folder)):
        broken = flaw(folder)
        if broken is None:
            return folder
        logger.warning("%s is passed over: %s.", folder, printable(broken))
    raise OutputError(f"{run_folder}: there is no whole checkpoint to resume from. To begin anew, name another folder.")


def checkpoint_to_resume(
    resume: bool | str | os.PathLike[str] | None, run_folder: str | os.PathLike[str] | None
) -> Path | None:
    """The checkpoint's folder that `resume_from_checkpoint` means: a path, or with True the newest of the run's folder.

    Raises:
        ConfigError: True without a folder to look in.
        OutputError: There is no checkpoint.
    """
    if resume is None or resume is False:
        return None
    if resume is not True:
        named = as_path(resume, "train(resume_from_checkpoint)", OutputError)
        broken = flaw(named)
        if broken is not None:
            raise OutputError(f"{named}: is not a whole checkpoint: {broken}. Give another one.")
        return named
    if run_folder is None:
        raise ConfigError("train(resume_from_checkpoint=True) needs checkpoint_dir, the run's folder.")
    return newest_checkpoint(as_path(run_folder, "checkpoint_dir", OutputError))


@contextmanager
def weights_of(policy: Policy, weights: dict[str, Tensor]) -> Iterator[None]:
    """Within it the policy has other weights; its own come back bit for bit."""
    trainable = policy.trainable()
    own = {name: parameter.data for name, parameter in trainable.items()}
    try:
        for name, parameter in trainable.items():
            parameter.data = weights[name].to(parameter.device, parameter.dtype)
        yield
    finally:
        for name, parameter in trainable.items():
            parameter.data = own[name]


def snapshot(policy: Policy) -> dict[str, Tensor]:
    """A copy on the CPU of everything that learns, by name."""
    return {name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in policy.trainable().items()}


def _require_kinds(record: Any) -> None:
    kinds = {"iteration": int, "num_steps": int, "settings": dict, "environment": dict, "history": list}
    for name, kind in kinds.items():
        if not isinstance(record[name], kind):
            raise TypeError(f"{name} is {type(record[name]).__name__}, not {kind.__name__}")


def _optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in policy.trainable().items():
        for moment in _MOMENTS:
            if parameter in optimizer.state:
                tensors[f"{name}.{moment}"] = optimizer.state[parameter][moment].contiguous()
    return tensors


def _own(weights: dict[str, Tensor], policy: Policy) -> dict[str, Tensor]:
    if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in policy.trainable().items()}:
        raise ValueError(f"{BEST_FILE} holds other weights than this run's")
    return weights


def _restore_optimizer(policy: Policy, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    names = {f"{name}.{moment}" for name in policy.trainable() for moment in _MOMENTS}
    if tensors and not tensors.keys() <= names:
        raise ValueError("its optimizer state is of other weights")
    state = {
        index: {moment: tensors[f"{name}.{moment}"] for moment in _MOMENTS}
        for index, name in enumerate(policy.trainable())
        if f"{name}.step" in tensors
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _processor() -> str:
    """The processor's name where the system tells it, else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
