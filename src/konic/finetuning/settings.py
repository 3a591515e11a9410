"""The base class of all configs: validated, keyword-only settings, whose every mistake is one clear error."""

import re
import reprlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from konic.finetuning.errors import ConfigError, did_you_mean

_OTHER_NAMES = MappingProxyType(
    {
        "lr": "learning_rate", "lr_scheduler_type": "lr_scheduler", "epochs": "ppo_epochs",
        "num_ppo_epochs": "ppo_epochs", "num_train_epochs": "ppo_epochs", "num_iterations": "ppo_epochs",
        "per_device_train_batch_size": "batch_size", "num_mini_batches": "num_minibatches",
        "group_size": "num_generations", "beta": "kl_penalty_weight", "kl_coef": "kl_penalty_weight",
        "init_kl_coef": "kl_penalty_weight", "epsilon": "clip_ratio", "cliprange": "clip_ratio",
        "epsilon_high": "clip_ratio_high", "lam": "gae_lambda", "loss_type": "algorithm",
        "max_completion_length": "max_new_tokens", "response_length": "max_new_tokens", "max_tokens": "max_new_tokens",
        "stop_strings": "stop", "rank": "r", "lora_r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout",
        "dataset_name": "name", "path": "name", "column": "prompt_column", "text_column": "prompt_column",
    }
)  # fmt: skip
"""Names of the same settings in TRL, PEFT, datasets and vLLM, or shorter ones that people try first."""


class Settings(BaseModel):
    """Settings whose every mistake is a :class:`ConfigError` that names the field and the fix.

    A field may be assigned: the new value is validated together with the others, as when the settings were made.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    successors: ClassVar[Mapping[str, str]] = {}
    """For names that konic 0.1 had here: what to use instead."""

    def __init__(self, *unnamed: Any, **values: Any) -> None:
        if unnamed:
            first = next(iter(type(self).model_fields))
            kind = type(self).__name__
            raise ConfigError(f"{kind} takes its fields by name, {kind}({first}=...), got {reprlib.repr(unnamed[0])}.")
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(type(self), error)) from None

    def __setattr__(self, name: str, value: Any) -> None:
        changed = self.with_fields({name: value})
        self.__dict__.update(changed.__dict__)
        object.__setattr__(self, "__pydantic_fields_set__", changed.model_fields_set)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(_explain_unknown(type(self), name))

    def with_fields(self, fields: Mapping[str, Any]) -> Self:
        """Return settings with other values for some fields; those that were never given follow from the new ones."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | dict(fields))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, without access tokens."""
        return self.model_dump(exclude={"token"})

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Return the settings that :meth:`to_dict` gave as a dict."""
        return cls.from_value(fields)

    @classmethod
    def from_value(cls, value: Self | Mapping[str, Any] | None) -> Self:
        """The settings for an instance of the class, a mapping of its fields, or None (all defaults)."""
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls(**{str(name): given for name, given in value.items()})
        raise ConfigError(f"Expected a {cls.__name__} or a dict of its fields, got {type(value).__name__}: {value!r}.")


def _explain(kind: type[Settings], error: ValidationError) -> str:
    lines = []
    wanted: dict[str, list[ErrorDetails]] = {}
    for problem in error.errors(include_url=False):
        # of its place, the field and what is inside the value; not the names of the types that were tried
        name = ".".join(
            str(part) for part in problem["loc"][:1] + tuple(p for p in problem["loc"] if isinstance(p, int))
        )
        if problem["type"] == "default_factory_not_called":
            continue  # its default depends on a field that has an error of its own
        if problem["type"] == "extra_forbidden":
            lines.append(_explain_unknown(kind, name))
        elif problem["type"] == "value_error":
            lines.append(f"{kind.__name__}: {problem['ctx']['error']}.")
        else:
            wanted.setdefault(name, []).append(problem)
    for name, problems in wanted.items():
        last = problems[-1]
        shown = "***" if name == "token" else reprlib.repr(last["input"])
        must_be = " or ".join(dict.fromkeys(map(_wanted, problems)))
        lines.append(f"{kind.__name__}.{name}: it must be {must_be}, got {shown}.{_near(last)}")
    return "\n".join(lines)


def _wanted(problem: ErrorDetails) -> str:
    """Return what pydantic wanted instead of the value."""
    limits = problem.get("ctx", {})
    for name, words in {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}.items():
        if name in limits:
            return f"{words} {limits[name]:g}"
    kind = problem["type"].partition("_")[0]
    plain = {
        "int": "a whole number",
        "float": "a number",
        "finite": "a finite number",
        "bool": "True or False",
        "string": "text",
        "tuple": "a list",
        "dict": "a dict",
        "invalid-json-value": "made of texts, numbers, lists and dicts",
    }
    said = problem["msg"].removeprefix("Input should be ")
    return plain.get(kind, said[0].lower() + said[1:])


def _near(problem: ErrorDetails) -> str:
    """Return ` Did you mean 'x'?` for a misspelt word of a fixed set."""
    value, known = problem["input"], re.findall("'(.*?)'", problem.get("ctx", {}).get("expected", ""))
    return did_you_mean(value.lower(), known) if isinstance(value, str) and len(value) < 100 else ""


def _explain_unknown(kind: type[Settings], name: str) -> str:
    return f"{kind.__name__} has no field {name!r}.{_instead_of(kind, name)}"


def _instead_of(kind: type[Settings], name: str) -> str:
    """Return a sentence about the field that was probably meant."""
    if name in kind.successors:
        return f" {kind.successors[name]}"
    meant = _OTHER_NAMES.get(name, name)
    if meant in kind.model_fields:
        return f" Here it is {meant}."
    for other in Settings.__subclasses__():
        if meant in other.model_fields:
            return f" It is {other.__name__}({meant}=...)."
    return did_you_mean(name, kind.model_fields) or f" Its fields: {', '.join(kind.model_fields)}."
