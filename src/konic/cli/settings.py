"""`--set config.field=value` -> an agent with other settings, and lines that say what changed."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from konic.cli.wording import as_of_set
from konic.finetuning import ConfigError, KonicFinetuningAgent

_WORDS = {"None": None, "True": True, "False": False}
_OF_ALGORITHM: dict[str, Callable[[Any], Any]] = {
    "num_generations": lambda training: training.responses_per_prompt,
    "clip_ratio_low": lambda training: training.clip_ratios[0],
    "clip_ratio_high": lambda training: training.clip_ratios[1],
}
"""The value that stands for None in a setting."""


def set_settings(agent: KonicFinetuningAgent, assignments: Sequence[str]) -> tuple[KonicFinetuningAgent, list[str]]:
    """Return an agent with other settings, and a line for each setting that differs, also for those that follow.

    Args:
        agent: The agent of a script; it is not changed.
        assignments: `config.field=value`, such as "training_config.algorithm=dapo". A value is JSON, or text as it is.

    Raises:
        ConfigError: An assignment is not of that form, or names something that does not exist or is invalid.
    """
    changes: dict[str, dict[str, Any]] = {}
    for assignment in assignments:
        target, equals, value = assignment.partition("=")
        config, dot, field = target.strip().partition(".")
        if not (equals and dot and field):
            shown = f"{target}=***" if equals and "token" in target else assignment
            raise ConfigError(
                f"--set {shown!r}: give config.field=value, such as training_config.algorithm=dapo. "
                "The model and the rewards are changed in the file."
            )
        changes.setdefault(config, {})[field] = _parse(value.strip())
    try:
        changed = agent.with_settings(changes)
    except ConfigError as error:
        fields = [f"{config}.{field}" for config, given in changes.items() for field in given]
        raise ConfigError(*(as_of_set(line, fields) for line in error.args)) from None
    return changed, [line for config in changes for line in _differences(config, agent, changed)]


def _parse(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return _WORDS.get(value, value)


def _differences(config: str, before: KonicFinetuningAgent, after: KonicFinetuningAgent) -> list[str]:
    old, new = getattr(before, f"get_{config}")(), getattr(after, f"get_{config}")()
    return [
        f"{config}.{name} = {_show(name, _in_force(new, name))} (the file: {_show(name, _in_force(old, name))})"
        for name in type(new).model_fields
        if _in_force(old, name) != _in_force(new, name)
    ]


def _in_force(config: Any, name: str) -> Any:
    """Return a setting's value; where None leaves it to the algorithm, the algorithm's."""
    value = getattr(config, name, None)
    if value is None and name in _OF_ALGORITHM:
        return _OF_ALGORITHM[name](config)
    return value


def _show(name: str, value: Any) -> str:
    """Return a setting's value as it is printed; an access token stays secret."""
    return "***" if name == "token" and value is not None else repr(value)
