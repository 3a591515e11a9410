"""Prompts and responses -> Scores by a run's settings: here or in workers, stopping at a fault or skipping it."""

import contextlib
import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from konic.finetuning.config import TrainingConfig
from konic.finetuning.data.samples import Sample
from konic.finetuning.errors import RewardError
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.rewards.calls import call_reward
from konic.finetuning.rewards.composer import KonicLLMRewardComposer, describe_weighting
from konic.finetuning.rewards.moments import RunningMoments
from konic.finetuning.rewards.outcomes import Fault, Outcome, Reward
from konic.finetuning.rewards.totals import (
    collect_breakdown,
    collect_parts,
    compute_totals,
    first_faults,
    moments_after,
)
from konic.finetuning.rewards.workers import RewardPool

logger = logging.getLogger(__name__)

SLOW_SECONDS = 30.0
"""After this long in one reward it is named on screen."""
ERROR_WINDOW = 100
"""Responses over which max_error_rate is taken."""
_FAULTS_SHOWN = 3


@dataclass(frozen=True)
class Scores:
    """The rewards of a batch of B responses."""

    rewards: list[float]
    """[B] each sample's reward; NaN where every part abstained or one failed."""
    breakdown: dict[str, list[float]]
    """Each part's own values [B], before normalising and weights; NaN where it abstained or failed."""
    faults: list[Fault | None] = field(default_factory=list)
    """[B] what failed first on each sample; empty where nothing can."""
    moments: dict[str, RunningMoments] = field(default_factory=dict)
    """Of every part that is normalised, with this batch counted in."""
    is_dropped: bool = False
    """True where a number of the batch is not finite and nothing is to be learned from it."""

    @property
    def has_score(self) -> list[bool]:
        """[B] False where there is no reward."""
        return [not self.is_dropped and not math.isnan(reward) for reward in self.rewards]

    @property
    def num_faults(self) -> int:
        """Samples on which a reward failed."""
        return sum(fault is not None for fault in self.faults)

    @property
    def errors(self) -> list[str | None]:
        """[B] what failed on each sample, in a line."""
        return [f"{fault.who} {fault.what}" if fault else None for fault in self.faults or [None] * len(self.rewards)]

    def filled(self) -> list[float]:
        """[B] the rewards, 0 where there is none."""
        return [0.0 if math.isnan(reward) else reward for reward in self.rewards]

    def valid_rewards(self) -> list[float]:
        """The rewards of the samples that have one."""
        return [reward for reward in self.rewards if not math.isnan(reward)]


class Scorer:
    """Scores batches by a composer, as a run's settings say; `with` it, worker processes end with the block."""

    def __init__(self, composer: KonicLLMRewardComposer, config: TrainingConfig) -> None:
        self._composer = composer
        self._config = config
        self._pool = RewardPool(composer, config.reward_workers, config.reward_timeout_seconds)
        self._shown: dict[tuple[str, str], int] = {}

    def __enter__(self) -> Self:
        if self._config.reward_workers:
            self._pool.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.close()

    def require_few_faults(self, history: Sequence[FinetuningIterationResult], scores: Scores) -> None:
        """Raise RewardError where rewards have failed on more responses than max_error_rate allows."""
        require_errors_within(history, scores, self._config)

    def score(
        self, samples: Sequence[Sample], moments: Mapping[str, RunningMoments] | None = None, learns: bool = False
    ) -> Scores:
        """The rewards of a batch.

        Args:
            samples: [B].
            moments: Of the parts that are normalised, so far; where there are none yet, the batch's own are taken.
            learns: Count the batch's values in before normalising.

        Raises:
            RewardError: A reward failed on a sample and on_reward_error is "raise", or a reducer failed.
        """
        weighting = describe_weighting(self._composer)
        outcomes = self._outcomes(weighting.rewards, samples)
        parts, faults = collect_parts(outcomes, len(samples)), first_faults(outcomes, len(samples))
        given = dict(moments or {})
        counted = [own for own, fault in zip(parts, faults, strict=True) if not fault]
        known = moments_after(weighting.rewards, given if learns else {}, counted)
        known |= {} if learns else given
        rewards = compute_totals(weighting, parts, faults, samples, known)
        return Scores(
            rewards=rewards, breakdown=collect_breakdown(parts), faults=faults, moments=known if learns else given
        )

    def _outcomes(self, rewards: Sequence[Reward], samples: Sequence[Sample]) -> list[list[Outcome]]:
        """Of every reward, its outcome on each sample; with on_reward_error="raise" there is no fault among them."""
        isolated = [reward for reward in rewards if self._config.reward_workers and not reward.is_model]
        coming = self._pool.submit(isolated, samples) if isolated else {}
        coming |= {r.name: call_reward(r, samples) for r in rewards if r.name not in coming}
        by_name, found = {reward.name: reward for reward in rewards}, {}
        for name, outcomes in coming.items():
            with contextlib.closing(outcomes), warn_if_slow(by_name[name], len(samples)) as done:  # type: ignore[type-var]
                for outcome in self._accepted(outcomes, samples):
                    done.append(outcome)
            found[name] = done
        return [found[reward.name] for reward in rewards]

    def _accepted(self, outcomes: Iterator[Outcome], samples: Sequence[Sample]) -> Iterator[Outcome]:
        """The outcomes as they come; a fault is raised or reported."""
        for outcome, sample in zip(outcomes, samples, strict=True):
            if isinstance(outcome, Fault):
                error = outcome.error(sample.prompt, sample.response)
                if self._config.on_reward_error == "raise":
                    raise error
                self._warn(outcome, error)
            yield outcome

    def _warn(self, fault: Fault, error: RewardError) -> None:
        """Warn about a skipped error, at most a few times per kind."""
        kind = fault.who, fault.what.split(":" if fault.what.startswith("raised ") else " ", 1)[0]
        self._shown[kind] = self._shown.get(kind, 0) + 1
        if self._shown[kind] <= _FAULTS_SHOWN:
            last = " Further ones like it are only counted." if self._shown[kind] == _FAULTS_SHOWN else ""
            logger.warning("Skipped a response: %s%s", error, last)


@contextlib.contextmanager
def warn_if_slow(reward: Reward, count: int) -> Iterator[list[Outcome]]:
    """Within it a reward that takes over 30 s is named on screen, with the response it is at, after those done."""
    done: list[Outcome] = []

    def tell() -> None:
        alone = reward.shape == "sample" and not reward.is_async
        where = f"response {len(done) + 1} of {count}" if alone else f"{count} responses at once"
        advice = "A reward that hangs can be stopped: TrainingConfig(reward_workers=2, reward_timeout_seconds=10)."
        told = "" if reward.is_model else f" {advice}"
        logger.warning("%s has been running for %.0f s (%s).%s", reward.who, SLOW_SECONDS, where, told)

    timer = threading.Timer(SLOW_SECONDS, tell)
    timer.daemon = True
    timer.start()
    try:
        yield done
    finally:
        timer.cancel()


def require_errors_within(history: Sequence[FinetuningIterationResult], scores: Scores, config: TrainingConfig) -> None:
    """See that rewards have failed on no more than max_error_rate of the last 100 responses.

    Before there are as many, the rate is taken as if the rest had been scored without a fault.

    Raises:
        RewardError: They have, and what failed last.
    """
    counts = [(result.num_reward_errors, result.num_samples) for result in history]
    errors = seen = 0
    for failed, size in reversed([*counts, (scores.num_faults, len(scores.rewards))]):
        if seen >= ERROR_WINDOW:
            break
        errors, seen = errors + failed, seen + size
    if errors > config.max_error_rate * max(seen, ERROR_WINDOW) + 1e-9:  # 0.29 × 100 is less than 29 in floats
        last = next(fault for fault in reversed(scores.faults or [None]) if fault) if scores.num_faults else None
        told = f" The last one: {last.who} {last.what}\n{last.traceback}" if last else ""
        raise RewardError(
            f"Rewards failed on {errors} of the last {seen} responses, more than max_error_rate="
            f"{config.max_error_rate:g} of {max(seen, ERROR_WINDOW)}.{told}".rstrip()
        )
