"""Rollout + Scores -> Advantages: computes the advantage of each token by the rule of the algorithm.

Shapes: B sequences, R response tokens; G groups of n responses to one prompt, B = G·n.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from konic.finetuning.algorithms import AdvantageRule
from konic.finetuning.config import TrainingConfig
from konic.finetuning.learning.advantages import (
    effective_sample_size,
    equal_groups,
    gae,
    group_centred,
    group_mean_normalised,
    group_normalised,
    lambdas_by_length,
    leave_one_out,
    overlong_penalties,
    parts_normalised,
    sampler_weights,
    standard_deviation,
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
    """[B, R] True on response tokens of samples that have a score and are not left out (`mask_truncated`,
    `filter_equal_groups`)."""
    has_signal: bool
    """False if the scores do not say which response is better. The policy then stays where it is."""
    value_loss_weight: float
    """0 if the algorithm learns no values."""
    kl_loss_weight: float
    """Weight of the exact KL in the loss, in units of advantage per nat; 0 if the KL penalty is in the reward."""
    no_signal_fraction: float = 0.0
    """Share of the responses that count whose advantages are all 0, before `sampler_correction`."""
    effective_sample_size: float = 1.0
    """Share of the samples that count after `sampler_correction`, from 0 to 1."""


class Estimate(NamedTuple):
    """What a rule of advantages finds."""

    advantages: Tensor
    """[B, R]."""
    returns: Tensor
    """[B, R] the targets of the value head; 0 if no values are learned."""
    reward_per_unit: float = 1.0
    """How much reward an advantage of 1 stands for; 1 where the rule keeps to its paper, in which β is a weight in the
    loss, whatever the unit of the advantages."""


Estimator = Callable[[Tensor, Rollout, Scores, TrainingConfig], Estimate]
"""(token rewards [B, R], rollout, scores, config) -> what the rule finds."""


def compute_advantages(
    rollout: Rollout,
    scores: Scores,
    config: TrainingConfig,
    kl_penalty_weight: float,
    scores_have_varied: bool = True,
) -> Advantages:
    """Return the advantages of a batch, computed by the configured algorithm.

    The score goes on the last token, minus `missing_eos_penalty` if the response was cut off. The KL penalty goes
    either on the reward of every token, as the log-ratio of the sampled token, or into the loss, as the exact KL.
    Whitening divides the advantages by their standard deviation; β in the loss is then divided by the same number, so
    that one nat costs β of reward wherever the penalty stands. A sample without a score gets advantage 0, does not
    train the value head, and is left out of its group.

    A batch of equal scores does not say which response is better, nor does one in which every group has equal scores
    to an algorithm that compares groups: all its advantages are 0, and the policy does not move. Whitening would
    otherwise scale the noise of the value head and of the penalty up to advantages of size one, and Adam would take the
    KL alone, however small, at its full step size.

    Rewards are compared in fp64, in which large ones keep their differences.

    Args:
        rollout: The responses.
        scores: Their rewards.
        config: The algorithm and its settings.
        kl_penalty_weight: β ≥ 0.
        scores_have_varied: False if all scores of the run, these included, are equal. It decides for a batch of one
            score.
    """
    rewards = penalised_scores(rollout, scores, config)
    has_score = _has_score(scores, rewards)
    log_ratios = (rollout.log_probs - rollout.ref_log_probs).to(rewards.dtype)
    penalty_in_reward = 0.0 if config.kl_in_loss else kl_penalty_weight
    per_token = token_rewards(rewards, log_ratios, rollout.response_mask, penalty_in_reward)
    estimate = ADVANTAGE_RULES[config.algorithm_row.advantages]
    advantages, returns, reward_per_unit = estimate(per_token, rollout, scores, config)
    mask = rollout.response_mask & has_score[:, None]
    if config.mask_truncated:
        mask = mask & rollout.samples.ended[:, None]
    if config.filter_equal_groups:
        mask = mask & ~in_equal_group(rollout, scores, config)[:, None]
    if config.algorithm_row.looks_at_parts:
        has_signal = bool((advantages[mask] != 0).any())  # parts can differ where their sums are equal
    else:
        has_signal = _has_signal(rewards, has_score, config, scores_have_varied)
        if config.algorithm_row.compares_groups:  # those that differ may all be left out of the loss
            has_signal = has_signal and bool((advantages[mask] != 0).any())
    advantages, returns = advantages.to(rollout.values.dtype), returns.to(rollout.values.dtype)
    advantages = torch.where(mask & has_signal, advantages, 0.0)
    if not has_signal:
        reward_per_unit = 1.0  # no advantages are divided, so neither is β
    counts = mask.any(dim=1)
    num_silent = (counts & ~(advantages != 0).any(dim=1)).sum().item()
    weights = _sampler_weights(rollout, mask, config)
    if weights is not None:
        advantages = advantages * weights
    return Advantages(
        advantages=advantages,
        returns=torch.where(mask, returns, 0.0),
        mask=mask,
        has_signal=has_signal,
        value_loss_weight=config.vf_coef if config.algorithm_row.learns_values else 0.0,
        kl_loss_weight=kl_penalty_weight / reward_per_unit if config.kl_in_loss else 0.0,
        no_signal_fraction=num_silent / max(1, counts.sum().item()),
        effective_sample_size=1.0 if weights is None or not mask.any() else effective_sample_size(weights[mask]),
    )


def _has_signal(rewards: Tensor, has_score: Tensor, config: TrainingConfig, scores_have_varied: bool) -> bool:
    """Return True if the scores of a batch [B] say that some response is better than another one."""
    if config.algorithm_row.compares_groups:
        groups = (-1, config.responses_per_prompt)
        return not bool(equal_groups(rewards.view(groups), has_score.view(groups)).all())
    scored = rewards[has_score]
    return bool((scored != scored[:1]).any()) or (len(scored) == 1 and scores_have_varied)


def mean_penalty(rollout: Rollout, scores: Scores, config: TrainingConfig) -> float:
    """Return the mean of what :func:`penalised_scores` takes off, over the responses that have a score; 0 without."""
    less = torch.tensor(scores.filled(), dtype=torch.float64) - penalised_scores(rollout, scores, config).cpu()
    taken = less[_has_score(scores, less)]
    return taken.mean().item() if len(taken) else 0.0


def penalised_scores(rollout: Rollout, scores: Scores, config: TrainingConfig) -> Tensor:
    """Return the score of each response [B] less its penalties, in fp64; 0 less its penalties if it has no score."""
    rewards = torch.tensor(scores.filled(), dtype=torch.float64, device=rollout.values.device)
    if config.missing_eos_penalty is not None:
        rewards = torch.where(rollout.samples.ended, rewards, rewards - config.missing_eos_penalty)
    if config.overlong_penalty:
        lengths, most = rollout.response_mask.sum(dim=1), config.overlong_penalty
        penalties = overlong_penalties(lengths, rollout.max_new_tokens, config.overlong_share, most)
        rewards = rewards - penalties.to(rewards.dtype)
    return rewards


def in_equal_group(rollout: Rollout, scores: Scores, config: TrainingConfig) -> Tensor:
    """Return True [B] for the responses whose group has equal scores, before any penalty; for GDPO, equal parts.

    A penalty for length, which alone would differ, teaches nothing about the reward.
    """
    rewards = torch.tensor(scores.filled(), dtype=torch.float64, device=rollout.values.device)
    groups = (-1, config.responses_per_prompt)
    if config.algorithm_row.looks_at_parts:
        parts, mask, _ = _parts_of(scores, rewards)
    else:
        parts, mask = rewards[None], _has_score(scores, rewards)[None]
    equal = torch.ones_like(rewards.view(groups)[:, 0], dtype=torch.bool)
    for part, counts in zip(parts, mask, strict=True):
        equal &= equal_groups(part.view(groups), counts.view(groups))
    return equal.repeat_interleave(config.responses_per_prompt)


def rows_to_learn_from(rollout: Rollout, scores: Scores, config: TrainingConfig) -> list[int]:
    """Return the rows of one batch, in order: all, or with `filter_equal_groups` first those whose group differs."""
    if not config.filter_equal_groups:
        return [*range(len(scores.rewards))]
    equal = in_equal_group(rollout, scores, config).tolist()
    return sorted(sorted(range(len(equal)), key=equal.__getitem__)[: config.batch_size])


def reasons_left_out(rollout: Rollout, scores: Scores, config: TrainingConfig) -> list[str | None]:
    """Return why each response [B] that has a reward is left out of the loss, or None."""
    if scores.is_dropped:
        return ["dropped"] * len(scores.rewards)
    reasons: list[str | None] = [None] * len(scores.rewards)
    if config.mask_truncated:
        reasons = [None if ended else "cut off" for ended in rollout.samples.ended.tolist()]
    if config.filter_equal_groups:
        equal = in_equal_group(rollout, scores, config).tolist()
        reasons = ["equal group" if is_equal else reason for is_equal, reason in zip(equal, reasons, strict=True)]
    return [reason if has_score else None for reason, has_score in zip(reasons, scores.has_score, strict=True)]


def _sampler_weights(rollout: Rollout, mask: Tensor, config: TrainingConfig) -> Tensor | None:
    """Return the weights of the tokens [B, R]; None where the log-probs are the sampler's own, or without correction.

    Samples whose hidden states the trainer used have the weight 1.
    """
    if config.sampler_correction is None or not rollout.is_rescored:
        return None
    return sampler_weights(
        (rollout.log_probs - rollout.samples.log_probs).to(rollout.values.dtype),
        mask,
        config.sampler_correction_limit,
        drops_others=config.sampler_correction == "mask",
        by_sequence=config.sampler_correction_level == "sequence",
    )


def _gae(rewards: Tensor, rollout: Rollout, scores: Scores, config: TrainingConfig) -> Estimate:
    """Return GAE with the value head, whitened over the batch (N); λ by length and λ of the targets as in VAPO."""
    mask, values = rollout.response_mask, rollout.values.to(rewards.dtype)
    alpha = config.gae_lambda_length
    lambdas = config.gae_lambda if alpha is None else lambdas_by_length(mask, alpha).to(values.dtype)
    advantages, returns = gae(rewards, values, mask, config.gamma, lambdas)
    if config.value_gae_lambda is not None:
        _, returns = gae(rewards, values, mask, config.gamma, config.value_gae_lambda)
    return _whitened(advantages, returns, rollout.response_mask & _has_score(scores, rewards)[:, None])


def _whitened(advantages: Tensor, returns: Tensor, mask: Tensor) -> Estimate:
    """Return advantages divided by their standard deviation over the mask, with mean 0."""
    deviation = standard_deviation(advantages, mask).item()
    return Estimate(whiten(advantages, mask), returns, deviation or 1.0)


def _has_score(scores: Scores, like: Tensor) -> Tensor:
    """Return True [B] for the samples that have a score, on the device of another tensor."""
    return torch.tensor(scores.has_score, device=like.device)


def _reward_to_go(rewards: Tensor, rollout: Rollout, scores: Scores, config: TrainingConfig) -> Estimate:
    """Return the sum of the rewards from each token to the end, whitened over the batch (arXiv 2501.03262)."""
    no_values = torch.zeros_like(rewards)
    to_go, _ = gae(rewards, no_values, rollout.response_mask, config.gamma, gae_lambda=1.0)
    return _whitened(to_go, no_values, rollout.response_mask & _has_score(scores, rewards)[:, None])


def _by_group(relative: Callable[[Tensor, Tensor], Tensor]) -> Estimator:
    """Return an estimator that gives every token the reward of its whole response, relative to the response's group."""

    def estimate(rewards: Tensor, rollout: Rollout, scores: Scores, config: TrainingConfig) -> Estimate:
        groups, has_score = (-1, config.responses_per_prompt), _has_score(scores, rewards)
        relative_rewards = relative(rewards.sum(dim=1).view(groups), has_score.view(groups)).flatten()
        return Estimate(relative_rewards[:, None].expand_as(rewards), torch.zeros_like(rewards))

    return estimate


def _parts(rewards: Tensor, rollout: Rollout, scores: Scores, config: TrainingConfig) -> Estimate:
    """Return the parts of the reward, each relative to its group, weighted and summed; see :func:`parts_normalised`."""
    relative = parts_normalised(*_parts_of(scores, rewards), config.responses_per_prompt)
    return Estimate(relative[:, None].expand_as(rewards), torch.zeros_like(rewards))


def _parts_of(scores: Scores, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values [K, B] of the parts that count, where they have one [K, B], and their weights [K]."""
    names = [name for name in scores.parts if scores.weights[name] != 0]
    parts = torch.tensor([scores.parts[name] for name in names], dtype=like.dtype, device=like.device)
    parts = parts.view(len(names), len(like))
    weights = torch.tensor([scores.weights[name] for name in names], dtype=like.dtype, device=like.device)
    return parts, ~parts.isnan() & _has_score(scores, like), weights


ADVANTAGE_RULES: dict[AdvantageRule, Estimator] = {
    "gae": _gae,
    "reward_to_go": _reward_to_go,
    "leave_one_out": _by_group(leave_one_out),
    "group_normalised": _by_group(group_normalised),
    "group_centred": _by_group(group_centred),
    "group_mean_normalised": _by_group(group_mean_normalised),
    "parts_normalised": _parts,
}
