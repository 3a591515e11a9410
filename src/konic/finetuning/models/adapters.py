"""PEFT's config -> adapter: creates and loads adapters, and switches dropout off."""

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from konic.finetuning.errors import ConfigError, KonicError, ModelError, safe_cause
from konic.finetuning.models.adapter_config import (
    incomplete_start,
    last_names,
    layers_of_shared_weights,
    require_adapted,
    require_quick_patterns,
    unsupported_option,
)
from konic.finetuning.models.headers import safetensors_header, weights_within
from konic.text import describe_error

REFERENCE_ADAPTER = "start"
"""Name of the second, frozen adapter, which is the reference if training starts from an existing adapter."""
MERGE_FIRST = "Merge this adapter into its base model and start from the merged model."
"""What to do with an adapter that training cannot continue from."""
_PEFT_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError, re.error)
"""What PEFT raises for a config that it cannot use."""


def new_adapter(
    causal_lm: PreTrainedModel, adapter: peft.LoraConfig, seed: int, revision: str | None
) -> peft.PeftModel:
    """Return the model with a new adapter.

    The adapter's random weights depend on the seed. The global random generator stays unchanged. The adapter's config
    keeps the model's `revision`, with which PEFT loads a saved adapter.

    Raises:
        ConfigError: The adapter config does not fit the model, the message lists candidates for the targets; or it
            names another revision.
    """
    if adapter.revision not in (None, revision):
        raise ConfigError(
            f"lora_config: revision={adapter.revision!r} is not the revision of base_model that is loaded. Set "
            f"model_kwargs={{'revision': {adapter.revision!r}}}, or leave revision out of lora_config."
        )
    adapter.revision = revision
    layers = {name: module for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    options = copy.deepcopy(adapter)  # PEFT changes some
    try:
        with torch.random.fork_rng(), _without_peft_advice():
            torch.manual_seed(seed)
            adapted = peft.get_peft_model(causal_lm, adapter)
    except _PEFT_ERRORS as error:
        raise ConfigError(
            f"lora_config does not fit {type(causal_lm).__name__}: {describe_error(error)}. "
            f"Candidates for target_modules: {', '.join(last_names(layers))}."
        ) from safe_cause(error)
    require_adapted(options, [name for name, layer in causal_lm.named_modules() if isinstance(layer, LoraLayer)])
    flaw = _find_flaw(causal_lm, adapter)
    if flaw is not None:
        raise ConfigError(f"lora_config: {flaw} target only other layers.")
    _require_readable(adapted)
    return adapted


def _require_readable(adapted: peft.PeftModel) -> None:
    """Raise ConfigError if PEFT would not find weights that it saves: it renames those of some models on loading."""
    with _without_peft_advice():
        weights = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
        found = peft.set_peft_model_state_dict(adapted, weights)
    if found.unexpected_keys:
        lost = next(key for key in found.missing_keys if ".default" in key)
        raise ConfigError(
            f"lora_config: PEFT saves an adapter of {lost.removeprefix('base_model.model.').partition('.lora_')[0]}, "
            "and does not find it again on loading. Name other target_modules, such as the layers of attention."
        )


def _find_flaw(causal_lm: PreTrainedModel, adapter: peft.LoraConfig) -> str | None:
    """Return why the adapter of a model cannot be computed or merged, and the setting that avoids it."""
    shared = layers_of_shared_weights(causal_lm)
    for name, layer in causal_lm.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if f"{name}.base_layer" in shared:
            return f"{name} shares its weights with another layer, so a merged model could not hold its adapter:"
        if adapter.lora_bias and getattr(layer.get_base_layer(), "bias", None) is None:
            return (
                f"lora_bias=True needs layers with a bias, and {name} has none: the adapter could not be merged. "
                "Set lora_bias=False, or"
            )
        if any((magnitude.weight == 0).any() for magnitude in layer.lora_magnitude_vector.values()):
            return (
                f"use_dora=True divides by the norm of each row of a layer's weights, and {name} has a row of zeros, "
                "as a tied head has for the padding token. Set use_dora=False, or"
            )
    return None


def load_adapter(causal_lm: PreTrainedModel, folder: Path, revision: str | None) -> peft.PeftModel:
    """Return the model with the folder's adapter loaded twice: one copy is trained, the other stays as the reference.

    The adapter's config keeps the model's `revision`.

    Raises:
        ModelError: The adapter cannot be loaded or does not fit the model.
    """
    with _as_model_errors(folder):
        config, weights, adapted = _read_adapter(causal_lm, folder, is_trainable=True)
        # a second `load_adapter` would subtract the start of PiSSA or OLoRA from the base model once more
        reference = copy.deepcopy(config)
        reference.init_lora_weights, reference.inference_mode = True, True
        with _without_peft_advice():
            adapted.add_adapter(REFERENCE_ADAPTER, reference)
            peft.set_peft_model_state_dict(adapted, weights, REFERENCE_ADAPTER)
    flaw = _find_flaw(causal_lm, config)
    if flaw is not None:
        raise ModelError(f"{folder}: {flaw} target only other layers, and train the adapter again.")
    adapted.peft_config["default"].revision = revision
    adapted.set_adapter("default")
    return adapted


def attach_adapter(causal_lm: PreTrainedModel, folder: Path) -> peft.PeftModel:
    """Return the model with the folder's adapter loaded once, to be merged. Its biases may be trained ones.

    Raises:
        ModelError: The adapter cannot be loaded or does not fit the model.
    """
    with _as_model_errors(folder):
        return _read_adapter(causal_lm, folder, is_trainable=False)[2]


@contextmanager
def _as_model_errors(folder: Path) -> Iterator[None]:
    """Within it, what PEFT and the readers of files raise becomes a ModelError that names the adapter's folder."""
    try:
        yield
    except ModelError:
        raise
    except KonicError as error:
        raise ModelError(f"{folder}: {error}") from None
    except (*_PEFT_ERRORS, OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: the adapter cannot be loaded: {describe_error(error)}") from safe_cause(error)


def _read_adapter(
    causal_lm: PreTrainedModel, folder: Path, is_trainable: bool
) -> tuple[peft.LoraConfig, dict[str, Tensor], peft.PeftModel]:
    """Return an adapter's config and weights, and the model with it; what was loaded is what the files hold."""
    file = folder / "adapter_model.safetensors"
    header, config = safetensors_header([file]), peft.PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, peft.LoraConfig):
        raise ModelError(f"{folder}: holds a {config.peft_type} adapter, and only LoRA can be loaded.")
    require_quick_patterns(config, causal_lm)
    problem = unsupported_option(config) or incomplete_start(config)
    advice = MERGE_FIRST if is_trainable else "Merge it with the base model and the version of PEFT that it is from."
    if problem is not None:
        raise ModelError(f"{folder}: {problem} {advice}")
    weights = _without_base_weights(load_file(file), config, causal_lm, folder, advice)
    _require_rank(weights, config, folder)
    with _without_peft_advice(), weights_within(header, "adapter_config.json"):
        adapted = peft.PeftModel.from_pretrained(causal_lm, str(folder), is_trainable=is_trainable)
        own = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
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
    lost = next((name for name, weight in weights.items() if not torch.equal(weight.to(own[name]), own[name])), None)
    if lost is not None:
        raise ModelError(f"{folder}: PEFT does not read {lost!r} as adapter_model.safetensors holds it. {advice}")
    return adapted.peft_config["default"], weights, adapted


def _require_rank(weights: Mapping[str, Tensor], config: peft.LoraConfig, folder: Path) -> None:
    """Raise ModelError if the rank of an adapter's layers is not the one in its config."""
    for key, weight in weights.items() if not config.target_parameters else ():
        layer, found, _ = key.removeprefix("base_model.model.").partition(".lora_A.")
        pattern = get_pattern_key(config.rank_pattern.keys(), layer)
        rank = config.rank_pattern.get(pattern, config.r)
        if found and weight.shape[0] != rank:
            raise ModelError(
                f"{folder}: adapter_config.json says r={rank} for {layer}, but its weights have the rank "
                f"{weight.shape[0]}. Use both files of the same adapter."
            )


def _without_base_weights(
    weights: dict[str, Tensor], config: peft.LoraConfig, causal_lm: PreTrainedModel, folder: Path, advice: str
) -> dict[str, Tensor]:
    """Return an adapter's weights without the copies of the base model's embeddings that PEFT may save with it.

    Raises:
        ModelError: They are not the embeddings of the base model.
    """
    base_weights = dict(causal_lm.named_parameters(remove_duplicate=False))
    kept = {}
    for key, weight in weights.items():
        if ".modules_to_save." in key and key.replace(".modules_to_save.", ".") in weights:
            continue  # the same weights once more
        name = re.sub(r"\.(base_layer|original_module)\.", ".", key.removeprefix("base_model.model."))
        base, parts = base_weights.get(name), name.split(".")
        modules = [".".join(parts[:length]) for length in range(1, len(parts))]
        is_trained = ".original_module." not in key and any(
            module.endswith(trained) for module in modules for trained in config.modules_to_save or ()
        )
        is_trained |= config.bias != "none" and parts[-1] == "bias"
        if base is None or (is_trained and weight.shape == base.shape):
            kept[key] = weight
        elif weight.shape != base.shape or not torch.equal(weight.to(base), base):
            raise ModelError(
                f"{folder}: its {name} is not that of the base model: its embeddings were trained or resized. {advice}"
            )
    return kept


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


def switch_off_dropout(model: nn.Module) -> None:
    """Leave train mode, and set every dropout probability to 0.

    With dropout, the first ratio of an update is not 1 and the KL is noise.
    """
    model.eval()
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
