"""Messages in the words of the library -> the same in the words of the command line and of YAML files."""

import re
from functools import partial

_CONFIGS = {
    "TrainingConfig": "training_config",
    "GenerationConfig": "generation_config",
    "DatasetConfig": "dataset_config",
    "LoraConfig": "lora_config",
    "TrainOptions": "train",
}

_OPTIONS = (
    (r"train\(\.\.\., allow_changes=True\), konic train \.\.\. --allow-changes", "--allow-changes"),
    (r"(engine\.)?train\(([a-z_]+(?:=[^()]*)?)\)", r"\2"),
    (r"{name}(resume_from_checkpoint|allow_changes)(=True|=\.\.\.|{end})", r"--\1"),
    (r"{name}(checkpoint_dir)(=|{end})", r"--\1\2"),
    (
        r"{name}(device|max_iterations|save_every|save_total_limit|num_workers|min_workers|ray_address)=(?!\.\.\.)",
        r"--\1 ",
    ),
    (r"{name}(max_iterations|save_every|save_total_limit)(=\.\.\.|{end})", r"--\1"),
)
"""Arguments of the library -> options of the command line, one after the other."""
_NAMES = {"--resume_from_checkpoint": "--resume", "--checkpoint_dir": "--output"}


def with_options(text: str) -> str:
    """Return a message with `--max-iterations` for `max_iterations`, `--resume` for `resume_from_checkpoint`, ...

    Indented lines, which are those of others, stay as they are, as do the names of files and keys.
    """
    return "\n".join(line if line.startswith(" ") else _with_options(line) for line in text.split("\n"))


def _with_options(line: str) -> str:
    for pattern, option in _OPTIONS:
        pattern = pattern.replace("{name}", r"(?<![\w./\\'\"-])").replace("{end}", r"(?![\w/'\"]|\.\w)")
        line = re.sub(pattern, option, line)
    for name, option in _NAMES.items():
        line = line.replace(name, option)
    return re.sub(
        r"--(max_iterations|save_every|save_total_limit|allow_changes|num_workers|min_workers|ray_address)\b",
        lambda found: found[0].replace("_", "-"),
        line,
    )


def with_config_names(text: str) -> str:
    """Return a message with `training_config.batch_size=4` for `TrainingConfig(batch_size=4)`, and so on.

    These are the names of the settings in a YAML file and for `--set`.
    """
    for kind, name in _CONFIGS.items():
        with_fields = re.compile(rf"\b{kind}\(([^()]*(?:\([^()]*\)[^()]*)*)\)")
        text = with_fields.sub(partial(_fields_of, name), text)
        text = re.sub(rf"\b{kind}\b", name, text)
    return text


def _fields_of(config: str, found: re.Match[str]) -> str:
    return re.sub(r"(^|, )(\w+)=", rf"\1{config}.\2=", found[1]) or config


def as_of_set(text: str, fields: list[str]) -> str:
    """Return a message about settings with `--set training_config.batch_size` for a field that `--set` gave."""
    text = with_config_names(text)
    for field in fields:
        config, _, name = field.partition(".")
        named = rf"\b({re.escape(config)}(?:\.|: | has no field ')){re.escape(name)}\b"
        text = re.sub(named, lambda found: f"--set {found[0]}", text)
    return text
