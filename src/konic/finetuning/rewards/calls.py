"""One reward, a batch of samples -> an outcome per sample: its parts, nothing where it abstained, or a fault.

The same code runs in this process and in workers, so that both give the same outcomes.
"""

import asyncio
import concurrent.futures
import inspect
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import cache
from typing import Any

from konic.finetuning.data.samples import Sample
from konic.finetuning.rewards.outcomes import (
    Fault,
    NotANumberError,
    Outcome,
    Reward,
    read_parts,
    shorten,
    timeout_fault,
    users_traceback,
)
from konic.finetuning.rewards.signatures import TextParameters, requested_columns, text_parameters

_FAILURES = (Exception, SystemExit, asyncio.CancelledError)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Values by place, and by name."""


def call_reward(reward: Reward, samples: Sequence[Sample], timeout: float | None = None) -> Iterator[Outcome]:
    """One outcome per sample, in order; those of a reward of single samples come as they are made.

    An async reward of single samples is awaited on all of them together, each for at most `timeout` seconds.

    Raises:
        RewardError: The reward asks for a column that the samples do not have.
    """
    if not samples:
        return
    columns = samples[0].columns
    wanted, names = requested_columns(reward, columns), text_parameters(reward, columns)
    if reward.shape != "sample":
        yield from _call_with_batch(reward, samples, wanted, names)
        return
    calls = [
        _arguments(names, sample.prompt, sample.response, {name: sample.columns[name] for name in wanted})
        for sample in samples
    ]
    if reward.is_async:
        yield from _call_together(reward, calls, timeout)
        return
    for places, named in calls:
        yield _outcome(reward, lambda places=places, named=named: _finished(reward.call(*places, **named)))  # type: ignore[misc]


def _arguments(names: TextParameters, prompt: Any, response: Any, columns: dict[str, Any]) -> Arguments:
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
            return timeout_fault(reward, timeout) if bound.expired() else _fault(reward, error)
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
    reward: Reward, samples: Sequence[Sample], wanted: list[str], names: TextParameters
) -> list[Outcome]:
    columns = {name: [sample.columns[name] for sample in samples] for name in wanted}
    prompts: list[Any] = [sample.prompt for sample in samples]
    responses: list[Any] = [sample.response for sample in samples]
    chats = [sample.messages for sample in samples]
    if reward.shape == "completions" and all(chat is not None for chat in chats):  # as TRL passes them
        prompts = [list(chat) for chat in chats if chat is not None]
        responses = [[{"role": "assistant", "content": text}] for text in responses]
    try:
        places, named = _arguments(names, prompts, responses, columns)
        values = _listed(_finished(reward.call(*places, **named)), len(samples))
    except NotANumberError as error:
        return [Fault(reward.who, str(error))] * len(samples)
    except _FAILURES as error:
        return [_fault(reward, error)] * len(samples)
    return [_outcome(reward, lambda v=value: v) for value in values]  # type: ignore[misc]


def _listed(returned: Any, count: int) -> list[Any]:
    """The values that a batch reward returned: a list, tuple, array or tensor of one per sample."""
    is_sequence = isinstance(returned, Sequence) and not isinstance(returned, str | bytes)
    shape = getattr(returned, "shape", None)
    if not is_sequence and not (shape is not None and len(shape) >= 1):
        raise NotANumberError(f"returned {shorten(returned)}, not a list with a value for each of {count} responses.")
    values = list(returned)
    if len(values) != count:
        raise NotANumberError(f"returned {len(values)} values for {count} responses.")
    return values


def _outcome(reward: Reward, make: Callable[[], Any]) -> Outcome:
    try:
        return read_parts(reward.name, make())
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
