"""Rewards and samples -> outcomes, somewhere in a Ray cluster: reward workers beside an actor, and models in actors.

The actor of reward workers holds a pool of `rewards.workers`, so order, timeouts and errors are those of workers on
this machine. Nothing here starts Ray: without a connection to it, everything runs in this process and beside it.
"""

import contextlib
import math
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import cloudpickle

from konic.finetuning.arguments import with_known_arguments
from konic.finetuning.data.samples import Sample
from konic.finetuning.errors import ConfigError, ProcessLostError, RewardError
from konic.finetuning.rewards.composer import KonicLLMRewardComposer, RewardModel
from konic.finetuning.rewards.listing import list_rewards
from konic.finetuning.rewards.marks import checked_flag
from konic.finetuning.rewards.outcomes import Outcome, Reward
from konic.finetuning.rewards.signatures import requested_columns
from konic.finetuning.rewards.workers import RESTARTS, RewardPool, pickled_composer
from konic.finetuning.system.pickling import pickled_by_value
from konic.finetuning.system.places import current_folder
from konic.text import describe_error, printable

ROOM_SECONDS = 120.0
"""How long an actor may wait for room in the cluster."""


def is_connected() -> bool:
    """Return True if this process is connected to Ray. It does not import Ray."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


class RemoteRewardPool:
    """A :class:`RewardPool` beside an actor of Ray, which has resources of its own and may be on another node.

    Args:
        composer: The composer whose rewards are called, without its reward models.
        workers: Number of processes beside the actor.
        timeout: Seconds that one call may take, on a sample or on a whole batch; None sets no limit.
        resources: What the actor and its processes take, such as `{"CPU": 4}`.
    """

    def __init__(
        self, composer: KonicLLMRewardComposer, workers: int, timeout: float | None, resources: Mapping[str, float]
    ) -> None:
        self._composer, self._workers, self._timeout = composer, workers, timeout
        self._resources = resources
        self._actor: Any = None
        self._known: set[str] = set()

    def start(self) -> None:
        """Start the actor and its processes, without waiting for them.

        Raises:
            RewardError: The composer cannot be sent to it.
        """
        if self._actor is None:
            self._known = {reward.name for reward in list_rewards(self._composer)}
            given = pickled_composer(self._composer), self._workers, self._timeout, current_folder() or ""
            self._actor = _actor(_RewardHost, self._resources).remote(*given)

    def submit(
        self, rewards: Sequence[Reward], samples: Sequence[Sample], seconds: Mapping[str, list[float]]
    ) -> dict[str, Iterator[Outcome]]:
        """Start calling rewards on a batch; see :meth:`RewardPool.submit`. The iterators are used up in their order.

        Raises:
            RewardError: The cluster has no room for the actor, or the composer cannot be sent to it or loaded there.
            ProcessLostError: The actor has ended, or its node. It may also be raised by the iterators.
        """
        names = [reward.name for reward in rewards]
        if not self._known.issuperset(names):  # a callback has added one
            self.close()
        self.start()
        with _naming_the_lost():
            _require_room(self._actor, "reward_resources", self._resources)
        stream = self._actor.score.options(num_returns="streaming").remote(names, list(samples))
        return {name: _received(stream, len(samples), seconds[name]) for name in names}

    def close(self) -> None:
        """End the actor and its processes, even in the middle of a call."""
        if self._actor is not None:
            _kill(self._actor)
            self._actor = None


class RemoteRewardModel:
    """A reward model in a Ray actor of its own, which all workers of a training share.

    Each worker sends its share of the responses as one batch; the actor scores one batch at a time. Without Ray, such
    as in `engine.evaluate()` after the training, the model is made in the process that needs it.

    Args:
        name: The reward's name.
        make: Makes the model: a function without parameters that returns an object with `score(prompts, responses)`.
            It is called in the actor, once, so that no other process loads the model. The model gets the columns that
            its `score` asks for, and `messages`, like any other.
        resources: What the actor takes, such as `{"GPU": 1}`; None takes nothing, so that it fits anywhere.
        normalize: As in `@llm_reward(normalize=True)`.
        timeout_seconds: How long to wait for the scores of a batch, in which the actor may also score those of other
            workers; None sets no limit. Without Ray there is none.

    Raises:
        ConfigError: `make` is no function, the resources are no numbers of at least 0, or the limit none above 0.
    """

    @with_known_arguments
    def __init__(
        self,
        name: str,
        make: Callable[[], RewardModel],
        resources: Mapping[str, float] | None = None,
        normalize: bool = False,
        timeout_seconds: float | None = 1800.0,
    ) -> None:
        self.name, self._timeout = name, timeout_seconds
        self.normalize = checked_flag("RemoteRewardModel: normalize", normalize)
        if not callable(make):
            raise ConfigError(f"RemoteRewardModel: make must be a function that returns the model, got {make!r:.200}.")
        self._make, self._resources = make, dict(resources or {})
        for resource, amount in self._resources.items():
            if not (_is_number(amount) and amount >= 0):
                raise ConfigError(f"RemoteRewardModel: resources[{resource!r}] must be 0 or more, got {amount!r}.")
        if timeout_seconds is not None and not (_is_number(timeout_seconds) and 0 < timeout_seconds < math.inf):
            raise ConfigError(f"RemoteRewardModel: timeout_seconds must be above 0, or None, got {timeout_seconds!r}.")
        self._key = f"konic-{uuid.uuid4().hex}"
        self._model: Any = None
        """The actor, or the model itself without Ray."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_model": None}

    def score(self, prompts: list[str], responses: list[str], **columns: list[Any]) -> Sequence[float | None]:
        """Return per response a number, or None to abstain. The model gets the `columns` that its `score` asks for.

        Raises:
            Exception: What the model raised.
            RewardError: The cluster has no room for the actor, or has lost it several times, or it takes too long.
        """
        if not is_connected():
            self._model = self._model or self._make()
            return _scored(self.name, self._model, prompts, responses, columns)
        import ray

        for _ in range(RESTARTS):
            try:
                return ray.get(
                    self._shared_actor().score.remote(self.name, prompts, responses, columns), timeout=self._timeout
                )
            except ray.exceptions.GetTimeoutError:
                _kill(self._model)
                self._model = None
                raise RewardError(
                    f"RemoteRewardModel {self.name!r} did not answer for {self._timeout:g} s, for {len(responses)} "
                    "responses. If it needs longer, raise its timeout_seconds."
                ) from None
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayActorError as error:
                lost, self._model = error, None
        raise RewardError(
            f"RemoteRewardModel {self.name!r}: its actor was lost {RESTARTS} times: {_first_line(lost)}"
        ) from None  # Ray's traceback names its own files alone

    def _shared_actor(self) -> Any:
        if self._model is None:
            make = pickled_by_value(self._make, [module for module in list(sys.modules.values()) if module is not None])
            options = {"name": self._key, "get_if_exists": True}
            self._model = _actor(_ModelHost, self._resources, **options).remote(make, current_folder() or "")
            _require_room(self._model, f"RemoteRewardModel {self.name!r}", self._resources)
        return self._model


class _RewardHost:
    """The actor beside reward workers."""

    def __init__(self, pickled: bytes, workers: int, timeout: float | None, folder: str) -> None:
        with contextlib.suppress(OSError):
            os.chdir(folder)
        self._given = pickled, workers, timeout
        self._pool: RewardPool | None = None

    def ready(self) -> None:
        """Start the processes, if they are not there."""
        if self._pool is None:
            pickled, workers, timeout = self._given
            try:
                composer = cloudpickle.loads(pickled)
            except Exception as error:
                raise RewardError(f"reward_resources: the rewards cannot be loaded: {describe_error(error)}") from None
            self._rewards = {reward.name: reward for reward in list_rewards(composer)}
            self._pool = RewardPool(composer, workers, timeout)
            self._pool.start()

    def score(self, names: Sequence[str], samples: Sequence[Sample]) -> Iterator[Any]:
        """Yield, for each reward in turn, one outcome per sample and then the list of their seconds."""
        self.ready()
        assert self._pool is not None  # noqa: S101
        seconds: dict[str, list[float]] = {name: [] for name in names}
        coming = self._pool.submit([self._rewards[name] for name in names], samples, seconds)
        for name, outcomes in coming.items():
            for outcome in outcomes:  # noqa: UP028  Ray sends a value, which `yield from` would pass on
                yield outcome
            yield seconds[name]


class _ModelHost:
    """The actor of a reward model."""

    def __init__(self, make: bytes, folder: str) -> None:
        with contextlib.suppress(OSError):
            os.chdir(folder)
        self._make, self._model = make, None

    def ready(self) -> None:
        """Answer that the actor has found room."""

    def score(
        self, name: str, prompts: list[str], responses: list[str], columns: dict[str, list[Any]]
    ) -> Sequence[float | None]:
        """Score a batch; the first one loads the model."""
        try:
            self._model = self._model or cloudpickle.loads(self._make)()
            return _scored(name, self._model, prompts, responses, columns)
        except Exception as error:
            raise _sendable(error) from None


def _scored(
    name: str, model: Any, prompts: list[str], responses: list[str], columns: Mapping[str, list[Any]]
) -> Sequence[float | None]:
    """What a model returns, which gets the columns that it asks for."""
    try:
        wanted = requested_columns(Reward(name, model.score, "batch", is_model=True), columns)
    except ValueError:  # no signature can be read, as of a function written in C
        wanted = []
    return model.score(prompts, responses, **{column: columns[column] for column in wanted})


def _sendable(error: Exception) -> Exception:
    """Return the error, or where it cannot be sent to another process, one of the same name with its message."""
    try:
        cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:
        name, _, message = describe_error(error, 1000).partition(": ")
        return type(name, (Exception,), {})(message)
    return error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _received(stream: Iterator[Any], count: int, seconds: list[float]) -> Iterator[Outcome]:
    """Yield the next outcomes of a stream, and take the seconds that follow them."""
    for _ in range(count):
        yield _next(stream)
    seconds += _next(stream)


def _next(stream: Iterator[Any]) -> Any:
    import ray

    with _naming_the_lost():
        return ray.get(next(stream))


@contextlib.contextmanager
def _naming_the_lost() -> Iterator[None]:
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayActorError as error:
        raise ProcessLostError(f"The actor of the reward workers was lost: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    """Return what happened; Ray's further lines hold its own numbers of the actor."""
    return printable(str(error).partition("\n")[0]).rstrip(".")


def _actor(kind: type, resources: Mapping[str, float], **options: Any) -> Any:
    """Return a class of actors with resources of their own, spread over the nodes, outside the group of the workers."""
    import ray

    more = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    return ray.remote(kind).options(
        num_cpus=resources.get("CPU", 0), num_gpus=resources.get("GPU", 0), resources=more,
        scheduling_strategy="SPREAD", **options,
    )  # fmt: skip


def _require_room(actor: Any, what: str, resources: Mapping[str, float]) -> None:
    """Wait until an actor runs.

    Raises:
        RewardError: The cluster has found no room for it.
        RayError: It has ended, or raised an error.
    """
    import ray

    ready = actor.ready.remote()
    if not ray.wait([ready], timeout=ROOM_SECONDS)[0]:
        _kill(actor)
        free = {name: amount for name, amount in ray.available_resources().items() if ":" not in name}
        raise RewardError(
            f"{what}: for {ROOM_SECONDS:g} s the cluster has had no room for {dict(resources)}; free are {free}. Ask "
            "for less, or for fewer workers of the training, or add nodes."
        )
    ray.get(ready)


def _kill(actor: Any) -> None:
    import ray

    with contextlib.suppress(Exception):  # Ray may have ended
        ray.kill(actor)
