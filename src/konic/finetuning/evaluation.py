"""Prompts -> Evaluation: responses of a policy to given prompts, and what they are worth.

The same prompts get the same random numbers every time, so that before and after differ by the policy alone.
"""

from collections.abc import Iterator, Mapping, Sequence

from konic.finetuning.config import GenerationConfig
from konic.finetuning.dataset import Prompt
from konic.finetuning.moments import RunningMoments
from konic.finetuning.policy import Policy
from konic.finetuning.prompts import PromptBatch, make_prompt_batch
from konic.finetuning.results import Evaluation
from konic.finetuning.rollout import scored
from konic.finetuning.sampling import RandomKey, Samples, SpecialTokens, sample
from konic.finetuning.scoring import Scorer

BATCH_SIZE = 64
"""Prompts sampled at once: on a CPU a decode step of 64 takes about twice as long as one of 8."""
MICRO_BATCH_SIZE = 16
"""Sequences read whole at once by the reference."""


def respond(
    policy: Policy,
    prompts: Sequence[Prompt],
    generation: GenerationConfig,
    special: SpecialTokens,
    seed: int,
    of_reference: bool = False,
) -> Iterator[tuple[PromptBatch, Samples]]:
    """Responses to the prompts, 64 at a time, of the policy or of its reference.

    The random numbers depend on the seed and each prompt's row.
    """
    for start in range(0, len(prompts), BATCH_SIZE):
        part = prompts[start : start + BATCH_SIZE]
        batch = make_prompt_batch(part, policy.tokenizer, generation.max_prompt_length, special.pad, policy.device)
        with policy.merged(of_reference) as model:
            samples = sample(model, policy.tokenizer, batch, generation, special, RandomKey(seed, 0))
        yield batch, samples


def evaluate(
    policy: Policy,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    generation: GenerationConfig,
    special: SpecialTokens,
    seed: int,
    moments: Mapping[str, RunningMoments],
    of_reference: bool = False,
) -> Evaluation:
    """Sample a response to every prompt, as :func:`respond` does, and score it; `moments` stay as they are.

    `of_reference` tries the reference instead, which is the policy before training: its KL is 0 and not computed.
    """
    texts: list[str] = []
    responses: list[str] = []
    kls: list[float] = []
    lengths: list[int] = []
    for batch, samples in respond(policy, prompts, generation, special, seed, of_reference):
        texts += batch.texts
        responses += samples.texts
        kl = None if of_reference else scored(policy, batch, samples, generation.temperature, MICRO_BATCH_SIZE).kl
        kls += [0.0] * len(batch) if kl is None else kl.sum(dim=1).tolist()
        lengths += samples.response_mask.sum(dim=1).tolist()
    scores = scorer.score(prompts, texts, responses, moments)
    scorer.require_few_faults([], scores)
    return Evaluation(texts, responses, scores.rewards, scores.breakdown, kls, lengths, scores.errors)
