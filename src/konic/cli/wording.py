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
