"""Prompts -> Evaluation: responses of a policy to given prompts, and what they are worth.

The same prompts get the same random numbers every time, so that before and after differ by the policy alone.
"""

from collections.abc import Iterator, Mapping, Sequence

from konic.finetuning.config import GenerationConfig
from konic.finetuning.dataset import Prompt
from konic.finetuning.moments import RunningMoments
from konic.finetuning.policy import Policy
from konic.finetuning.prompts import make_prompt_batch
from konic.finetuning.results import Evaluation
from konic.finetuning.rollout import Rollout, rollout
from konic.finetuning.sampling import RandomKey, SpecialTokens
from konic.finetuning.scoring import Scorer

BATCH_SIZE = 32
"""Prompts sampled at once: a decode step of 32 on a CPU takes about a third longer than one of 8."""


def respond(
    policy: Policy, prompts: Sequence[Prompt], generation: GenerationConfig, special: SpecialTokens, seed: int
) -> Iterator[Rollout]:
    """Responses to the prompts, 32 at a time. The random numbers depend on the seed and each prompt's row."""
    for start in range(0, len(prompts), BATCH_SIZE):
        part = prompts[start : start + BATCH_SIZE]
        batch = make_prompt_batch(part, policy.tokenizer, generation.max_prompt_length, special.pad, policy.device)
        yield rollout(policy, batch, generation, special, RandomKey(seed, 0))


def evaluate(
    policy: Policy,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    generation: GenerationConfig,
    special: SpecialTokens,
    seed: int,
    moments: Mapping[str, RunningMoments],
) -> Evaluation:
    """Sample a response to every prompt, as :func:`respond` does, and score it; `moments` stay as they are."""
    texts, responses, kls, lengths = [], [], [], []
    for part in respond(policy, prompts, generation, special, seed):
        texts += part.batch.texts
        responses += part.texts
        kls += part.kl.sum(dim=1).tolist()
        lengths += part.response_mask.sum(dim=1).tolist()
    scores = scorer.score(prompts, texts, responses, moments)
    scorer.require_few_faults([], scores)
    return Evaluation(texts, responses, scores.rewards, scores.breakdown, kls, lengths, scores.errors)
