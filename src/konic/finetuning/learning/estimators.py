"""Rollout + Scores -> Advantages: computes the advantage of each token by the rule of the algorithm.

Shapes: B sequences, R response tokens; G groups of n responses to one prompt, B = G·n.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from konic.finetuning.algorithms import AdvantageRule
from konic.finetuning.config import TrainingConfig
from konic.finetuning.learning.advantages import (
    gae,
    group_centred,
    group_mean_normalised,
    group_normalised,
    leave_one_out,
    parts_normalised,
    token_rewards,
    whiten,
)
from konic.finetuning.rewards.scoring import Scores
from konic.finetuning.rollout.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """The training signal of an update. Tensors are 0 where `mask` is False."""

    advantages: Tensor
    """[B, R] without gradient."""
    returns: Tensor
    """[B, R] the targets of the value head, in units of reward; unused if no values are learned."""
    mask: Tensor
    """[B, R] True on response tokens of samples that have a score, without cut-off ones if `mask_truncated` is set."""
    has_signal: bool
    """False if the scores do not say which response is better. The policy then stays where it is."""
    value_loss_weight: float
    """0 if the algorithm learns no values."""
    kl_loss_weight: float
    """β of the exact KL in the loss; 0 if the KL penalty is in the reward."""


Estimator = Callable[[Tensor, Rollout, Scores, TrainingConfig], tuple[Tensor, Tensor]]
"""(token rewards [B, R], rollout, scores, config) -> advantages [B, R] and returns [B, R]."""


def compute_advantages(
    rollout: Rollout,
    scores: Scores,
    config: TrainingConfig,
    kl_penalty_weight: float,
    scores_have_varied: bool = True,
) -> Advantages:
    """Return the advantages of a batch, computed by the configured algorithm.

    The score goes on the last token, minus `missing_eos_penalty` if the response was cut off. The KL penalty goes
    either on the reward of every token, as the log-ratio of the sampled token, or into the loss, as the exact KL. A
    sample without a score gets advantage 0, does not train the value head, and is left out of its group.

    A batch of equal scores does not say which response is better: all its advantages are 0, and the policy does not
    move. Whitening would otherwise scale the noise of the value head and of the penalty up to advantages of size one,
    and Adam would take a KL in the loss, alone, at its full step size.

    Args:
        rollout: The responses.
        scores: Their rewards.
        config: The algorithm and its settings.
        kl_penalty_weight: β ≥ 0.
        scores_have_varied: False if all scores of the run, these included, are equal. It decides for a batch of one
            score.
    """
    device, dtype = rollout.values.device, rollout.values.dtype
    rewards = torch.tensor(scores.filled(), dtype=dtype, device=device)
    has_score = _has_score(scores, rewards)
    if config.missing_eos_penalty is not None:
        rewards = torch.where(rollout.samples.ended, rewards, rewards - config.missing_eos_penalty)
    log_ratios = (rollout.log_probs - rollout.ref_log_probs).to(dtype)
    penalty_in_reward = 0.0 if config.kl_in_loss else kl_penalty_weight
    per_token = token_rewards(rewards, log_ratios, rollout.response_mask, penalty_in_reward)
    estimate = ADVANTAGE_RULES[config.algorithm_row.advantages]
    advantages, returns = estimate(per_token, rollout, scores, config)
    mask = rollout.response_mask & has_score[:, None]
    if config.mask_truncated:
        mask = mask & rollout.samples.ended[:, None]
    scored = rewards[has_score]
    has_signal = bool((scored != scored[:1]).any()) or (len(scored) == 1 and scores_have_varied)
    if config.algorithm_row.advantages == "parts_normalised":
        has_signal = bool((advantages[mask] != 0).any())  # parts can differ where their sums are equal
    return Advantages(
        advantages=torch.where(mask & has_signal, advantages, 0.0),
        returns=torch.where(mask, returns, 0.0),
        mask=mask,
        has_signal=has_signal,
        value_loss_weight=config.vf_coef if config.algorithm_row.learns_values else 0.0,
        kl_loss_weight=kl_penalty_weight if config.kl_in_loss else 0.0,
    )


def _gae(rewards: Tensor, rollout: Rollout, scores: Scores, config: TrainingConfig) -> tuple[Tensor, Tensor]:
    """Return GAE with the value head, whitened over the batch (N)."""
    advantages, returns = gae(rewards, rollout.values, rollout.response_mask, config.gamma, config.gae_lambda)
    return whiten(advantages, rollout.response_mask & _has_score(scores, rewards)[:, None]), returns


def _has_score(scores: Scores, like: Tensor) -> Tensor:
    """Return True [B] for the samples that have a score, on the device of another tensor."""
    return torch.tensor(scores.has_score, device=like.device)


def _reward_to_go(rewards: Tensor, rollout: Rollout, scores: Scores, config: TrainingConfig) -> tuple[Tensor, Tensor]:
    """Return the sum of the rewards from each token to the end, whitened over the batch (arXiv 2501.03262)."""
    no_values = torch.zeros_like(rewards)
    to_go, _ = gae(rewards, no_values, rollout.response_mask, config.gamma, gae_lambda=1.0)
    return whiten(to_go, rollout.response_mask & _has_score(scores, rewards)[:, None]), no_values


def _by_group(relative: Callable[[Tensor, Tensor], Tensor]) -> Estimator:
    """Return an estimator that gives every token the reward of its whole response, relative to the response's group."""

    def estimate(rewards: Tensor, rollout: Rollout, scores: Scores, config: TrainingConfig) -> tuple[Tensor, Tensor]:
        groups, has_score = (-1, config.responses_per_prompt), _has_score(scores, rewards)
        relative_rewards = relative(rewards.sum(dim=1).view(groups), has_score.view(groups)).flatten()
        return relative_rewards[:, None].expand_as(rewards), torch.zeros_like(rewards)

    return estimate


def _parts(rewards: Tensor, rollout: Rollout, scores: Scores, config: TrainingConfig) -> tuple[Tensor, Tensor]:
    """Return the parts of the reward, each relative to its group, weighted and summed; see :func:`parts_normalised`."""
    parts = torch.tensor([*scores.parts.values()], dtype=rewards.dtype, device=rewards.device)
    mask = ~parts.isnan() & _has_score(scores, rewards)
    weights = torch.tensor([scores.weights[name] for name in scores.parts], dtype=rewards.dtype, device=rewards.device)
    relative = parts_normalised(parts, mask, weights, config.responses_per_prompt)
    return relative[:, None].expand_as(rewards), torch.zeros_like(rewards)


ADVANTAGE_RULES: dict[AdvantageRule, Estimator] = {
    "gae": _gae,
    "reward_to_go": _reward_to_go,
    "leave_one_out": _by_group(leave_one_out),
    "group_normalised": _by_group(group_normalised),
    "group_centred": _by_group(group_centred),
    "group_mean_normalised": _by_group(group_mean_normalised),
    "parts_normalised": _parts,
}
