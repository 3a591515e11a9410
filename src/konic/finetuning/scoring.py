"""Prompts and responses -> Scores by a run's settings: here or in workers, stopping at a fault or skipping it."""

import contextlib
import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from konic.finetuning.config import TrainingConfig
from konic.finetuning.dataset import Prompt
from konic.finetuning.errors import RewardError
from konic.finetuning.moments import RunningMoments
from konic.finetuning.results import Evaluation, FinetuningIterationResult
from konic.finetuning.reward_calls import RESERVED, Columns, Fault, Outcome, Parts, Reward, call_reward
from konic.finetuning.reward_pool import RewardPool
from konic.finetuning.rewards import (
    KonicLLMRewardComposer,
    breakdown_of,
    merged,
    owners_of,
    rewards_of,
    total_of,
)

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

    def scored(self) -> list[float]:
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
        self,
        prompts: Sequence[Prompt],
        texts: list[str],
        responses: list[str],
        moments: Mapping[str, RunningMoments] | None = None,
        learns: bool = False,
    ) -> Scores:
        """The rewards of a batch; a row's other columns, and `messages` of a chat, go to whoever asks.

        Args:
            prompts: [B] rows of the dataset.
            texts: [B] what the model read of them.
            responses: [B].
            moments: Of the parts that are normalised, so far; where there are none yet, the batch's own are taken.
            learns: Count the batch's values in before normalising.

        Raises:
            RewardError: A reward failed on a sample and on_reward_error is "raise", or a reducer failed.
        """
        outcomes = self._outcomes(texts, responses, columns_of(prompts))
        samples, faults = merged(outcomes, len(texts)), first_faults(outcomes, len(texts))
        given = dict(moments or {})
        counted = [parts for parts, fault in zip(samples, faults, strict=True) if not fault]
        known = moments_after(self._composer, given if learns else {}, counted)
        known |= {} if learns else given
        rewards = totals_of(self._composer, samples, faults, texts, responses, known)
        return Scores(rewards, breakdown_of(samples), faults, known if learns else given)

    def _outcomes(self, texts: list[str], responses: list[str], columns: Columns) -> list[list[Outcome]]:
        """Of every reward, its outcome on each sample; with on_reward_error="raise" there is no fault among them."""
        rewards = rewards_of(self._composer)
        isolated = [reward for reward in rewards if self._config.reward_workers and not reward.is_model]
        coming = self._pool.submit(isolated, texts, responses, columns) if isolated else {}
        coming |= {r.name: call_reward(r, texts, responses, columns) for r in rewards if r.name not in coming}
        by_name, found = {reward.name: reward for reward in rewards}, {}
        for name, outcomes in coming.items():
            with contextlib.closing(outcomes), named_if_slow(by_name[name], len(texts)) as done:  # type: ignore[type-var]
                for outcome in self._accepted(outcomes, texts, responses):
                    done.append(outcome)
            found[name] = done
        return [found[reward.name] for reward in rewards]

    def _accepted(self, outcomes: Iterator[Outcome], texts: list[str], responses: list[str]) -> Iterator[Outcome]:
        """The outcomes as they come; a fault is raised or told."""
        for outcome, text, response in zip(outcomes, texts, responses, strict=True):
            if isinstance(outcome, Fault):
                if self._config.on_reward_error == "raise":
                    raise outcome.error(text, response)
                self._show(outcome, text, response)
            yield outcome

    def _show(self, fault: Fault, text: str, response: str) -> None:
        """Tell a fault that is skipped, the first few of a kind."""
        kind = fault.who, fault.what.split(":" if fault.what.startswith("raised ") else " ", 1)[0]
        self._shown[kind] = self._shown.get(kind, 0) + 1
        if self._shown[kind] <= _FAULTS_SHOWN:
            last = " Further ones like it are only counted." if self._shown[kind] == _FAULTS_SHOWN else ""
            logger.warning("Skipped a response: %s%s", fault.error(text, response), last)


@contextlib.contextmanager
def named_if_slow(reward: Reward, count: int) -> Iterator[list[Outcome]]:
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


def columns_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The rows' other columns [B] each, None where a row has none; with chats among them, `messages` of those alone."""
    taken = (*RESERVED, "messages")
    names = dict.fromkeys(str(name) for prompt in prompts for name in prompt.columns if name not in taken)
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    if any(not isinstance(prompt.content, str) for prompt in prompts):
        columns["messages"] = [prompt.content if not isinstance(prompt.content, str) else None for prompt in prompts]
    return columns


def moments_after(
    composer: KonicLLMRewardComposer, moments: Mapping[str, RunningMoments], samples: Sequence[Parts]
) -> dict[str, RunningMoments]:
    """The running moments of every part that is normalised, with a batch's values counted in."""
    after = dict(moments)
    for part, reward in owners_of(composer, dict.fromkeys(name for parts in samples for name in parts)).items():
        if reward.normalize:
            values = [parts[part] for parts in samples if part in parts]
            after[part] = after.get(part, RunningMoments()).after(values)
    return after


def moments_of(composer: KonicLLMRewardComposer, evaluation: Evaluation | None) -> dict[str, RunningMoments]:
    """The moments of an evaluation's own values, by which later ones are put on its scale; none without any."""
    if evaluation is None:
        return {}
    samples = [
        {name: values[row] for name, values in evaluation.breakdown.items() if not math.isnan(values[row])}
        for row, reward in enumerate(evaluation.rewards)
        if not math.isnan(reward)
    ]
    return moments_after(composer, {}, samples)


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


def totals_of(
    composer: KonicLLMRewardComposer,
    samples: Sequence[Parts],
    faults: Sequence[Fault | None],
    texts: Sequence[str],
    responses: Sequence[str],
    moments: Mapping[str, RunningMoments],
) -> list[float]:
    """The reward of each sample; NaN where a reward failed."""
    return [
        math.nan if fault else total_of(composer, parts, text, response, moments)
        for parts, fault, text, response in zip(samples, faults, texts, responses, strict=True)
    ]


def first_faults(outcomes: Sequence[Sequence[Outcome]], count: int) -> list[Fault | None]:
    """What failed first on each sample, over all rewards."""
    return [
        next((of_one[index] for of_one in outcomes if isinstance(of_one[index], Fault)), None)  # type: ignore[misc]
        for index in range(count)
    ]
