"""Saved model -> its model card for others: without the paths of this machine, and with what they need to open it."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from konic.export.saved import SavedModel
from konic.finetuning.models.locations import PACKAGED_MODELS
from konic.finetuning.run.card import model_card
from konic.text import escape_markdown, redact_all

_ABSOLUTE = re.compile(r"(?:[A-Za-z]:[\\/]|/|\\\\|~[\w.-]*/)(?=[^\s/\\])")
"""How a path begins that says where something lies on this machine."""


def export_card(saved: SavedModel, is_adapter: bool, file: str | None = None) -> str:
    """Return the README.md of an export.

    Args:
        saved: What is exported.
        is_adapter: True for an adapter, False for a full model.
        file: The GGUF file, if that is the export.
    """
    settings = without_paths(redact_all(saved.settings))
    result = replace(saved.result(), model_name=str(settings.get("model_name")))
    base = saved.base if saved.is_adapter else str(saved.settings.get("model_name"))
    is_public = saved.base_is_on_the_hub if saved.is_adapter else "/" in base and not Path(base).exists()
    loading = None
    if file is not None:
        loading = ["```", f"llama-cli -m {file}", "ollama create MODEL -f Modelfile && ollama run MODEL", "```"]
    elif is_adapter and not is_public:
        loading = _loading_by_hand(saved.base)
    return model_card(result, {"algorithm": "?"} | settings, base if is_public else None, is_adapter, loading)


def _loading_by_hand(base: str) -> list[str]:
    """Say how to open an adapter whose base model the Hub does not have."""
    if base in PACKAGED_MODELS:
        where = f"`{base}`, which konic unpacks from the package `{PACKAGED_MODELS[base].requirement}`"
        located = f"locate_model({base!r})"
        imports = ["from konic.finetuning.models.locations import locate_model", ""]
    else:
        where = f"a folder of the machine that trained it ({escape_markdown(Path(base).name)}), which you need too"
        located, imports = "BASE_FOLDER", [""]
    return [
        f"The base model of this adapter is {where}. An adapter works on exactly those weights only; a merged export "
        "of the run needs no base model.",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        *imports,
        f"base = AutoModelForCausalLM.from_pretrained({located})",
        "model = PeftModel.from_pretrained(base, FOLDER)",
        "```",
    ]


def without_paths(value: Any) -> Any:
    """Return a value with the last part of each absolute path in it, alone."""
    if isinstance(value, dict):
        return {name: without_paths(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(part) for part in value]
    if isinstance(value, str) and _ABSOLUTE.match(value):
        return Path(value.replace("\\", "/")).name
    return value


def find_places(text: str, places: Iterable[Path]) -> str | None:
    """Return the first of some folders of this machine that a text names, or None."""
    names = {str(place) for place in places if len(place.parts) > 1}
    return next((name for name in sorted(names) if re.search(re.escape(name) + r"(?![\w-])", text)), None)


def own_places(saved: SavedModel) -> list[Path]:
    """Return the folders that no exported text should name: home, the current one, the run's, and the base model's."""
    base = [Path(str(saved.adapter_config.get("base_model_name_or_path")))] if saved.is_adapter else []
    return [Path.home(), Path(os.getcwd()), saved.run.path.resolve(), *(path for path in base if path.is_absolute())]


def plain_json(values: Any) -> str:
    """Return values as a file of JSON."""
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
