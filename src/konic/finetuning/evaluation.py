"""Prompts -> Evaluation: rewards of a policy on given prompts, and what changed between two of them.

The same prompts get the same random numbers every time, so that before and after differ by the policy alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from konic.finetuning.config import GenerationConfig
from konic.finetuning.dataset import Prompt
from konic.finetuning.policy import Policy
from konic.finetuning.prompts import make_prompt_batch
from konic.finetuning.rewards import KonicLLMRewardComposer, Scores, score
from konic.finetuning.rollout import rollout
from konic.finetuning.sampling import RandomKey, SpecialTokens

BATCH_SIZE = 32
"""Prompts sampled at once: a batch of 32 costs a CPU about a third more time per token step than one of 8."""


@dataclass(frozen=True)
class Evaluation:
    """Responses to N prompts and what they were worth."""

    prompts: list[str]
    responses: list[str]
    scores: Scores
    kl_per_response: list[float]
    """[N] exact KL from the reference, summed over the response, nats."""
    response_lengths: list[int]
    """[N] tokens, the end-of-sequence token counted."""

    @property
    def reward_mean(self) -> float:
        """Over the responses that have a reward."""
        return mean(self.scores.scored())

    @property
    def breakdown(self) -> dict[str, float]:
        """Mean of each reward, before weights, where it did not abstain."""
        return breakdown_means(self.scores)


@dataclass(frozen=True)
class Interval:
    """A mean with a 95 % confidence interval."""

    mean: float
    low: float
    high: float


def evaluate(
    policy: Policy,
    composer: KonicLLMRewardComposer,
    prompts: Sequence[Prompt],
    generation: GenerationConfig,
    special: SpecialTokens,
    seed: int,
) -> Evaluation:
    """Sample a response to every prompt and score it. The random numbers depend on the seed and each prompt's row."""
    texts, responses, kls, lengths = [], [], [], []
    for start in range(0, len(prompts), BATCH_SIZE):
        part = prompts[start : start + BATCH_SIZE]
        batch = make_prompt_batch(part, policy.tokenizer, generation.max_prompt_length, special.pad, policy.device)
        rolled = rollout(policy, batch, generation, special, RandomKey(seed, 0))
        texts += batch.texts
        responses += rolled.texts
        kls += rolled.kl.sum(dim=1).tolist()
        lengths += rolled.response_mask.sum(dim=1).tolist()
    return Evaluation(texts, responses, score(composer, prompts, texts, responses), kls, lengths)


def mean(values: Sequence[float]) -> float:
    """The mean, NaN of none."""
    return math.fsum(values) / len(values) if values else math.nan


def breakdown_means(scores: Scores) -> dict[str, float]:
    """Mean of each part over the samples where it did not abstain."""
    return {
        name: mean([value for value in values if not math.isnan(value)]) for name, values in scores.breakdown.items()
    }


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], seed: int = 0, resamples: int = 10_000
) -> Interval:
    """The mean of after − before, with the percentile bootstrap's 95 % interval over pairs (Efron 1979).

    Args:
        before: [N] one value per prompt; a pair with a NaN is left out.
        after: [N] for the same prompts.
        seed: Seeds the resampling.
        resamples: How many times the N pairs are drawn anew, with replacement.
    """
    pairs = zip(before, after, strict=True)
    gains = np.array([late - early for early, late in pairs if not math.isnan(late - early)])
    if not len(gains):
        return Interval(math.nan, math.nan, math.nan)
    generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    means = gains[generator.integers(len(gains), size=(resamples, len(gains)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(gains.mean()), float(low), float(high))


def distinct_n(responses: Sequence[str], n: int = 2) -> float:
    """Different word n-grams over all word n-grams of the responses; near 0 if one phrase returns (Li et al. 2016)."""
    grams = [
        tuple(words[start : start + n])
        for words in (response.lower().split() for response in responses)
        for start in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0
