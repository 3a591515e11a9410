"""PromptBatch -> Rollout: responses, and how the policy and the reference score every token of them.

Shapes: B sequences, P prompt tokens, R response tokens, H hidden size. A mask is True where a token counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from konic.finetuning.config import GenerationConfig
from konic.finetuning.data.samples import Sample, make_samples
from konic.finetuning.data.tokenization import PromptBatch
from konic.finetuning.models.distributions import entropy_and_kl_, log_softmax_
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.length_groups import group_by_length
from konic.finetuning.models.policy import Policy
from konic.finetuning.models.prepacked import rows_to_prepack
from konic.finetuning.models.token_scores import map_tokens
from konic.finetuning.rollout.sampler import RandomKey, Sampler, Samples, SpecialTokens, decode_responses


@dataclass(frozen=True, kw_only=True)
class TokenNumbers:
    """What policy and reference make of the tokens sampled. Tensors are [B, R] and 0 outside the response mask."""

    log_probs: Tensor
    """log π(token): the denominator of the ratio. From the hidden states of the sampler where it gives them and the
    model computes in fp32 or better, else from a pass over whole sequences."""
    ref_log_probs: Tensor
    """log π_ref(token)."""
    kl: Tensor
    """Exact KL(π ‖ π_ref) of the distribution each token was drawn from, nats."""
    entropy: Tensor
    """Entropy of that distribution, nats."""
    values: Tensor
    """The expectation of the value head before each token, in units of reward."""
    ref_hidden: Tensor
    """[B, R, H] the last hidden states of the reference, from which its distributions are made again for a KL in the
    loss; any value outside the response mask."""


@dataclass(frozen=True, kw_only=True)
class Rollout(TokenNumbers):
    """Responses under the policy before its update."""

    batch: PromptBatch
    samples: Samples
    """The responses as tensors."""
    records: Sequence[Sample]
    """[B] The same, one record for each response."""
    temperature: float
    """Divides the logits in all log-probs, KL and entropy, as it did in sampling."""
    in_full_precision: bool
    """False where the model computes in 16 bits, so that rounding alone moves log-probs by more."""

    @property
    def response_mask(self) -> Tensor:
        """[B, R] True on response tokens."""
        return self.samples.response_mask

    @property
    def texts(self) -> list[str]:
        """The responses as text."""
        return [record.response for record in self.records]

    @property
    def ids(self) -> Tensor:
        """[B, P + R] prompts and responses."""
        return torch.cat([self.batch.ids, self.samples.response_ids], dim=1)

    @property
    def mask(self) -> Tensor:
        """[B, P + R] True on tokens of prompts and responses."""
        return torch.cat([self.batch.mask, self.response_mask], dim=1)


def rollout(
    policy: Policy,
    sampler: Sampler,
    batch: PromptBatch,
    generation: GenerationConfig,
    special: SpecialTokens,
    rng_key: RandomKey,
    micro_batch_size: int | None = None,
) -> Rollout:
    """Sample a response to every prompt and score it under policy and reference.

    Args:
        policy: What is trained.
        sampler: What samples responses from it.
        batch: The prompts.
        generation: How to sample.
        special: End and padding tokens.
        rng_key: Where the random numbers come from.
        micro_batch_size: Sequences scored at once, as many as the update takes; all if None.
    """
    prepacked_rows = rows_to_prepack(policy.language_model.causal_lm, len(batch), generation.max_new_tokens)
    with policy.language_model.prepacked_head(prepacked_rows):  # for both: most of scoring is the products of the head
        samples = sampler(batch, generation, rng_key)
        numbers = score_under_reference(policy, batch, samples, generation.temperature, micro_batch_size)
    return Rollout(
        **vars(numbers),
        batch=batch,
        samples=samples,
        records=make_records(batch, samples, policy, generation, special),
        temperature=generation.temperature,
        in_full_precision=_is_full_precision(policy),
    )


def make_records(
    batch: PromptBatch, samples: Samples, policy: Policy, generation: GenerationConfig, special: SpecialTokens
) -> list[Sample]:
    """One record for each response [B]."""
    responses = decode_responses(samples, policy.tokenizer, special, generation.stop)
    return make_samples(batch.prompts, batch.texts, responses, samples.token_ids())


def score_under_reference(
    policy: Policy, batch: PromptBatch, samples: Samples, temperature: float, micro_batch_size: int | None = None
) -> TokenNumbers:
    """How policy and reference score responses that were sampled from the policy as it is now."""
    hidden = samples.hidden if _is_full_precision(policy) else None
    if hidden is None:
        hidden = _response_hidden(policy.language_model, batch, samples, micro_batch_size)
    with policy.reference() as reference:
        ref_hidden = _response_hidden(reference, batch, samples, micro_batch_size)
    return _score(policy, samples, hidden, ref_hidden, temperature)


def _is_full_precision(policy: Policy) -> bool:
    return policy.language_model.causal_lm.dtype.itemsize >= 4


@torch.no_grad()
def _response_hidden(
    model: LanguageModel, batch: PromptBatch, samples: Samples, micro_batch_size: int | None
) -> Tensor:
    """The hidden states [B, R, H] before every response token, from whole sequences rather than a cache."""
    num_rows, num_tokens = samples.response_mask.shape
    ids = torch.cat([batch.ids, samples.response_ids], dim=1)
    mask = torch.cat([batch.mask, samples.response_mask], dim=1)
    hidden: Tensor | None = None
    for rows in group_by_length(batch.mask, samples.response_mask, micro_batch_size):
        found = model.response_hidden(ids[rows], mask[rows], num_tokens)
        if hidden is None:
            hidden = found.new_zeros(num_rows, *found.shape[1:])
        hidden[rows] = found
    assert hidden is not None  # noqa: S101
    return hidden


@torch.no_grad()
def _score(policy: Policy, samples: Samples, hidden: Tensor, ref_hidden: Tensor, temperature: float) -> TokenNumbers:
    """The numbers of the tokens sampled, from the hidden states [B, R, H] of policy and reference before each."""
    model = policy.language_model

    def score(hidden: Tensor, ref_hidden: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        both = [
            log_softmax_(logits, temperature) for logits in (model.logits(hidden), policy.reference_logits(ref_hidden))
        ]
        log_probs, ref_log_probs = (every.gather(-1, tokens[:, None]).squeeze(-1) for every in both)
        entropy, kl = entropy_and_kl_(*both)
        return log_probs, ref_log_probs, kl, entropy, policy.value_head(hidden)

    inputs = hidden, ref_hidden, samples.response_ids
    log_probs, ref_log_probs, kl, entropy, values = map_tokens(
        score, samples.response_mask, model.vocabulary_size, *inputs
    )
    return TokenNumbers(
        log_probs=log_probs, ref_log_probs=ref_log_probs, kl=kl, entropy=entropy, values=values, ref_hidden=ref_hidden
    )
