"""A model's folder or repository -> ModelError, if loading it would read or run what lies elsewhere."""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import find_adapter_config_file

from konic.finetuning.errors import ModelError
from konic.finetuning.models.headers import find_file
from konic.finetuning.models.tokenizer_rules import find_unbounded_rule
from konic.finetuning.system.places import find_stray, read_json, read_regular
from konic.text import describe_error, printable

_TEMPLATES = "additional_chat_templates"
_KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Where a config can name a kernel of the Hub, which is native code."""
_LISTS = ("fast_tokenizer_files", "init_inputs")
_OTHER_FILES = ("gguf_file", "merges", "tokenizer_object", "vocab", *_LISTS)
"""Settings of a tokenizer that may name files anywhere; none of them is written by `save_pretrained`."""
_FLASH_PACKAGES = {
    "flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface", "flash_attention_4": "flash_attn",
}  # fmt: skip


def require_contained(location: str, asked: str, model_kwargs: Mapping[str, Any]) -> None:
    """Check that a base model is read from its own folder or repository, and brings no native code.

    Raises:
        ModelError: It is an adapter, for which `transformers` would load another model; or a file of its folder is
            elsewhere; or its config names a kernel, or `model_kwargs` asks for one without trust.
    """
    fetched = _fetched_kernel(model_kwargs.get("attn_implementation"))
    if fetched is not None and not model_kwargs.get("trust_remote_code"):
        raise ModelError(
            f"{asked}: model_kwargs: attn_implementation={fetched!r} fetches native code from the Hub. Install "
            "flash-attn or use 'sdpa'; or, if you trust that code, set trust_remote_code=True."
        )
    hub = {key: model_kwargs.get(key) for key in ("revision", "token")}
    if find_adapter_config_file(location, **hub) is not None:
        raise ModelError(
            f"{asked} has an adapter_config.json, which would load another model than this one. Merge that adapter "
            "into its own base model first, and name the merged model."
        )
    if Path(location).is_dir():
        require_inside(Path(location), asked)
    config, _ = PreTrainedConfig.get_config_dict(location, **hub)
    kernel = next((name for name in _kernels(config) if "/" in name), None)
    if kernel is not None:  # also where model_kwargs has another one: `transformers` may prefer that of the file
        raise ModelError(f"{asked}: its config.json asks for {kernel!r}, native code from the Hub. Remove that line.")


def require_bounded_tokenizer(location: str, asked: str, model_kwargs: Mapping[str, Any]) -> None:
    """Check that the tokenizer of a folder or a Hub id reads no other files, and the rules of its tokenizer.json.

    Raises:
        ModelError: A file of it cannot be read, or names another file; or a rule may take for ever or fill the memory.
    """
    checks = {
        "tokenizer_config.json": _find_other_file, "special_tokens_map.json": _find_no_token,
        "tokenizer.json": find_unbounded_rule,
    }  # fmt: skip
    for name, check in checks.items():
        path = find_file(name, location, model_kwargs)
        try:
            problem = check(path) if path is not None else None
        except (OSError, ValueError) as error:
            problem = f"it cannot be read: {describe_error(error)}"
        if problem is not None:
            raise ModelError(f"{asked}: {name}: {problem}. Correct that file, or use another tokenizer.")


def _find_other_file(path: Path) -> str | None:
    """Return what in a tokenizer_config.json would make `transformers` read a file that is named there, or None."""
    settings = read_json(path)
    given = {name: settings.get(name) for name in _OTHER_FILES} if isinstance(settings, dict) else {}
    found = next((name for name, value in given.items() if value and (isinstance(value, str) or name in _LISTS)), None)
    return None if found is None else f"{found}={printable(str(given[found])[:200])!r} names another file to read"


def _find_no_token(path: Path) -> str | None:
    """Return what in a special_tokens_map.json is no token: `transformers` takes any setting from there."""
    settings = read_json(path)
    names = settings if isinstance(settings, dict) else ()
    found = next((name for name in names if not name.endswith(("_token", "_tokens"))), None)
    return None if found is None else f"{printable(found[:200])!r} is not the name of a token"


def require_inside(folder: Path, asked: str) -> None:
    """Check that the files that `transformers` reads from a folder are in it. Weights may be links.

    Raises:
        ModelError: One is elsewhere.
    """
    outside = find_outside(folder)
    if outside is not None:
        raise ModelError(f"{asked}: {outside}.")


def find_outside(folder: Path) -> str | None:
    """Return which file of a model's folder is elsewhere, or None. Links to weights, which people share, may be."""
    named = (*folder.iterdir(), *(folder / _TEMPLATES).glob("*"))
    files = [path for path in named if path.exists() and not path.is_dir()]
    stray = find_stray((path for path in files if path.suffix != ".safetensors"), folder)
    if stray is not None:
        return stray
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = [str(name) for name in json.loads(read_regular(index))["weight_map"].values()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # `transformers` says what is wrong with it
        elsewhere = next((name for name in shards if Path(name).is_absolute() or ".." in Path(name).parts), None)
        if elsewhere is not None:
            return f"{index.name} names {elsewhere!r}, which is outside of the folder"
    return None


def _fetched_kernel(asked: Any) -> str | None:
    """Return the implementation of attention that `transformers` would fetch from the Hub, or None.

    It does so for the name of a repository and, where `kernels` is installed, for a package that is not.
    """
    for name in map(str, asked.values() if isinstance(asked, Mapping) else [asked]):
        package = _FLASH_PACKAGES.get(name.partition("|")[2] or name)
        is_missing = package is not None and importlib.util.find_spec(package) is None
        if "/" in name or (is_missing and importlib.util.find_spec("kernels") is not None):
            return name
    return None


def _kernels(config: Any) -> Iterator[str]:
    """Yield every implementation that a config names, also in its parts and by part."""
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key in _KERNEL_KEYS:
            yield from (str(name) for name in (value.values() if isinstance(value, dict) else [value]))
        else:
            yield from _kernels(value)
