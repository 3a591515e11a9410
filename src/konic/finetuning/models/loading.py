"""base_model -> LoadedModel: loads a model and its tokenizer from the Hub, a folder, a GGUF file or a package.

GGUF weights are dequantised once and stored as safetensors in the cache folder, so that any tool can open them by path.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from konic.finetuning.errors import ConfigError, ModelError
from konic.finetuning.hub import hub_cause, hub_or_cache
from konic.finetuning.models.containment import require_inside
from konic.finetuning.models.locations import OWN_CODE, loading_failed, locate_model, quiet_transformers
from konic.finetuning.models.model_kwargs import check_model_kwargs, require_no_revision
from konic.finetuning.models.quantised import unify_products
from konic.finetuning.models.reading import read_model
from konic.finetuning.system.files import as_path
from konic.finetuning.system.places import read_regular
from konic.output import get_logger
from konic.text import describe_error

logger = get_logger(__name__)

_ADAPTER_FILES = ("adapter_model.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py")
"""What is read of an adapter on the Hub: its config and weights, and its tokenizer."""
_TRUST_FIRST = (
    "merge the adapter into it and name the merged model: trust_remote_code does not reach through an adapter"
)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """The model and tokenizer that `base_model` names."""

    name: str
    """`base_model` as the user wrote it."""
    location: str
    """The Hub id or folder from which plain `transformers` loads the model."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter: Path | None = None
    """The folder of a LoRA adapter to continue training from; `model` is its base model."""
    revision: str | None = None
    """The revision of the base model that was asked for; None for the main branch."""


def load_model(base_model: str, model_kwargs: Mapping[str, Any], device: torch.device) -> LoadedModel:
    """Load the causal language model and tokenizer that `base_model` names onto `device`, by default in fp32.

    Args:
        base_model: A Hub id, a folder, a `.gguf` file, or a key of :data:`PACKAGED_MODELS`. Hub id and folder may be
            those of a LoRA adapter.
        model_kwargs: Arguments for `from_pretrained`: revision, token, dtype, attn_implementation, trust_remote_code,
            quantization_config.
        device: Device for the weights.

    Raises:
        ConfigError: `model_kwargs` has an unknown key, or names another revision than the adapter's folder does.
        ModelError: There is no such model, or it cannot be loaded.
    """
    check_model_kwargs(model_kwargs)
    asked, location, adapter, model_kwargs = _locate(base_model, model_kwargs)
    trusts_code = model_kwargs.get("trust_remote_code", False)
    reads_adapter = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    model, loading_info, tokenizer = read_model(
        AutoModelForCausalLM,
        location,
        asked,
        model_kwargs,
        tokenizer_at=(str(adapter), trusts_code) if reads_adapter else None,
        own_code=_TRUST_FIRST if adapter else OWN_CODE,
        dtype=model_kwargs.get("dtype", torch.float32),
        trust_remote_code=trusts_code and not adapter,
    )
    _require_all_weights(asked, model, loading_info)
    if not getattr(model, "is_quantized", False):
        model.to(device)
    unify_products(model)
    return LoadedModel(
        name=base_model,
        location=location,
        model=model,
        tokenizer=tokenizer,
        adapter=adapter,
        revision=model_kwargs.get("revision"),
    )


def _require_all_weights(asked: str, model: PreTrainedModel, loading_info: Mapping[str, Any]) -> None:
    """Check that the files hold every weight of the model and no other weight, and that all weights are finite.

    Raises:
        ModelError: A check failed. The run would otherwise train randomly initialised weights or a part of the model.
    """
    named = getattr(model.config, "architectures", None) or "no architecture"
    kinds = ", ".join(map(str, named)) if isinstance(named, list) else str(named)
    for kind, what in (("missing_keys", "lack"), ("mismatched_keys", "have a different shape for")):
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in loading_info.get(kind) or ())
        if names:
            raise ModelError(
                f"{asked}: its weights {what} {names[0]!r}"
                f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}, which would be initialised at random. "
                f"Provide all safetensors files of a causal language model; config.json names {kinds}."
            )
    unused = sorted(str(name) for name in loading_info.get("unexpected_keys") or ())
    if unused:
        raise ModelError(
            f"{asked}: {len(unused)} of its weights, such as {unused[0]!r}, do not belong to the "
            f"{type(model).__name__} that config.json describes. Use weights and config.json of the same model."
        )
    broken = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if broken is not None:
        raise ModelError(f"{asked}: its weights {broken} are not finite (NaN or infinity). Use an undamaged model.")


def pick_device(name: str) -> torch.device:
    """Return the torch device for a name; "auto" means CUDA if it is available, else the CPU.

    Raises:
        ConfigError: The device is not available on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device={name!r} is not a device: give auto, cpu, cuda or cuda:1.") from None
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError):
        raise ConfigError(
            f"device={name!r} is not available. Torch sees {torch.cuda.device_count()} CUDA devices; 'cpu' always "
            "works."
        ) from None
    return device


def _locate(base_model: str, model_kwargs: Mapping[str, Any]) -> tuple[str, str, Path | None, dict[str, Any]]:
    """Return what names the model to load, its location, the folder of an adapter on it, and its `model_kwargs`.

    For an adapter, the model is its base.
    """
    model_kwargs, adapter = dict(model_kwargs), _adapter_folder(base_model)
    if adapter is None:
        location = locate_model(base_model)
        adapter = None if Path(location).is_dir() else _download_adapter(location, model_kwargs)
        if adapter is None:
            require_no_revision(location, f"base_model={base_model!r}", model_kwargs)
            return f"base_model={base_model!r}", location, None, model_kwargs
        model_kwargs.pop("revision", None)  # it is that of the adapter's repository
    require_inside(adapter, f"base_model={base_model!r}")
    name, revision = _read_base(adapter)
    option = f"{adapter / 'adapter_config.json'}: base_model_name_or_path"
    model_kwargs = _with_revision(model_kwargs, revision, adapter)
    logger.warning("%s is an adapter. Its base model, which it names itself, is %s.", adapter, name)
    location = locate_model(name, option)
    if revision is None:
        require_no_revision(location, f"{option}={name!r}", model_kwargs)
    if not (adapter / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"{adapter}: there is no adapter_model.safetensors, and pickled weights are not read. Save the adapter as "
            "safetensors."
        )
    return f"{option}={name!r}", location, adapter, model_kwargs


def _adapter_folder(base_model: str) -> Path | None:
    """Return the folder that a name stands for if it holds a PEFT adapter, else None."""
    folder = as_path(base_model, "base_model", ModelError)
    return folder.resolve() if (folder / "adapter_config.json").is_file() else None


def _download_adapter(repository: str, model_kwargs: Mapping[str, Any]) -> Path | None:
    """Return the folder in the Hub's cache with the adapter of a repository; None if the repository holds none.

    Raises:
        ModelError: It cannot be downloaded.
    """
    hub = {key: model_kwargs.get(key) for key in ("revision", "token")}
    try:
        with hub_or_cache(repository), quiet_transformers():
            config = find_adapter_config_file(repository, **hub)
            if config is None:
                return None
            commit = Path(config).parent.name
            return Path(
                snapshot_download(
                    repository, revision=commit, token=hub["token"], allow_patterns=[*_ADAPTER_FILES],
                    ignore_patterns="checkpoint-*",
                )
            )  # fmt: skip
    except Exception as error:
        raise ModelError(loading_failed(f"base_model={repository!r}", repository, error)) from hub_cause(
            error, repository
        )


def _read_base(adapter: Path) -> tuple[str, str | None]:
    """Return the name of an adapter's base model, and its revision if the adapter names one.

    Raises:
        ModelError: The adapter is not a LoRA adapter, or one that training cannot continue from.
    """
    try:
        config = json.loads(read_regular(adapter / "adapter_config.json"))
        kind, base, bias = config["peft_type"], config["base_model_name_or_path"], config.get("bias", "none")
        revision = config.get("revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{adapter}: adapter_config.json cannot be read: {describe_error(error)}.") from None
    if kind != "LORA" or bias != "none":
        raise ModelError(
            f"{adapter}: holds a {kind} adapter with bias={bias!r}. Training can continue only from LoRA adapters "
            "with bias='none'. Merge this adapter into its base model and start from the merged model."
        )
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{adapter}: adapter_config.json does not name its base model. Set base_model_name_or_path in that file."
        )
    if (as_path(base, "base_model_name_or_path", ModelError) / "adapter_config.json").is_file():
        raise ModelError(
            f"{adapter}: its base_model_name_or_path={base!r} is an adapter too. Merge that one into its own base "
            "model first, and set base_model_name_or_path to the merged model."
        )
    if revision is not None and (not isinstance(revision, str) or not revision):
        raise ModelError(
            f"{adapter}: adapter_config.json: revision={revision!r} is not the name of a branch, tag or commit of the "
            "base model. Set it to one, or to null."
        )
    return base, revision


def _with_revision(model_kwargs: Mapping[str, Any], revision: str | None, adapter: Path) -> dict[str, Any]:
    """Return the arguments with the revision of the base model that the adapter was trained on, if it names one."""
    asked = model_kwargs.get("revision")
    if None not in (asked, revision) and asked != revision:
        raise ConfigError(
            f"model_kwargs: revision={asked!r}, but {adapter / 'adapter_config.json'} was trained on "
            f"revision={revision!r} of its base model. Leave revision out of model_kwargs."
        )
    return {**model_kwargs, "revision": revision} if revision is not None else dict(model_kwargs)
