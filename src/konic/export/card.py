"""Saved model -> its model card for others: without the paths of this machine, and with what they need to open it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from konic.export.private import own_places, without_paths, without_places
from konic.export.saved import SavedModel, is_hub_id
from konic.finetuning.models.locations import PACKAGED_MODELS
from konic.finetuning.run.card import model_card
from konic.finetuning.system.places import looks_like_path
from konic.text import escape_markdown, redact_all


def export_card(saved: SavedModel, is_adapter: bool, file: str | None = None) -> str:
    """Return the README.md of an export.

    Args:
        saved: What is exported.
        is_adapter: True for an adapter, False for a full model.
        file: The GGUF file, if that is the export.
    """
    settings = without_places(without_paths(redact_all(saved.settings)), own_places(saved))
    if looks_like_path(str(settings.get("model_name"))):
        settings["model_name"] = Path(str(settings["model_name"])).name
    result = replace(saved.result(), model_name=str(settings.get("model_name")))
    base = saved.base if saved.is_adapter else str(saved.settings.get("model_name"))
    is_public = is_hub_id(base) and (saved.is_adapter or "/" in base)
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


def plain_json(values: Any) -> str:
    """Return values as a file of JSON."""
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
