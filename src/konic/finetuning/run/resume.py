"""Folder + settings -> the checkpoint to resume from, and whether it belongs to the same run."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from konic.finetuning.config import TrainingConfig
from konic.finetuning.errors import ConfigError, OutputError
from konic.finetuning.models.adapter_config import OWN_SETTINGS
from konic.finetuning.models.decode_probe import plan_from
from konic.finetuning.models.prepacked import DecodePlan
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.results.summary import Selection
from konic.finetuning.run.checkpoint import CheckpointRecord, checkpoints
from konic.finetuning.run.environment import environment
from konic.finetuning.system.files import SEAL_FILE, as_path, find_corruption
from konic.output import get_logger

logger = get_logger(__name__)

_FIXED = ("model_name", "use_lora", "lora_config")
"""Settings that the weights of a checkpoint depend on."""
_FREE = (
    "max_iterations", "iterations_done", "max_minutes", "eval_every", "device", "on_reward_error", "max_error_rate",
    "reward_workers", "reward_timeout_seconds", "reward_resources", "process_timeout_seconds",
    "sharding", "sharded_sampling",
    "decode_plan",  # a resume keeps that of the checkpoint
)  # fmt: skip
"""Settings that change no number of any iteration that both runs contain."""

_OF_LEARNING = {*TrainingConfig.model_fields, "selection"} - {"seed"}
"""Settings that change how a policy learns, but not what an evaluation of it gives."""

_BEFORE_IT_EXISTED: dict[str, Any] = {
    "kl_limit": None, "mask_truncated": False, "clip_ratio_low": None, "clip_ratio_high": None,
    "divergence_limit": None, "divergence": "total_variation", "gae_lambda_length": None, "value_gae_lambda": None,
    "overlong_penalty": 0.0, "overlong_share": 0.2, "filter_equal_groups": False, "resampling_budget": 3,
    "sampler_correction": "truncate", "sampler_correction_level": "token", "sampler_correction_limit": 2.0,
}  # fmt: skip
"""What a run did before these settings existed; a checkpoint from then does not name them. A correction of the sampler
changes nothing in fp32, and what rounding does in 16 bits."""

_SET_BY = {
    "on_held_out": "whether eval_every is set", "kl_budget": "kl_budget", "kl_price": "kl_penalty_weight",
    "kl_free": "kl_target",
}  # fmt: skip
"""The setting behind each field of a selection."""
_HASHES = {
    "prompts_sha256": "the rows of the dataset are not the same",
    "rewards_sha256": "the code of the rewards is not the same",
    "base_sha256": "the weights of base_model are not the same",
    "tokenizer_sha256": "the tokenizer or the chat template of base_model is not the same",
}
"""What a difference of these settings means."""

_WHERE_ROWS_ARE = ("source", "name", "split", "subset", "revision")
"""Where rows come from; the same rows may come from elsewhere."""


def checkpoint_to_resume(
    resume: bool | str | os.PathLike[str] | None, run_folder: str | os.PathLike[str] | None
) -> Path | None:
    """The checkpoint's folder that `resume_from_checkpoint` names: a path, or True for the newest of the run.

    Raises:
        ConfigError: True without a folder to look in.
        OutputError: There is no checkpoint.
    """
    if resume is None or resume is False:
        return None
    if resume is not True:
        named = as_path(resume, "train(resume_from_checkpoint)", OutputError)
        broken = find_corruption(named)
        if broken is None:
            return named
        if not named.exists():
            what = "there is no such folder"
        else:
            kind = (
                "it is a file" if not named.is_dir() else "it is the folder of a run" if checkpoints(named) else broken
            )
            what = f"is not a whole checkpoint: {kind}"
        raise OutputError(f"{named}: {what}. {_right_checkpoint(named, run_folder) or 'Give another one.'}")
    if run_folder is None:
        raise ConfigError("train(resume_from_checkpoint=True) needs checkpoint_dir, the run's folder.")
    return newest_checkpoint(as_path(run_folder, "checkpoint_dir", OutputError))


def _right_checkpoint(named: Path, run_folder: str | os.PathLike[str] | None) -> str | None:
    """Return advice that names the checkpoint that was probably meant, or None."""
    for folder in named.parents:
        if (folder / SEAL_FILE).is_file():
            return f"Name its folder: {folder}."
    runs = [named, named.parent]
    if run_folder is not None:
        runs.append(as_path(run_folder, "checkpoint_dir", OutputError))
    for run in runs:
        newest = next(reversed(checkpoints(run)), None)
        if newest not in (None, named):
            return f"Name a checkpoint, such as {newest}; with checkpoint_dir={str(run)!r}, True takes the newest."
    return None


def newest_checkpoint(run_folder: Path) -> Path:
    """The newest whole checkpoint in the folder of a run; a warning names each broken one that is skipped.

    Raises:
        OutputError: There is none.
    """
    for folder in reversed(checkpoints(run_folder)):
        broken = find_corruption(folder)
        if broken is None:
            return folder
        logger.warning("%s is skipped: %s.", folder, broken)
    raise OutputError(
        f"{run_folder}: there is no whole checkpoint to resume from. To start from the beginning, do not resume."
    )


def require_same_run(
    folder: Path, record: CheckpointRecord, settings: dict[str, Any], device: torch.device, allow_changes: bool
) -> bool:
    """Check that a checkpoint belongs to the run that is to continue; differences are named.

    Returns True if evaluations of then and of now can be compared: the rewards and what samples are the same.

    Raises:
        OutputError: A setting differs without `allow_changes`, or one that the weights depend on.
    """
    now = json.loads(json.dumps(settings, default=str))
    saved = _in_todays_terms(record.settings, now)
    changed = [name for name, value in now.items() if saved.get(name) != value and name not in _FREE]
    named = _name_differences(changed, saved, now)
    if any(name in _FIXED for name in changed):
        raise OutputError(
            f"{folder}: is a checkpoint of another model: {named}. Resume with the model and adapter that wrote it."
        )
    if changed and not allow_changes:
        raise OutputError(
            f"{folder}: is a checkpoint of another run: {named}. Resume with the settings that wrote it, or continue "
            "with the new ones as another run: train(..., allow_changes=True), konic train ... --allow-changes."
        )
    if changed:
        logger.warning("Continuing with other settings: %s. From here on it is another run.", named)
    _warn_of_another_environment(environment(device), record.environment)
    return _OF_LEARNING.issuperset(changed)


def _in_todays_terms(recorded: dict[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a checkpoint recorded, as a version with the settings of now would have recorded them.

    A difference that changes no number of the run is taken out: the same weights or rows under another name.
    """
    saved = _BEFORE_IT_EXISTED | recorded
    if saved.get("kl_placement", "") is None:  # written before PPO's own place became the loss
        of_rewards = ("ppo", "rloo", "reinforce++")
        saved["kl_placement"] = "reward" if saved.get("algorithm") in of_rewards else "loss"
    saved.setdefault("tokenizer_sha256", now.get("tokenizer_sha256"))  # not recorded before
    of_adapter = set(now.get("lora_config") or ()) == set(OWN_SETTINGS)
    if saved.get("use_lora") and of_adapter and set(saved.get("lora_config") or ()) != set(OWN_SETTINGS):
        saved["lora_config"] = now[
            "lora_config"
        ]  # beside a saved adapter, the agent's own was recorded before, which is ignored
    if "precision" not in saved:  # written when only model_kwargs named it
        dtype = str((saved.get("model_kwargs") or {}).get("dtype") or "float32").removeprefix("torch.")
        saved["precision"] = now.get("precision") if dtype == "auto" else dtype
    if isinstance(saved.get("generation_config"), dict):  # rewards did not see special tokens before
        before = {"skip_special_tokens": True, "decode_layout": "onednn", "engine": "local"}
        saved["generation_config"] = before | saved["generation_config"]
        if now["generation_config"]["decode_layout"] is None:  # the plan of the checkpoint is followed
            saved["generation_config"]["decode_layout"] = None
        for name in (name for name in now["generation_config"] if name.startswith("vllm_")):  # another server may do
            saved["generation_config"][name] = now["generation_config"][name]
    for name in ("selection", "dataset_config"):  # fields added later have changed nothing that the run had done
        if isinstance(saved.get(name), dict) and isinstance(now.get(name), dict):
            saved[name] = now[name] | saved[name]
    if saved.get("base_sha256") and saved["base_sha256"] == now.get("base_sha256"):
        saved["model_name"] = now.get("model_name")  # the same weights under another path
    if saved.get("prompts_sha256") and saved["prompts_sha256"] == now.get("prompts_sha256"):
        saved["dataset_config"] |= {name: now["dataset_config"][name] for name in _WHERE_ROWS_ARE}
    return saved


def _warn_of_another_environment(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Warn if the checkpoint was written by other versions, or on another processor or device."""
    differing = [
        f"{name} was {there.get(name)} and is {value}" for name, value in here.items() if there.get(name) != value
    ]
    if differing:
        logger.warning(
            "The run started in another environment (%s): from here on its numbers may differ by rounding.",
            "; ".join(differing),
        )


def describe_changes(then: dict[str, Any], now: dict[str, Any]) -> str:
    """Name each setting that differs, with its value then and now; "" if none does."""
    changed = [name for name, value in now.items() if then.get(name) != value]
    return _name_differences(changed, then, now)


def _name_differences(changed: Sequence[str], then: dict[str, Any], now: dict[str, Any]) -> str:
    return "; ".join(
        _HASHES.get(name) or f"{name} was {before!r} and is {after!r}"
        for name, before, after in _named_differences(changed, then, now)
    )


def _named_differences(
    changed: Sequence[str], saved: dict[str, Any], now: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name of each setting that differs, its value in the checkpoint and that of now.

    Of a config, each field that differs. How the best iteration is chosen follows from settings, and these are named.
    """
    for name in changed:
        before, after = saved.get(name), now[name]
        has_fields = name == "selection" or name.endswith("_config")
        if not has_fields or not isinstance(before, dict) or not isinstance(after, dict):
            yield name, before, after
            continue
        differing = [part for part in {**before, **after} if before.get(part) != after.get(part)]
        for part in differing:
            setting = f"{name}.{part}" if name != "selection" else _SET_BY.get(part, part)
            if setting not in changed:
                yield setting, before.get(part), after.get(part)


def same_best(record: CheckpointRecord, selection: Selection, history: Sequence[FinetuningIterationResult]) -> bool:
    """Return True if the best iteration of a checkpoint is also the best one by the settings of now."""
    saved = record.settings.get("selection")
    known = {part: saved[part] for part in _SET_BY if part in saved} if isinstance(saved, dict) else {}
    return replace(selection, **known).best(history) is selection.best(history)


def plan_to_follow(record: CheckpointRecord, current: DecodePlan, dtype: torch.dtype) -> DecodePlan | None:
    """Return how a run has sampled so far, which keeps its numbers the same bit for bit; None if it cannot here."""
    recorded = record.settings.get("decode_plan", asdict(DecodePlan()))  # of a run before there was another plan
    if recorded == asdict(current):  # also where it does not apply: a GPU, a torch without oneDNN
        return current
    plan = plan_from(recorded, dtype)
    if plan is None:
        logger.warning("decode_plan was %s, which is not possible here: numbers differ by rounding.", recorded)
    return plan
