"""Where prompts come from: validated values."""

import string
from enum import StrEnum
from typing import Any, Self

from pydantic import Field, model_validator

from konic.finetuning.config import Settings
from konic.finetuning.data.loaders import BUNDLED_SPLITS
from konic.finetuning.errors import ConfigError
from konic.finetuning.system.files import as_path


class DatasetSource(StrEnum):
    """Where prompts come from."""

    HUGGINGFACE = "huggingface"
    """`name` is a dataset of the Hub: `imdb`, `yelp_polarity`, `tatsu-lab/alpaca`."""
    LOCAL = "local"
    """`name` is a csv, json, jsonl, parquet or txt file (one prompt a line, column `text`), or a folder of one kind."""
    MEMORY = "memory"
    """`prompts` holds them: strings, lists of chat messages, or dicts with more columns."""
    BUNDLED = "bundled"
    """Openings of movie reviews that come with the package, split for good into `train` and `held_out`."""


class DatasetConfig(Settings):
    """Which prompts to learn on. Without `source`, a path is LOCAL, another name HUGGINGFACE, prompts are MEMORY."""

    source: DatasetSource = DatasetSource.BUNDLED
    """Where they come from."""
    name: str | None = None
    """A dataset of the Hub, or a file or folder."""
    prompts: tuple[Any, ...] | None = Field(default=None, repr=False)
    """The prompts themselves, for MEMORY."""
    prompt_column: str = "prompt"
    """The column that holds a prompt: a string, or a list of chat messages."""
    split: str = "train"
    """The split to learn on, of HUGGINGFACE and BUNDLED."""
    subset: str | None = None
    """The configuration of a dataset of the Hub that has several."""
    revision: str | None = None
    """A branch, tag or commit of a dataset of the Hub."""
    token: str | None = Field(default=None, repr=False)
    """For gated or private datasets; None takes the one you are logged in with. Never written to a run's files."""
    streaming: bool = False
    """Read a dataset of the Hub row by row as it is used, instead of downloading it first."""
    max_samples: int | None = Field(default=None, ge=1)
    """Rows kept; with `shuffle`, drawn at random."""
    shuffle: bool = True
    """Every pass goes through the rows in a new random order; False keeps the dataset's order."""
    shuffle_seed: int = Field(default=42, ge=0, lt=2**63)
    """Seeds which rows are kept, which are held out, and the order of every pass."""
    held_out: int = Field(default=0, ge=0)
    """Prompts kept aside for evaluation; of BUNDLED, the first ones of its own held-out split."""
    system_prompt: str | None = None
    """A system message put before chat messages that have none."""
    prompt_template: str | None = None
    """Plain text made of a row's columns, `"Review: {text}"`; it takes the place of `prompt_column`."""

    @model_validator(mode="before")
    @classmethod
    def _source_follows_from_what_is_given(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("prompts"), set | frozenset):
            raise ValueError("prompts is a set, which has no order: give a list")
        if not isinstance(values, dict) or values.get("source") is not None:
            return values
        if values.get("prompts") is not None:
            return {**values, "source": DatasetSource.MEMORY}
        if isinstance(values.get("name"), str):
            is_path = as_path(values["name"], "name", ConfigError).exists()
            return {**values, "source": DatasetSource.LOCAL if is_path else DatasetSource.HUGGINGFACE}
        return {name: value for name, value in values.items() if name != "source"}

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        source = self.source
        if source is DatasetSource.MEMORY and self.prompts is None:
            raise ValueError("source=MEMORY needs prompts=[...]")
        if source is not DatasetSource.MEMORY and self.prompts is not None:
            raise ValueError(f"prompts=[...] goes with source=MEMORY, not {source.name}")
        if source in (DatasetSource.LOCAL, DatasetSource.HUGGINGFACE) and not self.name:
            what = "the path of a file or folder" if source is DatasetSource.LOCAL else "a dataset of the Hub"
            raise ValueError(f"source={source.name} needs name=, {what}")
        if source is DatasetSource.BUNDLED and self.name:
            raise ValueError(f"name={self.name!r} goes with source=HUGGINGFACE or LOCAL, not BUNDLED")
        if source is DatasetSource.BUNDLED and self.split not in BUNDLED_SPLITS:
            raise ValueError(f"split={self.split!r} is not one of the bundled prompts': {', '.join(BUNDLED_SPLITS)}")
        if source is DatasetSource.BUNDLED and self.split == "held_out" and self.held_out:
            raise ValueError("split='held_out' would train on the very prompts that held_out keeps aside")
        if source in (DatasetSource.LOCAL, DatasetSource.MEMORY) and self.split != "train":
            raise ValueError(f"split={self.split!r} goes with source=HUGGINGFACE or BUNDLED, not {source.name}")
        if source is not DatasetSource.HUGGINGFACE:
            for name in ("subset", "revision", "token", "streaming"):
                if getattr(self, name):
                    raise ValueError(f"{name} goes with source=HUGGINGFACE, not {source.name}")
        return self

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.prompt_template is not None:
            try:
                fields = [name for _, name, _, _ in string.Formatter().parse(self.prompt_template) if name is not None]
            except ValueError as error:
                raise ValueError(f"prompt_template={self.prompt_template!r}: {error}") from None
            if not fields or not all(name.isidentifier() for name in fields):
                raise ValueError(
                    f"prompt_template={self.prompt_template!r} must name columns in braces, as in '{{text}}'"
                )
            if self.system_prompt is not None:
                raise ValueError(
                    "prompt_template makes plain text, and system_prompt goes with chat messages: give one"
                )
        return self
