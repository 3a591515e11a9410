"""Marked methods, functions and models -> the rewards of a composer, in order."""

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from konic.finetuning.errors import ConfigError
from konic.finetuning.rewards.marks import Mark, checked_clip, checked_flag, find_mark
from konic.finetuning.rewards.outcomes import Reward
from konic.finetuning.rewards.signatures import detect_shape, reward_of_model, shape_of_method


class HasRewards(Protocol):
    """A composer, whose class marks methods."""

    _added: dict[str, Reward]
    _reward_models: Sequence[Any] | None


def check_marked_methods(cls: type, taken: Collection[str]) -> None:
    """Raise ConfigError if a composer's class marks what is no method, or a method with a name that is taken."""
    for name, member in vars(cls).items():
        computed = getattr(member, "fget", None) or getattr(member, "func", None)  # of a property, or a cached one
        if computed is not None and find_mark(member) is None and find_mark(computed) is not None:
            raise ConfigError(f"{cls.__name__}.{name} is a property. A reward is a method (self, prompt, response).")
        first = next(iter(inspect.signature(member).parameters), "") if inspect.isfunction(member) else ""
        if find_mark(member) is not None and first in ("prompt", "prompts", "response", "responses"):
            raise ConfigError(
                f"{cls.__name__}.{name}: its first parameter is {first!r}. A reward is a method: (self, {first}, ...)."
            )
        is_taken = name in taken or (name.startswith("__") and name.endswith("__"))
        if is_taken and find_mark(member) is not None:
            raise ConfigError(f"{cls.__name__}.{name}: a composer has {name} itself. Give the reward another name.")


def reward_of_function(
    function: Callable[..., Any], name: str | None, normalize: bool, clip: tuple[float, float] | None
) -> Reward:
    """The reward that a plain function gives, under its own name or another.

    Raises:
        ConfigError: It is no function, or has no name.
        RewardError: It has other parameters than a reward's.
    """
    if not callable(function) or isinstance(function, type):
        is_class = isinstance(function, type) and "__call__" in dir(function)
        hint = f" Give an instance, {function.__name__}(), and name=." if is_class else ""
        raise ConfigError(f"A reward function must be a function, got {function!r}.{hint}")
    name = name or getattr(function, "__name__", None)
    if not name or name == "<lambda>":
        raise ConfigError(f"The reward function {function!r} has no name: call add_reward_function(..., name='...').")
    normalize = checked_flag(f"Reward {name!r}: normalize", normalize)
    mark = find_mark(function) or Mark(False, False, None)
    clip = checked_clip(clip) or mark.clip
    shape = "batch" if mark.batch and detect_shape(function) == "sample" else detect_shape(function)
    return Reward(name, function, shape, normalize=normalize or mark.normalize, clip=clip)


def list_rewards(composer: HasRewards) -> list[Reward]:
    """The marked methods in the order they were written, then functions, then models, in the order they were added."""
    kinds = type(composer).__mro__
    names = dict.fromkeys((*getattr(composer, "_marked", ()), *names_of(type(composer))))
    marks = {name: next((mark for kind in kinds if (mark := find_mark(vars(kind).get(name)))), None) for name in names}
    calls = {
        name: (getattr(composer, name), mark)
        for name, mark in marks.items()
        if mark is not None and callable(getattr(type(composer), name, None))
    }
    methods = [
        Reward(name, call, shape_of_method(call, mark.batch), False, mark.normalize, mark.clip)
        for name, (call, mark) in calls.items()
    ]
    hidden = next((reward.name for reward in methods if not callable(reward.call)), None)
    if hidden is not None:
        raise ConfigError(f"{type(composer).__name__}: an attribute {hidden!r} hides the reward. Rename one of them.")
    models = composer._reward_models or ()
    if not isinstance(models, Sequence):
        raise ConfigError(f"{type(composer).__name__}._reward_models must be a list of reward models, got {models!r}.")
    return [*methods, *composer._added.values(), *map(reward_of_model, models)]


def names_of(cls: type) -> dict[str, None]:
    """What a class and those above it define, in the order it was written."""
    return dict.fromkeys(name for kind in reversed(cls.__mro__) for name in vars(kind))
