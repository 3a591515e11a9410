"""One reward, a batch of samples -> an outcome per sample: its parts, nothing where it abstained, or a fault.

The same code runs in this process and in workers, so that both give the same outcomes.
"""

import asyncio
import concurrent.futures
import inspect
import math
import numbers
import threading
import traceback
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from konic.finetuning.errors import RewardError, did_you_mean

Parts = dict[str, float]
"""Values by part name, before weights: one under the reward's own name, or several as `reward.key`; none: abstained."""
Columns = Mapping[str, Sequence[Any]]
"""The dataset's other columns, a value per sample each."""

RESERVED = ("self", "prompt", "prompts", "response", "responses", "completions")
"""Names of parameters that no column fills."""
_MAX_TRACEBACK = 4000
_FAILURES = (Exception, SystemExit, asyncio.CancelledError)
_NOT_THE_USERS = (__file__, asyncio.__path__[0], concurrent.futures.__path__[0])


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


def shape_of(function: Callable[..., Any]) -> Literal["sample", "batch", "completions"]:
    """How a plain function wants to be called, by its parameters' names.

    `completions` makes it TRL's `(prompts, completions, **columns)`; `prompts` or `responses` one of a whole batch;
    else it is one of `(prompt, response)`.

    Raises:
        RewardError: It takes neither.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    if "completions" in parameters:
        return "completions"
    if "prompts" in parameters or "responses" in parameters:
        return "batch"
    places = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(places) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        raise RewardError(
            f"A reward function takes (prompt, response), (prompts, responses) or TRL's (prompts, completions, "
            f"**columns); {getattr(function, '__name__', function)!r} takes ({', '.join(parameters)})."
        )
    return "sample"


def columns_wanted(reward: Reward, columns: Mapping[str, Any]) -> list[str]:
    """The dataset's columns that a reward's parameters, besides prompt and response, ask for.

    Raises:
        RewardError: It asks for one that the dataset does not have.
    """
    parameters = list(inspect.signature(reward.call).parameters.values())
    if reward.shape == "completions":
        rest = [parameter for parameter in parameters if parameter.name not in ("prompts", "completions")]
    else:
        rest = [parameter for parameter in parameters[2:] if parameter.name not in RESERVED]
        rest += [parameter for parameter in parameters[:2] if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    wanted = []
    for parameter in rest:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            return [name for name in columns if name not in RESERVED]
        if parameter.name in columns:
            wanted.append(parameter.name)
        elif parameter.default is inspect.Parameter.empty and parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            raise RewardError(
                f"{reward.who} asks for the column {parameter.name!r}, which the dataset does not have."
                f"{did_you_mean(parameter.name, columns)} Its other columns: {', '.join(columns) or 'none'}."
            )
    return wanted


def call_reward(
    reward: Reward, prompts: list[str], responses: list[str], columns: Columns, timeout: float | None = None
) -> Iterator[Outcome]:
    """One outcome per sample, in order; those of a reward of single samples come as they are made.

    An async reward of single samples is awaited on all of them together, each for at most `timeout` seconds.
    """
    wanted = columns_wanted(reward, columns)
    if reward.shape != "sample":
        yield from _call_with_batch(reward, prompts, responses, columns, wanted)
        return
    calls = [
        (prompt, response, {name: columns[name][index] for name in wanted})
        for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    if reward.is_async:
        yield from _call_together(reward, calls, timeout)
        return
    for prompt, response, row in calls:
        yield _outcome(reward, lambda p=prompt, r=response, row=row: _finished(reward.call(p, r, **row)))  # type: ignore[misc]


def _call_together(
    reward: Reward, calls: list[tuple[str, str, dict[str, Any]]], timeout: float | None
) -> Iterator[Outcome]:
    async def one(prompt: str, response: str, row: dict[str, Any]) -> Any:
        try:
            async with asyncio.timeout(timeout) as bound:
                return await reward.call(prompt, response, **row)
        except TimeoutError as error:
            return took_too_long(reward, timeout) if bound.expired() else _fault(reward, error)
        except (SystemExit, KeyboardInterrupt) as error:  # they would end the loop
            return _fault(reward, error)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(one(*call) for call in calls), return_exceptions=True)

    for value in _finished(all_of_them()):
        if isinstance(value, Fault):
            yield value
        elif isinstance(value, BaseException):
            yield _fault(reward, value)
        else:
            yield _outcome(reward, lambda v=value: v)  # type: ignore[misc]


def _call_with_batch(
    reward: Reward, prompts: list[str], responses: list[str], columns: Columns, wanted: list[str]
) -> list[Outcome]:
    extra = {name: list(columns[name]) for name in wanted}
    try:
        if reward.shape == "completions":
            texts = _as_trl_passes_them(prompts, responses, columns.get("messages"))
            accepted = inspect.signature(reward.call).parameters
            takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
            given = {name: value for name, value in texts.items() if takes_all or name in accepted}
            returned = _finished(reward.call(**given, **extra))
        elif "responses" in (names := [*inspect.signature(reward.call).parameters]) and names[1:2] != ["responses"]:
            texts = {"prompts": list(prompts), "responses": list(responses)}
            returned = _finished(reward.call(**{name: texts[name] for name in texts if name in names}, **extra))
        else:
            returned = _finished(reward.call(list(prompts), list(responses), **extra))
        values = _listed(returned, len(prompts))
    except NotANumberError as error:
        return [Fault(reward.who, str(error))] * len(prompts)
    except _FAILURES as error:
        return [_fault(reward, error)] * len(prompts)
    return [_outcome(reward, lambda v=value: v) for value in values]  # type: ignore[misc]


def _as_trl_passes_them(prompts: list[str], responses: list[str], messages: Sequence[Any] | None) -> dict[str, Any]:
    """Plain texts; where the prompts are chats, their messages and one assistant message each."""
    if messages is None or any(chat is None for chat in messages):
        return {"prompts": list(prompts), "completions": list(responses)}
    completions = [[{"role": "assistant", "content": response}] for response in responses]
    return {"prompts": [list(chat) for chat in messages], "completions": completions}


def _listed(returned: Any, count: int) -> list[Any]:
    """The values that a batch reward returned: a list, tuple, array or tensor of one per sample."""
    is_sequence = isinstance(returned, Sequence) and not isinstance(returned, str | bytes)
    shape = getattr(returned, "shape", None)
    if not is_sequence and not (shape is not None and len(shape) >= 1):
        raise NotANumberError(f"returned {shortened(returned)}, not a list with a value for each of {count} responses.")
    values = list(returned)
    if len(values) != count:
        raise NotANumberError(f"returned {len(values)} values for {count} responses.")
    return values


def _outcome(reward: Reward, make: Callable[[], Any]) -> Outcome:
    try:
        return parts_of(reward.name, make())
    except NotANumberError as error:
        return Fault(reward.who if error.key is None else f"Reward {f'{reward.name}.{error.key}'!r}", str(error))
    except _FAILURES as error:
        return _fault(reward, error)


def _fault(reward: Reward, error: BaseException) -> Fault:
    try:
        told = str(error)
    except Exception:
        told = "its message could not be read"
    what = f"raised {type(error).__name__}: {told}" if told else f"raised {type(error).__name__}"
    return Fault(reward.who, what, users_traceback(error), error)


def took_too_long(reward: Reward, timeout: float | None) -> Fault:
    """What a call that was stopped by the clock comes to."""
    return Fault(reward.who, f"took longer than reward_timeout_seconds={timeout:g} and was stopped.")


def parts_of(name: str, value: Any) -> Parts:
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
        raise NotANumberError(f"returned {shortened(value)}, not a number.", key)
    try:
        real = float(real)
    except OverflowError:  # an integer past the range of floats
        real = math.inf
    if not math.isfinite(real):
        raise NotANumberError(f"returned {shortened(value)}, not a finite number.", key)
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
    return f"\n  prompt:   {shortened(prompt)}\n  response: {shortened(response)}"


def shortened(value: Any) -> str:
    """The repr of a value, of the first 200 characters of a long text."""
    if isinstance(value, str) and len(value) > 200:
        return repr(value[:200]) + f" … ({len(value)} characters)"
    try:
        told = repr(value)
    except Exception:
        told = f"a {type(value).__name__} that cannot be shown"
    return told if len(told) <= 400 else told[:400] + " …"


def _finished(value: Any) -> Any:
    """A value, or what an awaitable comes to."""
    if not inspect.isawaitable(value):
        return value

    async def result() -> Any:
        return await value

    return _run(result())


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns, run in one loop of its own thread, which works inside a notebook's running loop too."""

    async def result() -> tuple[Any, BaseException | None]:
        try:
            return await coroutine, None
        except (SystemExit, KeyboardInterrupt) as error:  # they would end the loop
            return None, error

    loop, thread = _event_loop()
    if threading.current_thread() is thread:  # a reward that scores by another composer: its loop cannot wait on itself
        with concurrent.futures.ThreadPoolExecutor(1) as other:
            value, error = other.submit(asyncio.run, result()).result()
    else:
        future = asyncio.run_coroutine_threadsafe(result(), loop)
        try:
            value, error = future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise
    if error is not None:
        raise RuntimeError(f"raised {error!r} in the reward") if isinstance(error, KeyboardInterrupt) else error
    return value


@cache
def _event_loop() -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="konic-rewards", daemon=True)
    thread.start()
    return loop, thread
