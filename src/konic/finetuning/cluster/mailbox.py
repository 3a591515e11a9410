"""Workers -> the driver, and its answers: an actor beside the driver passes them on."""

import asyncio
import io
import itertools
import logging
import sys
import threading
from collections.abc import Mapping
from typing import Any

from konic.finetuning.callbacks.hooks import BaseKonicFinetuningCallback
from konic.finetuning.errors import TrainingError
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.results.summary import FinetuningResult
from konic.finetuning.run.reward_weights import RewardWeights
from konic.output import get_logger
from konic.text import describe_error

INTERRUPT, FAILED = "interrupt", "failed"
"""Answers that end the training: Ctrl-C at the driver, or an error in one of its callbacks."""


class Mailbox:
    """What workers tell the driver, in order. The driver takes it, and answers what was asked."""

    def __init__(self) -> None:
        self._posts: asyncio.Queue[tuple[int | None, tuple[Any, ...]]] = asyncio.Queue()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()

    async def post(self, *event: Any) -> None:
        """Take an event that needs no answer."""
        self._posts.put_nowait((None, event))

    async def ask(self, *event: Any) -> Any:
        """Return the driver's answer to an event."""
        number = next(self._numbers)
        self._asked[number] = asyncio.get_running_loop().create_future()
        self._posts.put_nowait((number, event))
        try:
            return await self._asked[number]
        finally:
            del self._asked[number]

    async def answer(self, number: int, value: Any) -> None:
        """Give the answer to an event that was asked."""
        self._asked[number].set_result(value)

    async def next(self) -> list[tuple[int | None, tuple[Any, ...]]]:
        """Wait for events; return all that are there, each with the number to answer it by."""
        events = [await self._posts.get()]
        while not self._posts.empty():
            events.append(self._posts.get_nowait())
        return events


class Line:
    """A worker's connection to the mailbox."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox, self._last = mailbox, None

    def post(self, *event: Any) -> None:
        """Send an event."""
        self._last = self._mailbox.post.remote(*event)

    def ask(self, *event: Any) -> Any:
        """Send an event and return the answer.

        Raises:
            KeyboardInterrupt: The driver is to stop, or is gone.
            TrainingError: A callback failed there.
        """
        import ray

        try:
            answer = ray.get(self._mailbox.ask.remote(*event))
        except ray.exceptions.RayError:
            raise KeyboardInterrupt from None
        if answer == INTERRUPT:
            raise KeyboardInterrupt
        if answer == FAILED:
            raise TrainingError("A callback failed where the training was started.")
        return answer

    def flush(self) -> None:
        """Wait until what was sent has arrived."""
        import ray

        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _Stream):
                stream.end_line()
        if self._last is not None:
            ray.get(self._last)

    def take_over_output(self) -> None:
        """Send the driver what this process prints and logs from here on."""
        sys.stdout, sys.stderr = _Stream(self, "stdout"), _Stream(self, "stderr")
        logger = get_logger("konic")
        logger.handlers, logger.propagate = [_LogHandler(self)], False


def describe_losses(errors: Mapping[int, BaseException]) -> str:
    """Return why workers were lost, as one line; `errors` has the error of each of them by its number."""
    ended = [rank for rank, error in sorted(errors.items()) if hasattr(error, "health_check_failure")]  # Ray's
    if ended:  # what others say is that they miss these
        return "; ".join(f"worker {rank}: its process ended" for rank in ended)
    return "; ".join(f"worker {rank}: {_describe_loss(error)}" for rank, error in sorted(errors.items()))


def _describe_loss(error: BaseException) -> str:
    return f"{describe_error(getattr(error, '_base_exc', error)):.500}"  # Ray wraps what the worker raised


class _Stream(io.TextIOBase):
    """A text stream whose lines the driver prints."""

    encoding, errors = "utf-8", "replace"

    def __init__(self, line: Line, name: str) -> None:
        self._line, self._name, self._begun, self._lock = line, name, "", threading.Lock()

    def write(self, text: str) -> int:
        """Send whole lines; keep the start of the next one."""
        with self._lock:
            whole, ended, self._begun = (self._begun + text).rpartition("\n")
            if ended:
                self._line.post("text", self._name, whole)
        return len(text)

    @property
    def buffer(self) -> io.BufferedIOBase:
        """A stream of bytes, which are the text in UTF-8."""
        return _Bytes(self)

    def writable(self) -> bool:
        """True."""
        return True

    def flush(self) -> None:
        """Nothing: a line is sent when it ends."""

    def end_line(self) -> None:
        """Send a line that was begun and has no end."""
        if self._begun:
            self.write("\n")

    def isatty(self) -> bool:
        """False: the driver may have a terminal, this process has none."""
        return False


class _Bytes(io.BufferedIOBase):
    def __init__(self, text: _Stream) -> None:
        self._text = text

    def write(self, content: Any) -> int:
        """Write the bytes as text."""
        self._text.write(bytes(content).decode(errors="replace"))
        return len(content)

    def writable(self) -> bool:
        """True."""
        return True


class _LogHandler(logging.Handler):
    def __init__(self, line: Line) -> None:
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        """Send the record's name, level and text."""
        self._line.post("log", record.name, record.levelno, record.getMessage())


class Reporter(BaseKonicFinetuningCallback):
    """Calls the driver's callbacks from the first worker, waits for them, and takes over the weights they change."""

    def __init__(self, line: Line, weights: RewardWeights) -> None:
        self._line, self._weights = line, weights

    def _ask(self, hook: str, *values: Any) -> Any:
        answer, weights = self._line.ask(hook, *values)
        self._weights.take(weights)
        return answer

    def on_train_begin(self, config: dict[str, Any]) -> None:
        """See the base class."""
        self._ask("on_train_begin", config, self._weights.current)

    def on_iteration_begin(self, iteration: int) -> None:
        """See the base class."""
        self._ask("on_iteration_begin", iteration)

    def on_generation_begin(self, prompts: list[str]) -> None:
        """See the base class."""
        self._ask("on_generation_begin", prompts)

    def on_generation_end(self, prompts: list[str], responses: list[str]) -> None:
        """See the base class."""
        self._ask("on_generation_end", prompts, responses)

    def on_reward_computed(self, rewards: list[float], reward_breakdown: dict[str, list[float]]) -> None:
        """See the base class."""
        self._ask("on_reward_computed", rewards, reward_breakdown)

    def on_iteration_end(self, result: FinetuningIterationResult) -> None:
        """See the base class."""
        self._ask("on_iteration_end", result)

    def on_checkpoint_saved(self, path: str, iteration: int) -> None:
        """See the base class."""
        self._ask("on_checkpoint_saved", path, iteration)

    def on_train_end(self, result: FinetuningResult) -> None:
        """See the base class."""
        self._ask("on_train_end", result)

    def should_stop_early(self, result: FinetuningIterationResult) -> bool:
        """See the base class."""
        return bool(self._ask("should_stop_early", result))
