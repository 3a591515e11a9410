"""Log-probs, values and advantages -> losses per token. Pure functions of tensors and floats.

Shapes: B sequences, R response tokens, V vocabulary. A mask is True where a token counts. Losses come back per token
and are 0 outside the mask: whoever takes the step sums them over the whole step and divides by its true token count.
"""

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this before exp: e^20 is past every clip range and far from overflow."""


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


def log_ratio(new_log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Returns log π_new − log π_old [B, R], 0 outside the mask and clamped to ±20, so that exp never overflows."""
    return torch.where(mask, new_log_probs - old_log_probs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def policy_loss(log_ratios: Tensor, advantages: Tensor, mask: Tensor, clip_ratio: float) -> Tensor:
    """PPO's clipped loss −min(ρA, clip(ρ, 1 − ε, 1 + ε)A) per token [B, R] (Schulman et al. 2017, eq. 7).

    Args:
        log_ratios: [B, R] log ρ, from :func:`log_ratio`.
        advantages: [B, R], no gradient.
        mask: [B, R].
        clip_ratio: ε in (0, 1).
    """
    ratios = log_ratios.exp()
    clipped = ratios.clamp(1.0 - clip_ratio, 1.0 + clip_ratio)
    return torch.where(mask, -torch.minimum(ratios * advantages, clipped * advantages), 0.0)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_ratio: float) -> Tensor:
    """0.5 · max of the squared errors of V and of V kept within ±ε of its old value, per token [B, R] (N).

    Args:
        values: [B, R] V now.
        old_values: [B, R] V when the responses were sampled.
        returns: [B, R] what V regresses on.
        mask: [B, R].
        clip_ratio: ε > 0, in units of reward.
    """
    values, old_values, returns = (torch.where(mask, tensor, 0.0) for tensor in (values, old_values, returns))
    kept_near = old_values + (values - old_values).clamp(-clip_ratio, clip_ratio)
    return 0.5 * torch.maximum((values - returns).square(), (kept_near - returns).square())


def k1(log_ratios: Tensor) -> Tensor:
    """The plain KL estimate log π(y) − log π_ref(y) of a sampled token: unbiased, of either sign (Schulman)."""
    return log_ratios


def k3(log_ratios: Tensor) -> Tensor:
    """The KL estimate (1/ρ − 1) + log ρ of a token sampled from π: unbiased and never negative (Schulman)."""
    return torch.expm1(-log_ratios) + log_ratios


def clipped_tokens(log_ratios: Tensor, mask: Tensor, clip_ratio: float) -> Tensor:
    """True [B, R] where a token counts and its ratio has left [1 − ε, 1 + ε]."""
    return mask & ((log_ratios.exp() - 1.0).abs() > clip_ratio)


def explained_variance(predictions: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(targets − predictions) / Var(targets) over the mask: 1 is perfect, 0 no better than a constant.

    NaN where the targets do not vary.
    """
    counted = targets[mask]
    residual = (targets - predictions)[mask].var(correction=0)
    varies = counted.min() < counted.max()  # the variance of equal targets is rounding, not 0
    return torch.where(varies, 1.0 - residual / counted.var(correction=0), torch.nan)


def _finite(log_softmax: Tensor) -> Tensor:
    """Log-probs of −inf (a masked-out vocabulary entry) made finite, so that 0 · log 0 is 0."""
    return log_softmax.clamp(min=_least(log_softmax))


def _least(log_softmax: Tensor) -> float:
    return torch.finfo(log_softmax.dtype).min / 4
