"""What a reward returned -> its parts, nothing where it abstained, or a fault."""

import asyncio
import concurrent.futures
import inspect
import math
import numbers
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from konic.finetuning.errors import RewardError

Parts = dict[str, float]
"""Values by part name, before weights: one under the reward's own name, or several as `reward.key`; none: abstained."""
_MAX_TRACEBACK = 4000
_NOT_THE_USERS = (os.path.dirname(__file__) + os.sep, asyncio.__path__[0], concurrent.futures.__path__[0])


@dataclass(frozen=True)
class Reward:
    """One reward of a composer: what is called, how, and what happens to its values."""

    name: str
    call: Callable[..., Any]
    shape: Literal["sample", "batch", "completions"] = "sample"
    """(prompt, response), (prompts, responses), or by keyword as TRL does: prompts=, completions=."""
    is_model: bool = False
    """Stays in the run's own process, where its memory is."""
    normalize: bool = False
    """Values are counted in standard deviations from their running mean."""
    clip: tuple[float, float] | None = None
    """Bounds of a value, after it is normalised."""

    @property
    def is_async(self) -> bool:
        """True where calling it gives a coroutine."""
        return inspect.iscoroutinefunction(self.call) or inspect.iscoroutinefunction(type(self.call).__call__)

    @property
    def who(self) -> str:
        """How errors name it."""
        return f"Reward model {self.name!r}" if self.is_model else f"Reward {self.name!r}"


@dataclass(frozen=True)
class Fault:
    """A reward that failed on a sample."""

    who: str
    """`Reward 'kind'`."""
    what: str
    """What it did: raised, returned something that is no number, took too long."""
    traceback: str = ""
    """The part of the traceback that is the user's code."""
    cause: BaseException | None = field(default=None, compare=False, repr=False)
    """The exception itself; it does not cross processes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Fault, (self.who, self.what, self.traceback)

    def error(self, prompt: str, response: str) -> RewardError:
        """The error that stops a run: what failed, on which sample, and where in the user's code."""
        told = f"{self.who} {self.what}{sample_text(prompt, response)}"
        error = RewardError(f"{told}\n{self.traceback}".rstrip())
        error.__cause__ = self.cause
        return error


Outcome = Parts | Fault


class NotANumberError(ValueError):
    """Something returned cannot be a reward; the message says what was returned, `key` in which part of a dict."""

    def __init__(self, what: str, key: object = None) -> None:
        super().__init__(what)
        self.key = key


def timeout_fault(reward: Reward, timeout: float | None) -> Fault:
    """What a call that was stopped by the clock comes to."""
    return Fault(reward.who, f"took longer than reward_timeout_seconds={timeout:g} and was stopped.")


def read_parts(name: str, value: Any) -> Parts:
    """What a reward returned for one sample, by part; a None among the values of a dict is left out.

    Raises:
        NotANumberError: There is something in it that is not a finite number.
    """
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return {f"{name}.{key}": number(part, key) for key, part in value.items() if part is not None}
    return {name: number(value)}


def number(value: Any, key: object = None) -> float:
    """A returned value as a float; scalars of numpy and torch, and booleans, count as what they stand for.

    Raises:
        NotANumberError: It is not a number, or not finite.
    """
    real = value
    if callable(getattr(value, "item", None)):
        try:
            real = value.item()
        except (ValueError, RuntimeError, TypeError):  # an array of several numbers
            real = value
    if not isinstance(real, numbers.Real):
        raise NotANumberError(f"returned {shorten(value)}, not a number.", key)
    try:
        real = float(real)
    except OverflowError:  # an integer past the range of floats
        real = math.inf
    if not math.isfinite(real):
        raise NotANumberError(f"returned {shorten(value)}, not a finite number.", key)
    return real


def users_traceback(error: BaseException) -> str:
    """The traceback of an error and its causes, without the frames that lie in this library."""
    told = traceback.TracebackException.from_exception(error)
    link: traceback.TracebackException | None = told
    while link is not None:
        frames = [frame for frame in link.stack if not frame.filename.startswith(_NOT_THE_USERS)]
        link.stack = traceback.StackSummary.from_list(frames)
        link = link.__cause__ or link.__context__
    text = "".join(told.format()).rstrip()
    return text if len(text) <= _MAX_TRACEBACK else "… " + text[-_MAX_TRACEBACK:]


def sample_text(prompt: str, response: str) -> str:
    """Two lines that show a sample in an error."""
    return f"\n  prompt:   {shorten(prompt)}\n  response: {shorten(response)}"


def shorten(value: Any) -> str:
    """The repr of a value, of the first 200 characters of a long text."""
    if isinstance(value, str) and len(value) > 200:
        return repr(value[:200]) + f" … ({len(value)} characters)"
    try:
        told = repr(value)
    except Exception:
        told = f"a {type(value).__name__} that cannot be shown"
    return told if len(told) <= 400 else told[:400] + " …"
