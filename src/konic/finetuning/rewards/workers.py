"""Rewards and samples -> outcomes: calls the rewards in worker processes, which can be killed.

The outcomes and their order are the same as in this process. The pool is pebble's. A worker receives the composer's
methods and functions by value (cloudpickle). It does not import the user's script, and it is not forked from a process
in which torch has threads.
"""

import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, resource_tracker, spawn
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import Any

import cloudpickle
import pebble

from konic.finetuning.data.samples import Sample
from konic.finetuning.errors import RewardError, safe_cause
from konic.finetuning.rewards.calls import call_reward
from konic.finetuning.rewards.composer import KonicLLMRewardComposer, without_models
from konic.finetuning.rewards.listing import list_rewards
from konic.finetuning.rewards.outcomes import Fault, Outcome, Reward, timeout_fault
from konic.finetuning.rewards.signatures import requested_columns
from konic.finetuning.system.child import importing_nothing_from_here
from konic.finetuning.system.pickling import pickled_by_value, what_cannot_be_pickled
from konic.finetuning.system.places import current_folder
from konic.output import tolerate_broken_streams
from konic.text import describe_error

Timed = tuple[list[Outcome], list[float]]
"""Outcomes, and the seconds that each took."""
RESTARTS = 3
"""How many times a broken pool is restarted for one call."""
CALLS_PER_WORKER = 10_000
"""Number of calls after which a worker is replaced, so that leaks of a reward stay bounded."""
START_SECONDS = 120.0
_DONE = 219
"""The exit code of a worker that has done its calls."""
_GRACE_SECONDS = 0.5
"""The event loop stops an async reward. If the loop is blocked, the process is killed this much later."""


class RewardPool:
    """Worker processes that call a composer's methods and functions; they start on first use.

    Args:
        composer: The composer whose rewards are called, without its reward models.
        workers: Number of processes.
        timeout: Seconds that one call may take, on a sample or on a whole batch; None sets no limit.
    """

    def __init__(self, composer: KonicLLMRewardComposer, workers: int, timeout: float | None) -> None:
        self._composer = composer
        self._workers = workers
        self.timeout = timeout
        self._pool: pebble.ProcessPool | None = None
        self._known: set[str] = set()

    def start(self) -> None:
        """Start the workers, without waiting for them.

        Raises:
            RewardError: The composer cannot be sent to a worker, or there is no current folder to start one in.
        """
        if self._pool is not None and not self._pool.active:  # its workers were killed between two calls
            self.close()
        if self._pool is None:
            if current_folder() is None:
                raise RewardError("reward_workers: the current folder no longer exists: change to one that does.")
            if os.name == "posix":
                with _main_left_alone():
                    resource_tracker.ensure_running()  # the pool would start it, and from the current folder
            self._known = {reward.name for reward in list_rewards(self._composer)}
            self._pool = pebble.ProcessPool(
                max_workers=self._workers,
                max_tasks=CALLS_PER_WORKER,
                initializer=_begin_worker,
                initargs=(pickled_composer(self._composer),),
                context=_Context(),
            )
            self._loaded = self._pool.schedule(_load_error, timeout=START_SECONDS)

    def submit(
        self, rewards: Sequence[Reward], samples: Sequence[Sample], seconds: Mapping[str, list[float]]
    ) -> dict[str, Iterator[Outcome]]:
        """Start calling rewards on a batch. `seconds` gets each reward's times, as :func:`call_reward` measures them.

        Returns:
            By reward name, an iterator over the outcomes. It yields them in the samples' order, as they arrive.

        Raises:
            RewardError: The composer cannot be sent to a worker, or cannot be loaded there.
        """
        if not self._known.issuperset(reward.name for reward in rewards):  # a callback has added one
            self.close()
        self.start()
        try:
            problem = self._loaded.result(timeout=START_SECONDS)
        except (TimeoutError, pebble.ProcessExpired, BrokenProcessPool) as error:
            problem = describe_error(error)
        if problem:
            raise RewardError(f"reward_workers: the rewards cannot be loaded in a worker process: {problem}")
        calls = {reward.name: self._start_calls(reward, samples) for reward in rewards}
        return {name: _timed(parts, seconds[name]) for name, parts in calls.items()}

    def close(self) -> None:
        """End all workers, even in the middle of a call."""
        if self._pool is not None:
            self._pool.stop()  # type: ignore[no-untyped-call]
            self._pool.join()
            self._pool = None

    def schedule(
        self, reward: Reward, samples: Sequence[Sample]
    ) -> tuple[pebble.ProcessPool, pebble.ProcessFuture[Timed]]:
        """Queue a call; return the pool that runs it, and the future of its outcomes and their times."""
        limit = self.timeout + _GRACE_SECONDS if self.timeout and reward.is_async else self.timeout
        for _ in range(RESTARTS):
            self.start()
            assert self._pool is not None  # noqa: S101
            with contextlib.suppress(RuntimeError):  # the pool broke after the check
                future = self._pool.schedule(_call, args=(reward.name, samples, self.timeout), timeout=limit)
                return self._pool, future
        raise RewardError(f"reward_workers: the worker processes ended {RESTARTS} times before any call.")

    def is_current(self, pool: pebble.ProcessPool) -> bool:
        """True if this pool is still in use and active, so that its queued calls will return."""
        return self._pool is pool and pool.active

    def replace(self, broken: pebble.ProcessPool) -> None:
        """Close a broken pool, so that the next call starts a new one, unless another call has done so."""
        if self._pool is broken:
            self.close()

    def _start_calls(self, reward: Reward, samples: Sequence[Sample]) -> list["_Call"]:
        if not samples:
            return []
        names = requested_columns(reward, samples[0].columns)
        size = 1
        if reward.shape != "sample":
            size = len(samples)
        elif reward.is_async:  # each worker awaits its samples concurrently
            size = -(-len(samples) // self._workers)
        return _Call(self, reward, [sample.with_columns(names) for sample in samples]).split(size)


class _Call:
    """One reward called in a worker, on one sample or on a batch."""

    def __init__(self, pool: RewardPool, reward: Reward, samples: Sequence[Sample]) -> None:
        self._owner, self._reward, self._samples = pool, reward, samples

    def split(self, size: int) -> list["_Call"]:
        """Split into calls of at most `size` samples each, and start them."""
        parts = [self._samples[start : start + size] for start in range(0, len(self._samples), size)]
        calls = [_Call(self._owner, self._reward, part) for part in parts]
        for call in calls:
            call.start()
        return calls

    def start(self) -> None:
        """Put the call into the workers' queue."""
        self._pool, self._future = self._owner.schedule(self._reward, self._samples)

    def outcomes(self) -> Timed:
        """Wait for the call; return one outcome per sample, a fault if the worker hung or died, and their times."""
        for _ in range(RESTARTS):
            try:
                while not wait([self._future], timeout=1.0).done:
                    if not self._owner.is_current(self._pool):
                        raise BrokenProcessPool
                return self._future.result()
            except BrokenProcessPool:  # a worker died between two calls
                self._owner.replace(self._pool)
                self.start()
            except TimeoutError:
                return self._failed(timeout_fault(self._reward, self._owner.timeout))
            except pebble.ProcessExpired as error:
                code = error.exitcode or 0
                return self._failed(Fault(self._reward.who, f"ended its worker process (exit code {code})."))
            except Exception as error:  # the arguments cannot be pickled
                message = f"cannot be called in a worker process: {describe_error(error)}"
                return self._failed(Fault(self._reward.who, message))
        return self._failed(Fault(self._reward.who, f"lost its worker process {RESTARTS} times."))

    def _failed(self, fault: Fault) -> Timed:
        """Return the fault for every sample, without a time. If single samples shared the call, call each again."""
        if self._reward.shape == "sample" and len(self._samples) > 1:
            seconds: list[float] = []
            return [*_timed(self.split(1), seconds)], seconds
        return [fault] * len(self._samples), [math.nan] * len(self._samples)


def _timed(calls: Sequence[_Call], seconds: list[float]) -> Iterator[Outcome]:
    """Yield the outcomes of calls as they arrive; add their times to `seconds`."""
    for call in calls:
        outcomes, times = call.outcomes()
        seconds += times
        yield from outcomes


class _Process(SpawnProcess):
    """A new Python process that does not import the user's script, and that is killed instead of terminated.

    pebble takes the exit code 0 for a worker that has done its calls. A reward can also exit with 0 (`os._exit(0)`), in
    the middle of a call that would then be waited for without an end. So a worker that has done its calls has a code of
    its own.
    """

    def run(self) -> None:
        """Work until there are no more calls for this worker."""
        super().run()
        sys.exit(_DONE)

    @property
    def exitcode(self) -> int | None:
        """0 for a worker that has done its calls, and None for one that a reward ended with 0."""
        code = super().exitcode
        return {_DONE: 0, 0: None}.get(code, code) if code is not None else None

    def terminate(self) -> None:
        """Kill the process and its children; SIGTERM does not stop a reward that hangs in C code or ignores it."""
        if self.pid is None:  # it never started, and killpg(0) would kill this process and its group
            return
        with contextlib.suppress(ProcessLookupError, PermissionError, AttributeError):
            os.killpg(self.pid, signal.SIGKILL)
        self.kill()

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802
        with _main_left_alone():
            return SpawnProcess._Popen(process_obj)


class _Context(SpawnContext):
    Process = _Process


_spawning = threading.Lock()


@contextlib.contextmanager
def _main_left_alone() -> Iterator[None]:
    """Within the block, a process that this thread spawns gets neither the path of the user's script nor the folder in
    which that was started: it works in the current one, as rewards in this process do.
    """
    thread = threading.get_ident()
    with _spawning:
        original = spawn.get_preparation_data

        def without_main(name: str) -> dict[str, Any]:
            data = original(name)
            if threading.get_ident() == thread:
                data = {key: value for key, value in data.items() if not key.startswith("init_main") and key != "dir"}
            return data

        spawn.get_preparation_data = without_main
        try:
            with importing_nothing_from_here():
                yield
        finally:
            spawn.get_preparation_data = original


def pickled_composer(composer: KonicLLMRewardComposer) -> bytes:
    """Pickle the composer without its reward models, together with the code of the user's own modules."""
    bare = without_models(composer)
    functions = [reward.call for reward in list_rewards(bare)]
    names = {getattr(thing, "__module__", None) for thing in (*type(bare).__mro__, *functions)}
    modules = [sys.modules[name] for name in names if name in sys.modules]
    try:
        return pickled_by_value(bare, modules)
    except Exception as error:
        found = _function_that_cannot_be_sent(bare, modules) or what_cannot_be_pickled(bare, modules)
        where = f" in {found}" if found else ""
        raise RewardError(
            f"reward_workers: {type(composer).__name__} cannot be sent to worker processes: {describe_error(error)}"
            f"{where}. Open a lock, a file or a connection inside the reward instead, or set reward_workers=0."
        ) from safe_cause(error)


def _function_that_cannot_be_sent(composer: KonicLLMRewardComposer, modules: Iterable[ModuleType]) -> str:
    """Return which reward that is no method of the composer cannot be pickled; "" if all can."""
    for reward in list_rewards(composer):
        if getattr(reward.call, "__self__", None) is not composer:
            try:
                pickled_by_value(reward.call, modules)
            except Exception:
                return f"reward {reward.name!r}"
    return ""


_PR_SET_PDEATHSIG = 1
_rewards: dict[str, Reward] = {}
_find_problem: str | None = None


def _begin_worker(pickled: bytes) -> None:
    """Load the rewards before any call is timed.

    The worker leaves its parent's process group, so that it can be killed with its children, and it ends when its
    parent ends.
    """
    global _find_problem
    tolerate_broken_streams()
    if hasattr(os, "setsid"):
        os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if sys.platform == "linux":  # also works when a reward hangs in C code and the thread cannot run
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        _rewards.update({reward.name: reward for reward in list_rewards(cloudpickle.loads(pickled))})
    except Exception as error:
        _find_problem = describe_error(error)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)


def _load_error() -> str | None:
    return _find_problem


def _call(name: str, samples: Sequence[Sample], timeout: float | None) -> Timed:
    seconds: list[float] = []
    return list(call_reward(_rewards[name], samples, timeout, seconds)), seconds
