"""The base class of all configs: validated, keyword-only settings, whose every mistake is one clear error."""

import reprlib
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from konic.finetuning.errors import ConfigError, did_you_mean


class Settings(BaseModel):
    """Settings whose every mistake is a :class:`ConfigError` that names the field and the fix.

    A field may be assigned: the new value is validated together with the others, as when the settings were made.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    successors: ClassVar[Mapping[str, str]] = {}
    """For names that konic 0.1 had here: what to use instead."""

    def __init__(self, **values: Any) -> None:
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
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "default_factory_not_called":
            continue  # its default depends on a field that has an error of its own
        if problem["type"] == "extra_forbidden":
            lines.append(_explain_unknown(kind, name))
        elif problem["type"] == "value_error":
            lines.append(f"{kind.__name__}: {problem['ctx']['error']}.")
        else:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            shown = "***" if problem["loc"][:1] == ("token",) else reprlib.repr(problem["input"])
            lines.append(f"{kind.__name__}.{name}: {message}, got {shown}.")
    return "\n".join(lines)


def _explain_unknown(kind: type[Settings], name: str) -> str:
    fields = f" Its fields: {', '.join(kind.model_fields)}."
    hint = f" {kind.successors[name]}" if name in kind.successors else did_you_mean(name, kind.model_fields) or fields
    return f"{kind.__name__} has no field {name!r}.{hint}"
