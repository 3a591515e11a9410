"""Logits -> log-probs, entropy and exact KL. Pure functions of tensors and floats.

Shapes: V vocabulary.
"""

import torch
from torch import Tensor


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob of each token, and all log-probs, of softmax(logits / temperature).

    Args:
        logits: [..., V], computed in fp32 or better.
        tokens: [...] ids.
        temperature: > 0.

    Returns:
        log-probs [...] in nats, and the full log-softmax [..., V].
    """
    log_softmax = (logits / temperature).log_softmax(dim=-1)
    return log_softmax.gather(-1, tokens[..., None]).squeeze(-1), log_softmax


def entropies(log_softmax: Tensor) -> Tensor:
    """−Σ_v π(v) log π(v) of each distribution [..., V] -> [...], nats; a token of probability 0 adds nothing."""
    return -(log_softmax.exp() * _finite(log_softmax)).sum(dim=-1)


def exact_kl(log_softmax: Tensor, ref_log_softmax: Tensor) -> Tensor:
    """KL(π ‖ π_ref) = Σ_v π(v) (log π(v) − log π_ref(v)) of each distribution [..., V] -> [...], nats, clamped at 0.

    Non-negative in exact arithmetic; the clamp takes off rounding. Less variance than any estimate from the sampled
    token alone (arXiv 2504.10637). Computed as Σ_v π (log π − log π_ref) + π_ref − π, which adds 1 − 1 and makes the
    gradient at π = π_ref exactly 0 rather than rounding, which Adam would follow at its full step size.
    """
    probabilities, ref_probabilities = log_softmax.exp(), ref_log_softmax.exp()
    terms = probabilities * (_finite(log_softmax) - _finite(ref_log_softmax)) + (ref_probabilities - probabilities)
    return terms.sum(dim=-1).clamp(min=0.0)


def entropy_and_kl_(log_softmax: Tensor, ref_log_softmax: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`entropies` of the first and :func:`exact_kl` of both, without gradient; what is given is overwritten.

    Writing over what is there is worth a name: on a CPU the pages of one new [n, V] cost more than the arithmetic.
    """
    for given in (log_softmax, ref_log_softmax):
        given.clamp_(min=_least(given))
    probabilities = log_softmax.exp()
    entropy = -torch.einsum("...v,...v->...", probabilities, log_softmax)
    terms = log_softmax.sub_(ref_log_softmax).mul_(probabilities)
    terms.add_(ref_log_softmax.exp_().sub_(probabilities))
    return entropy, terms.sum(dim=-1).clamp_(min=0.0)


def log_softmax_(logits: Tensor, temperature: float) -> Tensor:
    """Log softmax(logits / temperature) [..., V] without gradient, in the logits' own memory."""
    return torch.log_softmax(logits.div_(temperature), dim=-1, out=logits)


def _finite(log_softmax: Tensor) -> Tensor:
    """Log-probs of −inf (a masked-out vocabulary entry) made finite, so that 0 · log 0 is 0."""
    return log_softmax.clamp(min=_least(log_softmax))


def _least(log_softmax: Tensor) -> float:
    return torch.finfo(log_softmax.dtype).min / 4
