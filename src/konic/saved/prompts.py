"""A file, the command line or a run's record -> the prompts that saved weights respond to."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from konic.finetuning import ConfigError, DatasetConfig, DatasetSource
from konic.finetuning.data.folders import kind_of
from konic.finetuning.data.prompts import Prompt, load_prompts, make_prompts, with_system_prompt
from konic.finetuning.errors import DatasetError
from konic.finetuning.settings import short_repr
from konic.output import get_logger
from konic.report.run import Run
from konic.saved.agents import recorded, recorded_place

logger = get_logger(__name__)


def given_prompts(texts: Sequence[str], run: Run, as_chats: bool) -> list[Prompt]:
    """Return prompts for texts, as they are or each as a chat of one message with the run's system prompt."""
    return [_for_run(prompt, run, as_chats) for prompt in make_prompts(list(texts), DatasetConfig(), "The prompts")]


def read_prompts(
    file: str, run: Run, column: str | None, split: str | None, most: int | None, as_chats: bool
) -> list[Prompt]:
    """Return the prompts of a file or folder in its order; `most` takes the first ones.

    Without `column`, the column or template of the run's own dataset is used, or `text` for a text file.

    Raises:
        ConfigError: A setting is invalid.
        DatasetError: There is no such file, or it has not this column or no prompts.
    """
    is_text = kind_of(Path(file)) == ".txt"
    of_run = recorded(run, "dataset_config")
    fields = {name: of_run[name] for name in ("prompt_column", "prompt_template") if of_run.get(name)}
    if column or is_text:
        fields = {"prompt_column": column or "text"}
        if of_run.get("prompt_template"):
            logger.warning(
                "The run's prompt_template, %s, is not applied to these prompts: they are column %r as it is.",
                short_repr(of_run["prompt_template"]), fields["prompt_column"],
            )  # fmt: skip
    named = {"split": split} if split else {}
    config = DatasetConfig(source=DatasetSource.LOCAL, name=file, shuffle=False, max_samples=most, **fields | named)
    try:
        rows = load_prompts(config).rows
    except DatasetError as error:
        message = re.sub(r"DatasetConfig\(prompt_(column|template)=\.\.\.\)", "--prompt-column", str(error))
        raise DatasetError(message) from None
    return [_for_run(prompt, run, as_chats) for prompt in rows]


def held_out_prompts(run: Run, most: int | None = None) -> list[Prompt]:
    """Return the prompts that a run held out, read again from its file or from the bundled ones.

    Raises:
        ConfigError: The run held none out, or they cannot be read again from its record, or their file has changed.
        DatasetError: Its file is not there any more.
    """
    settings = recorded(run, "dataset_config")
    source, advice = settings.get("source"), "Name a file: --prompts FILE."
    if source not in (DatasetSource.LOCAL, DatasetSource.BUNDLED):
        raise ConfigError(f"{run.path}: its prompts came from {source or 'nowhere known'!r} and are not kept. {advice}")
    own = {"name": recorded_place(run, settings["name"])} if isinstance(settings.get("name"), str) else {}
    config = DatasetConfig(**_known(settings) | own)
    if not config.held_out:
        raise ConfigError(f"{run.path}: its run held out no prompts (held_out=0). {advice}")
    try:
        prompts = load_prompts(config)
    except DatasetError as error:
        raise DatasetError(f"{error} {advice}") from None
    if prompts.fingerprint() != run.settings.get("prompts_sha256"):  # a stranger's run may name any file of yours
        raise ConfigError(f"{config.name or 'The bundled file'} is not what the run read its prompts from. {advice}")
    return prompts.held_out[:most]


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the recorded settings that this version has."""
    return {name: value for name, value in settings.items() if name in DatasetConfig.model_fields}


def _for_run(prompt: Prompt, run: Run, as_chat: bool) -> Prompt:
    """Return a prompt with what the run's dataset adds to chats; plain text becomes a chat only if it is wanted."""
    if isinstance(prompt.content, str) and not as_chat:
        return prompt
    settings = recorded(run, "dataset_config")
    content = [{"role": "user", "content": prompt.content}] if isinstance(prompt.content, str) else prompt.content
    values = settings.get("chat_template_kwargs")
    chat = replace(prompt, content=content, chat_template_kwargs=values if isinstance(values, dict) else {})
    system = settings.get("system_prompt")
    return with_system_prompt(chat, system if isinstance(system, str) else None)
