"""One reward and a batch of samples -> one outcome per sample: its parts, no parts if it abstained, or a fault.

This process and the workers run the same code, so both give the same outcomes.
"""

import asyncio
import concurrent.futures
import inspect
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from konic.finetuning.data.rows import copy_columns
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
from konic.finetuning.system.user_code import preserved_state
from konic.text import describe_error

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional arguments and keyword arguments."""


def call_reward(
    reward: Reward, samples: Sequence[Sample], timeout: float | None = None, seconds: list[float] | None = None
) -> Iterator[Outcome]:
    """Yield one outcome per sample, in the samples' order.

    A sync reward of single samples yields each outcome as soon as it is computed. An async reward of single samples is
    awaited on all samples concurrently, each for at most `timeout` seconds.

    `seconds` gets the time of each sample: that of its call, or its share of a call with the whole batch.

    Raises:
        RewardError: The reward asks for a column that the samples do not have.
    """
    if not samples:
        return
    samples = [replace(sample, columns=copy_columns(sample.columns)) for sample in samples]  # a reward may change them
    columns = samples[0].columns
    seconds = [] if seconds is None else seconds
    wanted, names = requested_columns(reward, columns), text_parameters(reward, columns)
    if reward.shape != "sample":
        start = time.perf_counter()
        outcomes = _call_with_batch(reward, samples, wanted, names)
        seconds += [(time.perf_counter() - start) / len(samples)] * len(samples)
        yield from outcomes
        return
    calls = [
        _arguments(names, sample.prompt, sample.response, {name: sample.columns[name] for name in wanted})
        for sample in samples
    ]
    if reward.is_async:
        yield from _call_together(reward, calls, timeout, seconds)
        return
    for places, named in calls:
        start = time.perf_counter()
        outcome = _outcome(reward, lambda places=places, named=named: _called(reward, places, named))  # type: ignore[misc]
        seconds.append(time.perf_counter() - start)
        yield outcome


def _arguments(names: TextParameters, prompt: Any, response: Any, columns: dict[str, Any]) -> Arguments:
    """Return a reward's arguments: the texts by keyword or by position, and the columns by keyword."""
    if names is None:
        return (prompt, response), columns
    return (), {name: text for name, text in zip(names, (prompt, response), strict=True) if name} | columns


def _call_together(
    reward: Reward, calls: list[Arguments], timeout: float | None, seconds: list[float]
) -> Iterator[Outcome]:
    times = [0.0] * len(calls)

    async def one(index: int, places: tuple[Any, ...], named: dict[str, Any]) -> Any:
        start = time.perf_counter()
        try:
            async with asyncio.timeout(timeout) as bound:
                return await reward.call(*places, **named)
        except TimeoutError as error:
            return timeout_fault(reward, timeout) if bound.expired() else _fault(reward, error)
        except (SystemExit, KeyboardInterrupt) as error:  # these would stop the event loop
            return _fault(reward, error)
        finally:
            times[index] = time.perf_counter() - start

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(one(i, *call) for i, call in enumerate(calls)), return_exceptions=True)

    values = _run(reward.who, all_of_them())
    seconds += times
    for value in values:
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
        values = _listed(_called(reward, places, named), len(samples))
    except NotANumberError as error:
        return [Fault(reward.who, str(error))] * len(samples)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # such as sys.exit()
        return [_fault(reward, error)] * len(samples)
    return [_outcome(reward, lambda v=value: v) for value in values]  # type: ignore[misc]


def _listed(returned: Any, count: int) -> list[Any]:
    """Return a batch reward's values as a list. The reward may return a list, tuple, array or tensor."""
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
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # such as sys.exit()
        return _fault(reward, error)


def _fault(reward: Reward, error: BaseException) -> Fault:
    return Fault(reward.who, f"raised {describe_error(error, 1000)}", users_traceback(error), error)


def _called(reward: Reward, places: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Call a reward; return its value, or the result of the awaitable that it returns."""
    with preserved_state(reward.who):
        value = reward.call(*places, **named)
    if not inspect.isawaitable(value):
        return value

    async def result() -> Any:
        return await value

    return _run(reward.who, result())


def _run(who: str, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine and return its result.

    All coroutines share one event loop in a thread of its own, which also works inside a notebook's running loop.
    """

    async def result() -> tuple[Any, BaseException | None]:
        try:
            with preserved_state(who):
                return await coroutine, None
        except (SystemExit, KeyboardInterrupt) as error:  # these would stop the event loop
            return None, error

    loop, thread = _event_loop()
    if threading.current_thread() is thread:  # the reward calls another composer: the loop cannot wait for itself
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
        raise RuntimeError(f"the reward raised {error!r}") if isinstance(error, KeyboardInterrupt) else error
    return value


@cache
def _event_loop() -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="konic-rewards", daemon=True)
    thread.start()
    return loop, thread
