"""Rollout + Advantages -> UpdateStats: epochs, minibatches, micro-batches, one optimizer step after another.

Shapes: B sequences, R response tokens; b sequences of one micro-batch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from konic.finetuning.algorithms import Advantages
from konic.finetuning.config import TrainingConfig
from konic.finetuning.errors import TrainingError
from konic.finetuning.language_model import score_tokens
from konic.finetuning.losses import (
    clipped_tokens,
    explained_variance,
    k3,
    log_ratio,
    policy_loss,
    value_loss,
)
from konic.finetuning.policy import Policy
from konic.finetuning.rollout import Rollout


@dataclass(frozen=True)
class UpdateStats:
    """One iteration's update; losses are per response token, averaged over its optimizer steps."""

    policy_loss: float
    value_loss: float
    entropy_loss: float
    """−entropy, nats: of the policy at each step where entropy_coef > 0, else of the policy that sampled."""
    total_loss: float
    """policy_loss + vf_coef · value_loss + entropy_coef · entropy_loss."""
    clip_fraction: float
    """Share of tokens whose ratio had left [1 − ε, 1 + ε], over all steps."""
    approx_kl: float
    """k3 estimate of KL(old ‖ new) per token, nats, over all steps."""
    grad_norm: float
    """Before clipping, averaged over the steps."""
    learning_rate: float
    """Of the last step."""
    explained_variance: float
    """Of the returns by the values before the update; NaN where returns do not vary."""
    first_log_ratio: float
    """Largest |log-ratio| before the first step: 0 where old and new log-probs come from the same shapes."""


@dataclass(frozen=True)
class Schedule:
    """Where in the run an update's optimizer steps stand."""

    first_step: int
    """Optimizer steps taken before."""
    total_steps: int
    """Optimizer steps planned over the whole run."""
    peak: float
    """The learning rate at the end of warm-up."""


def make_optimizer(policy: Policy, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over everything that learns, with eps 1e-5 (N, N+)."""
    return torch.optim.AdamW(policy.trainable().values(), lr=0.0, eps=1e-5, weight_decay=config.weight_decay)


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    advantages: Advantages,
    config: TrainingConfig,
    schedule: Schedule,
) -> UpdateStats:
    """Train the policy on its own responses: `ppo_epochs` passes of `num_minibatches` optimizer steps each.

    A token average is a sum over the whole optimizer step divided by its true token count, whatever the micro-batches.

    Raises:
        TrainingError: A loss or gradient is not finite; the step is not taken.
    """
    steps: list[Tensor] = []
    first_log_ratio = 0.0
    rate = 0.0
    with policy.training_mode():
        for index, rows in enumerate(_minibatches(len(rollout.batch), config, schedule.first_step)):
            num_tokens = int(advantages.mask[rows].sum())
            if num_tokens == 0:
                continue  # every sample abstained: there is nothing to follow
            totals, largest = _accumulate(policy, rollout, advantages, rows, num_tokens, config)
            first_log_ratio = largest if index == 0 else first_log_ratio
            rate = _learning_rate(schedule, index, config)
            norm = _step(policy, optimizer, rate, config.max_grad_norm)
            steps.append(torch.cat([totals, norm[None].to(totals)]))
    means = torch.stack(steps).mean(dim=0).tolist() if steps else [0.0] * 6
    policy_mean, value_mean, entropy_mean, clip_fraction, approx_kl, grad_norm = means
    return UpdateStats(
        policy_loss=policy_mean,
        value_loss=value_mean,
        entropy_loss=-entropy_mean,
        total_loss=policy_mean + config.vf_coef * value_mean - config.entropy_coef * entropy_mean,
        clip_fraction=clip_fraction,
        approx_kl=approx_kl,
        grad_norm=grad_norm,
        learning_rate=rate,
        explained_variance=_explained_variance(rollout, advantages),
        first_log_ratio=first_log_ratio,
    )


def learning_rate_at(step: int, total_steps: int, peak: float, warmup_steps: int, schedule: str) -> float:
    """The learning rate of an optimizer step.

    Args:
        step: The step about to be taken, counted from 0 over the whole run.
        total_steps: Steps planned over the whole run; only the falling schedules look at it.
        peak: The rate at the end of warm-up.
        warmup_steps: Step i of these runs at peak · (i + 1) / warmup_steps.
        schedule: "constant", "linear" (to zero at total_steps) or "cosine" (half a period, to zero at total_steps).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return peak * (1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)


def _minibatches(num_rows: int, config: TrainingConfig, first_step: int) -> Iterator[np.ndarray]:
    """The rows of every optimizer step: each epoch is a new permutation, keyed by seed, first step and epoch."""
    for epoch in range(config.ppo_epochs):
        if config.num_minibatches == 1:
            yield np.arange(num_rows)
            continue
        generator = np.random.Generator(np.random.Philox(key=[config.seed, first_step], counter=[0, 0, epoch, 2**63]))
        yield from np.split(generator.permutation(num_rows), config.num_minibatches)


def _accumulate(
    policy: Policy,
    rollout: Rollout,
    advantages: Advantages,
    rows: np.ndarray,
    num_tokens: int,
    config: TrainingConfig,
) -> tuple[Tensor, float]:
    """Add one optimizer step's gradients; its means [policy, value, entropy, clipped, KL] and largest |log-ratio|."""
    totals = torch.zeros(5, dtype=torch.float64)
    largest = 0.0
    for part in np.split(rows, config.gradient_accumulation_steps):
        chosen = torch.from_numpy(part).to(rollout.ids.device)
        mask = advantages.mask[chosen]
        if not mask.any():
            continue
        num_response_tokens = mask.shape[1]
        model = policy.language_model
        hidden = model.response_hidden(rollout.ids[chosen], rollout.mask[chosen], num_response_tokens)
        tokens = rollout.samples.response_ids[chosen]
        needs_entropy = config.entropy_coef > 0
        log_probs, *scored = score_tokens(model, hidden, tokens, mask, rollout.temperature, needs_entropy)
        entropy = scored[0] if needs_entropy else rollout.entropy[chosen] * mask
        ratios = log_ratio(log_probs, rollout.log_probs[chosen], mask)
        policy_losses = policy_loss(ratios, advantages.advantages[chosen], mask, config.clip_ratio)
        value_losses = value_loss(
            policy.values(hidden), rollout.values[chosen], advantages.returns[chosen], mask, config.clip_ratio
        )
        losses = policy_losses + config.vf_coef * value_losses - config.entropy_coef * entropy
        _require_finite(losses, mask, rollout, part)
        torch.autograd.backward(losses.sum() / num_tokens)
        with torch.no_grad():
            clipped = clipped_tokens(ratios, mask, config.clip_ratio)
            parts = (policy_losses, value_losses, entropy, clipped, torch.where(mask, k3(-ratios), 0.0))
            totals += torch.stack([tensor.double().sum() for tensor in parts]).cpu()
            largest = max(largest, ratios.abs().max().item())
    return totals / num_tokens, largest


def _require_finite(losses: Tensor, mask: Tensor, rollout: Rollout, part: np.ndarray) -> None:
    bad = (mask & ~losses.isfinite()).any(dim=1).nonzero()
    if len(bad):
        prompt = rollout.batch.prompts[int(part[int(bad[0])])]
        raise TrainingError(
            f"The loss is not finite for the sample of dataset row {prompt.row}, prompt {prompt.text[:100]!r}. "
            "The step was not taken. Usual causes: too high a learning rate, half precision, or damaged weights."
        )


def _learning_rate(schedule: Schedule, index: int, config: TrainingConfig) -> float:
    step = schedule.first_step + index
    return learning_rate_at(step, schedule.total_steps, schedule.peak, config.warmup_steps, config.lr_scheduler)


def _step(policy: Policy, optimizer: torch.optim.Optimizer, rate: float, max_grad_norm: float) -> Tensor:
    """Take one optimizer step with the accumulated gradients; their norm before clipping."""
    parameters = policy.trainable()
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
    if not norm.isfinite():
        broken = (n for n, p in parameters.items() if p.grad is not None and not p.grad.isfinite().all())
        name = next(broken, "all weights together")
        optimizer.zero_grad(set_to_none=True)
        raise TrainingError(f"The gradient of {name} is not finite. The step was not taken; lower the learning rate.")
    torch.nn.utils.clip_grads_with_norm_(parameters.values(), max_grad_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.detach()


def _explained_variance(rollout: Rollout, advantages: Advantages) -> float:
    if not advantages.mask.any():
        return math.nan
    return explained_variance(rollout.values, advantages.returns, advantages.mask).item()
