"""@llm_reward: marks a method of a composer as a reward, with its options."""

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from konic.finetuning.errors import ConfigError

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
    method: Any = None, *, batch: bool = False, normalize: bool = False, clip: tuple[float, float] | None = None
) -> Any:
    """Marks a composer's method `(self, prompt: str, response: str)` as a reward; it may be `async`.

    It returns a number, a dict of named numbers, or None to abstain. Further parameters are filled with the dataset's
    columns of the same names, and `messages` with the chat that a prompt came from.

    Args:
        method: The method, where the mark is used without brackets.
        batch: The method is `(self, prompts, responses)` and returns a list with a value per response.
        normalize: In training, count each value in standard deviations from the running mean of its part.
        clip: The lowest and the highest value that count, after normalising.

    Raises:
        ConfigError: Bounds in the wrong order.
    """
    mark = Mark(batch, normalize, checked_clip(clip))

    def marked(function: Any) -> Any:
        if not callable(function):
            raise ConfigError(f"@llm_reward marks a method, got {function!r}. Its options are named: batch=, clip=.")
        setattr(function, _MARK, mark)
        return function

    return marked if method is None else marked(method)


def find_mark(member: Any) -> Mark | None:
    """The mark of a member of a class, if it has one."""
    return getattr(member, _MARK, None) or getattr(getattr(member, "__func__", None), _MARK, None)


def checked_clip(clip: Any) -> tuple[float, float] | None:
    """The bounds as floats.

    Raises:
        ConfigError: They are not a lower and a higher number.
    """
    if clip is None:
        return None
    is_pair = isinstance(clip, Sequence) and len(clip) == 2 and all(is_finite_number(bound) for bound in clip)
    if not is_pair or clip[0] >= clip[1]:
        raise ConfigError(f"clip must be a lower and a higher bound, such as (-1.0, 1.0); got {clip!r}.")
    return float(clip[0]), float(clip[1])


def is_finite_number(value: Any) -> bool:
    """True for a finite real number that is not a boolean."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
