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

_TEXTS = {
    "sample": ("prompt", "response"),
    "batch": ("prompts", "responses"),
    "completions": ("prompts", "completions"),
}
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

    `completions`, or `prompts` and `**columns` alone, make it TRL's `(prompts, completions, **columns)`; `prompts` or
    `responses` one of a whole batch; else it is one of `(prompt, response)`.

    Raises:
        RewardError: It takes neither.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    kinds = {parameter.kind for parameter in parameters.values()}
    takes_all = inspect.Parameter.VAR_KEYWORD in kinds and "responses" not in parameters
    if "completions" in parameters or ("prompts" in parameters and takes_all):
        return "completions"
    if "prompts" in parameters or "responses" in parameters:
        return "batch"
    places = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(places) < 2 and "response" not in parameters and inspect.Parameter.VAR_POSITIONAL not in kinds:
        raise RewardError(
            f"A reward function takes (prompt, response), (prompts, responses) or TRL's (prompts, completions, "
            f"**columns); {getattr(function, '__name__', function)!r} takes ({', '.join(parameters)})."
        )
    return "sample"


def text_names(reward: Reward, columns: Mapping[str, Any]) -> tuple[str | None, str | None] | None:
    """The parameters that take the prompt and the response, whatever their order; None where both are taken by place.

    One that is named alone leaves the other to the first parameter that no column fills.

    Raises:
        RewardError: There is no parameter for the response.
    """
    parameters = inspect.signature(reward.call).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    prompt, response = _TEXTS[reward.shape]
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    if reward.shape == "completions":
        return (prompt if takes_all or prompt in names else None), (
            response if takes_all or response in names else None
        )
    if response in names and prompt in names:
        return prompt, response
    if response in names:
        return (names[0] if names.index(response) == 1 and names[0] not in columns else None), response
    if prompt in names:
        others = [name for name in names if name != prompt and name not in columns]
        if not others:
            raise RewardError(f"{reward.who} takes no response: its parameters are {', '.join(names)}.")
        return prompt, others[0]
    return None


def columns_wanted(reward: Reward, columns: Mapping[str, Any]) -> list[str]:
    """The dataset's columns that a reward's parameters, besides prompt and response, ask for.

    Raises:
        RewardError: It asks for one that the dataset does not have.
    """
    parameters = list(inspect.signature(reward.call).parameters.values())
    taken = text_names(reward, columns)
    if taken is None:
        places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:2]
        rest = [parameter for parameter in parameters if parameter not in places]
    else:
        rest = [parameter for parameter in parameters if parameter.name not in taken]
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
    names = text_names(reward, columns)
    calls = [
        _arguments(names, prompt, response, {name: columns[name][index] for name in wanted})
        for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    if reward.is_async:
        yield from _call_together(reward, calls, timeout)
        return
    for places, named in calls:
        yield _outcome(reward, lambda places=places, named=named: _finished(reward.call(*places, **named)))  # type: ignore[misc]


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _arguments(
    names: tuple[str | None, str | None] | None, prompt: Any, response: Any, columns: dict[str, Any]
) -> Arguments:
    """What a reward is called with: texts by name or by place, and columns by name."""
    if names is None:
        return (prompt, response), columns
    return (), {name: text for name, text in zip(names, (prompt, response), strict=True) if name} | columns


def _call_together(reward: Reward, calls: list[Arguments], timeout: float | None) -> Iterator[Outcome]:
    async def one(places: tuple[Any, ...], named: dict[str, Any]) -> Any:
        try:
            async with asyncio.timeout(timeout) as bound:
                return await reward.call(*places, **named)
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
        texts: tuple[list[Any], list[Any]] = list(prompts), list(responses)
        if reward.shape == "completions":
            texts = _as_trl_passes_them(prompts, responses, columns.get("messages"))
        places, named = _arguments(text_names(reward, columns), *texts, extra)
        returned = _finished(reward.call(*places, **named))
        values = _listed(returned, len(prompts))
    except NotANumberError as error:
        return [Fault(reward.who, str(error))] * len(prompts)
    except _FAILURES as error:
        return [_fault(reward, error)] * len(prompts)
    return [_outcome(reward, lambda v=value: v) for value in values]  # type: ignore[misc]


def _as_trl_passes_them(
    prompts: list[str], responses: list[str], messages: Sequence[Any] | None
) -> tuple[list[Any], list[Any]]:
    """Plain texts; where the prompts are chats, their messages and one assistant message each."""
    if messages is None or any(chat is None for chat in messages):
        return list(prompts), list(responses)
    return [list(chat) for chat in messages], [[{"role": "assistant", "content": text}] for text in responses]


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
