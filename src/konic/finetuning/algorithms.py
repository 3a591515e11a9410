"""Rollout + Scores -> Advantages: what each token's choice was worth, by the rule of the algorithm.

An algorithm is a row of a table: how it turns rewards into advantages, whether it learns values, and where the KL
penalty goes. A new one is a function in advantages.py, a row here, its name in config.py, and its tests. Losses are
averaged over the tokens of an optimizer step for all of them.

Shapes: B sequences, R response tokens; G groups of n responses to one prompt, B = G·n.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from konic.finetuning.advantages import gae, group_centred, group_normalised, leave_one_out, token_rewards, whiten
from konic.finetuning.config import TrainingConfig
from konic.finetuning.rollout import Rollout
from konic.finetuning.scoring import Scores


@dataclass(frozen=True)
class Advantages:
    """What the update follows. Tensors are 0 where `mask` is False."""

    advantages: Tensor
    """[B, R] no gradient."""
    returns: Tensor
    """[B, R] what the value head regresses on, in units of reward; unused where values do not learn."""
    mask: Tensor
    """[B, R] True on response tokens of samples that have a score."""
    value_loss_weight: float
    """0 where the algorithm has no values."""
    kl_loss_weight: float
    """β of the exact KL in the loss; 0 where the penalty is in the reward."""


Estimator = Callable[[Tensor, Rollout, Tensor, TrainingConfig], tuple[Tensor, Tensor]]
"""(token rewards [B, R], rollout, has_score [B], config) -> advantages [B, R] and returns [B, R]."""


@dataclass(frozen=True)
class Algorithm:
    """One row of the table."""

    estimate: Estimator
    learns_values: bool
    kl_placement: Literal["reward", "loss"]
    """Where the KL penalty goes unless TrainingConfig.kl_placement says otherwise."""


def advantages_of(rollout: Rollout, scores: Scores, config: TrainingConfig, kl_penalty_weight: float) -> Advantages:
    """The advantages of a batch by the configured algorithm.

    The score goes on the last token, less `missing_eos_penalty` where the response was cut off; the penalty on the
    sampled tokens' log-ratio goes on every token, or the exact KL goes into the loss. A sample without a score gets
    advantage 0, teaches the value head nothing, and is left out of its group.

    Args:
        rollout: The responses.
        scores: Their rewards.
        config: The algorithm and its settings.
        kl_penalty_weight: β ≥ 0.
    """
    algorithm = ALGORITHMS[config.algorithm]
    device, dtype = rollout.values.device, rollout.values.dtype
    rewards = torch.tensor(scores.filled(), dtype=dtype, device=device)
    has_score = torch.tensor(scores.has_score, device=device)
    if config.missing_eos_penalty is not None:
        rewards = torch.where(rollout.samples.ended, rewards, rewards - config.missing_eos_penalty)
    is_in_loss = (config.kl_placement or algorithm.kl_placement) == "loss"
    log_ratios = (rollout.log_probs - rollout.ref_log_probs).to(dtype)
    in_reward = 0.0 if is_in_loss else kl_penalty_weight
    per_token = token_rewards(rewards, log_ratios, rollout.response_mask, in_reward)
    advantages, returns = algorithm.estimate(per_token, rollout, has_score, config)
    mask = rollout.response_mask & has_score[:, None]
    return Advantages(
        torch.where(mask, advantages, 0.0),
        torch.where(mask, returns, 0.0),
        mask,
        value_loss_weight=config.vf_coef if algorithm.learns_values else 0.0,
        kl_loss_weight=kl_penalty_weight if is_in_loss else 0.0,
    )


def _ppo(rewards: Tensor, rollout: Rollout, has_score: Tensor, config: TrainingConfig) -> tuple[Tensor, Tensor]:
    """GAE with the value head, whitened over the batch (N)."""
    advantages, returns = gae(rewards, rollout.values, rollout.response_mask, config.gamma, config.gae_lambda)
    return whiten(advantages, rollout.response_mask & has_score[:, None]), returns


def _reinforce_plus_plus(
    rewards: Tensor, rollout: Rollout, has_score: Tensor, config: TrainingConfig
) -> tuple[Tensor, Tensor]:
    """The reward still to come after each token, whitened over the batch (arXiv 2501.03262)."""
    no_values = torch.zeros_like(rewards)
    to_come, _ = gae(rewards, no_values, rollout.response_mask, config.gamma, gae_lambda=1.0)
    return whiten(to_come, rollout.response_mask & has_score[:, None]), no_values


def _by_group(relative: Callable[[Tensor, Tensor], Tensor]) -> Estimator:
    """The whole response is one action: its reward, relative to its group's, on every token."""

    def estimate(rewards: Tensor, rollout: Rollout, has_score: Tensor, config: TrainingConfig) -> tuple[Tensor, Tensor]:
        groups = (-1, config.responses_per_prompt)
        relative_rewards = relative(rewards.sum(dim=1).view(groups), has_score.view(groups)).flatten()
        return relative_rewards[:, None].expand_as(rewards), torch.zeros_like(rewards)

    return estimate


ALGORITHMS = {
    "ppo": Algorithm(_ppo, learns_values=True, kl_placement="reward"),
    "rloo": Algorithm(_by_group(leave_one_out), learns_values=False, kl_placement="reward"),
    "grpo": Algorithm(_by_group(group_normalised), learns_values=False, kl_placement="loss"),
    "dr_grpo": Algorithm(_by_group(group_centred), learns_values=False, kl_placement="loss"),
    "reinforce++": Algorithm(_reinforce_plus_plus, learns_values=False, kl_placement="reward"),
}
