"""Samples -> Scores: calls all rewards, in this process or in workers, and raises or skips faults.

The run's settings decide both.
"""

import contextlib
import math
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Self

from konic.finetuning.config import TrainingConfig
from konic.finetuning.data.prompts import Prompt
from konic.finetuning.data.samples import Sample
from konic.finetuning.errors import RewardError, did_you_mean
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.rewards.calls import call_reward
from konic.finetuning.rewards.composer import KonicLLMRewardComposer, describe_weighting, unknown_weights
from konic.finetuning.rewards.moments import RunningMoments
from konic.finetuning.rewards.outcomes import Fault, Outcome, Reward
from konic.finetuning.rewards.overrides import compose_totals
from konic.finetuning.rewards.remote import RemoteRewardPool, is_connected
from konic.finetuning.rewards.totals import (
    Weighting,
    collect_breakdown,
    collect_parts,
    compute_totals,
    find_owners,
    first_faults,
    moments_after,
    named_by_part,
    part_keys,
    part_weights,
    prepared_parts,
)
from konic.finetuning.rewards.workers import RewardPool
from konic.finetuning.system.world import ALONE, World, from_first
from konic.output import get_logger

logger = get_logger(__name__)

SLOW_SECONDS = 30.0
"""A warning names a reward that has been running for this long."""
ERROR_WINDOW = 100
"""Number of the last responses that max_error_rate applies to."""
SILENT_RESPONSES = 32
"""A warning names a reward that has returned None for so many responses and has given no value yet."""
_FAULTS_SHOWN = 3


@dataclass(frozen=True)
class Scores:
    """The rewards of a batch of B responses."""

    rewards: list[float]
    """[B] each sample's reward; NaN if every part abstained or one failed."""
    breakdown: dict[str, list[float]]
    """Each part's own values [B], before normalising and weights; NaN if it abstained or failed."""
    faults: list[Fault | None] = field(default_factory=list)
    """[B] the first fault on each sample, or None; an empty list if nothing can fail."""
    moments: dict[str, RunningMoments] = field(default_factory=dict)
    """The running moments of every part that is normalised, including this batch."""
    parts: dict[str, list[float]] = field(default_factory=dict)
    """Each part's values [B] after normalising and clipping, before weights; NaN if it abstained or failed."""
    weights: dict[str, float] = field(default_factory=dict)
    """The weight of each part."""
    seconds: dict[str, list[float]] = field(default_factory=dict, compare=False, repr=False)
    """[B] the time of each reward, its share of a call with the whole batch; NaN if it is not known."""
    is_dropped: bool = False
    """True if a number of the batch is not finite, so that the policy must not learn from the batch."""

    @property
    def has_score(self) -> list[bool]:
        """[B] False for a sample without a reward, and for every sample of a dropped batch."""
        return [not self.is_dropped and not math.isnan(reward) for reward in self.rewards]

    @property
    def num_faults(self) -> int:
        """Number of samples on which a reward failed."""
        return sum(fault is not None for fault in self.faults)

    @property
    def errors(self) -> list[str | None]:
        """[B] one line that shows what failed on each sample, or None."""
        return [f"{fault.who} {fault.what}" if fault else None for fault in self.faults or [None] * len(self.rewards)]

    def filled(self) -> list[float]:
        """[B] the rewards, with 0 for a sample that has none."""
        return [0.0 if math.isnan(reward) else reward for reward in self.rewards]

    def valid_rewards(self) -> list[float]:
        """The rewards of the samples that have one."""
        return [reward for reward in self.rewards if not math.isnan(reward)]

    def select(self, rows: Sequence[int]) -> Self:
        """Return the scores of the responses in these rows."""
        return replace(
            self,
            rewards=[self.rewards[row] for row in rows],
            breakdown={name: [values[row] for row in rows] for name, values in self.breakdown.items()},
            parts={name: [values[row] for row in rows] for name, values in self.parts.items()},
            seconds={name: [values[row] for row in rows] for name, values in self.seconds.items()},
            faults=[self.faults[row] for row in rows] if self.faults else [],
        )


def join_scores(rounds: Sequence[Scores]) -> Scores:
    """Return the scores of several rounds one after another, with the moments of the last.

    A part that a round does not have, because it abstained there or failed, is NaN for all of that round.
    """

    def chained(name: str) -> dict[str, list[float]]:
        found = [getattr(scores, name) for scores in rounds]
        absent = [[math.nan] * len(scores.rewards) for scores in rounds]
        return {
            part: [value for own, nan in zip(found, absent, strict=True) for value in own.get(part, nan)]
            for part in dict.fromkeys(part for own in found for part in own)
        }

    return replace(
        rounds[-1],
        rewards=[reward for scores in rounds for reward in scores.rewards],
        breakdown=chained("breakdown"),
        parts=chained("parts"),
        weights={name: weight for scores in rounds for name, weight in scores.weights.items()},
        seconds=chained("seconds"),
        faults=[fault for scores in rounds for fault in scores.faults or [None] * len(scores.rewards)],
        is_dropped=any(scores.is_dropped for scores in rounds),
    )


class Scorer:
    """Scores batches with a composer, according to the run's settings.

    As a context manager, it starts the worker processes and ends them with the `with` block.
    """

    def __init__(self, composer: KonicLLMRewardComposer, config: TrainingConfig, world: World = ALONE) -> None:
        self._composer = composer
        self._config = config
        self._world = world
        self._pool = _pool(composer, config)
        self._shown: dict[tuple[str, str], int] = {}
        self._parts: dict[str, None] = {}
        """The names of the parts that rewards have returned so far."""
        self._odd_weights: set[str] = set()
        """The names that a warning has named because no reward has returned such a part."""
        self._num_silent: dict[str, float] = {}
        """By reward: the responses so far, if it returned None for all of them, else -∞."""

    def __enter__(self) -> Self:
        if self._config.reward_workers:
            self._pool.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.close()

    def require_error_rate(self, history: Sequence[FinetuningIterationResult], scores: Scores) -> None:
        """Raise RewardError if rewards have failed on more responses than max_error_rate allows."""
        require_errors_within(history, scores, self._config)

    def require_fit_evaluation(self, scores: Scores) -> None:
        """Raise RewardError if rewards failed on too many responses of an evaluation, or on all of them."""
        if scores.num_faults == len(scores.rewards) and self._config.max_error_rate < 1:
            raise _too_many_errors(f"Rewards failed on all {scores.num_faults} responses of an evaluation.", scores)
        require_errors_within([], scores, self._config)

    def score(
        self,
        samples: Sequence[Sample],
        moments: Mapping[str, RunningMoments] | None = None,
        update_moments: bool = False,
    ) -> Scores:
        """Score a batch.

        The calls of rewards that get one response are divided among the processes. A reward that gets the batch, the
        reducer and the composer's own `compose` are called in the first process, so that they see all of it, once.

        Args:
            samples: [B].
            moments: Running moments so far, by the name of a part that is normalised. A part that has none yet uses the
                batch's own.
            update_moments: Add the batch's values to the moments before normalising.

        Raises:
            RewardError: A reward failed on a sample and on_reward_error is "raise", or a reducer failed.
        """
        weighting = describe_weighting(self._composer)
        rewards = weighting.rewards
        seconds: dict[str, list[float]] = {reward.name: [] for reward in rewards}
        outcomes, seconds = self._shared(self._own_outcomes(rewards, samples, seconds), samples, seconds)
        parts, faults = collect_parts(outcomes, len(samples)), first_faults(outcomes, len(samples))
        given = dict(moments or {})
        counted = [own for own, fault in zip(parts, faults, strict=True) if not fault]
        known = moments_after(rewards, given if update_moments else {}, counted)
        known |= {} if update_moments else given
        shared: dict[str, Any] | None = None
        if self._world.rank == 0:
            self._warn_of_silence(rewards, outcomes)
            self._parts |= dict.fromkeys(name for own in parts for name in own)
            told = unknown_weights(self._composer)
            self._odd_weights |= warn_of_weights(weighting, self._parts, self._odd_weights, told)
            totals = compute_totals(weighting, parts, faults, samples, known)
            composed = compose_totals(self._composer, rewards, samples, parts, totals, faults, self._accepted)
            shared = {
                "rewards": composed.totals,
                "breakdown": composed.breakdown,
                "parts": collect_breakdown([prepared_parts(weighting, own, known) for own in parts]),
                "weights": part_weights(weighting, composed.breakdown),
                "faults": composed.faults if self._world.size == 1 else [*map(_as_json, composed.faults)],
            }
        shared = from_first(self._world, shared)
        breakdown, shown = named_by_part(rewards, shared.pop("breakdown")), [*map(_from_json, shared.pop("faults"))]
        moments = known if update_moments else given
        return Scores(**shared, breakdown=breakdown, faults=shown, seconds=seconds, moments=moments)

    def _own_outcomes(
        self, rewards: Sequence[Reward], samples: Sequence[Sample], seconds: Mapping[str, list[float]]
    ) -> list[list[Outcome]]:
        """The outcomes per reward of the samples that this process scores."""
        if self._world.size == 1:
            return self._outcomes(rewards, samples, seconds)
        rows = self._world.own_rows(len(samples))
        own = samples[rows.start : rows.stop]
        divided = [reward for reward in rewards if reward.is_model or reward.shape == "sample"]
        whole = [reward for reward in rewards if reward not in divided] if self._world.rank == 0 else []
        found: dict[str, list[Outcome]] = {reward.name: [] for reward in rewards}
        for part, given in ((divided, own), (whole, samples)):
            if part and given:
                done = self._outcomes(part, given, seconds)
                found |= {reward.name: each for reward, each in zip(part, done, strict=True)}
        return [found[reward.name] for reward in rewards]

    def _outcomes(
        self, rewards: Sequence[Reward], samples: Sequence[Sample], seconds: Mapping[str, list[float]]
    ) -> list[list[Outcome]]:
        """The outcomes per reward and per sample; with on_reward_error="raise" none of them is a fault."""
        isolated = [reward for reward in rewards if self._config.reward_workers and not reward.is_model]
        coming = self._pool.submit(isolated, samples, seconds) if isolated else {}
        coming |= {r.name: call_reward(r, samples, seconds=seconds[r.name]) for r in rewards if r.name not in coming}
        by_name, found = {reward.name: reward for reward in rewards}, {}
        for name, outcomes in coming.items():
            with contextlib.closing(outcomes), warn_if_slow(by_name[name], len(samples)) as done:  # type: ignore[type-var]
                for outcome in self._accepted(outcomes, samples):
                    done.append(outcome)
            found[name] = done
        return [found[reward.name] for reward in rewards]

    def _shared(
        self, own: list[list[Outcome]], samples: Sequence[Sample], seconds: dict[str, list[float]]
    ) -> tuple[list[list[Outcome]], dict[str, list[float]]]:
        """The outcomes of all processes per reward and sample, and their seconds. The first process warns for all."""
        if self._world.size == 1:
            return own, seconds
        own_as_json = [[*map(_as_json, each)] for each in own]
        messages = self._world.gather({"outcomes": own_as_json, "seconds": seconds})
        parts = zip(*(message["outcomes"] for message in messages), strict=True)
        outcomes: list[list[Outcome]] = [[*map(_from_json, chain(*each))] for each in parts]
        if self._world.rank == 0:
            for each, done in zip(outcomes, own, strict=True):
                for _ in self._accepted(iter(each[len(done) :]), samples[len(done) :]):
                    pass
        return outcomes, {name: [*chain(*(message["seconds"][name] for message in messages))] for name in seconds}

    def _accepted(self, outcomes: Iterator[Outcome], samples: Sequence[Sample]) -> Iterator[Outcome]:
        """Yield the outcomes as they arrive; raise a fault or log it."""
        for outcome, sample in zip(outcomes, samples, strict=True):
            if isinstance(outcome, Fault):
                if self._config.on_reward_error == "raise":
                    raise outcome.error(sample.prompt, sample.response)
                self._warn(outcome, sample)
            yield outcome

    def _warn_of_silence(self, rewards: Sequence[Reward], outcomes: Sequence[Sequence[Outcome]]) -> None:
        """Warn, once each, of rewards that have returned None for every response so far."""
        for reward, own in zip(rewards, outcomes, strict=True):
            before = self._num_silent.get(reward.name, 0)
            self._num_silent[reward.name] = now = -math.inf if any(own) else before + len(own)
            if before < SILENT_RESPONSES <= now:
                logger.warning(
                    "%s has given no value for any of the first %d responses. Is a `return` missing?", reward.who, now
                )

    def _warn(self, fault: Fault, sample: Sample) -> None:
        """Warn about a skipped error, at most a few times per kind."""
        kind = fault.who, fault.what.split(":" if fault.what.startswith("raised ") else " ", 1)[0]
        self._shown[kind] = self._shown.get(kind, 0) + 1
        if self._shown[kind] <= _FAULTS_SHOWN:
            error = fault.error(sample.prompt, sample.response)
            if self._shown[kind] < _FAULTS_SHOWN:
                logger.warning("Skipped a response: %s", error)
            else:
                logger.warning("Skipped a response: %s\nFurther errors like this are only counted.", error)


def warn_of_weights(
    weighting: Weighting, parts: Iterable[str], warned: Collection[str] = (), told: Collection[str] = ()
) -> set[str]:
    """Warn about weights for parts that no reward has returned, once each reward that could has returned any.

    Args:
        weighting: The weights, by any name of a part or a reward.
        parts: The names of the parts so far.
        warned: Names that this has warned of.
        told: Names of which the composer has said that only a dict could have them.

    Returns:
        The names that it has warned of now.
    """
    names = list(parts)
    rewards = [reward.name for reward in weighting.rewards]
    keys = part_keys(weighting.rewards, names)
    silent = {*rewards} - {reward.name for reward in find_owners(weighting.rewards, names).values()}
    known = {*names, *keys.values(), *rewards}
    own = getattr(weighting.reducer, "_weights", None)  # of a WeightedSumReducer; another class may call anything so
    weights = {*weighting.weights, *(map(str, own) if isinstance(own, Mapping) else ())}
    found = set()
    for weight in sorted(weights - known - {*warned} - (set() if keys else {*told})):
        owners = {reward for reward in rewards if weight.startswith(f"{reward}.")} or {*rewards}
        if not owners & silent:
            found.add(weight)
            logger.warning(
                "The weight of %r changes nothing so far: no reward has returned that part.%s Parts: %s.",
                weight, did_you_mean(weight, known), ", ".join(map(repr, names)),
            )  # fmt: skip
    return found


def _as_json(outcome: Outcome | None) -> Any:
    return [outcome.who, outcome.what, outcome.traceback] if isinstance(outcome, Fault) else outcome


def _from_json(value: Any) -> Any:
    return Fault(*value) if isinstance(value, list) else value


def _pool(composer: KonicLLMRewardComposer, config: TrainingConfig) -> RewardPool | RemoteRewardPool:
    given = composer, config.reward_workers, config.reward_timeout_seconds
    if config.reward_resources is None or not is_connected():
        return RewardPool(*given)
    return RemoteRewardPool(*given, config.reward_resources)


@contextlib.contextmanager
def warn_if_slow(reward: Reward, count: int) -> Iterator[list[Outcome]]:
    """Within the block, warn if the reward runs for over 30 s, and name the response that it is working on.

    Yields:
        The list to add finished outcomes to; its length gives the position of the current response.
    """
    done: list[Outcome] = []

    def warn() -> None:
        alone = reward.shape == "sample" and not reward.is_async
        where = f"response {len(done) + 1} of {count}" if alone else f"{count} responses at once"
        advice = " To stop a reward that hangs, set TrainingConfig(reward_workers=2, reward_timeout_seconds=10)."
        hint = "" if reward.is_model else advice
        logger.warning("%s has been running for %.0f s (%s).%s", reward.who, SLOW_SECONDS, where, hint)

    timer = threading.Timer(SLOW_SECONDS, warn)
    timer.daemon = True
    timer.start()
    try:
        yield done
    finally:
        timer.cancel()


def require_fitting(scores: Scores, config: TrainingConfig, prompts: Sequence[Prompt]) -> None:
    """Check that rewards have the sign that the algorithm needs.

    Raises:
        RewardError: One is below 0, and the algorithm divides by their mean.
    """
    if config.algorithm_row.advantages != "group_mean_normalised":
        return
    for prompt, reward in zip(prompts, scores.rewards, strict=True):
        if reward < 0:
            raise RewardError(
                f"algorithm={config.algorithm!r} divides by the mean reward of the responses to a prompt, so every "
                f"reward has to be at least 0: the response to dataset row {prompt.row}, prompt {prompt.text[:100]!r}, "
                f"got {reward:g}. Add a constant to the rewards, or use algorithm='grpo'."
            )


def require_errors_within(history: Sequence[FinetuningIterationResult], scores: Scores, config: TrainingConfig) -> None:
    """Check that rewards have failed on at most max_error_rate of the last 100 responses.

    If there are fewer than 100 responses, the missing ones count as scored without a fault.

    Raises:
        RewardError: Rewards have failed on more responses than that. The message shows the last fault.
    """
    counts = [(result.num_reward_errors, result.num_samples) for result in history]
    errors = seen = 0
    for failed, size in reversed([*counts, (scores.num_faults, len(scores.rewards))]):
        if seen >= ERROR_WINDOW:
            break
        errors, seen = errors + failed, seen + size
    if errors > config.max_error_rate * max(seen, ERROR_WINDOW) + 1e-9:  # 0.29 × 100 is less than 29 in floats
        raise _too_many_errors(
            f"Rewards failed on {errors} of the last {seen} responses, more than max_error_rate="
            f"{config.max_error_rate:g} of {max(seen, ERROR_WINDOW)}.",
            scores,
        )


def _too_many_errors(problem: str, scores: Scores) -> RewardError:
    """The error, with the last fault of a batch if it has one."""
    last = next(fault for fault in reversed(scores.faults or [None]) if fault) if scores.num_faults else None
    detail = f" The last error: {last.who} {last.what}" if last else ""
    return RewardError(f"{problem}{detail}", *(last.traceback_lines if last else ()))
