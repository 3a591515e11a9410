"""A causal language model taken apart at its last hidden state, and what its tokens are worth.

Shapes: B sequences, T tokens of prompt and response, R response tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from konic.finetuning.errors import ModelError
from konic.finetuning.losses import entropies, exact_kl, token_log_probs
from konic.finetuning.prompts import position_ids

MAX_LOGITS = 2**24
"""Logits held at once when tokens are scored: 64 MB in fp32, whatever the batch."""
MAX_KEPT_LOGITS = 2**26
"""Logits kept from a forward pass for its backward pass: 256 MB in fp32; beyond them they are computed twice."""


@dataclass(frozen=True)
class TokenScores:
    """What tokens are worth. Tensors are [B, R], 0 outside the mask."""

    log_probs: Tensor
    entropy: Tensor | None
    """Nats; None unless asked for."""
    kl: Tensor | None
    """Exact KL from the reference, nats; None without one."""


class LanguageModel:
    """A causal language model taken apart at its last hidden state."""

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        self.causal_lm = causal_lm
        config = causal_lm.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)

    @property
    def vocabulary_size(self) -> int:
        """V: the width of the head, which may be above the tokenizer's count."""
        return self.causal_lm.get_output_embeddings().weight.shape[0]

    def decode(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any = None) -> Tensor:
        """Last hidden states [B, T, H] of the given tokens; a cache holds the keys of those before and takes theirs.

        Args:
            ids: [B, T].
            mask: [B, T' ≥ T] True on tokens that count, those in the cache first.
            positions: [B, T].
            cache: A `transformers` cache, or None.
        """
        output = self.causal_lm.base_model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state

    def response_hidden(self, ids: Tensor, mask: Tensor, num_response_tokens: int) -> Tensor:
        """The hidden states [B, R, H] from which each of the last R tokens is predicted."""
        hidden = self.decode(ids, mask, position_ids(mask))
        return hidden[:, -num_response_tokens - 1 : -1]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., H], in fp32 or better."""
        logits = self.causal_lm.get_output_embeddings()(hidden)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def check_logits(self) -> None:
        """Raise ModelError where the architecture makes logits in a way :meth:`logits` does not know."""
        ids = torch.arange(8, device=self.causal_lm.device)[None] % self.causal_lm.config.get_text_config().vocab_size
        mask = torch.ones_like(ids, dtype=torch.bool)
        with torch.no_grad():
            truth = self.causal_lm(input_ids=ids, use_cache=False).logits.to(torch.float32)
            ours = self.logits(self.decode(ids, mask, position_ids(mask))).to(torch.float32)
        if not torch.allclose(ours, truth, atol=1e-2, rtol=1e-2):
            raise ModelError(
                f"{type(self.causal_lm).__name__} transforms its logits in a way that is not supported here: they "
                f"differ by up to {(ours - truth).abs().max().item():.2g} from its head's output."
            )


def score_tokens(
    model: LanguageModel,
    hidden: Tensor,
    tokens: Tensor,
    mask: Tensor,
    temperature: float,
    *,
    needs_entropy: bool,
    reference: tuple[Callable[[Tensor], Tensor], Tensor] | None,
) -> TokenScores:
    """What the tokens that count are worth under a model, and how far it is from a reference there.

    Memory does not grow with B·R·V: with gradients, a batch of more than 2^26 logits drops each chunk's after the
    forward pass and computes them again in the backward one.

    Args:
        model: Its head makes the logits.
        hidden: [B, R, H] from which each token is predicted.
        tokens: [B, R] ids.
        mask: [B, R]; only these are computed.
        temperature: > 0.
        needs_entropy: False saves three passes over the logits.
        reference: The reference's function from hidden states to logits, without gradient, and its hidden states
            [B, R, H] at the same tokens; None where no KL is needed.
    """
    tensors_kept = 1 if reference is None else 3  # of the size of the logits, for the backward pass
    num_kept = tensors_kept * int(mask.sum()) * model.vocabulary_size
    recompute = torch.is_grad_enabled() and num_kept > MAX_KEPT_LOGITS

    def score(hidden: Tensor, tokens: Tensor, *ref_hidden: Tensor) -> tuple[Tensor, ...]:
        log_probs, log_softmax = token_log_probs(model.logits(hidden), tokens, temperature)
        found = [log_probs]
        if needs_entropy:
            found.append(entropies(log_softmax))
        if reference is not None:
            found.append(exact_kl(log_softmax, (reference[0](ref_hidden[0]) / temperature).log_softmax(dim=-1)))
        return tuple(found)

    def score_chunk(*inputs: Tensor) -> Any:
        return checkpoint(score, *inputs, use_reentrant=False) if recompute else score(*inputs)

    inputs = (hidden, tokens) if reference is None else (hidden, tokens, reference[1])
    log_probs, *rest = map_tokens(score_chunk, mask, model.vocabulary_size, *inputs)
    entropy = rest.pop(0) if needs_entropy else None
    return TokenScores(log_probs, entropy, rest.pop() if rest else None)


def map_tokens(
    function: Callable[..., tuple[Tensor, ...]], mask: Tensor, vocabulary: int, *inputs: Tensor
) -> tuple[Tensor, ...]:
    """`function` over the tokens that count, in chunks of at most 2^24 logits; results [B, R] are 0 outside the mask.

    Args:
        function: Takes the chunk's part [n, ...] of every input, returns tensors [n].
        mask: [B, R] with at least one True.
        vocabulary: V, which sets the chunk's length.
        inputs: [B, R, ...] each.
    """
    counted = [tensor[mask] for tensor in inputs]
    size = max(1, MAX_LOGITS // vocabulary)
    chunks = [
        function(*(tensor[start : start + size] for tensor in counted)) for start in range(0, len(counted[0]), size)
    ]
    results = [torch.cat(parts) for parts in zip(*chunks, strict=True)]
    return tuple(result.new_zeros(mask.shape).masked_scatter(mask, result) for result in results)
