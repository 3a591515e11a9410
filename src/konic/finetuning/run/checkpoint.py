"""Policy + optimizer + TrainerState -> a checkpoint, and back: only safetensors and json, so nothing in it can run."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from konic.finetuning.algorithms import ALGORITHMS
from konic.finetuning.errors import NotFiniteError, OutputError, safe_cause
from konic.finetuning.models.policy import Policy
from konic.finetuning.models.policy_files import load_policy, save_policy
from konic.finetuning.models.sharding import divided_like, gathered, is_divided, own_part
from konic.finetuning.run.environment import environment
from konic.finetuning.run.state import TrainerState
from konic.finetuning.system.files import replacing_folder, seal
from konic.finetuning.system.places import read_json
from konic.output import get_logger
from konic.text import describe_error

logger = get_logger(__name__)

_STATE_FILE = "trainer_state.json"
_OPTIMIZER_FILE = "optimizer.safetensors"
_BEST_FILE = "best.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_NAMED = re.compile(r"checkpoint-[0-9]+")


def save_checkpoint(
    folder: Path | None,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    settings: dict[str, Any],
) -> None:
    """Write everything a resume needs: weights, optimizer, counters, history, best weights, settings.

    None for the folder is for a process that only gives its part of the weights to the first one.

    Raises:
        NotFiniteError: A weight or a moment of the optimizer is NaN or infinite; nothing is written.
        OutputError: The folder cannot be written.
    """
    writes, moments, best = folder is not None, _optimizer_tensors(policy, optimizer), state.best_weights
    all_tensors = policy.trainable() | moments
    broken = next((name for name, tensor in all_tensors.items() if not own_part(tensor).isfinite().all()), None)
    is_broken = broken is not None
    if policy.sharding.divides_trained:
        is_broken = policy.sharding.most(int(is_broken)) > 0
    if is_broken:
        raise NotFiniteError(
            f"{broken or 'A weight'} holds NaN or infinity after iteration {state.iteration}: no checkpoint of it is "
            "written. Resume the checkpoint before it, with a lower learning_rate or max_grad_norm."
        )
    if policy.sharding.divides_trained:
        moments = gathered(moments, keep=writes)
        if best is not None:
            with swapped_weights(policy, best):
                best = gathered(policy.trainable(), keep=writes)
    if folder is None:
        save_policy(policy, None)
        return
    with replacing_folder(folder) as target:
        save_policy(policy, target)
        save_file(moments, target / _OPTIMIZER_FILE)
        if best is not None:
            save_file(best, target / _BEST_FILE)
        record = state.to_dict() | {"settings": settings, "environment": environment(policy.device)}
        (target / _STATE_FILE).write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
        seal(target)


@dataclass(frozen=True)
class CheckpointRecord:
    """What a checkpoint says about its run: all that can be read without its weights."""

    state: TrainerState
    settings: dict[str, Any]
    environment: dict[str, Any]


def read_record(folder: Path) -> CheckpointRecord:
    """The state, settings and environment of the run that wrote a checkpoint.

    Raises:
        OutputError: There is no checkpoint in the folder.
    """
    try:
        values = read_json(folder / _STATE_FILE)
        if "num_prompts" not in values:  # of a version in which every iteration took one batch of prompts
            num_responses, settings = values["iteration"] * values["settings"]["batch_size"], values["settings"]
            size = settings["num_generations"] or ALGORITHMS[settings["algorithm"]].group_size
            values |= {"num_prompts": num_responses // size, "group_spreads": {}}
        if "planned_iterations" not in values:  # of a version in which the rate fell once over the whole run
            values |= {"planned_iterations": values["settings"]["max_iterations"], "falls_from": 0}
        if "reward_weights" not in values:  # of a version that kept those of the last iteration as a setting
            values["reward_weights"] = values["settings"].get("reward_weights", {})
        record = CheckpointRecord(TrainerState.from_dict(values), values["settings"], values["environment"])
        for name in ("settings", "environment"):
            if not isinstance(getattr(record, name), dict):
                raise TypeError(f"{name} is {type(getattr(record, name)).__name__}, not dict")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OutputError(
            f"{folder}: is not a whole checkpoint: {describe_error(error)}. Give another one."
        ) from safe_cause(error)
    return record


def load_checkpoint(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> TrainerState:
    """Restore weights and optimizer as :func:`save_checkpoint` found them; returns the state of the run.

    Raises:
        OutputError: The folder is not a whole checkpoint of this policy.
    """
    state = read_record(folder).state
    try:
        load_policy(policy, folder)
        _restore_optimizer(policy, optimizer, load_file(folder / _OPTIMIZER_FILE))
        best_file = folder / _BEST_FILE
        best_weights = _own(load_file(best_file), policy) if best_file.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise OutputError(
            f"{folder}: is not a whole checkpoint of this run: {describe_error(error)}. "
            "Give another checkpoint, and the same model and adapter that wrote it."
        ) from safe_cause(error)
    return replace(state, best_weights=best_weights)


def checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, whole or not, by iteration."""
    named = [path for path in run_folder.glob("checkpoint-*") if _NAMED.fullmatch(path.name)]
    return sorted((path for path in named if path.is_dir()), key=iteration_number)


def iteration_number(checkpoint: Path) -> int:
    """The iteration in the name of a checkpoint's folder."""
    return int(checkpoint.name.rpartition("-")[2])


@contextmanager
def swapped_weights(policy: Policy, weights: dict[str, Tensor]) -> Iterator[None]:
    """Within it the policy has other weights; afterwards its own are restored bit for bit."""
    trainable = policy.trainable()
    own = snapshot(policy) if policy.sharding.divides_trained else {name: p.data for name, p in trainable.items()}
    try:
        for name, parameter in trainable.items():
            _set(parameter, weights[name])
        yield
    finally:
        for name, parameter in trainable.items():
            _set(parameter, own[name])


@torch.no_grad()
def _set(parameter: nn.Parameter, values: Tensor) -> None:
    """Give other values to a weight, or to the part of a divided one that is here."""
    if is_divided(parameter):
        own_part(parameter).copy_(values)
    else:
        parameter.data = values.to(parameter.device, parameter.dtype)


def snapshot(policy: Policy) -> dict[str, Tensor]:
    """A copy on the CPU of everything that learns, by name; of divided weights, the parts that are here."""
    own = {name: own_part(weight.detach()) for name, weight in policy.trainable().items()}
    return {name: weight.to("cpu", copy=True).contiguous() for name, weight in own.items()}


def remember(policy: Policy, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return a function that puts back the weights and the optimizer's moments as they are now, bit for bit."""
    weights, moments = snapshot(policy), _optimizer_tensors(policy, optimizer)
    moments = {name: moment.to("cpu", copy=True) for name, moment in moments.items()}

    def put_back() -> None:
        for name, parameter in policy.trainable().items():
            _set(parameter, weights[name])
        _restore_optimizer(policy, optimizer, moments)

    return put_back


def _optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in policy.trainable().items():
        for moment in _MOMENTS:
            if parameter in optimizer.state:
                tensors[f"{name}.{moment}"] = optimizer.state[parameter][moment].contiguous()
    return tensors


def _own(weights: dict[str, Tensor], policy: Policy) -> dict[str, Tensor]:
    if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in policy.trainable().items()}:
        raise ValueError(f"{_BEST_FILE} holds other weights than this run's")
    return {name: own_part(divided_like(weight, weights[name])).cpu() for name, weight in policy.trainable().items()}


def _restore_optimizer(policy: Policy, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    names = {f"{name}.{moment}" for name in policy.trainable() for moment in _MOMENTS}
    if tensors and not tensors.keys() <= names:
        raise ValueError("its optimizer state is of other weights")
    state = {
        index: {
            moment: tensors[f"{name}.{moment}"]
            if moment == "step"
            else divided_like(weight, tensors[f"{name}.{moment}"])
            for moment in _MOMENTS
        }
        for index, (name, weight) in enumerate(policy.trainable().items())
        if f"{name}.step" in tensors
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
