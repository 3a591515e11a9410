"""Scores and values -> advantages and returns. Pure functions of tensors and floats.

Shapes: B sequences, R response tokens; G groups of n responses to one prompt. A mask is True where an entry counts.
"""

import math

import torch
from torch import Tensor


def token_rewards(scores: Tensor, log_ratios: Tensor, response_mask: Tensor, kl_penalty_weight: float) -> Tensor:
    """Return the reward of every token: the KL penalty, plus the score on the last token (Ziegler et al. 2019; N+).

    Args:
        scores: [B] one score per sequence.
        log_ratios: [B, R] log π(token) − log π_ref(token) of the sampled tokens, nats.
        response_mask: [B, R] True on response tokens; every row has at least one.
        kl_penalty_weight: β ≥ 0.

    Returns:
        [B, R] the rewards, 0 outside the mask. A row sums to its score − β Σ log_ratios.
    """
    rewards = torch.where(response_mask, -kl_penalty_weight * log_ratios, 0.0)
    positions = torch.arange(response_mask.shape[1], device=scores.device)
    last = torch.where(response_mask, positions, -1).amax(dim=1)
    return rewards + torch.where(positions == last[:, None], scores[:, None], 0.0)


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, gae_lambda: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Return generalised advantage estimates, and the returns as value targets (Schulman et al. 2016, eq. 16).

    A_t = δ_t + γλ A_{t'} with δ_t = r_t + γ V_{t'} − V_t, where t' is the next token that counts. After the last
    token that counts, both the value and the advantage are 0. Masked positions are skipped, whatever they contain.

    Args:
        rewards: [B, R].
        values: [B, R] V before each token.
        response_mask: [B, R].
        gamma: Discount per token, in (0, 1].
        gae_lambda: λ in [0, 1], one for all responses or one for each [B]; 1 gives return − value.

    Returns:
        advantages [B, R] and returns [B, R] = advantages + values; both 0 outside the mask.
    """
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        counts = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
        advantages[:, t] = torch.where(counts, advantage, 0.0)
        next_value = torch.where(counts, values[:, t], next_value)
        next_advantage = torch.where(counts, advantage, next_advantage)
    returns = torch.where(response_mask, advantages + values, 0.0)
    return advantages, returns


def lambdas_by_length(response_mask: Tensor, alpha: float) -> Tensor:
    """Return λ = 1 − 1 / (α · length) of each response [B], and 0 where that is negative (VAPO, arXiv 2504.05118).

    The longer a response, the further its last reward reaches back.

    Args:
        response_mask: [B, R]; every row has at least one True.
        alpha: α > 0.
    """
    return (1.0 - 1.0 / (alpha * response_mask.sum(dim=1).double())).clamp(min=0.0)


def overlong_penalties(lengths: Tensor, max_length: int, share: float, most: float) -> Tensor:
    """Return what responses lose for their length [B]: 0, rising in a line to `most` at the end (DAPO, 2503.14476).

    Args:
        lengths: [B] tokens of each response.
        max_length: The most tokens that a response can have.
        share: The share of them, from the end, over which the penalty rises; in (0, 1].
        most: The penalty of a response of `max_length`, in units of reward.
    """
    buffer = max(round(share * max_length, 9), 1.0)  # 0.28 · 50 is a little more than 14 in floats
    return most * (1.0 - (max_length - lengths.double()) / buffer).clamp(min=0.0)


def equal_groups(scores: Tensor, mask: Tensor) -> Tensor:
    """Return True [G] for groups that have exactly equal scores, or fewer than two. They teach nothing.

    Arguments and shapes are those of :func:`leave_one_out`.
    """
    return (group_centred(scores, mask) == 0).all(dim=1)


def sampler_weights(log_ratios: Tensor, mask: Tensor, limit: float, *, drops_others: bool, by_sequence: bool) -> Tensor:
    """Return importance weights [B, R] of tokens that were drawn by another policy than the trainer computes.

    The weight is w = π(token) / π_sampler(token), or the product of these over the response. "Truncated", it is
    min(w, C) (Ionides 2008); "masked", it is w between 1/C and C, and 0 elsewhere.

    Args:
        log_ratios: [B, R] log π − log π_sampler of the sampled tokens.
        mask: [B, R]; weights are 0 outside it.
        limit: C > 1.
        drops_others: True masks, False truncates.
        by_sequence: True gives every token of a response the weight of the whole response.
    """
    log_ratios = torch.where(mask, log_ratios, 0.0)
    if by_sequence:
        log_ratios = log_ratios.sum(dim=1, keepdim=True).expand_as(log_ratios)
    bound = math.log(limit)
    weights = log_ratios.clamp(max=bound).exp()
    keeps = mask & (log_ratios.abs() <= bound) if drops_others else mask
    return torch.where(keeps, weights, 0.0)


def effective_sample_size(weights: Tensor) -> float:
    """Return (Σ w)² / (n · Σ w²) of weights [n]: from 0 to 1, and 1 where all are equal (Kong 1992)."""
    weights = weights.double()
    squares = weights.square().sum().item()
    return min(1.0, weights.sum().item() ** 2 / (len(weights) * squares)) if squares else 0.0


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Return values with mean 0 and unbiased standard deviation 1 over the mask, and 0 outside the mask (N).

    Fewer than two values, or values that are all equal, become 0.

    Args:
        values: [B, R].
        mask: [B, R].
    """
    deviation = standard_deviation(values, mask)
    if deviation == 0:
        return torch.zeros_like(values)
    return torch.where(mask, (values - values[mask].mean()) / (deviation + 1e-8), 0.0)


def standard_deviation(values: Tensor, mask: Tensor) -> Tensor:
    """Return the unbiased standard deviation over the mask; exactly 0 for fewer than two values, or equal ones."""
    counted = values[mask]
    if counted.numel() < 2 or counted.min() == counted.max():
        return values.new_zeros(())  # the mean of equal values has a rounding error, which must not be scaled up
    return counted.std()


def leave_one_out(scores: Tensor, mask: Tensor) -> Tensor:
    """Return each score minus the mean of the others in its group, n/(n − 1) · (r − mean); RLOO (arXiv 2402.14740).

    Args:
        scores: [G, n].
        mask: [G, n] False where a response has no score. It gets 0 and is left out of the mean of the others.

    Returns:
        [G, n] the relative scores. They are exactly 0 in groups with equal scores or with fewer than two scores.
    """
    num_scores = mask.sum(dim=1, keepdim=True)
    return group_centred(scores, mask) * num_scores / (num_scores - 1).clamp(min=1)


def group_normalised(scores: Tensor, mask: Tensor) -> Tensor:
    """Return (r − mean) / (std + 1e-4) within each group, with the unbiased std; GRPO (arXiv 2402.03300, section 4.1).

    Arguments and shapes are those of :func:`leave_one_out`.
    """
    centred = group_centred(scores, mask)
    variance = centred.square().sum(dim=1, keepdim=True) / (mask.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    return centred / (variance.sqrt() + 1e-4)


def group_mean_normalised(scores: Tensor, mask: Tensor) -> Tensor:
    """Return (r − mean) / mean within each group: MaxRL, for rewards of at least 0 (arXiv 2602.02710).

    With rewards of 0 and 1, its expectation is the gradient of log P(success) up to the n-th order, where GRPO's and
    RLOO's is that of P(success): rare successes weigh more. A group whose mean is not above 0 becomes 0.

    Arguments and shapes are those of :func:`leave_one_out`.
    """
    mean = torch.where(mask, scores, 0.0).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(mean > 0, group_centred(scores, mask) / mean.clamp(min=1e-8), 0.0)


def parts_normalised(parts: Tensor, mask: Tensor, weights: Tensor, group_size: int) -> Tensor:
    """Return Σ_k w_k · (r_k − mean) / (std + 1e-4) within groups, whitened over the batch: GDPO (arXiv 2601.05242).

    Each part of the reward counts by its weight, however much or little it varies.

    Args:
        parts: [K, B] the values of each part, before weights; arbitrary where `mask` is False. K may be 0.
        mask: [K, B] True where a part has a value.
        weights: [K].
        group_size: n, with B = G·n.

    Returns:
        [B] mean 0 and unbiased standard deviation 1 (+ 1e-4) over the responses that have a part; exactly 0 elsewhere,
        and in groups where no part differs.
    """
    groups = (-1, group_size)
    total = parts.new_zeros(parts.shape[1])
    for part, has_value, weight in zip(parts, mask, weights, strict=True):
        total = total + weight * group_normalised(part.reshape(groups), has_value.reshape(groups)).flatten()
    counted = total[mask.any(dim=0)]  # its mean is 0, because every part sums to 0 within every group
    return total / (counted.std() + 1e-4) if len(counted) > 1 else torch.zeros_like(total)


def group_centred(scores: Tensor, mask: Tensor) -> Tensor:
    """Return r − mean within each group: Dr. GRPO, which is GRPO without the division by the std (arXiv 2503.20783).

    Arguments and shapes are those of :func:`leave_one_out`.
    """
    total = torch.where(mask, scores, 0.0).sum(dim=1, keepdim=True)
    centred = scores - total / mask.sum(dim=1, keepdim=True).clamp(min=1)
    highest = torch.where(mask, scores, -torch.inf).amax(dim=1, keepdim=True)
    lowest = torch.where(mask, scores, torch.inf).amin(dim=1, keepdim=True)
    return torch.where(mask & (lowest < highest), centred, 0.0)  # the mean of equal scores has rounding error
