"""Folders written whole: checkpoints with everything a resume needs, and the final model.

A folder is written beside its place and renamed, so that what bears its name is complete. Only safetensors and json.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from konic.finetuning.errors import ConfigError, OutputError
from konic.finetuning.moments import RunningMoments
from konic.finetuning.policy import Policy
from konic.finetuning.results import FinetuningIterationResult
from konic.finetuning.state import TrainerState

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
BEST_FILE = "best.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_IDENTITY = (
    "model_name", "use_lora", "lora_config", "algorithm", "batch_size", "num_generations", "seed", "dataset_config",
    "generation_config", "selection",
)  # fmt: skip
_RECORDED = ("iteration", "num_steps", "elapsed_seconds", "reward_moments", "settings", "history")
_FREE = (
    "max_iterations", "iterations_done", "max_minutes", "eval_every", "model_kwargs", "device", "on_reward_error",
    "max_error_rate", "reward_workers", "reward_timeout_seconds",
)  # fmt: skip


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new folder to fill; on leaving without an error it is synced and takes its name, replacing what bore it.

    Raises:
        OutputError: It cannot be written; whatever bore the name is as it was.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        beside.chmod(0o755)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}.") from error
    try:
        yield beside
        for file in beside.rglob("*"):
            _sync(file)
        _sync(beside)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, old)
            os.replace(beside, folder)
            shutil.rmtree(old)
        else:
            os.replace(beside, folder)
        _sync(folder.parent)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def written_into(folder: Path) -> Iterator[Path]:
    """A new folder to fill; on leaving without an error its files go into `folder` one by one, beside what is there.

    Raises:
        OutputError: It cannot be written.
    """
    with written_whole(folder.parent / f".{folder.name}-{os.getpid()}") as beside:
        yield beside
    whole = folder.parent / f".{folder.name}-{os.getpid()}"
    try:
        folder.mkdir(exist_ok=True)
        for file in whole.iterdir():
            os.replace(file, folder / file.name)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(whole, ignore_errors=True)


def save_checkpoint(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, state: TrainerState, settings: dict[str, Any]
) -> None:
    """Write everything a resume needs: weights, optimizer, counters, history, best weights, settings."""
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
            "history": [result.to_dict() for result in state.history],
        }
        (target / STATE_FILE).write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """Where the run of a checkpoint stood, and its settings: what can be read without its weights.

    Raises:
        OutputError: There is no checkpoint in the folder.
    """
    try:
        record = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        return {name: record[name] for name in _RECORDED}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{folder}: is not a whole checkpoint: {type(error).__name__}: {error}. Give another one."
        ) from error


def require_same_run(folder: Path, saved: dict[str, Any], settings: dict[str, Any]) -> None:
    """See that a checkpoint belongs to the run that is to go on.

    Raises:
        OutputError: A setting without which it would be another run differs; other changes are named in a warning.
    """
    now = json.loads(json.dumps(settings, default=str))
    changed = {name: (saved.get(name), value) for name, value in now.items() if saved.get(name) != value}
    named = "; ".join(f"{name} was {old!r} and is {new!r}" for name, (old, new) in changed.items() if name in _IDENTITY)
    if named:
        raise OutputError(
            f"{folder}: is a checkpoint of another run: {named}. Resume with the settings it was made with."
        )
    others = [name for name in changed if name not in _FREE]
    if others:
        logger.warning("Resuming with other settings than before: %s.", ", ".join(others))


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
            best_weights=load_file(best_file) if best_file.is_file() else None,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise OutputError(
            f"{folder}: is not a whole checkpoint of this run: {type(error).__name__}: {error}. "
            "Give another checkpoint, and the same model and adapter that wrote it."
        ) from error


def newest_checkpoint(run_folder: Path) -> Path:
    """The checkpoint of the highest iteration in a run's folder.

    Raises:
        OutputError: There is none.
    """
    found = [path for path in run_folder.glob("checkpoint-*") if (path / STATE_FILE).is_file()]
    if not found:
        raise OutputError(f"{run_folder}: there is no checkpoint to resume from.")
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]))


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
        return Path(resume).expanduser().absolute()
    if run_folder is None:
        raise ConfigError("train(resume_from_checkpoint=True) needs checkpoint_dir, the run's folder.")
    return newest_checkpoint(Path(run_folder).expanduser().absolute())


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


def _optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in policy.trainable().items():
        for moment in _MOMENTS:
            if parameter in optimizer.state:
                tensors[f"{name}.{moment}"] = optimizer.state[parameter][moment].contiguous()
    return tensors


def _restore_optimizer(policy: Policy, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state = {
        index: {moment: tensors[f"{name}.{moment}"] for moment in _MOMENTS}
        for index, name in enumerate(policy.trainable())
        if f"{name}.step" in tensors
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
