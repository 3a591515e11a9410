"""Prompts -> Evaluation: responses of a policy to given prompts, and their rewards.

The same prompts get the same random numbers every time, so that before and after differ by the policy alone.
"""

from collections.abc import Iterator, Mapping, Sequence

from konic.finetuning.config import GenerationConfig
from konic.finetuning.data.prompts import Prompt
from konic.finetuning.data.samples import Sample
from konic.finetuning.data.tokenization import PromptBatch, make_prompt_batch
from konic.finetuning.models.policy import Policy
from konic.finetuning.results.evaluation import Evaluation
from konic.finetuning.rewards.moments import RunningMoments
from konic.finetuning.rewards.scoring import Scorer
from konic.finetuning.rollout.local_sampler import LocalSampler
from konic.finetuning.rollout.rollout import make_records, score_under_reference
from konic.finetuning.rollout.sampler import RandomKey, Samples, SpecialTokens

BATCH_SIZE = 64
"""Prompts sampled at once: on a CPU a decode step of 64 takes about twice as long as one of 8."""
MICRO_BATCH_SIZE = 16
"""Sequences that the reference reads whole at once."""


def respond(
    policy: Policy,
    prompts: Sequence[Prompt],
    generation: GenerationConfig,
    special: SpecialTokens,
    seed: int,
    from_reference: bool = False,
) -> list[Sample]:
    """Responses [N] to the prompts [N], of the policy or of its reference.

    The random numbers depend on the seed and the row of each prompt.
    """
    batches = _sample_in_batches(policy, prompts, generation, special, seed, from_reference)
    return [record for _, _, records in batches for record in records]


def evaluate(
    policy: Policy,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    generation: GenerationConfig,
    special: SpecialTokens,
    seed: int,
    moments: Mapping[str, RunningMoments],
    from_reference: bool = False,
) -> Evaluation:
    """Sample a response to every prompt, as :func:`respond` does, and score it; `moments` stay as they are.

    `from_reference` evaluates the reference instead, which is the policy before training: its KL is 0 and not computed.
    """
    every: list[Sample] = []
    kls: list[float] = []
    for batch, samples, records in _sample_in_batches(policy, prompts, generation, special, seed, from_reference):
        every += records
        if from_reference:
            kls += [0.0] * len(records)
        else:
            kl = score_under_reference(policy, batch, samples, generation.temperature, MICRO_BATCH_SIZE).kl
            kls += kl.sum(dim=1).tolist()
    scores = scorer.score(every, moments)
    scorer.require_few_faults([], scores)
    return Evaluation(
        prompts=[record.prompt for record in every],
        responses=[record.response for record in every],
        rewards=scores.rewards,
        breakdown=scores.breakdown,
        kl_per_response=kls,
        response_lengths=[len(record.token_ids) for record in every],
        errors=scores.errors,
    )


def _sample_in_batches(
    policy: Policy,
    prompts: Sequence[Prompt],
    generation: GenerationConfig,
    special: SpecialTokens,
    seed: int,
    from_reference: bool,
) -> Iterator[tuple[PromptBatch, Samples, list[Sample]]]:
    sampler = LocalSampler(policy, special, from_reference)
    for start in range(0, len(prompts), BATCH_SIZE):
        part = prompts[start : start + BATCH_SIZE]
        batch = make_prompt_batch(part, policy.tokenizer, generation.max_prompt_length, special.pad, policy.device)
        samples = sampler(batch, generation, RandomKey(seed, iteration=0))
        yield batch, samples, make_records(batch, samples, policy, generation, special)
