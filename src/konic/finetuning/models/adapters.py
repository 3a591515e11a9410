"""LoraConfig -> PEFT adapter: checks the targets, creates, loads and merges adapters, and switches dropout off."""

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from konic.finetuning.config import LoraConfig
from konic.finetuning.errors import ConfigError, ModelError, did_you_mean

REFERENCE_ADAPTER = "start"
"""Name of the second, frozen adapter, which is the reference if training starts from an existing adapter."""


def peft_config(lora: LoraConfig | peft.LoraConfig, causal_lm: PreTrainedModel) -> peft.LoraConfig:
    """Return the PEFT config for a model.

    The targets are checked against the model's layers, and `fan_in_fan_out` is derived from the layers.

    Raises:
        ConfigError: A target matches no layer. The message lists the candidates.
    """
    if isinstance(lora, LoraConfig):
        values = lora.model_dump()
        if isinstance(values["target_modules"], tuple):
            values["target_modules"] = list(values["target_modules"])
        lora = peft.LoraConfig(**{**values, "fan_in_fan_out": False})
    else:
        lora = copy.deepcopy(lora)
    layers = {name: module for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    if lora.target_modules is None:
        default = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(causal_lm.config.model_type)
        lora.target_modules = set(default) if default else "all-linear"
    if not isinstance(lora.target_modules, str):
        _check_targets(sorted(lora.target_modules), causal_lm, layers)
    targets = lora.target_modules
    lora.fan_in_fan_out = any(
        isinstance(module, Conv1D)
        for name, module in layers.items()
        if isinstance(targets, str) or any(name == target or name.endswith(f".{target}") for target in targets)
    )
    lora.task_type = peft.TaskType.CAUSAL_LM
    return lora


def _check_targets(targets: list[str], causal_lm: PreTrainedModel, layers: dict[str, nn.Module]) -> None:
    names = [
        name for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear | Conv1D | nn.Embedding)
    ]
    candidates = sorted({name.rsplit(".", 1)[-1] for name in layers})
    if not targets:
        raise ConfigError(f"LoraConfig.target_modules is empty. Name at least one of: {', '.join(candidates)}.")
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ConfigError(
                f"LoraConfig.target_modules: {target!r} matches no layer of {type(causal_lm).__name__}."
                f"{did_you_mean(target, candidates)} Candidates: {', '.join(candidates)}."
            )


def new_adapter(causal_lm: PreTrainedModel, adapter: peft.LoraConfig, seed: int) -> peft.PeftModel:
    """Return the model with a new adapter.

    The adapter's random weights depend on the seed. The global random generator stays unchanged.

    Raises:
        ConfigError: The adapter config does not fit the model. The message lists candidates for the targets.
    """
    try:
        with torch.random.fork_rng(), _without_renaming_advice():
            torch.manual_seed(seed)
            return peft.get_peft_model(causal_lm, adapter)
    except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError, re.error) as error:
        linear = {
            name.rsplit(".", 1)[-1] for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear)
        }
        raise ConfigError(
            f"lora_config does not fit {type(causal_lm).__name__}: {' '.join(str(error).split())[:300]} "
            f"Candidates for target_modules: {', '.join(sorted(linear))}."
        ) from error


def load_adapter(causal_lm: PreTrainedModel, folder: Path) -> peft.PeftModel:
    """Return the model with the folder's adapter loaded twice: one copy is trained, the other stays as the reference.

    Raises:
        ModelError: The adapter cannot be loaded or does not fit the model.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"{folder}: there is no adapter_model.safetensors, and pickled weights are not read. Save the adapter as "
            "safetensors."
        )
    try:
        with _without_renaming_advice():
            adapted = peft.PeftModel.from_pretrained(causal_lm, str(folder), is_trainable=True)
            adapted.load_adapter(str(folder), REFERENCE_ADAPTER, is_trainable=False)
        weights = load_file(folder / "adapter_model.safetensors")
        own = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: the adapter cannot be loaded: {type(error).__name__}: {error}") from error
    if weights.keys() != own.keys():
        unmatched = sorted(weights.keys() ^ own.keys())
        raise ModelError(
            f"{folder}: adapter_model.safetensors does not hold the weights that adapter_config.json describes: "
            f"{unmatched[0]!r} and {len(unmatched) - 1} more are in only one of the two files. Use both files of the "
            "same adapter."
        )
    broken = next((name for name, weight in weights.items() if not weight.isfinite().all()), None)
    if broken is not None:
        raise ModelError(
            f"{folder}: the adapter's weights {broken} are not finite (NaN or infinity). Use an undamaged adapter."
        )
    adapted.set_adapter("default")
    return adapted


@contextmanager
def _without_renaming_advice() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT 0.21 uses a name that transformers 5.23 deprecates
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        # load_adapter compares the keys itself
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        yield


def adapter_off_is_base(adapter: peft.LoraConfig) -> bool:
    """Return False if the adapter trains or rewrites weights of the base model itself, else True."""
    return adapter.bias == "none" and adapter.init_lora_weights in (True, False, "gaussian", "orthogonal")


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0. With dropout, the first ratio of an update is not 1 and the KL is noise."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def can_merge(layer: Any) -> bool:
    """Return True for plain layers with floating-point weights.

    Quantised layers keep the adapter unmerged during sampling.
    """
    base = layer.get_base_layer()
    return isinstance(base, nn.Linear | Conv1D | nn.Embedding) and base.weight.is_floating_point()


def merged_layer(layer: Any) -> nn.Module:
    """Return a copy of an adapted layer's base layer with the adapter merged in.

    Only the base layer's weights are copied. A deep copy of the whole layer takes 2 ms, which is much on a GPU.
    """
    base = _shallow_copy(layer.get_base_layer())
    for name, weight in base.named_parameters(recurse=False):
        base._parameters[name] = nn.Parameter(weight.detach().clone(), requires_grad=False)
    layer_copy = _shallow_copy(layer)
    layer_copy.merged_adapters = []
    layer_copy.base_layer = base
    with torch.no_grad():
        layer_copy.merge()
    return base


def _shallow_copy(module: Any) -> Any:
    """Return a copy of a module that shares its parameters and submodules until they are replaced."""
    shallow = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):
            vars(shallow)[name] = value.copy()
    return shallow
