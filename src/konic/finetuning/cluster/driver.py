"""A training of an engine -> the same in workers of Ray Train: starts them and answers them, returns the result.

Ray Train starts all workers again when one is lost. Where a run is then resumed, and what was already reported, is
decided here, in the one process that outlives them.
"""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from konic.finetuning.callbacks.composite import Callbacks
from konic.finetuning.cluster.connection import connected, require_equal_nodes
from konic.finetuning.cluster.mailbox import FAILED, INTERRUPT, Mailbox, describe_losses
from konic.finetuning.cluster.worker import Job, Outcome
from konic.finetuning.errors import ConfigError, KonicError, OutputError, TrainingError, safe_cause
from konic.finetuning.results.summary import FinetuningResult
from konic.finetuning.run.folder import RunFolder
from konic.finetuning.system.files import as_path
from konic.finetuning.system.pickling import pickled_by_value
from konic.finetuning.system.signals import uninterrupted
from konic.output import get_logger, write_line
from konic.text import describe_error

logger = get_logger(__name__)

MAX_RESTARTS = 3
"""How often a training is started again because a worker was lost."""
_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 60.0
"""After this long without workers, a warning says that the cluster has no room yet."""
_OF_ITERATION = ("on_generation_begin", "on_generation_end", "on_reward_computed", "on_iteration_end")
_MAY_STOP = ("on_attempt", "on_iteration_begin", *_OF_ITERATION[:3], "should_stop_early")
"""Where Ctrl-C ends a training: between two iterations, or in one that then does not count."""


class RayTraining:
    """The trainings of one engine on Ray: a second one continues the first."""

    def __init__(self, scaling: Any) -> None:
        self.scaling = scaling
        self.checkpoint: Path | None = None
        """The newest checkpoint, as the workers name it; None before the first one."""
        self._folder: Path | None = None
        self._iterations = 0

    def train(
        self, engine: Any, callbacks: Callbacks, folder: Any, options: Mapping[str, Any], limit_seconds: float
    ) -> FinetuningResult:
        """Train, and return the result of the first worker.

        Args:
            engine: What the workers train: an engine that has no callback and has not started.
            callbacks: Called in this process.
            folder: The run's folder, or None for a new one.
            options: Arguments of `engine.train`.
            limit_seconds: How long a worker waits for another one.

        Raises:
            KonicError: As in one process; or Ray has no room for the workers, or lost them too often.
        """
        options = dict(options)
        if isinstance(options["resume_from_checkpoint"], str | os.PathLike):
            options["resume_from_checkpoint"] = str(as_path(options["resume_from_checkpoint"], "resume", OutputError))
        if folder is not None or self._folder is None:
            folder = RunFolder.named(folder, engine.agent.get_base_model()).path.absolute()
            if folder != self._folder:
                self._folder, self.checkpoint, self._iterations = folder, None, 0
        if self._iterations and not options["resume_from_checkpoint"]:
            options["resume_from_checkpoint"] = self.checkpoint and str(self.checkpoint)
            options["max_iterations"] += self._iterations
        engine.checkpoint_dir = str(self._folder)
        job = Job(_pickled(engine), str(self._folder), options, _current_folder(), limit_seconds)
        desk = Desk(callbacks, options["resume_from_checkpoint"])
        try:
            with connected(self.scaling) as (ray, scaling):
                outcome = _run(ray, scaling, job, desk)
        finally:
            self.checkpoint = desk.checkpoint or self.checkpoint
        if desk.failure is not None:
            raise desk.failure
        if outcome.error is not None:
            raise outcome.error
        if outcome.result is None:
            raise KeyboardInterrupt
        self._iterations = outcome.result.total_iterations
        return outcome.result


class Desk:
    """Answers the workers: calls the callbacks, each event once, although a restarted run repeats iterations."""

    def __init__(self, callbacks: Callbacks, resume: Any) -> None:
        self._callbacks = callbacks
        self._resume = resume
        self.checkpoint: Path | None = None
        self.failure: BaseException | None = None
        """The error of a callback."""
        self.is_interrupted = False
        self.attempts = self.losses = 0
        self._has_begun = self._has_ended = False
        self._iteration = self._last_ended = self._last_saved = 0
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
            if self.losses <= MAX_RESTARTS:
                where = self.checkpoint.name if self.checkpoint else "where it began"
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
            return self._once(hook, *values) if own is None else own(*values)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                self.is_interrupted = True
                return INTERRUPT
            self.failure = error
            return FAILED

    def on_attempt(self, num_workers: int) -> dict[str, Any]:
        """The workers have started: return what differs from the options given. After a loss, the run is resumed.

        A run that saved nothing yet starts as it did at first.
        """
        self.attempts += 1
        return {"resume_from_checkpoint": True} if self.checkpoint else {"resume_from_checkpoint": self._resume}

    def on_train_begin(self, config: dict[str, Any]) -> None:
        """Call the callbacks, once."""
        if not self._has_begun:
            self._has_begun = True
            self._callbacks.on_train_begin(config)

    def on_iteration_begin(self, iteration: int) -> None:
        """Call the callbacks, unless it is repeated."""
        self._iteration = iteration
        self._once("on_iteration_begin", iteration)

    def should_stop_early(self, result: Any) -> bool:
        """Return the answer of the callbacks, also when it is asked again."""
        if result.iteration not in self._stops:
            self._stops[result.iteration] = self._callbacks.should_stop_early(result)
        return self._stops[result.iteration]

    def on_checkpoint_saved(self, path: str, iteration: int) -> None:
        """Remember the checkpoint; call the callbacks, unless it is repeated."""
        self.checkpoint = Path(path)
        if iteration > self._last_saved:
            self._last_saved = iteration
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


def _run(ray: Any, scaling: Any, job: Job, desk: Desk) -> Outcome:
    """Run Ray Train in a thread, and answer its workers in this one until it ends."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    require_equal_nodes(ray, scaling)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=here, max_concurrency=1000).remote()
    ended: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="konic-ray-") as storage:
        trainer = _trainer(scaling, job, mailbox, storage)

        def fit() -> None:
            try:
                ended.append(trainer.fit().return_value)
            except Exception as error:
                ended.append(error)

        thread = threading.Thread(target=fit, daemon=True, name="konic-ray-train")
        thread.start()
        try:
            _serve(ray, mailbox, desk, thread, scaling)
        except ray.exceptions.RayError as error:
            raise TrainingError(f"Ray was lost during the training: {describe_error(error)}") from safe_cause(error)
        finally:
            with suppress(Exception):
                ray.kill(mailbox)
    if isinstance(ended[0], Exception):
        raise _lost_too_often(ended[0], desk) from safe_cause(ended[0])
    return ended[0]


def _trainer(scaling: Any, job: Job, mailbox: Any, storage: str) -> Any:
    """Return Ray's trainer. The function of a worker is sent by value: where konic is missing, an error says so."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, UserCallback
    from ray.train.torch import TorchConfig, TorchTrainer

    class Losses(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: Any) -> None:
            mailbox.post.remote("lost", describe_losses(worker_exceptions))

    def work() -> Any:
        from konic.finetuning.cluster.worker import work

        return work(job, mailbox)

    return TorchTrainer(
        work,
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if scaling.use_gpu else "gloo", timeout_s=max(1, round(job.limit_seconds))
        ),
        scaling_config=scaling,
        run_config=RunConfig(
            storage_path=storage,  # konic's checkpoints are in the run's folder; nothing is reported to Ray
            failure_config=FailureConfig(max_failures=MAX_RESTARTS),
            callbacks=[Losses()],
            worker_runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}},
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _serve(ray: Any, mailbox: Any, desk: Desk, thread: threading.Thread, scaling: Any) -> None:
    """Answer events until the training has ended. The first Ctrl-C ends it at its next event, the second at once."""
    pending, start, has_warned = mailbox.next.remote(), time.monotonic(), False
    while True:
        try:
            with uninterrupted():
                is_alive = thread.is_alive()
                ready, _ = ray.wait([pending], timeout=_POLL_SECONDS)
                if ready:
                    events = ray.get(pending)
                    pending = mailbox.next.remote()
                    _handle(events, desk, mailbox)
                elif not is_alive:
                    return
                elif not desk.attempts and not has_warned and time.monotonic() > start + _PATIENCE_SECONDS:
                    has_warned = True
                    logger.warning(
                        "No worker has started for %.0f s: the cluster has to find room for %s of them, and has free: "
                        "%s.", _PATIENCE_SECONDS, scaling.num_workers, ray.available_resources(),
                    )  # fmt: skip
        except KeyboardInterrupt:
            if desk.is_interrupted:
                raise
            desk.is_interrupted = True


def _handle(events: Iterable[tuple[int | None, tuple[Any, ...]]], desk: Desk, mailbox: Any) -> None:
    for number, event in events:
        if number is None:
            desk.note(*event)
        else:
            mailbox.answer.remote(number, desk.answer(*event))


def _lost_too_often(error: Exception, desk: Desk) -> KonicError:
    if not desk.attempts:
        return ConfigError(f"Ray could not start the workers: {describe_error(error)}")
    return TrainingError(
        f"Workers were lost {desk.losses} times, and are not started again: {describe_error(error)}",
        f"The newest checkpoint is {desk.checkpoint}." if desk.checkpoint else "There is no checkpoint.",
    )


def _pickled(engine: Any) -> bytes:
    try:
        return pickled_by_value(engine, [module for module in list(sys.modules.values()) if module is not None])
    except Exception as error:
        raise ConfigError(
            f"The agent cannot be sent to the workers: {describe_error(error)}. If its composer holds something open "
            "(a lock, a file, a connection), open it inside the reward instead."
        ) from safe_cause(error)


def _current_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""
