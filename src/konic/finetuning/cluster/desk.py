"""Events of the workers -> the callbacks of the process that started the training, each event once."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from konic.finetuning.callbacks.composite import Callbacks
from konic.finetuning.cluster.mailbox import FAILED, INTERRUPT
from konic.finetuning.results.summary import FinetuningResult
from konic.finetuning.run.reward_weights import RewardWeights
from konic.output import get_logger, write_line

logger = get_logger(__name__)

MAX_RESTARTS = 3
"""How often a training is started again because a worker was lost."""
_OF_ITERATION = ("on_generation_begin", "on_generation_end", "on_reward_computed", "on_iteration_end")
_MAY_STOP = ("on_attempt", "on_iteration_begin", *_OF_ITERATION[:3], "should_stop_early")
"""Where Ctrl-C ends a training: between two iterations, or in one that then does not count."""


class Desk:
    """Answers the workers: calls the callbacks, each event once, although a restarted run repeats iterations."""

    def __init__(
        self,
        callbacks: Callbacks,
        weights: RewardWeights,
        resume: Any = None,
        is_remote: bool = False,
        iterations_before: int = 0,
    ) -> None:
        """`weights` are those of this process, which its callbacks may change.

        `iterations_before` were done by an earlier training of the same engine.
        """
        self._callbacks, self._is_remote, self._iterations_before = callbacks, is_remote, iterations_before
        self._weights = weights
        self._weights_in_force: Mapping[str, float] = {}
        self._weights_sent: dict[tuple[int, str], Mapping[str, float]] = {}
        self._resume = resume
        self.checkpoint: str | None = None
        """The newest one, as the workers name it."""
        self.failure: BaseException | None = None
        """The error of a callback."""
        self.is_interrupted = False
        self.has_workers = False
        """True from the first word of a worker until workers are lost."""
        self.attempts = self.losses = 0
        self.last_loss = ""
        """Which workers, and how, such as "worker 1: its process ended"."""
        self._idle_since: float | None = time.monotonic()
        """When the last worker was lost, or the training was started; None while workers run, or once reported."""
        self._has_begun = self._has_ended = False
        self.last_saved = 0
        """The last iteration that a checkpoint of this training has; 0 before the first."""
        self._iteration = self._last_ended = 0
        self._stops: dict[int, bool] = {}

    def note(self, kind: str, *content: Any) -> None:
        """Print or log what a worker has printed or logged."""
        if kind == "text":
            stream, text = content
            write_line(text, sys.stdout if stream == "stdout" else sys.stderr)
        elif kind == "log":
            name, level, text = content
            get_logger(name).log(level, "%s", text)
        else:
            self.losses += 1
            self.last_loss = content[0]
            self.has_workers = False
            self._idle_since = time.monotonic()
            if self.losses <= MAX_RESTARTS:
                where = self.checkpoint.rpartition("/")[2] if self.checkpoint else "where it began"
                logger.warning(
                    "A worker was lost (%s). All are started again (%d of %d), and go on from %s.",
                    content[0], self.losses, MAX_RESTARTS, where,
                )  # fmt: skip

    def answer(self, hook: str, *values: Any) -> Any:
        """Return the answer to an event, or INTERRUPT or FAILED. A run that ends still saves."""
        if self.failure is not None and hook != "on_checkpoint_saved":
            return FAILED
        if self.is_interrupted and hook in _MAY_STOP:
            return INTERRUPT
        try:
            own = getattr(self, hook, None)
            value = self._once(hook, *values) if own is None else own(*values)
            return value if hook == "on_attempt" else (value, self._weights_after(hook))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                self.is_interrupted = True
                return INTERRUPT
            self.failure = error
            return FAILED

    def _weights_after(self, hook: str) -> Mapping[str, float]:
        """Return the weights after an event; where it is repeated, those from when it was new."""
        weights = self._weights.current
        same = self._weights_in_force if weights == self._weights_in_force else weights  # one object for many events
        self._weights_in_force = self._weights_sent.setdefault((self._iteration, hook), same)
        return self._weights_in_force

    def on_attempt(self, num_workers: int) -> dict[str, Any]:
        """The workers have started: return where they resume, and which attempt it is, from 1.

        A run that saved nothing yet starts as it did at first.
        """
        self.attempts += 1
        self._idle_since, self.has_workers = None, True
        resume = bool(self.checkpoint) or self._resume
        return {"resume_from_checkpoint": resume, "attempt": self.attempts}

    def has_waited(self, seconds: float) -> bool:
        """True where no worker has run for so long; once, until workers are lost again."""
        if self._idle_since is None or time.monotonic() < self._idle_since + seconds:
            return False
        self._idle_since = None
        return True

    def on_train_begin(self, config: dict[str, Any], weights: Mapping[str, float]) -> None:
        """Call the callbacks, once, with the rewards' weights that a resumed run has."""
        if not self._has_begun:
            self._has_begun = True
            self._weights.take(weights)
            if self._is_remote:
                del config["run_folder"]  # is that of a worker's machine
            self._callbacks.on_train_begin(config)

    def on_iteration_begin(self, iteration: int) -> None:
        """Call the callbacks, unless it is repeated."""
        self._iteration = iteration
        self._once("on_iteration_begin", iteration)

    def should_stop_early(self, result: Any) -> bool:
        """Return the answer of the callbacks, also when it is asked again.

        They were asked about the first `iterations_before` by an earlier training.
        """
        if result.iteration <= self._iterations_before:
            return False
        if result.iteration not in self._stops:
            self._stops[result.iteration] = self._callbacks.should_stop_early(result)
        return self._stops[result.iteration]

    def on_checkpoint_saved(self, path: str, iteration: int) -> None:
        """Remember the checkpoint; call the callbacks, unless it is repeated."""
        self.checkpoint = path
        if iteration > self.last_saved:
            self.last_saved = iteration
            self._callbacks.on_checkpoint_saved(path, iteration)

    def on_train_end(self, result: FinetuningResult) -> None:
        """Call the callbacks, once."""
        if not self._has_ended:
            self._has_ended = True
            self._callbacks.on_train_end(result)

    def _once(self, hook: str, *values: Any) -> Any:
        if self._iteration <= self._last_ended:
            return None
        if hook == "on_iteration_end":
            self._last_ended = self._iteration
        return getattr(self._callbacks, hook)(*values)
