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
    group_normalised,
    leave_one_out,
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
    """[B, R] True on response tokens of samples that have a score."""
    value_loss_weight: float
    """0 if the algorithm learns no values."""
    kl_loss_weight: float
    """β of the exact KL in the loss; 0 if the KL penalty is in the reward."""


Estimator = Callable[[Tensor, Rollout, Tensor, TrainingConfig], tuple[Tensor, Tensor]]
"""(token rewards [B, R], rollout, has_score [B], config) -> advantages [B, R] and returns [B, R]."""


def compute_advantages(
    rollout: Rollout, scores: Scores, config: TrainingConfig, kl_penalty_weight: float
) -> Advantages:
    """Return the advantages of a batch, computed by the configured algorithm.

    The score goes on the last token, minus `missing_eos_penalty` if the response was cut off. The KL penalty goes
    either on the reward of every token, as the log-ratio of the sampled token, or into the loss, as the exact KL. A
    sample without a score gets advantage 0, does not train the value head, and is left out of its group.

    Args:
        rollout: The responses.
        scores: Their rewards.
        config: The algorithm and its settings.
        kl_penalty_weight: β ≥ 0.
    """
    device, dtype = rollout.values.device, rollout.values.dtype
    rewards = torch.tensor(scores.filled(), dtype=dtype, device=device)
    has_score = torch.tensor(scores.has_score, device=device)
    if config.missing_eos_penalty is not None:
        rewards = torch.where(rollout.samples.ended, rewards, rewards - config.missing_eos_penalty)
    log_ratios = (rollout.log_probs - rollout.ref_log_probs).to(dtype)
    penalty_in_reward = 0.0 if config.kl_in_loss else kl_penalty_weight
    per_token = token_rewards(rewards, log_ratios, rollout.response_mask, penalty_in_reward)
    estimate = ADVANTAGE_RULES[config.algorithm_row.advantages]
    advantages, returns = estimate(per_token, rollout, has_score, config)
    mask = rollout.response_mask & has_score[:, None]
    return Advantages(
        advantages=torch.where(mask, advantages, 0.0),
        returns=torch.where(mask, returns, 0.0),
        mask=mask,
        value_loss_weight=config.vf_coef if config.algorithm_row.learns_values else 0.0,
        kl_loss_weight=kl_penalty_weight if config.kl_in_loss else 0.0,
    )


def _gae(rewards: Tensor, rollout: Rollout, has_score: Tensor, config: TrainingConfig) -> tuple[Tensor, Tensor]:
    """Return GAE with the value head, whitened over the batch (N)."""
    advantages, returns = gae(rewards, rollout.values, rollout.response_mask, config.gamma, config.gae_lambda)
    return whiten(advantages, rollout.response_mask & has_score[:, None]), returns


def _reward_to_go(
    rewards: Tensor, rollout: Rollout, has_score: Tensor, config: TrainingConfig
) -> tuple[Tensor, Tensor]:
    """Return the sum of the rewards from each token to the end, whitened over the batch (arXiv 2501.03262)."""
    no_values = torch.zeros_like(rewards)
    to_go, _ = gae(rewards, no_values, rollout.response_mask, config.gamma, gae_lambda=1.0)
    return whiten(to_go, rollout.response_mask & has_score[:, None]), no_values


def _by_group(relative: Callable[[Tensor, Tensor], Tensor]) -> Estimator:
    """Return an estimator that gives every token the reward of its whole response, relative to the response's group."""

    def estimate(rewards: Tensor, rollout: Rollout, has_score: Tensor, config: TrainingConfig) -> tuple[Tensor, Tensor]:
        groups = (-1, config.responses_per_prompt)
        relative_rewards = relative(rewards.sum(dim=1).view(groups), has_score.view(groups)).flatten()
        return relative_rewards[:, None].expand_as(rewards), torch.zeros_like(rewards)

    return estimate


ADVANTAGE_RULES: dict[AdvantageRule, Estimator] = {
    "gae": _gae,
    "reward_to_go": _reward_to_go,
    "leave_one_out": _by_group(leave_one_out),
    "group_normalised": _by_group(group_normalised),
    "group_centred": _by_group(group_centred),
}
