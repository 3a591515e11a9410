"""PromptBatch -> Rollout: responses, and what the policy and the reference make of every token of them.

Shapes: B sequences, P prompt tokens, R response tokens. A mask is True where a token counts.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from konic.finetuning.config import GenerationConfig
from konic.finetuning.grouping import groups_of_like_length
from konic.finetuning.language_model import LanguageModel, map_tokens
from konic.finetuning.losses import entropy_and_kl_, log_softmax_
from konic.finetuning.packing import rows_to_pack_for
from konic.finetuning.policy import Policy
from konic.finetuning.prompts import PromptBatch
from konic.finetuning.sampling import RandomKey, Samples, SpecialTokens, sample


@dataclass(frozen=True)
class Rollout:
    """Responses under the policy before its update. Tensors [B, R] are 0 outside `response_mask`."""

    batch: PromptBatch
    samples: Samples
    temperature: float
    """Divides the logits in every number below, as it did in sampling."""
    in_full_precision: bool
    """False where the model computes in 16 bits, so that rounding alone moves log-probs by more."""
    log_probs: Tensor
    """[B, R] log π(token) by what sampled it, or in 16 bits by what is trained: the ratio's denominator."""
    ref_log_probs: Tensor
    """[B, R] log π_ref(token)."""
    kl: Tensor
    """[B, R] exact KL(π ‖ π_ref) of the distribution each token was drawn from, nats."""
    entropy: Tensor
    """[B, R] entropy of that distribution, nats."""
    values: Tensor
    """[B, R] the value head's expectation before each token."""
    ref_hidden: Tensor
    """[B, R, H] the reference's last hidden states, from which its distributions are made again for a KL in the loss;
    any value outside `response_mask`."""

    @property
    def response_mask(self) -> Tensor:
        """[B, R] True on response tokens."""
        return self.samples.response_mask

    @property
    def texts(self) -> list[str]:
        """The responses as text."""
        return self.samples.texts

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
    batch: PromptBatch,
    generation: GenerationConfig,
    special: SpecialTokens,
    key: RandomKey,
    micro_batch_size: int | None = None,
) -> Rollout:
    """Sample a response to every prompt and score it under policy and reference.

    Args:
        policy: What samples.
        batch: The prompts.
        generation: How to sample.
        special: End and padding tokens.
        key: Where the random numbers come from.
        micro_batch_size: Sequences scored at once, as many as the update takes; all if None.
    """
    packed_for = rows_to_pack_for(policy.language_model.causal_lm, len(batch), generation.max_new_tokens)
    with policy.language_model.head_packed(packed_for):  # for both: most of scoring is the head's products
        with policy.merged() as model:
            samples = sample(model, policy.tokenizer, batch, generation, special, key)
        return scored(policy, batch, samples, generation.temperature, micro_batch_size)


def scored(
    policy: Policy, batch: PromptBatch, samples: Samples, temperature: float, micro_batch_size: int | None = None
) -> Rollout:
    """What policy and reference make of responses that the policy has just sampled."""
    in_full_precision = policy.language_model.causal_lm.dtype.itemsize >= 4
    hidden = samples.hidden if in_full_precision else _whole(policy.language_model, batch, samples, micro_batch_size)
    with policy.reference() as reference:
        ref_hidden = _whole(reference, batch, samples, micro_batch_size)
    tensors = *_score(policy, samples, hidden, ref_hidden, temperature), ref_hidden
    return Rollout(batch, samples, temperature, in_full_precision, *tensors)


def with_values_shifted(rollout: Rollout, shift: float) -> Rollout:
    """The rollout as a value head whose bias is higher by `shift` would have valued it.

    A value head that knows nothing starts at the first batch's mean score. From 0 it would take the clipped value loss
    several iterations to get there, in which advantages tell late tokens from early ones rather than good responses
    from bad. (N normalises rewards to mean 0 before training, to the same end.)
    """
    return replace(rollout, values=torch.where(rollout.response_mask, rollout.values + shift, 0.0))


@torch.no_grad()
def _whole(model: LanguageModel, batch: PromptBatch, samples: Samples, micro_batch_size: int | None) -> Tensor:
    """The hidden states [B, R, H] before every response token, from whole sequences rather than a cache."""
    hidden = torch.zeros_like(samples.hidden)
    ids = torch.cat([batch.ids, samples.response_ids], dim=1)
    mask = torch.cat([batch.mask, samples.response_mask], dim=1)
    for rows in groups_of_like_length(batch.mask, samples.response_mask, micro_batch_size):
        hidden[rows] = model.response_hidden(ids[rows], mask[rows], hidden.shape[1])
    return hidden


@torch.no_grad()
def _score(
    policy: Policy, samples: Samples, hidden: Tensor, ref_hidden: Tensor, temperature: float
) -> tuple[Tensor, ...]:
    """Log-probs, reference log-probs, exact KL, entropy and values [B, R] of the tokens sampled."""
    model = policy.language_model

    def score(hidden: Tensor, ref_hidden: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        both = [
            log_softmax_(logits, temperature) for logits in (model.logits(hidden), policy.reference_logits(ref_hidden))
        ]
        log_probs, ref_log_probs = (every.gather(-1, tokens[:, None]).squeeze(-1) for every in both)
        entropy, kl = entropy_and_kl_(*both)
        return log_probs, ref_log_probs, kl, entropy, policy.values(hidden)

    return map_tokens(score, samples.response_mask, model.vocabulary_size, hidden, ref_hidden, samples.response_ids)
