"""Hidden states -> log-probs, entropy and exact KL of tokens, in chunks: memory does not grow with B·R·V.

Why the gradients are written by hand, in closed form: autograd would keep tensors as large as the logits [n, V] for
the backward pass, and `torch.utils.checkpoint` would compute the logits twice. The closed form computes each gradient
[n, H] together with its value and keeps nothing larger. For 16,384 response tokens at a vocabulary of 49,152, one fp32
copy of the logits would be 3,072 MB; the clipped loss and the exact KL with their gradient add 178 MB (docs/speed.md).

Shapes: B sequences, R response tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from konic.finetuning.models.distributions import (
    entropies,
    exact_kl,
    log_softmax_,
    token_log_probs,
    total_variation,
)
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.products import back_through
from konic.finetuning.models.wide_head import WideHead

MAX_LOGITS = {"cpu": 2**23, "cuda": 2**26}
"""Logits in one tensor when tokens are scored, for any batch, by device type. On a CPU that is 32 MB in fp32, a size
that glibc frees at once; on a GPU 256 MB, so that few kernels do much work each."""
MAX_KEPT_LOGITS = 2**26
"""Most logits kept for the backward pass if the head is trained: 256 MB in fp32. More are computed twice instead."""


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Scores of tokens under a model. Tensors are [B, R] and 0 outside the mask."""

    log_probs: Tensor
    entropy: Tensor | None
    """In nats; None unless requested."""
    kl: Tensor | None
    """Exact KL from the reference, in nats; None without a reference."""


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
    """Return log-probs, entropy and exact KL from a reference for every token that counts.

    Memory does not grow with B·R·V: the logits of a chunk are freed before the next chunk is computed. Only if the head
    is trained, up to 2^26 logits are kept for the backward pass.

    Args:
        model: The model whose head computes the logits.
        hidden: [B, R, H] the hidden state from which each token is predicted.
        tokens: [B, R] ids.
        mask: [B, R] True on tokens that count. Only these are computed.
        temperature: > 0.
        needs_entropy: False skips the entropy, and lets a plain head use closed-form gradients instead of autograd.
        reference: The reference's function from hidden states to logits, without gradient, and its hidden states
            [B, R, H] at the same tokens; None if no KL is needed.
    """
    tensors_kept = 1 if reference is None else 3  # each as large as the logits
    must_recompute = model.head_learns and tensors_kept * int(mask.sum()) * model.vocabulary_size > MAX_KEPT_LOGITS

    def score(hidden: Tensor, tokens: Tensor, *ref_hidden: Tensor) -> tuple[Tensor, ...]:
        log_probs, log_softmax = token_log_probs(model.logits(hidden), tokens, temperature)
        results = [log_probs]
        if needs_entropy:
            results.append(entropies(log_softmax))
        if reference is not None:
            results.append(exact_kl(log_softmax, (reference[0](ref_hidden[0]) / temperature).log_softmax(dim=-1)))
        return tuple(results)

    head = model.causal_lm.get_output_embeddings()
    closed_form = not needs_entropy and model.is_plain

    def score_chunk(hidden: Tensor, tokens: Tensor, *ref_hidden: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return score(hidden, tokens, *ref_hidden)
        if model.head_learns:
            inputs = hidden, tokens, *ref_hidden
            return checkpoint(score, *inputs, use_reentrant=False) if must_recompute else score(*inputs)
        if not closed_form:
            return _PerToken.apply(score, hidden, tokens, *ref_hidden)  # type: ignore[no-untyped-call]
        ref = None if reference is None else log_softmax_(reference[0](ref_hidden[0]), temperature)
        return _LogProbs.apply(hidden, model.wide_head or head, tokens, temperature, ref)  # type: ignore[no-untyped-call]

    inputs = (hidden, tokens) if reference is None else (hidden, tokens, reference[1])
    log_probs, *rest = map_tokens(score_chunk, mask, model.vocabulary_size, *inputs)
    entropy = rest.pop(0) if needs_entropy else None
    return TokenScores(log_probs=log_probs, entropy=entropy, kl=rest.pop() if rest else None)


@torch.no_grad()
def divergences(
    model: LanguageModel, old_hidden: Tensor, hidden: Tensor, mask: Tensor, temperature: float, measure: str
) -> Tensor:
    """Return how far each token's distribution has moved [B, R], over the whole vocabulary and without gradient.

    Args:
        model: The model whose head computes the logits of both; the head itself must not have changed.
        old_hidden: [B, R, H] the hidden states from which the tokens were drawn.
        hidden: [B, R, H] the hidden states of the same tokens now.
        mask: [B, R] True on tokens that count; the result is 0 elsewhere.
        temperature: > 0.
        measure: "total_variation" (0 to 1), or "kl" for KL(π_old ‖ π) in nats.
    """
    between = total_variation if measure == "total_variation" else exact_kl

    def diverge(old_hidden: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        old, new = (log_softmax_(model.logits(states), temperature) for states in (old_hidden, hidden))
        return (between(old, new),)

    return map_tokens(diverge, mask, model.vocabulary_size, old_hidden, hidden.detach())[0]


class _LogProbs(torch.autograd.Function):
    """Computes log π(token) of hidden states [n, H] under a plain head, and KL(π ‖ π_ref) if needed, with gradients.

    With logits = hidden Wᵀ + b and π = softmax(logits / T):
    ∂ log π(token) / ∂ hidden = (onehot − π) W / T and ∂ KL / ∂ hidden = π (log π − log π_ref − KL) W / T.
    The gradient of the KL is exactly 0 where π is exactly π_ref.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: nn.Linear | WideHead,
        tokens: Tensor,
        temperature: float,
        ref_log_softmax: Tensor | None,
    ) -> tuple[Tensor, ...]:
        logits = head(hidden)
        logits = logits if logits.dtype.itemsize >= 4 else logits.float()
        log_softmax = log_softmax_(logits, temperature)
        log_probs = log_softmax.gather(-1, tokens[:, None])
        probabilities = log_softmax.exp() if ref_log_softmax is not None else log_softmax.exp_()
        results, gradients = [log_probs.squeeze(-1)], []
        if ref_log_softmax is not None:
            terms = log_softmax.sub_(ref_log_softmax).mul_(probabilities)
            kl = terms.sum(dim=-1, keepdim=True)
            results.append(kl.squeeze(-1).clamp(min=0.0))
            gradients.append(_through(head, terms.addcmul_(probabilities, kl, value=-1.0)))
        minus_gradient = probabilities.scatter_add_(-1, tokens[:, None], torch.full_like(log_probs, -1.0))
        gradients.insert(0, _through(head, minus_gradient).neg_())
        ctx.save_for_backward(*(gradient.div_(temperature) for gradient in gradients))
        ctx.dtype = hidden.dtype
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> Any:
        return _scaled(scales, ctx.saved_tensors).to(ctx.dtype), None, None, None, None


def _through(head: nn.Linear | WideHead, of_logits: Tensor) -> Tensor:
    """Return the gradient [n, H] of the hidden states for that of the logits [n, V] under a plain head."""
    if isinstance(head, WideHead):
        return head.gradient(of_logits)
    return back_through(head, of_logits)


class _PerToken(torch.autograd.Function):
    """Applies a function token by token to hidden states [n, H] and keeps its gradient [n, H] instead of logits [n, V].

    Each entry of a result depends on one token alone. The gradient of the result's sum therefore holds the gradient of
    every token, and the backward pass only scales it. Nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], hidden: Tensor, *others: Tensor) -> Any:
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            results = function(leaf, *others)
            gradients = [
                torch.autograd.grad(result.sum(), leaf, retain_graph=index + 1 < len(results))[0]
                for index, result in enumerate(results)
            ]
        ctx.save_for_backward(*gradients)
        return tuple(result.detach() for result in results)

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> Any:
        return None, _scaled(scales, ctx.saved_tensors), *[None] * (len(ctx.needs_input_grad) - 2)


def _scaled(scales: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Return Σ scale · gradient [n, H] over several results [n]."""
    total = scales[0][:, None] * gradients[0]
    for scale, gradient in zip(scales[1:], gradients[1:], strict=True):
        total = total + scale[:, None] * gradient
    return total.to(gradients[0].dtype)


def map_tokens(
    function: Callable[..., tuple[Tensor, ...]], mask: Tensor, vocabulary: int, *inputs: Tensor
) -> tuple[Tensor, ...]:
    """Apply `function` to the tokens that count, in chunks of about :data:`MAX_LOGITS` logits.

    Results [B, R] are 0 outside the mask.

    Args:
        function: Takes the chunk's part [n, ...] of every input and returns tensors [n].
        mask: [B, R] with at least one True.
        vocabulary: V. It determines the length of a chunk.
        inputs: [B, R, ...] each.
    """
    counted = [tensor.flatten(0, 1) if mask.all() else tensor[mask] for tensor in inputs]
    size = -(-MAX_LOGITS.get(mask.device.type, MAX_LOGITS["cpu"]) // vocabulary)
    chunks = [
        function(*(tensor[start : start + size] for tensor in counted)) for start in range(0, len(counted[0]), size)
    ]
    results = [torch.cat(parts) for parts in zip(*chunks, strict=True)]
    return tuple(result.new_zeros(mask.shape).masked_scatter(mask, result) for result in results)
