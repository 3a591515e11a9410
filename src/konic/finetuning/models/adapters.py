"""LoraConfig -> PEFT adapter: checks the targets, creates, loads and merges adapters, and switches dropout off."""

import copy
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from konic.finetuning.config import LoraConfig
from konic.finetuning.errors import ConfigError, ModelError, did_you_mean

logger = logging.getLogger(__name__)

REFERENCE_ADAPTER = "start"
"""Name of the second, frozen adapter, which is the reference if training starts from an existing adapter."""


def peft_config(lora: LoraConfig | peft.LoraConfig, causal_lm: PreTrainedModel) -> peft.LoraConfig:
    """Return the PEFT config for a model.

    The targets are checked against the model's layers, and `fan_in_fan_out` is derived from the layers.

    Raises:
        ConfigError: No target matches a layer, or an option of PEFT is not supported. The message names it.
    """
    if isinstance(lora, LoraConfig):
        values = lora.model_dump()
        if isinstance(values["target_modules"], tuple):
            values["target_modules"] = list(values["target_modules"])
        lora = peft.LoraConfig(**{**values, "fan_in_fan_out": False})
    else:
        lora = copy.deepcopy(lora)
        _require_supported(lora)
    layers = {name: module for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    if lora.target_modules is None:
        default = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(causal_lm.config.model_type)
        lora.target_modules = set(default) if isinstance(default, list) else default or "all-linear"
    if lora.target_modules == "all-linear" and not lora.exclude_modules:
        # a router returns a tuple, which PEFT cannot add to
        lora.exclude_modules = {name for name, layer in layers.items() if "Router" in type(layer).__name__} or None
    if not isinstance(lora.target_modules, str) and not lora.target_parameters:
        lora.target_modules = _matching_targets(sorted(lora.target_modules), causal_lm, layers)
    _require_saved_modules(lora.modules_to_save or (), causal_lm)
    targets = lora.target_modules
    lora.fan_in_fan_out = any(
        isinstance(module, Conv1D)
        for name, module in layers.items()
        if isinstance(targets, str) or any(name == target or name.endswith(f".{target}") for target in targets)
    )
    lora.task_type = peft.TaskType.CAUSAL_LM
    return lora


def _matching_targets(targets: list[str], causal_lm: PreTrainedModel, layers: dict[str, nn.Module]) -> set[str]:
    """Return the targets that match a layer. Others are a warning; if all are, an error."""
    names = [
        name for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear | Conv1D | nn.Embedding)
    ]
    candidates = _last_names(layers)
    if not targets:
        raise ConfigError(f"LoraConfig.target_modules is empty. Name at least one of: {', '.join(candidates)}.")
    matching = {target for target in targets if any(name == target or name.endswith(f".{target}") for name in names)}
    unmatched = [target for target in targets if target not in matching]
    if unmatched:
        message = (
            f"LoraConfig.target_modules: {', '.join(map(repr, unmatched))} "
            f"{'matches' if len(unmatched) == 1 else 'match'} no layer of {type(causal_lm).__name__}."
            f"{''.join(did_you_mean(target, candidates) for target in unmatched)} Candidates: {', '.join(candidates)}."
        )
        if not matching:
            raise ConfigError(message)
        logger.warning(
            "%s Only %s %s adapted.", message, ", ".join(sorted(matching)), "is" if len(matching) == 1 else "are"
        )
    return matching


def _last_names(layers: Iterable[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in layers})


def _require_saved_modules(names: Iterable[str], causal_lm: PreTrainedModel) -> None:
    """Raise ConfigError if a name in `modules_to_save` matches no module: PEFT would leave it out without a word."""
    modules = [name for name, _ in causal_lm.named_modules()]
    for name in names:
        if not any(module.endswith(name) for module in modules):
            raise ConfigError(
                f"lora_config: modules_to_save: {name!r} matches no module of {type(causal_lm).__name__}."
                f"{did_you_mean(name, _last_names(modules))} Name a module, such as 'lm_head', or leave it out."
            )


_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "kasa_config", "layer_replication",
    "megatron_config", "monteclora_config",
)  # fmt: skip
"""Options of PEFT whose adapters act on some tokens only, draw random numbers, or change the base model for good."""
_BASE_STAYS = (True, "gaussian", "orthogonal", "mica")
_BASE_CHANGES = ("pissa", "olora", "loftq")
"""Values of `init_lora_weights` that leave the weights of the base model alone, and that rewrite them the same way each
time. Others compute their start from data or random numbers that are not in the saved adapter."""


def _unsupported_option(lora: peft.LoraConfig) -> str | None:
    """Return what is wrong with an adapter that cannot be switched off, merged or loaded again without a difference."""
    name = next((name for name in _UNSUPPORTED if getattr(lora, name, None)), None)
    return name and (
        f"{name} is not supported. The adapter must act on every token in the same way, and it must be possible to "
        "switch it off and to merge it."
    )


def _require_supported(lora: peft.LoraConfig) -> None:
    problem = _unsupported_option(lora)
    if problem is not None:
        raise ConfigError(f"lora_config: {problem} Leave that option out.")
    if lora.init_lora_weights not in (*_BASE_STAYS, *_BASE_CHANGES):
        raise ConfigError(
            f"lora_config: init_lora_weights={lora.init_lora_weights!r} starts from data or random numbers that the "
            f"saved adapter does not hold. Use one of {', '.join(map(repr, (*_BASE_STAYS, *_BASE_CHANGES)))}."
        )


def new_adapter(causal_lm: PreTrainedModel, adapter: peft.LoraConfig, seed: int) -> peft.PeftModel:
    """Return the model with a new adapter.

    The adapter's random weights depend on the seed. The global random generator stays unchanged.

    Raises:
        ConfigError: The adapter config does not fit the model. The message lists candidates for the targets.
    """
    layers = {name: module for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    try:
        with torch.random.fork_rng(), _without_peft_advice():
            torch.manual_seed(seed)
            adapted = peft.get_peft_model(causal_lm, adapter)
    except (ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError, re.error) as error:
        raise ConfigError(
            f"lora_config does not fit {type(causal_lm).__name__}: {' '.join(str(error).split())[:300]} "
            f"Candidates for target_modules: {', '.join(_last_names(layers))}."
        ) from error
    without_bias = [
        name
        for name, layer in causal_lm.named_modules()
        if adapter.lora_bias and isinstance(layer, LoraLayer) and getattr(layer.get_base_layer(), "bias", None) is None
    ]
    if without_bias:
        raise ConfigError(
            f"lora_config: lora_bias=True needs layers with a bias, and {without_bias[0]} has none: the adapter could "
            "not be merged. Set lora_bias=False, or target only layers with a bias."
        )
    return adapted


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
    config = peft.PeftConfig.from_pretrained(str(folder))
    problem = _unsupported_option(config)
    if str(config.init_lora_weights).startswith("pissa_niter"):
        problem = f"its init_lora_weights={config.init_lora_weights!r} changes the base model at random."
    if problem is not None:
        raise ModelError(f"{folder}: {problem} Merge this adapter into its base model and start from the merged model.")
    try:
        with _without_peft_advice():
            adapted = peft.PeftModel.from_pretrained(causal_lm, str(folder), is_trainable=True)
            weights = load_file(folder / "adapter_model.safetensors")
            # a second `load_adapter` would subtract the start of PiSSA or OLoRA from the base model once more
            reference = copy.deepcopy(adapted.peft_config["default"])
            reference.init_lora_weights, reference.inference_mode = True, True
            adapted.add_adapter(REFERENCE_ADAPTER, reference)
            peft.set_peft_model_state_dict(adapted, weights, REFERENCE_ADAPTER)
        own = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
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
def _without_peft_advice() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT 0.21 uses a name that transformers 5.23 deprecates
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        # PEFT writes these patterns itself, for the experts of adapters that transformers 4 trained
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        # one setting for all layers; PEFT corrects it for those of the other kind
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        # PEFT takes the biases of lora_bias for weights without a shape
        warnings.filterwarnings("ignore", r"Adapter '\w+': \d+ LoRA tensor\(s\) have invalid shape", UserWarning)
        # load_adapter compares the keys itself
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        yield


def adapter_off_is_base(adapter: peft.LoraConfig) -> bool:
    """Return False if the adapter trains or rewrites weights of the base model itself, else True."""
    return adapter.bias == "none" and adapter.init_lora_weights in _BASE_STAYS


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0. With dropout, the first ratio of an update is not 1 and the KL is noise."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@contextmanager
def moved_weights(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Add noise to weights inside the context, as training would move them; then put them back bit for bit."""
    generator, originals = torch.Generator().manual_seed(0), [(weight, weight.detach().clone()) for weight in weights]
    with torch.no_grad():
        for weight, _ in originals:
            weight.add_(torch.randn(weight.shape, generator=generator).to(weight) * 0.1)
        try:
            yield
        finally:
            for weight, original in originals:
                weight.copy_(original)


def merged_model(adapted: peft.PeftModel) -> PreTrainedModel:
    """Return a copy of a model with its adapter merged in.

    Input embedding and head that share their weights are separated if the adapter changes only one of them.
    """
    adapted = copy.deepcopy(adapted)
    causal_lm = adapted.base_model.model
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    adapted_ends = [end for end in (embedding, head) if isinstance(end, LoraLayer | AuxiliaryTrainingWrapper)]
    follows_embedding = isinstance(head, TrainableTokensWrapper) and head.token_adapter.tied_adapter is not None
    if adapted_ends and not follows_embedding:
        inner = getattr(head, "original_module", head)
        inner = inner.get_base_layer() if isinstance(inner, LoraLayer) else inner
        inner.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
        for config in (causal_lm.config, causal_lm.config.get_text_config()):
            config.tie_word_embeddings = False
    return adapted.merge_and_unload()


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
