"""Prompts -> Evaluation: samples a policy's responses to given prompts and scores them.

The same prompts get the same random numbers every time, so evaluations before and after training differ only because of
the policy.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from konic.finetuning.config import GenerationConfig
from konic.finetuning.data.prompts import Prompt
from konic.finetuning.data.samples import Sample
from konic.finetuning.data.tokenization import make_prompt_batch, warn_of_cuts
from konic.finetuning.models.policy import Policy
from konic.finetuning.results.evaluation import Evaluation
from konic.finetuning.rewards.moments import RunningMoments
from konic.finetuning.rewards.scoring import Scorer, Scores
from konic.finetuning.rollout.rollout import make_records, score_under_reference
from konic.finetuning.rollout.sampler import RandomKey, Sampler, SpecialTokens
from konic.finetuning.rollout.shares import share_samples
from konic.finetuning.system.world import ALONE, World

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
    world: World = ALONE,
) -> list[Sample]:
    """Return a response of the sampler to each of the prompts [N].

    The random numbers depend on the seed and on the dataset row of each prompt.
    """
    batches = _sample_in_batches(policy, sampler, prompts, generation, special, seed, with_kl=False, world=world)
    return [record for records, _ in batches for record in records]


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
    world: World = ALONE,
    warns_of_cuts: bool = True,
) -> Evaluation:
    """Sample a response to every prompt, as :func:`respond` does, and score it. `moments` is not changed.

    `samples_reference` says that the sampler samples from the reference, which is the policy before training. Its KL is
    0 and is not computed. `warns_of_cuts` says that prompts which are cut off are a warning.
    """
    all_records: list[Sample] = []
    kls: list[float] = []
    batches = _sample_in_batches(
        policy, sampler, prompts, generation, special, seed, with_kl=not samples_reference, world=world,
        warns_of_cuts=warns_of_cuts,
    )  # fmt: skip
    for records, kl in batches:
        all_records += records
        kls += kl
    scores = scorer.score(all_records, moments)
    scorer.require_fit_evaluation(scores)
    return make_evaluation(all_records, kls, scores)


def make_evaluation(records: Sequence[Sample], kl_per_response: list[float], scores: Scores) -> Evaluation:
    """Return the evaluation of responses [N], from the KL of each, in nats, and their scores."""
    return Evaluation(
        prompts=[record.prompt for record in records],
        responses=[record.response for record in records],
        rewards=scores.rewards,
        breakdown=scores.breakdown,
        kl_per_response=kl_per_response,
        response_lengths=[len(record.token_ids) for record in records],
        errors=scores.errors,
    )


def _sample_in_batches(
    policy: Policy,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    generation: GenerationConfig,
    special: SpecialTokens,
    seed: int,
    with_kl: bool,
    world: World,
    warns_of_cuts: bool = True,
) -> Iterator[tuple[list[Sample], list[float]]]:
    """Yield the responses of each batch, and their KL in nats, 0 without `with_kl`. Each process samples a part."""
    for start in range(0, len(prompts), BATCH_SIZE):
        part, earlier = prompts[start : start + BATCH_SIZE], prompts[:start]
        batch = make_prompt_batch(
            part, policy.tokenizer, generation.max_prompt_length, special.pad, policy.device, earlier
        )
        if warns_of_cuts:
            warns_of_cuts = not warn_of_cuts(batch, generation.max_prompt_length)
        rows = world.own_rows(len(batch))
        own = batch.part(rows or range(1))
        kl = torch.zeros(len(own), device=policy.device)
        with policy.sharding.rollout():
            drawn = sampler(own, generation, RandomKey(seed, iteration=0))
            if with_kl:
                scored, _ = score_under_reference(policy, own, drawn, generation.temperature, MICRO_BATCH_SIZE)
                kl = scored.kl.sum(dim=1)
        samples, numbers = share_samples(world, rows, drawn, {"kl": kl})
        yield make_records(batch, samples, policy, generation, special), numbers["kl"].tolist()
