"""Log-probs, values and advantages -> losses per token. Pure functions of tensors and floats.

Shapes: B sequences, R response tokens, V vocabulary. A mask is True where a token counts. Losses are returned per
token and are 0 outside the mask. The caller sums them over the whole optimizer step and divides by the true token
count of the step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from konic.finetuning.algorithms import PolicyLoss, RatioLevel

SOFT_GATE_TEMPERATURES = (1.0, 1.05)
"""τ of SAPO's gate for positive advantages, and for the others."""
MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this value before exp: e^20 is beyond every clip range and far from overflow."""


def log_ratio(new_log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Return log π_new − log π_old [B, R], 0 outside the mask and clamped to ±20 so that exp never overflows."""
    return torch.where(mask, new_log_probs - old_log_probs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def level_log_ratios(log_ratios: Tensor, mask: Tensor, level: RatioLevel) -> Tensor:
    """Return the log-ratios [B, R] that a policy loss uses: one per token, or one for the whole response.

    The ratio of a response is s = (π(y) / π_old(y))^(1/length). Its logarithm is the mean log-ratio of the response's
    tokens, and every token of the response gets it (GSPO, arXiv 2507.18071, eq. 7).
    """
    if level == "token":
        return log_ratios
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(mask, torch.where(mask, log_ratios, 0.0).sum(dim=1, keepdim=True) / lengths, 0.0)


def clipped_policy_loss(
    log_ratios: Tensor, advantages: Tensor, mask: Tensor, clip_ratios: tuple[float, float]
) -> Tensor:
    """Return PPO's clipped loss −min(ρA, clip(ρ, 1 − ε_low, 1 + ε_high)A) per token [B, R].

    The formula is eq. 7 of Schulman et al. 2017, with one ε for each side.

    Args:
        log_ratios: [B, R] log ρ, from :func:`log_ratio`.
        advantages: [B, R] without gradient.
        mask: [B, R].
        clip_ratios: ε_low in (0, 1) and ε_high > 0.
    """
    low, high = clip_ratios
    ratios = log_ratios.exp()
    clipped = ratios.clamp(1.0 - low, 1.0 + high)
    return torch.where(mask, -torch.minimum(ratios * advantages, clipped * advantages), 0.0)


def clipped_weight_loss(
    log_ratios: Tensor, advantages: Tensor, mask: Tensor, clip_ratios: tuple[float, float]
) -> Tensor:
    """Return CISPO's loss −sg(clip(ρ, 1 − ε_low, 1 + ε_high)) · A · log ρ per token [B, R] (arXiv 2506.13585, eq. 4).

    No token loses its gradient: a ratio beyond the clip only weighs as much as the clip. log ρ has the gradient of
    log π, because log π_old is a constant. Arguments are those of :func:`clipped_policy_loss`.
    """
    low, high = clip_ratios
    weights = log_ratios.detach().exp().clamp(1.0 - low, 1.0 + high)
    return torch.where(mask, -weights * advantages * log_ratios, 0.0)


def soft_gate_loss(log_ratios: Tensor, advantages: Tensor, mask: Tensor, clip_ratios: tuple[float, float]) -> Tensor:
    """Return SAPO's loss −(4 / τ) σ(τ (ρ − 1)) · A per token [B, R] (arXiv 2511.20347).

    The gate fades the gradient out as the ratio leaves 1, faster for negative advantages: τ is 1 for A > 0 and 1.05
    for the others. Arguments are those of :func:`clipped_policy_loss`; `clip_ratios` is not used.
    """
    if_positive, otherwise = SOFT_GATE_TEMPERATURES
    temperatures = torch.full_like(advantages, otherwise).masked_fill(advantages > 0, if_positive)
    gates = torch.sigmoid(temperatures * (log_ratios.exp() - 1.0)) * 4.0 / temperatures
    return torch.where(mask, -gates * advantages, 0.0)


def unclipped_loss(log_ratios: Tensor, advantages: Tensor, mask: Tensor, clip_ratios: tuple[float, float]) -> Tensor:
    """Return −ρA per token [B, R], for a loss whose mask says what counts (DPPO, arXiv 2602.04879, eq. 11).

    Arguments are those of :func:`clipped_policy_loss`; `clip_ratios` is not used.
    """
    return torch.where(mask, -log_ratios.exp() * advantages, 0.0)


def moves_outward(log_ratios: Tensor, advantages: Tensor, divergences: Tensor, limit: float) -> Tensor:
    """Return True [B, R] for tokens beyond a limit that their gradient would move further (arXiv 2602.04879, eq. 12).

    A positive advantage raises the token's probability: that is outward if the probability has risen already, ρ > 1.
    A negative one lowers it: outward if ρ < 1.

    Args:
        log_ratios: [B, R] log ρ.
        advantages: [B, R].
        divergences: [B, R] how far the distribution of each token has moved since its response was sampled.
        limit: δ > 0, in the unit of `divergences`.
    """
    return (divergences > limit) & (log_ratios.detach() * advantages > 0)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_ratio: float) -> Tensor:
    """Return 0.5 · max of the squared errors of V and of V clipped to ±ε around its old value, per token [B, R] (N).

    Args:
        values: [B, R] the current V.
        old_values: [B, R] V when the responses were sampled.
        returns: [B, R] the targets of V.
        mask: [B, R].
        clip_ratio: ε > 0, in units of reward.
    """
    values, old_values, returns = (torch.where(mask, tensor, 0.0) for tensor in (values, old_values, returns))
    kept_near = old_values + (values - old_values).clamp(-clip_ratio, clip_ratio)
    return 0.5 * torch.maximum((values - returns).square(), (kept_near - returns).square())


def k1(log_ratios: Tensor) -> Tensor:
    """Return the plain KL estimate log π(y) − log π_ref(y) of a sampled token: unbiased, of either sign (Schulman)."""
    return log_ratios


def k3(log_ratios: Tensor) -> Tensor:
    """Return the KL estimate (1/ρ − 1) + log ρ of a token sampled from π: unbiased and never negative (Schulman)."""
    return torch.expm1(-log_ratios) + log_ratios


def clipped_tokens(log_ratios: Tensor, mask: Tensor, clip_ratios: tuple[float, float]) -> Tensor:
    """Return True [B, R] where a token counts and its ratio is outside [1 − ε_low, 1 + ε_high]."""
    low, high = clip_ratios
    change = log_ratios.exp() - 1.0
    return mask & ((change > high) | (-change > low))


def explained_variance(predictions: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Return 1 − Var(targets − predictions) / Var(targets) over the mask: 1 is perfect, 0 no better than a constant.

    The result is NaN if the targets do not vary.
    """
    counted = targets[mask]
    residual = (targets - predictions)[mask].var(correction=0)
    varies = counted.min() < counted.max()  # the computed variance of equal targets is a rounding error, not 0
    return torch.where(varies, 1.0 - residual / counted.var(correction=0), torch.nan)


PolicyLossFunction = Callable[[Tensor, Tensor, Tensor, tuple[float, float]], Tensor]
"""(log-ratios [B, R], advantages [B, R], mask [B, R], (ε_low, ε_high)) -> losses [B, R]."""

POLICY_LOSSES: dict[PolicyLoss, PolicyLossFunction] = {
    "clipped": clipped_policy_loss,
    "clipped_weight": clipped_weight_loss,
    "soft_gate": soft_gate_loss,
    "unclipped": unclipped_loss,
}
