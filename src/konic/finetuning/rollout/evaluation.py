"""Prompts -> Evaluation: samples a policy's responses to given prompts and scores them.

The same prompts get the same random numbers every time, so evaluations before and after training differ only because of
the policy.
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
from konic.finetuning.rollout.rollout import make_records, score_under_reference
from konic.finetuning.rollout.sampler import RandomKey, Sampler, Samples, SpecialTokens

BATCH_SIZE = 64
"""Prompts sampled at once. On a CPU, a decode step of 64 rows takes about twice as long as a step of 8 rows."""
MICRO_BATCH_SIZE = 16
"""Whole sequences that the reference reads in one forward pass."""


def respond(
    policy: Policy,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    generation: GenerationConfig,
    special: SpecialTokens,
    seed: int,
) -> list[Sample]:
    """Return a response of the sampler to each of the prompts [N].

    The random numbers depend on the seed and on the dataset row of each prompt.
    """
    batches = _sample_in_batches(policy, sampler, prompts, generation, special, seed)
    return [record for _, _, records in batches for record in records]


def evaluate(
    policy: Policy,
    sampler: Sampler,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    generation: GenerationConfig,
    special: SpecialTokens,
    seed: int,
    moments: Mapping[str, RunningMoments],
    samples_reference: bool = False,
) -> Evaluation:
    """Sample a response to every prompt, as :func:`respond` does, and score it. `moments` is not changed.

    `samples_reference` says that the sampler samples from the reference, which is the policy before training. Its KL is
    0 and is not computed.
    """
    all_records: list[Sample] = []
    kls: list[float] = []
    for batch, samples, records in _sample_in_batches(policy, sampler, prompts, generation, special, seed):
        all_records += records
        if samples_reference:
            kls += [0.0] * len(records)
        else:
            kl = score_under_reference(policy, batch, samples, generation.temperature, MICRO_BATCH_SIZE).kl
            kls += kl.sum(dim=1).tolist()
    scores = scorer.score(all_records, moments)
    scorer.require_error_rate([], scores)
    return Evaluation(
        prompts=[record.prompt for record in all_records],
        responses=[record.response for record in all_records],
        rewards=scores.rewards,
        breakdown=scores.breakdown,
        kl_per_response=kls,
        response_lengths=[len(record.token_ids) for record in all_records],
        errors=scores.errors,
    )


def _sample_in_batches(
    policy: Policy,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    generation: GenerationConfig,
    special: SpecialTokens,
    seed: int,
) -> Iterator[tuple[PromptBatch, Samples, list[Sample]]]:
    for start in range(0, len(prompts), BATCH_SIZE):
        part = prompts[start : start + BATCH_SIZE]
        batch = make_prompt_batch(part, policy.tokenizer, generation.max_prompt_length, special.pad, policy.device)
        samples = sampler(batch, generation, RandomKey(seed, iteration=0))
        yield batch, samples, make_records(batch, samples, policy, generation, special)
