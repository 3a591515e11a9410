"""A reward's return value -> one outcome: its parts, no parts if the reward abstained, or a fault."""

import asyncio
import concurrent.futures
import inspect
import math
import numbers
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

import numpy as np

from konic.finetuning.errors import ConfigError, RewardError, is_valid_text, safe_cause
from konic.finetuning.system.places import INSTALLED
from konic.text import indented, printable_lines, redact

Parts = dict[str, float]
"""Values by part name, before weights: one under the reward's own name, or several named `reward.key`.

Empty if the reward abstained.
"""
_MAX_TRACEBACK = 4000
_NOT_THE_USERS = (os.path.dirname(__file__) + os.sep, asyncio.__path__[0], concurrent.futures.__path__[0])


@dataclass(frozen=True)
class Reward:
    """One reward of a composer: what to call, with which arguments, and how to process its values."""

    name: str
    call: Callable[..., Any]
    shape: Literal["sample", "batch", "completions"] = "sample"
    """Arguments: (prompt, response), (prompts, responses), or TRL's keywords prompts= and completions=."""
    is_model: bool = False
    """True for a reward model. It runs in the run's own process, which holds the model in memory."""
    normalize: bool = False
    """True to convert values to standard deviations from their running mean."""
    clip: tuple[float, float] | None = None
    """Lowest and highest value, applied after normalising."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a name that cannot be written to the run's files."""
        if not isinstance(self.name, str) or not is_valid_text(self.name):
            raise ConfigError(f"The name of a reward must be valid text, got {shorten(self.name)}.")

    @property
    def is_async(self) -> bool:
        """True if a call returns a coroutine."""
        return inspect.iscoroutinefunction(self.call) or inspect.iscoroutinefunction(type(self.call).__call__)

    @property
    def who(self) -> str:
        """The reward's name in error messages."""
        return f"Reward model {self.name!r}" if self.is_model else f"Reward {self.name!r}"


@dataclass(frozen=True)
class Fault:
    """A reward that failed on a sample."""

    who: str
    """`Reward 'kind'`."""
    what: str
    """What the reward did: raised an error, returned something that is not a number, or took too long."""
    traceback: str = ""
    """The traceback, only the frames of the user's code."""
    cause: BaseException | None = field(default=None, compare=False, repr=False)
    """The exception itself; dropped when the fault is sent to another process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Fault, (self.who, self.what, self.traceback)

    @property
    def traceback_lines(self) -> list[str]:
        """The lines of the traceback, indented: what an error of the user's says is not advice of konic's."""
        return indented(self.traceback.split("\n")) if self.traceback else []

    def error(self, prompt: str, response: str) -> RewardError:
        """The error that stops a run. It shows what failed, on which sample, and where in the user's code."""
        error = RewardError(f"{self.who} {self.what}", *sample_lines(prompt, response), *self.traceback_lines)
        error.__cause__ = self.cause and safe_cause(self.cause)
        return error


Outcome = Parts | Fault


class NotANumberError(ValueError):
    """A returned value cannot be a reward. The message shows the value; `key` is its key in a returned dict."""

    def __init__(self, what: str, key: object = None) -> None:
        super().__init__(what)
        self.key = key


def timeout_fault(reward: Reward, timeout: float | None) -> Fault:
    """Outcome of a call that timed out."""
    return Fault(reward.who, f"took longer than reward_timeout_seconds={timeout:g} and was stopped.")


def read_parts(name: str, value: Any) -> Parts:
    """Convert a reward's return value for one sample to parts; None values of a dict are left out.

    Raises:
        NotANumberError: A value is not a finite number, or a key cannot name a part.
    """
    if value is None:
        return {}
    if isinstance(value, Mapping):
        named = named_by_text(value)
        return {f"{name}.{key}": number(part, key) for key, part in named.items() if part is not None}
    return {name: number(value)}


def named_by_text(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Return values by their keys as text.

    Raises:
        NotANumberError: A key is not valid text, or two keys are the same text.
    """
    named: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key)
        if not is_valid_text(name):
            raise NotANumberError(f"returned the key {shorten(name)}, which contains half a character.")
        if name in named:
            raise NotANumberError(f"returned two keys that are the same text, {shorten(name)}. Rename one of them.")
        named[name] = value
    return named


def number(value: Any, key: object = None) -> float:
    """Convert a returned value to a float; numpy scalars, torch scalars and booleans give their numeric value.

    Raises:
        NotANumberError: The value is not a number, or not finite.
    """
    real = value
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):  # its item() would be 0
        raise NotANumberError(f"returned {shorten(value)}, a masked value and not a number.", key)
    if callable(getattr(value, "item", None)):
        try:
            real = value.item()
        except (ValueError, RuntimeError, TypeError):  # an array of several numbers
            real = value
    if not isinstance(real, numbers.Real | Decimal):
        raise NotANumberError(f"returned {shorten(value)}, not a number.", key)
    try:
        real = float(real)
    except OverflowError:  # an integer beyond the range of floats
        real = math.inf
    if not math.isfinite(real):
        raise NotANumberError(f"returned {shorten(value)}, not a finite number.", key)
    return real


def users_traceback(error: BaseException) -> str:
    """The traceback of an error and its causes: the frames of the user's code, and causes that have some.

    If the error itself has no such frame, as where a reward is a function of a library, all but konic's are kept.
    """
    report = traceback.TracebackException.from_exception(error)
    has_own = any(map(_is_the_users, report.stack))
    link: traceback.TracebackException | None = report
    while link is not None:
        kept = _is_the_users if has_own else _is_not_of_konic
        link.stack = traceback.StackSummary.from_list([frame for frame in link.stack if kept(frame)])
        if has_own and link.__cause__ and link.__cause__.stack and not any(map(_is_the_users, link.__cause__.stack)):
            link.__cause__ = None
        if has_own and link.__context__ and not any(map(_is_the_users, link.__context__.stack)):
            link.__context__ = None
        link = link.__cause__ or link.__context__
    text = printable_lines("".join(report.format()).rstrip())
    return text if len(text) <= _MAX_TRACEBACK else "… " + text[-_MAX_TRACEBACK:]


def _is_not_of_konic(frame: traceback.FrameSummary) -> bool:
    return not frame.filename.startswith(_NOT_THE_USERS)


def _is_the_users(frame: traceback.FrameSummary) -> bool:
    return not frame.filename.startswith((*_NOT_THE_USERS, *INSTALLED, "<frozen "))


def sample_lines(prompt: str, response: str) -> tuple[str, str]:
    """Two lines that show a sample in an error message."""
    return f"  prompt:   {shorten(prompt)}", f"  response: {shorten(response)}"


def shorten(value: Any) -> str:
    """The repr of a value: a text is cut after 200 characters, the repr of anything else after 400."""
    if isinstance(value, str) and len(value) > 200:
        return repr(redact(value)[:200]) + f" … ({len(value)} characters)"
    try:
        text = redact(repr(value))
    except Exception:
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 400 else text[:400] + " …"
