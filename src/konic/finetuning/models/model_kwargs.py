"""model_kwargs -> ConfigError, if `from_pretrained` could not take a value, or would take it for something else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface

from konic.finetuning.errors import ConfigError, did_you_mean

_MODEL_KWARGS = ("revision", "token", "dtype", "attn_implementation", "trust_remote_code", "quantization_config")
_DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")


def check_model_kwargs(model_kwargs: Mapping[str, Any]) -> None:
    """Raise ConfigError if `model_kwargs` has a key that is not passed on to `from_pretrained`, or a wrong value."""
    for key in model_kwargs:
        if key not in _MODEL_KWARGS:
            raise ConfigError(
                f"model_kwargs has no key {key!r}.{did_you_mean(str(key), _MODEL_KWARGS)} "
                f"Valid keys: {', '.join(_MODEL_KWARGS)}."
            )
    trusts_code = model_kwargs.get("trust_remote_code", False)
    if not isinstance(trusts_code, bool):  # `transformers` takes every text for True, and asks a terminal for None
        raise ConfigError(f"model_kwargs: trust_remote_code={trusts_code!r} is neither True nor False.")
    revision, token = model_kwargs.get("revision"), model_kwargs.get("token")
    if revision is not None and (not isinstance(revision, str) or not revision):
        raise ConfigError(f"model_kwargs: revision={revision!r} is not the name of a branch, tag or commit.")
    if token is not None and not isinstance(token, str | bool):
        raise ConfigError(f"model_kwargs: token takes a text or a bool, got a value of type {type(token).__name__}.")
    quantization = model_kwargs.get("quantization_config")
    if quantization is not None and not isinstance(quantization, Mapping) and not hasattr(quantization, "quant_method"):
        raise ConfigError(
            f"model_kwargs: quantization_config={quantization!r} is neither a dict nor a config of transformers, such "
            "as BitsAndBytesConfig."
        )
    given = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    method = getattr(given, "quant_method", given)
    if getattr(method, "value", method) == "torchao":  # its tensors lack operations, from abs on
        raise ConfigError(
            "model_kwargs: quantization_config: konic cannot read the weights of torchao, neither to check them nor to "
            "merge an adapter. Use BitsAndBytesConfig, or leave quantization_config out."
        )
    for attention in parts_of(model_kwargs.get("attn_implementation")):
        _check_attention(attention)
    check_dtype(model_kwargs.get("dtype"), "model_kwargs: dtype={}")


def parts_of(value: Any) -> list[Any]:
    """Return the values of an argument: it may be a dict with one for each part of a multimodal model."""
    return [part for part in (value.values() if isinstance(value, Mapping) else [value]) if part is not None]


def _check_attention(name: Any) -> None:
    known = ["eager", *AttentionInterface().valid_keys()]
    if name not in known and not (isinstance(name, str) and "/" in name):  # a kernel of the Hub has a /
        raise ConfigError(
            f"model_kwargs: attn_implementation={name!r} is none of {', '.join(map(repr, sorted(known)))}."
            f"{did_you_mean(str(name), known)}"
        )


def check_dtype(value: Any, shown: str) -> None:
    """Raise ConfigError for a dtype that no model can compute in; `shown` is the setting, with {} for its value."""
    for dtype in parts_of(value):
        if dtype != "auto":
            _check_dtype(dtype, shown)


def _check_dtype(dtype: Any, shown: str) -> None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    is_float = isinstance(found, torch.dtype) and found.is_floating_point
    if not isinstance(found, torch.dtype) or not is_float or found.itemsize < 2:
        problem = "has too few bits to train with" if is_float else "is not a floating-point type of torch"
        hint = did_you_mean(str(dtype).removeprefix("torch.").replace("fp", "float"), _DTYPES)
        raise ConfigError(
            f"{shown.format(repr(dtype))} {problem}.{'' if is_float else hint} "
            f"Use one of {', '.join(map(repr, _DTYPES))}, or a torch.dtype; quantization_config is for weights in "
            "fewer bits."
        )


def require_no_revision(location: str, asked: str, model_kwargs: Mapping[str, Any]) -> None:
    """Raise ConfigError if `model_kwargs` names a revision of a model that is a folder here."""
    revision = model_kwargs.get("revision")
    if revision not in (None, "main") and Path(location).is_dir():
        raise ConfigError(
            f"model_kwargs: revision={revision!r}, but {asked} is a folder here, and only a Hub model has revisions. "
            "Leave revision out."
        )
