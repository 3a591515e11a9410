"""A script or a YAML file -> the job that it describes: an agent, and what `konic train` is to do with it.

What a YAML file may hold stands in docs/commands.md. Paths inside of it are relative to its folder.
"""

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from konic.cli.documents import Document
from konic.cli.paths import is_yaml, require_file
from konic.cli.scripts import import_script, load_agent, load_composer, load_composer_and_dataset, run_user_code
from konic.cli.wording import with_config_names
from konic.finetuning import (
    ConfigError,
    DatasetConfig,
    GenerationConfig,
    KonicError,
    KonicFinetuningAgent,
    KonicLLMRewardComposer,
    LoraConfig,
    TrainingConfig,
)
from konic.finetuning.cluster.connection import require_ray
from konic.finetuning.errors import did_you_mean
from konic.finetuning.settings import Settings, describe
from konic.finetuning.system.places import looks_like_path

_CONFIGS: dict[str, type[Settings]] = {
    "lora_config": LoraConfig,
    "dataset_config": DatasetConfig,
    "training_config": TrainingConfig,
    "generation_config": GenerationConfig,
}
_KEYS = ("base_model", "reward_composer", *_CONFIGS, "model_kwargs", "train")
_NOT_IN_YAML = {
    ("model_kwargs", "trust_remote_code"): "a YAML file cannot allow a model's own code. Allow it in a script",
    ("model_kwargs", "token"): "a token does not belong into a file. Log in with `hf auth login`, or set HF_TOKEN",
    ("dataset_config", "token"): "a token does not belong into a file. Log in with `hf auth login`, or set HF_TOKEN",
    ("train", "resume"): "it is given on the command line, as --resume",
    ("train", "allow_changes"): "it is given on the command line, as --allow-changes",
}


class TrainOptions(Settings):
    """What `train:` of a YAML file may say; options of `konic train` of the same names come first."""

    max_iterations: int | None = Field(default=None, ge=0)
    output: str | None = Field(default=None, min_length=1)
    device: str | None = Field(default=None, min_length=1)
    save_every: int | None = Field(default=None, ge=0)
    save_total_limit: int | None = Field(default=None, ge=1)
    num_workers: int | None = Field(default=None, ge=1)
    min_workers: int | None = Field(default=None, ge=1)
    ray_address: str | None = Field(default=None, min_length=1)

    def scaling(self) -> Any:
        """Return Ray's ScalingConfig for `num_workers`; None without it.

        Raises:
            ConfigError: Ray is missing, or an option is given that needs `num_workers`.
        """
        if self.num_workers is None:
            for name in ("min_workers", "ray_address"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name}={getattr(self, name)!r} needs num_workers (--num-workers), such as 2.")
            return None
        least = self.num_workers if self.min_workers is None else self.min_workers
        if least > self.num_workers:
            raise ConfigError(f"min_workers={least} is above num_workers={self.num_workers}.")
        require_ray()
        from ray.train import ScalingConfig

        number = self.num_workers if least == self.num_workers else (least, self.num_workers)
        return ScalingConfig(num_workers=number, use_gpu=(self.device or "").startswith("cuda"))


@dataclass(frozen=True)
class Job:
    """An agent, the options of its training that its file gives, and the file."""

    agent: KonicFinetuningAgent
    file: Path
    options: TrainOptions = field(default_factory=TrainOptions)


def load_job(file: Path) -> Job:
    """Load the job of a script or a YAML file.

    Raises:
        KonicError: It cannot be used; the message names the line of a YAML file.
    """
    if not is_yaml(file):
        return Job(load_agent(file), file)
    return _YamlJob(_read(file)).job()


def load_rewards(file: Path) -> tuple[KonicLLMRewardComposer, DatasetConfig]:
    """Load the composer of a script or a YAML file, and its dataset config, which says what a prompt is."""
    if not is_yaml(file):
        return load_composer_and_dataset(file)
    job = _YamlJob(_read(file))
    return job.composer(), job.config("dataset_config") or DatasetConfig()


def _read(file: Path) -> Document:
    require_file(file)
    return Document(file)


class _YamlJob:
    """The parts of a YAML file, each checked when it is asked for."""

    def __init__(self, document: Document) -> None:
        self._document, self._values = document, document.values
        self._folder = document.file.parent
        for key in self._values:
            if key not in _KEYS:
                other = next((name for name, kind in _CONFIGS.items() if key in kind.model_fields), None)
                other = "train" if key in TrainOptions.model_fields else other
                hint = f" It belongs under {other}:." if other else did_you_mean(key, _KEYS)
                raise document.error(f"there is no key {key!r}.{hint} Keys: {', '.join(_KEYS)}.", key)
        for (part, key), reason in _NOT_IN_YAML.items():
            if key in self._mapping(part):
                raise document.error(f"{part}.{key}: {reason}.", part, key)
        missing = [name for name in ("base_model", "reward_composer") if self._values.get(name) is None]
        if missing:
            raise document.error(f"it has no {' and no '.join(missing)}.")

    def job(self) -> Job:
        base_model = self._values["base_model"]
        if not isinstance(base_model, str) or not base_model.strip():
            raise self._document.error(f"base_model must be a text, got {describe(base_model)}.", "base_model")
        configs = {name: self.config(name) for name in _CONFIGS}
        options = self._made("train", TrainOptions)
        if options.output is not None and "://" not in options.output:
            options = options.with_fields({"output": str(self._folder / Path(options.output).expanduser())})
        base_model, composer = self._place(base_model, "base_model"), self.composer()
        try:
            agent = KonicFinetuningAgent(base_model, composer, model_kwargs=self._mapping("model_kwargs"), **configs)
        except ConfigError as error:
            raise self._located(error) from None
        return Job(agent, self._document.file, options)

    def config(self, name: str) -> Any:
        """Return a config; None where the file has none."""
        return None if self._values.get(name) is None else self._made(name, _CONFIGS[name])

    def composer(self) -> KonicLLMRewardComposer:
        """Return the composer that `reward_composer` names: a class, an instance, or a function that returns one."""
        given, arguments = self._values["reward_composer"], {}
        if isinstance(given, dict):
            unknown = next((key for key in given if key not in ("path", "arguments")), None)
            if unknown is not None:
                hint = did_you_mean(unknown, ("path", "arguments"))
                raise self._document.error(
                    f"reward_composer has no key {unknown!r}.{hint} It has: path, arguments.",
                    "reward_composer", unknown,
                )  # fmt: skip
            arguments, given = self._mapping("reward_composer", "arguments"), given.get("path")
        place, _, name = given.rpartition(":") if isinstance(given, str) else ("", "", "")
        if isinstance(given, str) and given.endswith(".py") and not arguments:
            return load_composer(self._folder / given)
        if not place or not name.isidentifier():
            raise self._bad_composer("give file.py:Name or package.module:Name")
        return self._made_composer(self._found(place, name), arguments, given)

    def _found(self, place: str, name: str) -> Any:
        """Return what a module calls by a name."""
        if place.endswith(".py"):
            script = self._folder / Path(place).expanduser()
            if not script.is_file():
                raise self._bad_composer(f"there is no file {script}")
            module = import_script(script)
        else:
            if not all(part.isidentifier() for part in place.split(".")):
                raise self._bad_composer("give file.py:Name or package.module:Name")
            first = place.partition(".")[0]
            if first in sys.stdlib_module_names:
                raise self._bad_composer(f"{first} is a module of Python itself, which has no rewards")
            if (self._folder / first).is_dir() or (self._folder / f"{first}.py").is_file():
                sys.path.insert(0, str(self._folder.absolute()))  # only then: its files may have names of other modules
            module = run_user_code(self._document.file, importlib.import_module, place)
        if not hasattr(module, name):
            own = [each for each in vars(module) if not each.startswith("_")]
            raise self._bad_composer(f"{place} has no {name!r}", did_you_mean(name, own))
        return getattr(module, name)

    def _made_composer(self, found: Any, arguments: dict[str, Any], given: str) -> KonicLLMRewardComposer:
        if isinstance(found, KonicLLMRewardComposer):
            if arguments:
                raise self._bad_composer(f"{given} is made already, and takes no arguments")
            return found
        if not callable(found) or (isinstance(found, type) and not issubclass(found, KonicLLMRewardComposer)):
            raise self._bad_composer(f"{given} is {describe(found)}, not a composer")
        if not isinstance(found, type) and not self._is_of_job(given):
            raise self._bad_composer(
                f"{given} is a function of an installed package. A file may call functions of its own folder; of a "
                "package, name a class of rewards"
            )
        composer = run_user_code(self._document.file, self._call, found, arguments)
        if not isinstance(composer, KonicLLMRewardComposer):
            raise self._bad_composer(f"{given} gives {describe(composer)}, not a KonicLLMRewardComposer")
        return composer

    def _call(self, found: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call what makes the composer; an error of konic gets the line of the argument that it names first."""
        try:
            return found(**arguments)
        except KonicError as error:
            named = next((word for word in re.findall(r"\w+", str(error)) if word in arguments), None)
            path = ("arguments", named) if named is not None else ()
            raise self._document.error(f"reward_composer: {error}", "reward_composer", *path) from None

    def _is_of_job(self, given: str) -> bool:
        """Return True for what stands in a file that is named, or in a module below the job's folder."""
        place = given.rpartition(":")[0]
        source = getattr(sys.modules.get(place), "__file__", None)
        below = source is not None and Path(source).resolve().is_relative_to(self._folder.resolve())
        return place.endswith(".py") or (below and "site-packages" not in str(source))

    def _bad_composer(self, problem: str, hint: str = "") -> ConfigError:
        return self._document.error(f"reward_composer: {problem}.{hint}", "reward_composer")

    def _made(self, name: str, kind: type[Settings]) -> Any:
        fields = dict(self._mapping(name))
        if kind is DatasetConfig and isinstance(fields.get("name"), str) and fields.get("source") != "huggingface":
            fields["name"] = self._place(fields["name"], name, "name", is_path=fields.get("source") == "local")
        try:
            return kind(**fields)
        except ConfigError as error:
            raise self._located(error, name) from None

    def _mapping(self, *path: str) -> dict[str, Any]:
        value: Any = self._values
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, dict) and path != ("reward_composer",):
            raise self._document.error(f"{path[-1]} must be a mapping, got {describe(value)}.", *path)
        return value or {}

    def _place(self, name: str, *path: str, is_path: bool = False) -> str:
        """Return a name as a path relative to the file's folder, where it is a path."""
        here = self._folder / Path(name).expanduser()
        if is_path or here.exists() or looks_like_path(name):
            return str(here)
        if Path(name).exists():
            raise self._document.error(
                f"{name!r} is not in the folder of this file, but in the current folder. Paths are relative to the "
                "file: give the path from there, or the whole path.",
                *path,
            )
        return name

    def _located(self, error: KonicError, section: str = "") -> ConfigError:
        """Return an error of the settings with the line of the key that it names first, and the keys as they stand."""
        lines = []
        for text in error.args:
            parts = [section] if section else _CONFIGS
            named = [(part, word) for word in re.findall(r"\w+", text) for part in parts]
            path = next((each for each in named if self._document.line(*each)), (section,))
            lines.append(str(self._document.error(with_config_names(text), *path)))
        return ConfigError(*lines)
