"""PromptBatch -> Rollout: samples responses and scores every token under the policy and the reference.

Shapes: B sequences, P prompt tokens, R response tokens, H hidden size. A mask is True where a token counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from konic.finetuning.config import GenerationConfig
from konic.finetuning.data.samples import Sample, make_samples
from konic.finetuning.data.tokenization import PromptBatch
from konic.finetuning.models.distributions import entropy_and_kl_, log_softmax_
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.length_groups import group_by_length
from konic.finetuning.models.policy import Policy
from konic.finetuning.models.sharding import NOT_SHARDED, Sharding
from konic.finetuning.models.token_scores import map_tokens, score_tokens
from konic.finetuning.rollout.sampler import RandomKey, Sampler, Samples, SpecialTokens, decode_responses
from konic.finetuning.rollout.shares import pad_rows, share_samples
from konic.finetuning.system.world import ALONE, World


@dataclass(frozen=True, kw_only=True)
class TokenNumbers:
    """Scores of the sampled tokens under policy and reference. Tensors are [B, R] and 0 outside the response mask."""

    log_probs: Tensor
    """log π(token): the denominator of the ratio. Computed from the sampler's hidden states if the sampler returns them
    and the model computes in fp32 or better, else by a pass over whole sequences."""
    ref_log_probs: Tensor
    """log π_ref(token)."""
    kl: Tensor
    """Exact KL(π ‖ π_ref) of the distribution from which each token was drawn, in nats."""
    entropy: Tensor
    """Entropy of the distribution from which each token was drawn, in nats."""
    values: Tensor
    """The value head's estimate before each token, in units of reward."""


@dataclass(frozen=True, kw_only=True)
class States:
    """The last hidden states from which the tokens of O of the B responses were drawn: those that this process sampled.

    Values outside the response mask are arbitrary.
    """

    places: Tensor
    """[B] int64, where the states of a response stand, from 0 to O - 1; -1 if another process has them."""
    hidden: Tensor
    """[O, R, H] of the policy."""
    ref_hidden: Tensor
    """[O, R, H] of the reference. A KL in the loss recomputes the reference's distributions from these states."""

    @classmethod
    def of_all(cls, hidden: Tensor, ref_hidden: Tensor) -> Self:
        """Return the states [B, R, H] of responses that all were sampled here."""
        places = torch.arange(len(hidden), device=hidden.device)
        return cls(places=places, hidden=hidden, ref_hidden=ref_hidden)

    def among(self, rows: range, response_mask: Tensor) -> Self:
        """Return these states as those of some rows of all responses, of which the mask [B, R] is given."""
        num_rows, length = response_mask.shape
        if len(rows) == num_rows:
            return self
        places = torch.full((num_rows,), -1, device=response_mask.device)
        places[rows.start : rows.stop] = self.places[: len(rows)]
        both = (pad_rows(states, length) for states in (self.hidden, self.ref_hidden))
        return type(self)(places=places, hidden=next(both), ref_hidden=next(both))

    def own(self, rows: Tensor) -> Tensor:
        """Return those of the rows whose states are here, in order."""
        return rows[self.places[rows] >= 0]


@dataclass(frozen=True, kw_only=True)
class Rollout(TokenNumbers):
    """Responses of the policy, with their scores, before its update."""

    states: States
    batch: PromptBatch
    samples: Samples
    """The responses as tensors."""
    records: Sequence[Sample]
    """[B] The responses as records, one for each."""
    temperature: float
    """Divides the logits in all log-probs, KL and entropy, as in sampling."""
    max_new_tokens: int
    """The most tokens that a response can have."""
    in_full_precision: bool
    """False if the model computes in 16 bits, where rounding alone moves log-probs further than in fp32."""
    is_rescored: bool
    """True if `log_probs` come from a forward pass of the trainer, and not from the sampler's own states."""

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


def sample_rollout(
    policy: Policy,
    sampler: Sampler,
    batch: PromptBatch,
    generation: GenerationConfig,
    special: SpecialTokens,
    rng_key: RandomKey,
    micro_batch_size: int | None = None,
    world: World = ALONE,
) -> Rollout:
    """Sample a response to every prompt and score it under policy and reference.

    Args:
        policy: The policy that is trained.
        sampler: Samples responses from the policy.
        batch: The prompts of all processes.
        generation: How to sample.
        special: End and padding tokens.
        rng_key: Determines the random numbers.
        micro_batch_size: Sequences scored at once, as many as in the update; None means all.
        world: The processes among which the prompts are divided.
    """
    rows = world.own_rows(len(batch))
    own = batch.part(rows or range(1))
    with policy.sharding.rollout():
        model = policy.language_model
        prepacking = model.prepacking(len(own), generation.max_new_tokens)
        # scoring too is mostly products of the head; a wide one is the update's, to the last bit
        packed_for = prepacking.num_rows if prepacking and model.wide_head is None else None
        with model.prepacked_head(packed_for):
            drawn = sampler(own, generation, rng_key)
            scored, states = score_under_reference(policy, own, drawn, generation.temperature, micro_batch_size)
    samples, numbers = share_samples(world, rows, drawn, vars(scored))
    return Rollout(
        **numbers,
        states=states.among(rows, samples.response_mask),
        batch=batch,
        samples=samples,
        records=make_records(batch, samples, policy, generation, special),
        temperature=generation.temperature,
        max_new_tokens=generation.max_new_tokens,
        in_full_precision=_is_full_precision(policy),
        is_rescored=drawn.hidden is None or not _is_full_precision(policy),
    )


def make_records(
    batch: PromptBatch, samples: Samples, policy: Policy, generation: GenerationConfig, special: SpecialTokens
) -> list[Sample]:
    """Return one record for each response [B]."""
    responses = decode_responses(samples, policy.tokenizer, special, generation)
    return make_samples(batch.prompts, batch.texts, responses, samples.token_ids())


def score_under_reference(
    policy: Policy, batch: PromptBatch, samples: Samples, temperature: float, micro_batch_size: int | None = None
) -> tuple[TokenNumbers, States]:
    """Score responses, sampled from the policy's current weights, under policy and reference."""
    with policy.fast_products():
        hidden = _policy_hidden(policy, batch, samples, micro_batch_size)
        with policy.reference() as reference:
            ref_hidden = _response_hidden(reference, batch, samples, micro_batch_size, policy.sharding)
    return _score(policy, samples, hidden, ref_hidden, temperature), States.of_all(hidden, ref_hidden)


@torch.no_grad()
def policy_log_probs(policy: Policy, rollout: Rollout, rows: range) -> Tensor:
    """Return log π(token) [rows, R] of some responses under the policy as it is now, 0 outside the response mask."""
    part = slice(rows.start, rows.stop)
    mask, tokens = rollout.response_mask[part], rollout.samples.response_ids[part]
    model = policy.language_model
    hidden = model.response_hidden(rollout.ids[part], rollout.mask[part], mask.shape[1])
    return score_tokens(model, hidden, tokens, mask, rollout.temperature, needs_entropy=False, reference=None).log_probs


@torch.no_grad()
def kl_between(
    policy: Policy,
    other: Policy,
    batch: PromptBatch,
    samples: Samples,
    temperature: float,
    micro_batch_size: int | None = None,
) -> Tensor:
    """Return the exact KL(π ‖ π_other) [B, R] of each token's distribution, in nats, 0 outside the response mask.

    Args:
        policy: The policy that sampled the responses.
        other: A policy with the same tokens, such as the model before training, and not the reference of `policy`: a
            policy that was loaded from an adapter has that adapter as its reference.
        batch: The prompts.
        samples: The responses.
        temperature: Divides the logits of both.
        micro_batch_size: Sequences read at once; None means all.
    """

    def divergence(hidden: Tensor, other_hidden: Tensor) -> tuple[Tensor, ...]:
        logits = policy.language_model.logits(hidden), other.language_model.logits(other_hidden)
        return (entropy_and_kl_(*(log_softmax_(each, temperature) for each in logits))[1],)

    hidden = _policy_hidden(policy, batch, samples, micro_batch_size)
    other_hidden = _response_hidden(other.language_model, batch, samples, micro_batch_size)
    size = policy.language_model.vocabulary_size
    (kl,) = map_tokens(divergence, samples.response_mask, size, hidden, other_hidden)
    return kl


def _policy_hidden(policy: Policy, batch: PromptBatch, samples: Samples, micro_batch_size: int | None) -> Tensor:
    """Return the policy's hidden states [B, R, H] before every response token: the sampler's own, if they are exact."""
    if samples.hidden is not None and _is_full_precision(policy):
        return samples.hidden
    return _response_hidden(policy.language_model, batch, samples, micro_batch_size, policy.sharding)


def _is_full_precision(policy: Policy) -> bool:
    return not policy.language_model.in_16_bits


@torch.no_grad()
def _response_hidden(
    model: LanguageModel,
    batch: PromptBatch,
    samples: Samples,
    micro_batch_size: int | None,
    sharding: Sharding = NOT_SHARDED,
) -> Tensor:
    """Return the hidden states [B, R, H] before every response token, from whole sequences instead of a cache."""
    num_rows, num_tokens = samples.response_mask.shape
    ids = torch.cat([batch.ids, samples.response_ids], dim=1)
    mask = torch.cat([batch.mask, samples.response_mask], dim=1)
    hidden: Tensor | None = None
    for rows in sharding.padded(group_by_length(batch.mask, samples.response_mask, micro_batch_size)):
        if rows is None:
            model.empty_pass()
            continue
        group_hidden = model.response_hidden(ids[rows], mask[rows], num_tokens)
        if hidden is None:
            hidden = group_hidden.new_zeros(num_rows, *group_hidden.shape[1:])
        hidden[rows] = group_hidden
    assert hidden is not None  # noqa: S101
    return hidden


@torch.no_grad()
def _score(policy: Policy, samples: Samples, hidden: Tensor, ref_hidden: Tensor, temperature: float) -> TokenNumbers:
    """Score the sampled tokens, from the hidden states [B, R, H] of policy and reference before each token."""
    model = policy.language_model

    def score(hidden: Tensor, ref_hidden: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        both = [
            log_softmax_(logits, temperature) for logits in (model.logits(hidden), policy.reference_logits(ref_hidden))
        ]
        log_probs, ref_log_probs = (each.gather(-1, tokens[:, None]).squeeze(-1) for each in both)
        entropy, kl = entropy_and_kl_(*both)
        return log_probs, ref_log_probs, kl, entropy, policy.value_head(hidden)

    inputs = hidden, ref_hidden, samples.response_ids
    log_probs, ref_log_probs, kl, entropy, values = map_tokens(
        score, samples.response_mask, model.vocabulary_size, *inputs
    )
    return TokenNumbers(
        log_probs=log_probs,
        ref_log_probs=ref_log_probs,
        kl=kl,
        entropy=entropy,
        values=values,
    )
