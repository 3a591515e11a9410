"""A pickled engine -> its training, in one of the workers that Ray Train has started."""

import os
import socket
import sys
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
from filelock import FileLock, Timeout

import konic
from konic.finetuning.cluster.mailbox import Line, Reporter
from konic.finetuning.cluster.rendezvous import join_workers
from konic.finetuning.errors import (
    ConfigError,
    KonicError,
    OutputError,
    ProcessLostError,
    TrainingError,
    safe_cause,
)
from konic.finetuning.results.summary import FinetuningResult
from konic.finetuning.run.remote import copy_of, mirror_of
from konic.finetuning.run.reward_weights import RewardWeights
from konic.finetuning.system.places import is_url
from konic.finetuning.system.world import World, find_world, from_first
from konic.text import describe_error, indented

_LOCK_SECONDS, _FIRST_LOCK_SECONDS = 60.0, 10.0
"""How long a worker waits for the end of the process that it replaces; at first there is one only if a driver was
killed a moment ago."""


@dataclass(frozen=True)
class Job:
    """What every worker gets."""

    engine: bytes
    """The engine, pickled by value."""
    folder: str
    """The run's folder, or its URL."""
    options: Mapping[str, Any]
    """Arguments of `engine.train`."""
    command: Sequence[str]
    """`sys.argv` of the driver, for `run.json` and for rewards that read it."""
    driver: Mapping[str, Any]
    """Process id and host of the driver: whoever wants to stop the run stops that process."""
    current_folder: str
    """That of the driver: relative paths mean the same in the workers, where they have such a folder."""
    paths: Sequence[str]
    """Folders where the driver finds modules of the user's own; a reward may import one while it runs."""
    limit_seconds: float
    """Seconds to wait for another worker."""
    version: str = konic.__version__


@dataclass(frozen=True)
class Outcome:
    """How the training ended: with a result or an error; with neither, it was interrupted."""

    result: FinetuningResult | None = None
    error: KonicError | None = None


def work(job: Job, mailbox: Any) -> Outcome:
    """Train, and return what came of it. An error is an outcome too, because Ray Train would retry it.

    Raises:
        ProcessLostError: Another worker is gone: Ray Train then starts all of them again.
    """
    line = Line(mailbox)
    line.take_over_output()
    try:
        return _outcome(job, line)
    finally:
        with suppress(Exception):  # the driver may be gone
            line.flush()


def _outcome(job: Job, line: Line) -> Outcome:
    join_workers(job.limit_seconds)
    world = find_world(job.limit_seconds)
    try:
        with world.propagating_errors():
            engine = _loaded(job)
            start = from_first(world, line.ask("on_attempt", world.size) if world.rank == 0 else None)
            options = {**job.options, "resume_from_checkpoint": start["resume_from_checkpoint"]}
            hosts = {message["host"] for message in world.gather({"host": socket.gethostname()})}
            if len(hosts) > 1:
                _require_shared(job.folder, world)
            if world.rank == 0:
                limit = _FIRST_LOCK_SECONDS if start["attempt"] == 1 else _LOCK_SECONDS
                _wait_for_lock(Path(copy_of(job.folder)), limit)
        engine.callback = Reporter(line, RewardWeights(engine.agent.get_reward_composer()))
        engine.driver = job.driver
        return Outcome(engine.train(**options))
    except ProcessLostError:
        raise
    except KeyboardInterrupt:
        return Outcome()
    except KonicError as error:
        return Outcome(error=_located(error, world))
    except Exception as error:
        lines = indented(traceback.format_exc().rstrip().split("\n"))
        return Outcome(error=_located(TrainingError(describe_error(error), *lines), world))


def _loaded(job: Job) -> Any:
    if job.version != konic.__version__:
        raise ConfigError(
            f"this node has konic {konic.__version__}, and the training was started by konic {job.version}. Install "
            "the same version on every node."
        )
    sys.argv[:] = job.command
    with suppress(OSError):
        os.chdir(job.current_folder)
    sys.path += [path for path in job.paths if path not in sys.path and os.path.isdir(path)]
    try:
        return cloudpickle.loads(job.engine)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this node has no module {error.name!r}, which the agent uses. Install it on every node, or put it beside "
            "the script, whose own modules are sent along."
        ) from None
    except Exception as error:
        raise ConfigError(f"the agent cannot be loaded on this node: {describe_error(error)}") from safe_cause(error)


def _require_shared(place: str, world: World) -> None:
    """Raise OutputError on a worker that cannot write the run's folder, or does not see what the others write there."""
    mirror = mirror_of(place) if is_url(place) else None
    name = f".worker-{uuid.uuid4().hex}"
    with mirror.marked(name) if mirror else _marked(Path(place), name):
        names = [message["name"] for message in world.gather({"name": name})]
        sees = mirror.has if mirror else lambda other: (Path(place) / other).exists()
        missing = [rank for rank, other in enumerate(names) if not sees(other)]
        world.gather({})  # every worker has looked
    if missing:
        raise OutputError(
            f"{mirror.address if mirror else place}: this node does not see what process {missing[0]} writes there. "
            "Name a checkpoint_dir on storage that all nodes share."
        )


@contextmanager
def _marked(folder: Path, name: str) -> Iterator[None]:
    """Within it, an empty file of this name is in the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written here: {describe_error(error)}.") from None
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / name).unlink()


def _wait_for_lock(folder: Path, seconds: float) -> None:
    """Wait for the end of a process of the same run that was killed; another run's lock is an error later."""
    if (folder / ".lock").exists():
        with suppress(Timeout, OSError), FileLock(folder / ".lock").acquire(timeout=seconds):
            pass


def _located(error: KonicError, world: World) -> KonicError:
    """Return an error with the process and host where it arose, unless another process has sent it."""
    first, *more = error.args or ("",)
    if first.startswith("In process "):
        return error
    where = f"In process {world.rank} of {world.size} on {socket.gethostname()}: "
    return type(error)(where + first, *more)
