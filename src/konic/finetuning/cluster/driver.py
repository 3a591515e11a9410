"""A training of an engine -> the same in workers of Ray Train: starts them and answers them, returns the result.

Ray Train starts all workers again when one is lost. Where a run is then resumed, and what was already reported, is
decided here, in the one process that outlives them.
"""

import gc
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from konic.finetuning.callbacks.composite import Callbacks
from konic.finetuning.cluster.connection import connected
from konic.finetuning.cluster.desk import MAX_RESTARTS, Desk
from konic.finetuning.cluster.mailbox import Mailbox, describe_losses
from konic.finetuning.cluster.nodes import describe_resources, require_equal_nodes, require_room
from konic.finetuning.cluster.ray_inside import worker_resources
from konic.finetuning.cluster.worker import Job, Outcome
from konic.finetuning.errors import ConfigError, KonicError, OutputError, TrainingError, safe_cause
from konic.finetuning.results.summary import FinetuningResult
from konic.finetuning.rewards.composer import keep_origin
from konic.finetuning.run.folder import RunFolder
from konic.finetuning.run.reward_weights import RewardWeights
from konic.finetuning.system.files import as_path
from konic.finetuning.system.pickling import own_paths, pickled_by_value, what_cannot_be_pickled
from konic.finetuning.system.places import current_folder, is_url
from konic.finetuning.system.signals import uninterrupted
from konic.output import get_logger
from konic.text import describe_error

logger = get_logger(__name__)

_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 60.0
"""After this long without workers, a warning says that the cluster has no room yet."""


class RayTraining:
    """The trainings of one engine on Ray: a second one continues the first."""

    def __init__(self, scaling: Any) -> None:
        self.scaling = scaling
        self.checkpoint: str | None = None
        """The newest checkpoint, as the workers name it; None before the first one."""
        self._folder = ""
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
        resume = options["resume_from_checkpoint"]
        if isinstance(resume, str | os.PathLike) and not is_url(resume):
            options["resume_from_checkpoint"] = str(as_path(resume, "resume", OutputError))
        if folder is not None or not self._folder:
            if urlsplit(str(folder)).scheme == "memory":
                raise OutputError(
                    f"{folder}: this is the memory of one process, and the workers are others. Name a folder."
                )
            named = folder if is_url(folder) else RunFolder.named(folder, engine.agent.get_base_model()).path.absolute()
            folder = str(named)
            if folder != self._folder:
                self._folder, self.checkpoint, self._iterations = folder, None, 0
        if self._iterations and not options["resume_from_checkpoint"]:
            options["resume_from_checkpoint"] = self.checkpoint
            options["max_iterations"] += self._iterations
        engine.checkpoint_dir = self._folder
        keep_origin(engine.agent.get_reward_composer())
        driver = {"id": os.getpid(), "host": socket.gethostname()}
        here = current_folder() or ""
        job = Job(_pickled(engine), self._folder, options, sys.argv, driver, here, own_paths(), limit_seconds)
        weights = RewardWeights(engine.agent.get_reward_composer())
        desk = Desk(callbacks, weights, options["resume_from_checkpoint"], is_url(self._folder), self._iterations)
        try:
            with connected(self.scaling) as (ray, scaling):
                outcome = _run(ray, scaling, job, desk)
        finally:
            self.checkpoint = desk.checkpoint or self.checkpoint
            self._iterations = max(self._iterations, desk.last_saved)  # where a training after an error goes on
        if desk.failure is not None:
            raise desk.failure
        if outcome.error is not None:
            raise outcome.error
        if outcome.result is None:
            raise KeyboardInterrupt
        self._iterations = outcome.result.total_iterations
        return outcome.result


def _run(ray: Any, scaling: Any, job: Job, desk: Desk) -> Outcome:
    """Run Ray Train in a thread, and answer its workers in this one until it ends."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gc.collect()  # reward models that nothing can reach any more end, and give back what their actors took
    require_equal_nodes(ray, scaling)
    gpus = ray.cluster_resources().get("GPU", 0)
    if gpus and not scaling.use_gpu:
        logger.warning(
            "This Ray has %d GPUs, and no worker takes one: --device cuda, or ScalingConfig(use_gpu=True), gives each "
            "worker a GPU.",
            gpus,
        )
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
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig, TorchTrainer

    class Losses(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: Any) -> None:
            mailbox.post.remote("lost", describe_losses(worker_exceptions))

    class Apart(Backend):  # rendezvous.py joins the workers
        share_cuda_visible_devices = True

    class Workers(TorchConfig):
        backend_cls = Apart

    def work() -> Any:
        from konic.finetuning.cluster.worker import work

        return work(job, mailbox)

    return TorchTrainer(
        work,
        torch_config=Workers(),
        scaling_config=scaling,
        run_config=RunConfig(
            storage_path=storage,  # konic's checkpoints are in the run's folder; nothing is reported to Ray
            failure_config=FailureConfig(max_failures=MAX_RESTARTS),
            callbacks=[Losses()],
            worker_runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}},
            logging_config=LoggingConfig(log_level="CRITICAL"),  # the driver tells the errors of workers
        ),
    )


def _serve(ray: Any, mailbox: Any, desk: Desk, thread: threading.Thread, scaling: Any) -> None:
    """Answer events until the training has ended.

    The first Ctrl-C ends it at the next event of a worker, or at once while there is no worker; the second at once.
    """
    pending = mailbox.next.remote()
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
                elif desk.has_waited(_PATIENCE_SECONDS):
                    _explain_waiting(ray, desk, scaling)
        except KeyboardInterrupt:
            if desk.is_interrupted or not desk.has_workers:
                raise
            desk.is_interrupted = True


def _explain_waiting(ray: Any, desk: Desk, scaling: Any) -> None:
    """Warn that no worker has started.

    Raises:
        TrainingError: A node was lost, and the others have no room for the workers.
    """
    try:
        require_room(ray, scaling)
    except ConfigError as error:
        raise TrainingError(f"The workers cannot be started again: {error}", _newest(desk)) from None
    needs, free = worker_resources(scaling), ray.available_resources()
    logger.warning(
        "No worker has started for %.0f s: they are slow to start, or wait for room. Each takes %s, and free is %s.",
        _PATIENCE_SECONDS, describe_resources(needs), describe_resources({name: free.get(name, 0) for name in needs}),
    )  # fmt: skip


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
        f"Workers were lost {desk.losses} times, and are not started again: {desk.last_loss or describe_error(error)}.",
        _newest(desk),
    )


def _newest(desk: Desk) -> str:
    return f"The newest checkpoint is {desk.checkpoint}." if desk.checkpoint else "There is no checkpoint."


def _pickled(engine: Any) -> bytes:
    modules = [module for module in list(sys.modules.values()) if module is not None]
    try:
        return pickled_by_value(engine, modules)
    except Exception as error:
        composer = engine.agent.get_reward_composer()
        found = what_cannot_be_pickled(composer, modules)
        where = f" in {found}" if found else ""
        raise ConfigError(
            f"The agent cannot be sent to the workers: {describe_error(error)}{where}. Open a lock, a file or a "
            "connection inside the reward instead."
        ) from safe_cause(error)
