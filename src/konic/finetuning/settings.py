"""The base class of all configs: validated, keyword-only settings, whose every mistake is one clear error."""

import re
import reprlib
from collections.abc import Hashable, Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Self, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from konic.finetuning.errors import ConfigError, did_you_mean, is_valid_text
from konic.text import keep_secret, redact

MAX_SECONDS = 1e6
"""Of a time limit, twelve days: what waits for processes and sockets takes no number much larger."""
MAX_PENALTY = 1e15
"""In units of reward: the square of a larger one, and sums of such squares, leave single precision."""

_OTHER_NAMES = MappingProxyType(
    {
        "lr": "learning_rate", "lr_scheduler_type": "lr_scheduler",
        "num_ppo_epochs": "ppo_epochs", "num_iterations": "ppo_epochs",
        "per_device_train_batch_size": "batch_size", "num_mini_batches": "num_minibatches",
        "group_size": "num_generations", "beta": "kl_penalty_weight", "kl_coef": "kl_penalty_weight",
        "init_kl_coef": "kl_penalty_weight", "epsilon": "clip_ratio", "cliprange": "clip_ratio",
        "epsilon_high": "clip_ratio_high", "lam": "gae_lambda", "loss_type": "algorithm",
        "steps_per_generation": "num_minibatches", "generation_batch_size": "batch_size", "scale_rewards": "algorithm",
        "importance_sampling_level": "algorithm", "multi_objective_aggregation": "algorithm",
        "mask_truncated_completions": "mask_truncated", "eval_steps": "eval_every", "shuffle_dataset": "shuffle",
        "vllm_importance_sampling_correction": "sampler_correction",
        "vllm_importance_sampling_mode": "sampler_correction",
        "vllm_importance_sampling_clip_max": "sampler_correction_limit",
        "vllm_importance_sampling_cap": "sampler_correction_limit",
        "use_vllm": "engine", "vllm_server_base_url": "vllm_address", "vllm_server_timeout": "vllm_timeout_seconds",
        "max_completion_length": "max_new_tokens", "response_length": "max_new_tokens", "max_tokens": "max_new_tokens",
        "stop_strings": "stop", "rank": "r", "lora_r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout",
        "dataset_name": "name", "path": "name", "column": "prompt_column", "text_column": "prompt_column",
    }
)  # fmt: skip
"""Names of the same settings in TRL, PEFT, datasets and vLLM, or shorter ones that people try first."""
_ELSEWHERE = {
    "engine.train({}=...)": "max_iterations save_every save_total_limit resume_from_checkpoint allow_changes",
    "engine.train(max_iterations=...)": "max_steps iterations num_steps epochs num_train_epochs",
    "engine.train(save_every=...)": "save_steps save_strategy",
    "KonicFinetuningEngine.from_agent(agent, checkpoint_dir=...)": "checkpoint_dir output_dir save_dir output",
    "KonicFinetuningEngine.from_agent(agent, device=...)": "device use_cpu no_cuda",
    "KonicFinetuningEngine.from_agent(agent, callback=...)": "callback callbacks report_to",
    "KonicFinetuningAgent({}=...)": "reward_composer model_kwargs lora_config dataset_config training_config "
    "generation_config base_model",
    "KonicFinetuningCallback(log_samples=...)": "log_completions",
    "KonicFinetuningCallback(max_samples_to_log=...)": "num_completions_to_print",
    "KonicFinetuningAgent(base_model=...)": "model_name model",
    "KonicFinetuningAgent(model_kwargs=...)": "model_init_kwargs trust_remote_code",
    "TrainingConfig(precision='bfloat16')": "bf16",
    "KonicFinetuningAgent(model_kwargs={{'dtype': 'bfloat16'}})": "dtype torch_dtype fp16",
    "the composer's argument {}": "reward_weights reducer reward_models reward_functions",
}
"""Where a name is given that is no field of any config."""
_NEUTRAL = MappingProxyType(
    {
        "top_p": "1.0", "top_k": "0", "repetition_penalty": "1.0", "min_new_tokens": "1", "max_grad_norm": "1e9",
        "weight_decay": "0", "entropy_coef": "0", "kl_penalty_weight": "0", "warmup_steps": "0", "lora_dropout": "0",
    }
)  # fmt: skip
"""For fields where other libraries take None or 0 for "without it": the number that does so here."""


class _ShortRepr(reprlib.Repr):
    """Shortens a value that a message shows, after hiding the secrets in it: half a token is a secret too."""

    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(redact(x), level)


short_repr = _ShortRepr().repr


class Settings(BaseModel):
    """Settings whose every mistake is a :class:`ConfigError` that names the field and the fix.

    A field may be assigned: the new value is validated together with the others, as when the settings were made.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    successors: ClassVar[Mapping[str, str]] = {}
    """For names that konic 0.1 had here: what to use instead."""

    def __init__(self, *unnamed: Any, **values: Any) -> None:
        keep_secret(values.get("token"))
        if unnamed:
            first = next(iter(type(self).model_fields))
            kind = type(self).__name__
            raise ConfigError(f"{kind} takes its fields by name, {kind}({first}=...), got {short_repr(unnamed[0])}.")
        for name, field in type(self).model_fields.items():
            wanted = _wanted_instead(values[name], cast("Hashable", field.annotation)) if name in values else None
            if wanted is not None:
                shown = "***" if name == "token" else short_repr(values[name])
                raise ConfigError(f"{type(self).__name__}.{name}: it must be {wanted}, got {shown}.")
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(*_explain(type(self), error)) from None

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
    def _example(cls, value: Any) -> str:
        """Return a field that shows how the settings are written; `value` was given instead of them."""
        return next(iter(cls.model_fields))

    @classmethod
    def from_value(cls, value: Self | Mapping[str, Any] | None, argument: str | None = None) -> Self:
        """The settings for an instance of the class, a mapping of its fields, or None (all defaults).

        An error names `argument`; None derives it from the class.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls(**{str(name): given for name, given in value.items()})
        argument = argument or re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
        raise ConfigError(
            f"{argument} must be a {cls.__name__} or a dict of its fields, got {describe(value)}. "
            f"Write {cls.__name__}({cls._example(value)}=...)."
        )


def describe(value: Any) -> str:
    """Return what a value is, for an error: plain values as they are, others, which may hold a token, by their type."""
    if isinstance(value, type):
        return f"the class {value.__name__}: add ()"
    if isinstance(value, str | int | float):
        return f"{type(value).__name__} {short_repr(value)}"
    kind = type(value)
    is_plain = kind.__module__ == "builtins" or kind.__module__.startswith("konic.")
    return kind.__name__ if is_plain else f"{kind.__module__}.{kind.__name__}"


def texts_in(value: Any, levels: int = 50) -> Iterator[str]:
    """Yield the texts inside of a value made of lists and dicts, down to a number of levels: it may contain itself."""
    if isinstance(value, str):
        yield value
    elif levels and isinstance(value, Mapping):
        yield from texts_in([*value, *value.values()], levels - 1)
    elif levels and isinstance(value, list | tuple | set | frozenset):
        for part in value:
            yield from texts_in(part, levels - 1)


def _wanted_instead(value: Any, annotation: Hashable) -> str | None:
    """Return what a field must be instead of a value that pydantic would take, or None."""
    kinds = _leaves_of(annotation)
    parts = value if isinstance(value, list | tuple) else [value]
    if kinds <= {int, float} and any(map(is_bool, parts)):  # for pydantic, True is 1
        return "a number"
    if str in kinds and any(isinstance(part, bytes | bytearray) for part in parts):
        return "text"
    if Any not in kinds and not all(map(is_valid_text, texts_in(value))):
        return "valid text, without half a character (a lone surrogate)"
    return None


def is_bool(value: Any) -> bool:
    """Return True for a bool, also of numpy or torch."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


@cache
def _leaves_of(annotation: Hashable) -> frozenset[Any]:
    return frozenset(_leaves(annotation))


def _leaves(annotation: Any) -> Iterator[Any]:
    inner = [each for each in get_args(annotation) if each not in (type(None), Ellipsis)]
    if get_origin(annotation) is Annotated:
        inner = inner[:1]
    if not inner:
        yield annotation
    for each in inner:
        yield from _leaves(each)


def _explain(kind: type[Settings], error: ValidationError) -> list[str]:
    """Return a line for each mistake."""
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
            lines.append(f"{kind.__name__}: {str(problem['ctx']['error']).rstrip('.')}.")
        else:
            wanted.setdefault(name, []).append(problem)
    for name, problems in wanted.items():
        last = problems[-1]
        shown = "***" if name == "token" else short_repr(last["input"])
        must_be = " or ".join(dict.fromkeys(map(_wanted, problems)))
        lines.append(f"{kind.__name__}.{name}: it must be {must_be}, got {shown}.{_instead_of_value(name, last)}")
    return lines


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


def _instead_of_value(name: str, problem: ErrorDetails) -> str:
    """Return a sentence about the value that was probably meant."""
    value, known = problem["input"], re.findall("'(.*?)'", problem.get("ctx", {}).get("expected", ""))
    is_zero = isinstance(value, int | float) and value == 0  # an array is not asked: it has more than one answer
    if (value is None or is_zero) and name in _NEUTRAL:
        return f" To go without it, set {name}={_NEUTRAL[name]}."
    if is_zero and name == "temperature":
        return " do_sample=False takes the likeliest token; a policy learns only where it tries others too."
    return did_you_mean(value.lower(), known) if isinstance(value, str) and len(value) < 100 else ""


def _explain_unknown(kind: type[Settings], name: str) -> str:
    return f"{kind.__name__} has no field {name!r}.{_instead_of(kind, name)}"


def _configs() -> list[type[Settings]]:
    """Return the classes of settings that a user of the library knows."""
    return [kind for kind in Settings.__subclasses__() if kind.__module__.startswith("konic.finetuning.")]


def _instead_of(kind: type[Settings], name: str) -> str:
    """Return a sentence about the field that was probably meant."""
    if name in kind.successors:
        return f" {kind.successors[name]}"
    meant = _OTHER_NAMES.get(name, name)
    if meant in kind.model_fields:
        return f" Here it is {meant}."
    return place_of(name) or did_you_mean(name, kind.model_fields) or f" Its fields: {', '.join(kind.model_fields)}."


def place_of(name: str) -> str:
    """Return a sentence about where a setting is given, if there is one of this name, also in other libraries."""
    meant = _OTHER_NAMES.get(name, name)
    for other in _configs():
        if meant in other.model_fields:
            return f" It is {other.__name__}({meant}=...)."
    for place, names in _ELSEWHERE.items():
        if name in names.split():
            return f" It is {place.format(name)}."
    return ""
