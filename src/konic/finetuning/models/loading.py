"""base_model -> LoadedModel: a causal language model and tokenizer, from the Hub, a folder, a GGUF file or a package.

GGUF weights are dequantised once and kept as safetensors in the cache folder, so that any tool opens them by path.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from konic.finetuning.errors import ConfigError, ModelError, did_you_mean
from konic.finetuning.models.locations import loading_failed, locate_model, quiet_transformers
from konic.finetuning.system.files import as_path

_MODEL_KWARGS = ("revision", "token", "dtype", "attn_implementation", "trust_remote_code", "quantization_config")
_TOKENIZER_KWARGS = ("revision", "token", "trust_remote_code")


@dataclass(frozen=True)
class LoadedModel:
    """What `base_model` stood for."""

    name: str
    """As the user wrote it."""
    location: str
    """The Hub id or folder that plain `transformers` opens it by."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter: Path | None = None
    """The folder of a LoRA adapter to go on from; `model` is its base model."""


def load_model(base_model: str, model_kwargs: Mapping[str, Any], device: torch.device) -> LoadedModel:
    """The causal language model and tokenizer that `base_model` names, on `device`, in fp32 unless told otherwise.

    Args:
        base_model: A Hub id, a folder, an adapter's folder, a `.gguf` file, or a key of :data:`PACKAGED_MODELS`.
        model_kwargs: For `from_pretrained`: revision, token, dtype, attn_implementation, trust_remote_code,
            quantization_config.
        device: Where the weights go.

    Raises:
        ConfigError: An unknown key in `model_kwargs`.
        ModelError: Nothing there, or nothing that loads.
    """
    check_model_kwargs(model_kwargs)
    adapter = _adapter_folder(base_model)
    location = locate_model(base_model if adapter is None else _read_base_name(adapter))
    kwargs: dict[str, Any] = {"dtype": torch.float32, **model_kwargs}
    try:
        with quiet_transformers():
            model, told = AutoModelForCausalLM.from_pretrained(
                location, use_safetensors=True, output_loading_info=True, **kwargs
            )
            tokenizer = AutoTokenizer.from_pretrained(
                adapter if adapter and (adapter / "tokenizer_config.json").is_file() else location,
                **{key: value for key, value in model_kwargs.items() if key in _TOKENIZER_KWARGS},
            )
    except Exception as error:
        raise ModelError(loading_failed(f"base_model={base_model!r}", location, error)) from error
    _require_all_weights(base_model, model, told)
    if not getattr(model, "is_quantized", False):
        model.to(device)
    return LoadedModel(base_model, location, model, tokenizer, adapter)


def _require_all_weights(base_model: str, model: PreTrainedModel, told: Mapping[str, Any]) -> None:
    """See that every weight came from the files, that none was left over, and that all are numbers.

    Raises:
        ModelError: Else the run would learn on weights drawn at random, or on a part of the model.
    """
    kinds = ", ".join(getattr(model.config, "architectures", None) or ["no architecture"])
    for kind, what in (("missing_keys", "lack"), ("mismatched_keys", "have another shape for")):
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in told.get(kind) or ())
        if names:
            raise ModelError(
                f"base_model={base_model!r}: its weights {what} {names[0]!r}"
                f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}, which would be drawn at random. Give all "
                f"of a model's safetensors, and a causal language model: config.json names {kinds}."
            )
    unused = sorted(str(name) for name in told.get("unexpected_keys") or ())
    if unused:
        raise ModelError(
            f"base_model={base_model!r}: {len(unused)} of its weights, such as {unused[0]!r}, have no place in the "
            f"{type(model).__name__} that config.json describes. Give weights and config.json of one model."
        )
    broken = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if broken is not None:
        raise ModelError(f"base_model={base_model!r}: its weights {broken} are not finite (NaN or infinity).")


def pick_device(name: str) -> torch.device:
    """The torch device that a name stands for; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: No such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError):
        raise ConfigError(
            f"device={name!r} is not there. Torch sees {torch.cuda.device_count()} CUDA devices; 'cpu' always works."
        ) from None
    return device


def _adapter_folder(base_model: str) -> Path | None:
    """The folder that a name stands for, if it holds a PEFT adapter."""
    folder = as_path(base_model, "base_model", ModelError)
    return folder.resolve() if (folder / "adapter_config.json").is_file() else None


def _read_base_name(adapter: Path) -> str:
    """The base model that an adapter names.

    Raises:
        ModelError: It is not a LoRA adapter, or one that cannot be gone on from.
    """
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        kind, base, bias = config["peft_type"], config["base_model_name_or_path"], config.get("bias", "none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{adapter}: adapter_config.json cannot be read: {type(error).__name__}: {error}.") from None
    if kind != "LORA" or bias != "none":
        raise ModelError(
            f"{adapter}: holds a {kind} adapter with bias={bias!r}. Training goes on from LoRA adapters with "
            "bias='none'; merge this one into its base model and start from that."
        )
    if not isinstance(base, str) or not base:
        raise ModelError(f"{adapter}: adapter_config.json does not name its base model.")
    return base


def check_model_kwargs(model_kwargs: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that `from_pretrained` is not given here."""
    for key in model_kwargs:
        if key not in _MODEL_KWARGS:
            raise ConfigError(
                f"model_kwargs has no key {key!r}.{did_you_mean(str(key), _MODEL_KWARGS)} "
                f"Its keys: {', '.join(_MODEL_KWARGS)}."
            )
