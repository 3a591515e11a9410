"""Rollout + Scores -> Advantages: what each token's choice was worth.

Shapes: B sequences, R response tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from konic.finetuning.advantages import gae, token_rewards, whiten
from konic.finetuning.config import TrainingConfig
from konic.finetuning.rewards import Scores
from konic.finetuning.rollout import Rollout


@dataclass(frozen=True)
class Advantages:
    """What the update follows. Both are 0 where `mask` is False."""

    advantages: Tensor
    """[B, R] whitened, no gradient."""
    returns: Tensor
    """[B, R] what the value head regresses on, in units of reward."""
    mask: Tensor
    """[B, R] True on response tokens of samples that have a score."""


def ppo(rollout: Rollout, scores: Scores, config: TrainingConfig, kl_penalty_weight: float) -> Advantages:
    """PPO: the score on the last token, the KL penalty on all, GAE with the value head, whitened over the batch (N).

    A sample without a score gets advantage 0 and teaches the value head nothing.
    """
    device, dtype = rollout.values.device, rollout.values.dtype
    rewards = torch.tensor(scores.filled(), dtype=dtype, device=device)
    has_score = torch.tensor(scores.has_score, device=device)
    if config.missing_eos_penalty is not None:
        rewards = torch.where(rollout.samples.ended, rewards, rewards - config.missing_eos_penalty)
    log_ratios = rollout.log_probs - rollout.ref_log_probs
    per_token = token_rewards(rewards, log_ratios.to(dtype), rollout.response_mask, kl_penalty_weight)
    advantages, returns = gae(per_token, rollout.values, rollout.response_mask, config.gamma, config.gae_lambda)
    mask = rollout.response_mask & has_score[:, None]
    return Advantages(whiten(advantages, mask), torch.where(mask, returns, 0.0), mask)
