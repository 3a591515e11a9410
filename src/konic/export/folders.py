"""Saved model -> a folder that PEFT, or `transformers`, opens."""

import os
import shlex
import shutil
from pathlib import Path

from konic.export.card import export_card, plain_json
from konic.export.private import own_places, without_paths, without_places
from konic.export.saved import ADAPTER_CONFIG, SavedModel, read_dtype
from konic.finetuning.errors import ModelError, OutputError
from konic.finetuning.models.locations import PACKAGED_MODELS, quiet_transformers
from konic.finetuning.system.files import filling_folder, require_writable
from konic.finetuning.system.places import read_json
from konic.text import describe_error

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
_PATH_KEYS = ("_name_or_path", "name_or_path", "_model_name_or_path", "tokenizer_file", "vocab_file", "merges_file")
"""Where configs may say where something lay on the machine that wrote them."""


def require_new(output: Path) -> None:
    """Check that a folder is new or empty, and can be written.

    Raises:
        OutputError: It is not; nothing of a user is replaced.
    """
    if output.is_symlink():
        raise OutputError(f"--output {output}: is a link to {os.readlink(output)}. Name a new folder.")
    if output.is_file():
        raise OutputError(f"--output {output}: is a file. Name a new folder.")
    if output.is_dir() and any(output.iterdir()):
        raise OutputError(f"--output {output}: is not empty, and nothing in it is replaced. Name a new folder.")
    require_writable(output.absolute(), "--output")


def write_adapter(saved: SavedModel, output: Path) -> list[str]:
    """Write the adapter, the tokenizer and a model card to a folder; return what to say about them.

    Raises:
        ModelError: The run trained every weight.
        OutputError: The folder cannot be written.
    """
    if not saved.is_adapter:
        raise ModelError(f"{saved.folder}: the run trained every weight, so there is no adapter. Use --format merged.")
    with filling_folder(output) as folder:
        shutil.copyfile(saved.folder / "adapter_model.safetensors", folder / "adapter_model.safetensors")
        config = without_places(saved.adapter_config, own_places(saved)) | {"base_model_name_or_path": saved.base}
        (folder / ADAPTER_CONFIG).write_text(plain_json(config), encoding="utf-8")
        _copy_tokenizer(saved, folder)
        (folder / "README.md").write_text(export_card(saved, is_adapter=True), encoding="utf-8")
    if saved.base_is_on_the_hub:
        return [f"PEFT loads its base model, {saved.base}, from the Hub."]
    where = (
        "the package " + PACKAGED_MODELS[saved.base].requirement if saved.base in PACKAGED_MODELS else "this machine"
    )
    return [f"Its base model, {saved.base}, comes from {where}: README.md says how to open both.",
            "To share one that opens by itself, use --format merged."]  # fmt: skip


def write_merged(saved: SavedModel, output: Path, dtype: str | None) -> list[str]:
    """Write the full model, the tokenizer and a model card to a folder; return what to say about them.

    Raises:
        ModelError: The model cannot be loaded.
        OutputError: The folder cannot be written.
    """
    kind = read_dtype(dtype, saved)
    model, tokenizer = saved.load()
    with filling_folder(output) as folder, quiet_transformers():
        model.to(kind).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _strip_configs(saved, folder)
        (folder / "README.md").write_text(export_card(saved, is_adapter=False), encoding="utf-8")
    return [f"transformers opens it: AutoModelForCausalLM.from_pretrained({str(output)!r})"]


def write_gguf_folder(saved: SavedModel, output: Path, dtype: str | None) -> list[str]:
    """Write a GGUF file, a Modelfile for Ollama and a model card to a folder; return what to say about them.

    Raises:
        ModelError: The model cannot be loaded, or llama.cpp computes it in another way.
        OutputError: The folder cannot be written.
    """
    from konic.export.gguf_file import FILE_TYPES, require_known, write_gguf
    from konic.export.modelfile import modelfile

    dtype = dtype or "float16"
    if dtype not in FILE_TYPES:
        raise OutputError(f"--dtype {dtype}: GGUF files are written as {', '.join(FILE_TYPES)}.")
    model, tokenizer = saved.load()
    require_known(model)
    file = f"model-{dtype.replace('float', 'f')}.gguf"
    with filling_folder(output) as folder:
        write_gguf(model, tokenizer, folder / file, saved.title, dtype)
        system_prompt = saved.setting("dataset_config").get("system_prompt")
        text, note = modelfile(file, tokenizer, saved.setting("generation_config"), system_prompt)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(export_card(saved, is_adapter=False, file=file), encoding="utf-8")
    model, recipe = (shlex.quote(str(output / name)) for name in (file, "Modelfile"))
    return [note, f"llama.cpp: llama-cli -m {model}", f"Ollama: ollama create MODEL -f {recipe}"]


def _copy_tokenizer(saved: SavedModel, target: Path) -> None:
    for path in (path for pattern in TOKENIZER_FILES for path in saved.folder.glob(pattern)):
        place = target / path.relative_to(saved.folder)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
    _strip_configs(saved, target)


def _strip_configs(saved: SavedModel, folder: Path) -> None:
    """Leave out where things lay on this machine. What others need to open the model stays."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            try:
                config = dict(read_json(path))
            except (OSError, ValueError, TypeError) as error:
                raise ModelError(f"{saved.folder / name}: cannot be read: {describe_error(error)}.") from None
            kept = {key: without_paths(value) if key in _PATH_KEYS else value for key, value in config.items()}
            path.write_text(plain_json(without_places(kept, own_places(saved))), encoding="utf-8")
