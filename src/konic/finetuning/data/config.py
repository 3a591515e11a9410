"""Where prompts come from: validated settings."""

import os
import re
import string
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Self

from pydantic import Field, JsonValue, model_validator

from konic.finetuning.data.loaders import BUNDLED_SPLITS, is_local
from konic.finetuning.data.rows import rows_of
from konic.finetuning.settings import Settings, short_repr


def _name_as_text(name: Any) -> Any:
    return os.fspath(name) if isinstance(name, os.PathLike) else name


_OF_THE_PROMPT = (
    "messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "compiled_template", "conversations", "self",
)  # fmt: skip
"""What follows from the prompt and from konic's own call of `apply_chat_template`, not from its template's values."""
_GIVEN_AS = {"name": _name_as_text, "prompts": rows_of}
"""How values of other kinds that people have in hand become a field's own."""


class DatasetSource(StrEnum):
    """Where prompts come from."""

    HUGGINGFACE = "huggingface"
    """`name` is a Hub dataset: `imdb`, `yelp_polarity`, `tatsu-lab/alpaca`."""
    LOCAL = "local"
    """`name` is a csv, tsv, json, jsonl, ndjson, parquet, arrow or txt file, also compressed (gz, zst), a folder of
    files of one kind, or a folder of `save_to_disk`. A txt file holds one prompt per line, in the column `text`."""
    MEMORY = "memory"
    """`prompts` holds the prompts: strings, lists of chat messages, or dicts with more columns; or a table of pandas,
    polars, `datasets`, pyarrow or numpy."""
    BUNDLED = "bundled"
    """Openings of movie reviews, shipped with the package, in two fixed splits: `train` and `held_out`."""
    KONIC_CLOUD = "konic_cloud"
    """Of konic 0.1, and not offered: export the data, and load the file with LOCAL."""


class DatasetConfig(Settings):
    """Which prompts to train on.

    Without `source`, the source is MEMORY if `prompts` is given, LOCAL if `name` is an existing path, HUGGINGFACE for
    any other `name`, and BUNDLED if neither is given.
    """

    successors = MappingProxyType(
        {
            "response_column": "Responses are sampled; a reward reads a column by a parameter of its name.",
            "chosen_column": "`konic reward-model train` makes a reward model of preference pairs.",
            "rejected_column": "`konic reward-model train` makes a reward model of preference pairs.",
            "preprocessing_fn": "Change the rows in Python, and give them as prompts=[...].",
            "context_column": 'A prompt of several columns is prompt_template="{context}\n\n{prompt}".',
        }
    )

    source: DatasetSource = DatasetSource.BUNDLED
    """Where the prompts come from."""
    name: str | None = None
    """A Hub dataset, or a file or folder."""
    prompts: tuple[Any, ...] | None = Field(default=None, repr=False)
    """The prompts, for MEMORY."""
    prompt_column: str = "prompt"
    """The column that holds a prompt: a string, or a list of chat messages."""
    split: str = "train"
    """The split to train on, for HUGGINGFACE, BUNDLED and folders with a file for each split."""
    subset: str | None = None
    """The configuration to load, for a Hub dataset that has several."""
    revision: str | None = None
    """A branch, tag or commit of a Hub dataset."""
    token: str | None = Field(default=None, repr=False)
    """Access token for gated or private datasets; None uses your login's token. Never written to a run's files."""
    streaming: bool = False
    """Read the rows of a Hub dataset one by one when they are needed, instead of downloading the dataset first."""
    max_samples: int | None = Field(default=None, ge=1)
    """Number of rows to keep, drawn at random with `shuffle`; None keeps all."""
    shuffle: bool = True
    """True uses a new random order of the rows in every pass; False keeps the dataset's order."""
    shuffle_seed: int = Field(default=42, ge=0, lt=2**63)
    """Random seed for which rows are kept, which rows are held out, and the order of every pass."""
    weights_column: str | None = None
    """The column with a number of at least 0 for each row: how often it is drawn, relative to the others. Rows are then
    drawn one by one, with `shuffle_seed`; None takes every row once per pass."""
    prefer_undecided: bool = False
    """Draw a prompt more often, the more the scores of the last group of responses to it differed. A prompt whose group
    was equal keeps a tenth of the average chance, and one not yet asked has the highest so far."""
    held_out: int = Field(default=0, ge=0)
    """Number of prompts reserved for evaluation; for BUNDLED, the first prompts of its own held-out split."""
    system_prompt: str | None = None
    """A system message to put first in chats that have none."""
    chat_template_kwargs: dict[str, JsonValue] | None = None
    """What the model's chat template gets besides the messages, `{"enable_thinking": False}`."""
    prompt_template: str | None = None
    """A template that builds plain text from a row's columns, `"Review: {text}"`; it replaces `prompt_column`."""

    @classmethod
    def _example(cls, value: Any) -> str:
        return "name" if isinstance(value, str | os.PathLike) else "prompts"

    def with_fields(self, fields: Mapping[str, Any]) -> Self:
        """Return settings with other values for some fields.

        A new `name` takes the place of `prompts`, new `prompts` that of `name`, and the source follows from them.
        """
        follows: dict[str, Any] = {}
        for name, other in (("name", "prompts"), ("prompts", "name")):
            if name in fields:
                follows |= {"source": None} | ({other: None} if fields[name] is not None else {})
        return super().with_fields(follows | dict(fields))

    @model_validator(mode="before")
    @classmethod
    def _source_follows_from_what_is_given(cls, values: Any) -> Any:
        if isinstance(values, dict):
            given = {name: read(values[name]) for name, read in _GIVEN_AS.items() if values.get(name) is not None}
            values = {**values, **given}
        if not isinstance(values, dict) or values.get("source") is not None:
            return values
        if values.get("prompts") is not None:
            return {**values, "source": DatasetSource.MEMORY}
        if isinstance(values.get("name"), str):
            return {**values, "source": DatasetSource.LOCAL if is_local(values["name"]) else DatasetSource.HUGGINGFACE}
        return {name: value for name, value in values.items() if name != "source"}

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        source = self.source
        if source is DatasetSource.KONIC_CLOUD:
            raise ValueError("source=KONIC_CLOUD is not offered: export the data, and load the file with LOCAL")
        if source is DatasetSource.MEMORY and self.prompts is None:
            raise ValueError("source=MEMORY needs prompts=[...]")
        if source is not DatasetSource.MEMORY and self.prompts is not None:
            raise ValueError(f"prompts=[...] goes with source=MEMORY, not {source.name}")
        if source in (DatasetSource.LOCAL, DatasetSource.HUGGINGFACE) and not self.name:
            what = "the path of a file or folder" if source is DatasetSource.LOCAL else "a Hub dataset"
            raise ValueError(f"source={source.name} needs name=, {what}")
        if source is DatasetSource.MEMORY and self.name:
            raise ValueError(f"name={self.name!r} and prompts=[...] are both given: give one of them")
        if source is DatasetSource.BUNDLED and self.name:
            raise ValueError(f"name={self.name!r} goes with source=HUGGINGFACE or LOCAL, not {source.name}")
        if source is DatasetSource.BUNDLED and self.split not in BUNDLED_SPLITS:
            raise ValueError(
                f"split={self.split!r} is not a split of the bundled prompts; use one of: {', '.join(BUNDLED_SPLITS)}"
            )
        if source is DatasetSource.BUNDLED and self.split == "held_out" and self.held_out:
            raise ValueError(
                "split='held_out' would train on the same prompts that held_out reserves for evaluation: "
                "use split='train' or held_out=0"
            )
        if source is DatasetSource.MEMORY and self.split != "train":
            raise ValueError(f"split={self.split!r} goes with a dataset that has splits, not with prompts=[...]")
        if "[" in self.split and (self.streaming or source is DatasetSource.LOCAL):
            raise ValueError(
                f"split={self.split!r} takes a part of a split, for which a dataset of the Hub must be downloaded: use "
                "max_samples"
            )
        if source is not DatasetSource.HUGGINGFACE:
            for name in ("subset", "revision", "token", "streaming"):
                if getattr(self, name):
                    raise ValueError(f"{name} goes with source=HUGGINGFACE, not {source.name}")
        return self

    @model_validator(mode="after")
    def _check_chat_template_kwargs(self) -> Self:
        taken = next((name for name in self.chat_template_kwargs or {} if name in _OF_THE_PROMPT), None)
        if taken is not None:
            raise ValueError(f"chat_template_kwargs cannot set {taken!r}, which follows from the prompt")
        for name in ("tools", "documents"):
            value = (self.chat_template_kwargs or {}).get(name)
            if value is not None and not (isinstance(value, list) and all(isinstance(part, dict) for part in value)):
                raise ValueError(f"chat_template_kwargs[{name!r}] must be a list of dicts, got {short_repr(value)}")
        return self

    @model_validator(mode="after")
    def _check_drawing(self) -> Self:
        for name in ("weights_column", "prefer_undecided"):
            if not getattr(self, name):
                continue
            if self.streaming:
                raise ValueError(f"{name} needs all rows to draw from them, and streaming=True reads them one by one")
            if not self.shuffle:
                raise ValueError(f"{name} draws rows at random, and shuffle=False keeps their order: give one of them")
        return self

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.prompt_template is not None:
            try:
                parts = list(string.Formatter().parse(self.prompt_template))
            except ValueError as error:
                raise ValueError(f"prompt_template={self.prompt_template!r}: {error}") from None
            fields = [name for _, name, _, _ in parts if name is not None]
            if any(re.search(r"[0-9]{5}", form) for _, _, form, _ in parts if form):
                raise ValueError(f"prompt_template={self.prompt_template!r}: a width has at most four digits")
            wrong = next((name for name in fields if not re.fullmatch(r"[^\W\d](?:[\w -]*\w)?", name)), None)
            if not fields or wrong is not None:
                why = "" if wrong is None else f": {wrong!r} cannot be the name of one. A brace that is text is doubled"
                raise ValueError(
                    f"prompt_template={self.prompt_template!r} must name columns in braces, as in '{{text}}'{why}"
                )
            for name in ("system_prompt", "chat_template_kwargs"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"prompt_template makes plain text, but {name} needs chat messages: give one of them"
                    )
        return self
