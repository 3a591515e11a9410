"""@llm_reward: marks a method of a composer as a reward, with its options."""

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import numpy as np

from konic.finetuning.errors import ConfigError, is_valid_text

Method = TypeVar("Method", bound=Callable[..., Any])
_MARK = "_konic_llm_reward"


@dataclass(frozen=True)
class Mark:
    """The options of a marked method: see :func:`llm_reward`."""

    batch: bool
    normalize: bool
    clip: tuple[float, float] | None


@overload
def llm_reward(method: Method) -> Method: ...
@overload
def llm_reward(
    *, batch: bool = False, normalize: bool = False, clip: tuple[float, float] | None = None
) -> Callable[[Method], Method]: ...
def llm_reward(
    method: Any = None,
    *more: Any,
    batch: bool = False,
    normalize: bool = False,
    clip: tuple[float, float] | None = None,
    **other: Any,
) -> Any:
    """Mark a composer's method `(self, prompt: str, response: str)` as a reward; the method may be `async`.

    The method returns a number, a dict of named numbers, or None to abstain. Further parameters receive the dataset's
    columns of the same names; a parameter `messages` receives the chat that the prompt came from.

    Args:
        method: The method, if the decorator is used without parentheses.
        batch: The method takes `(self, prompts, responses)` and returns a list with one value per response.
        normalize: In training, convert each value to standard deviations from the running mean of its part.
        clip: Lowest and highest value; values outside are clipped to these bounds, after normalising.
        *more: Refused, as other options are.
        **other: Refused by name.

    Raises:
        ConfigError: There is no such option, the bounds are not a lower and a higher number, or what is marked cannot
            be called with a prompt and a response or returns no value.
    """
    if more or other:
        raise ConfigError(
            f"@llm_reward has no option {[*other, *more][0]!r}. It has batch=, normalize= and clip=; a reward is named "
            "after its method."
        )
    batch, normalize = checked_flag("@llm_reward: batch", batch), checked_flag("@llm_reward: normalize", normalize)
    mark = Mark(batch, normalize, checked_clip(clip))

    def marked(function: Any) -> Any:
        plain = inspect.unwrap(getattr(function, "__func__", function))
        if isinstance(function, type) or not (callable(function) or isinstance(function, classmethod)):
            raise ConfigError(
                f"@llm_reward marks a method (self, prompt, response), got {function!r}. Pass options by name: batch=, "
                "normalize=, clip=."
            )
        if inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
            raise ConfigError(f"@llm_reward: {plain.__qualname__} yields its values. Return one value per response.")
        setattr(function, _MARK, mark)
        return function

    return marked if method is None else marked(method)


def find_mark(member: Any) -> Mark | None:
    """Return the mark of a class member, or None if it has no mark."""
    return getattr(member, _MARK, None) or getattr(getattr(member, "__func__", None), _MARK, None)


def checked_flag(what: str, value: Any) -> bool:
    """Return True or False, numpy's too; raise ConfigError, which says `what` it is, for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise ConfigError(f"{what} must be True or False, got {value!r:.200}.")
    return bool(value)


def checked_clip(clip: Any) -> tuple[float, float] | None:
    """Return the bounds as floats, or None if there are none.

    Raises:
        ConfigError: The bounds are not a lower and a higher number.
    """
    if clip is None:
        return None
    is_pair = isinstance(clip, Sequence) and len(clip) == 2 and all(is_finite_number(bound) for bound in clip)
    if not is_pair or clip[0] >= clip[1]:
        raise ConfigError(f"clip must be a lower and a higher bound, such as (-1.0, 1.0); got {clip!r}.")
    return float(clip[0]), float(clip[1])


def checked_weights(weights: Any, what: str = "reward_weights") -> dict[str, float]:
    """Return weights by name; raise ConfigError, which says `what` they are, unless all are finite numbers."""
    if not isinstance(weights, Mapping):
        raise ConfigError(f"{what} must be a dict of numbers by reward name, got {weights!r}.")
    named: dict[str, float] = {}
    for name, weight in weights.items():
        if str(name) in named or not is_valid_text(str(name)):
            why = "is given twice" if str(name) in named else "has a name that contains half a character"
            raise ConfigError(f"{what}[{str(name)!r}] {why}. Rename it.")
        if not is_finite_number(weight):
            raise ConfigError(f"{what}[{str(name)!r}] must be a finite number, got {weight!r}.")
        named[str(name)] = float(weight)
    return named


def is_finite_number(value: Any) -> bool:
    """True for a finite real number that is not a boolean."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
