"""Rollout + Advantages -> UpdateStats: trains the policy in epochs of minibatches, one optimizer step each."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from konic.finetuning.config import TrainingConfig
from konic.finetuning.errors import NotFiniteError, TrainingError
from konic.finetuning.learning.estimators import Advantages
from konic.finetuning.learning.gradients import StepGradients, StepStats
from konic.finetuning.learning.losses import explained_variance
from konic.finetuning.learning.schedule import Schedule, learning_rate_at
from konic.finetuning.models.policy import Policy
from konic.finetuning.models.sharding import is_divided, own_part
from konic.finetuning.rollout.rollout import Rollout
from konic.finetuning.system.world import ALONE, World
from konic.output import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class UpdateStats:
    """Metrics of one update. `results.iteration` explains each."""

    policy_loss: float
    value_loss: float
    entropy_loss: float
    total_loss: float
    clip_fraction: float
    approx_kl: float
    grad_norm: float
    learning_rate: float
    explained_variance: float
    first_log_ratio: float
    sampler_gap: float
    kl_loss: float
    num_steps: int
    num_nonfinite: int


MAX_SAMPLER_GAP = 1e-3
"""Limit of the mean |Δ log-prob| per token, nats, between sampler and trainer in fp32; rounding is below 1 % of it."""
MAX_FIRST_LOG_RATIO = 1e-2
"""Limit of the largest |log-ratio| before the first step in fp32; rounding stays below 1 % of this limit."""


def make_optimizer(policy: Policy, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW over all trainable parameters, with eps 1e-5 (N, N+)."""
    parameters = [*policy.trainable().values()]
    # one kernel cannot take divided weights together with whole ones
    both = [[each for each in parameters if is_divided(each) == kind] for kind in (True, False)]
    groups = [{"params": group} for group in both if group]
    return torch.optim.AdamW(groups, lr=0.0, eps=1e-5, weight_decay=config.weight_decay)


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    advantages: Advantages,
    config: TrainingConfig,
    schedule: Schedule,
    world: World = ALONE,
) -> UpdateStats:
    """Train the policy on its own responses: `ppo_epochs` passes of `num_minibatches` optimizer steps each.

    A token average is a sum over the whole optimizer step divided by its true token count, for any micro-batches and
    any number of processes. Each process works on the responses that it sampled, and the gradients are added.

    Raises:
        NotFiniteError: A loss or gradient is not finite. The step is not taken. With on_nonfinite="skip" the update
            logs a warning instead.
        TrainingError: The policy is not the one that sampled. No step is taken.
    """
    steps: list[StepStats] = []
    first_log_ratio = rate = 0.0
    sampler_gap = _gap(rollout) if rollout.is_rescored else 0.0
    num_nonfinite = 0
    explores = config.entropy_coef > 0 and config.kl_in_loss  # the KL holds it; in the reward it is part of the signal
    train_policy = schedule.train_policy and (advantages.has_signal or explores)
    learns = train_policy or advantages.value_loss_weight > 0
    gradients = StepGradients(policy, rollout, advantages, config, train_policy, world)
    with policy.saving_memory(), policy.fast_products(), _gradients_dropped_after(optimizer):
        for index, rows in enumerate(_minibatches(len(rollout.batch), config, schedule.first_step)):
            num_tokens = int(advantages.mask[rows].sum())
            if num_tokens == 0 or not learns:
                continue  # no sample of this minibatch has a score, or the scores teach nothing: there is no gradient
            try:
                step = gradients.accumulate(rows, num_tokens)
                if not steps:
                    first_log_ratio = step.largest_log_ratio
                    sampler_gap = sampler_gap if rollout.is_rescored else step.sampler_gap
                    _require_same_policy(step, rollout, config)
                if config.target_kl is not None and steps and step.approx_kl > config.target_kl:
                    break
                rate = _learning_rate(schedule, index, config)
                norm = _step(policy, optimizer, rate, config.max_grad_norm, world)
            except NotFiniteError as error:
                if config.on_nonfinite == "stop":
                    raise
                logger.warning("A step is dropped (on_nonfinite='skip'): %s", error)
                optimizer.zero_grad(set_to_none=True)
                num_nonfinite += 1
            else:
                steps.append(replace(step, grad_norm=norm))

    means = _mean_over_steps(steps)
    policy_part = means["policy_loss"] + config.entropy_coef * means["entropy_loss"]
    policy_part += advantages.kl_loss_weight * means["kl_loss"]
    value_part = advantages.value_loss_weight * means["value_loss"]
    return UpdateStats(
        **means,
        total_loss=value_part + (policy_part if train_policy else 0.0),
        learning_rate=rate,
        explained_variance=_explained_variance(rollout, advantages),
        first_log_ratio=first_log_ratio,
        sampler_gap=sampler_gap,
        num_steps=len(steps),
        num_nonfinite=num_nonfinite,
    )


def _mean_over_steps(steps: list[StepStats]) -> dict[str, float]:
    """Return the means that become metrics, by name; 0 if no step was taken."""
    names = [field.name for field in fields(StepStats) if field.name not in ("sampler_gap", "largest_log_ratio")]
    return {name: sum(getattr(step, name) for step in steps) / len(steps) if steps else 0.0 for name in names}


@contextmanager
def _gradients_dropped_after(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Drop all gradients when the context ends, also after an error. A step that was not taken leaves none behind."""
    try:
        yield
    finally:
        optimizer.zero_grad(set_to_none=True)


def _minibatches(num_rows: int, config: TrainingConfig, first_step: int) -> Iterator[np.ndarray]:
    """Yield the rows of every optimizer step. Each epoch is a new permutation, keyed by seed, first step and epoch."""
    for epoch in range(config.ppo_epochs):
        if config.num_minibatches == 1:
            yield np.arange(num_rows)
            continue
        generator = np.random.Generator(np.random.Philox(key=[config.seed, first_step], counter=[0, 0, epoch, 2**63]))
        yield from np.split(generator.permutation(num_rows), config.num_minibatches)


def _gap(rollout: Rollout) -> float:
    """Return how far the sampler's log-probs are from the trainer's: the mean over all tokens."""
    apart = (rollout.samples.log_probs - rollout.log_probs)[rollout.response_mask].abs()
    return apart.mean().item() if len(apart) else 0.0


def _require_same_policy(step: StepStats, rollout: Rollout, config: TrainingConfig) -> None:
    gap, largest = step.sampler_gap, step.largest_log_ratio
    is_corrected = rollout.is_rescored and config.sampler_correction is not None
    agrees = (gap <= MAX_SAMPLER_GAP or is_corrected) and largest <= MAX_FIRST_LOG_RATIO
    if config.self_checks and rollout.in_full_precision and not agrees:
        raise TrainingError(
            "Before the first step the policy is the one that sampled, but the log-probs of sampler and trainer "
            f"differ by {gap:.2g} nats per token on average and by up to {largest:.2g}; the limits are "
            f"{MAX_SAMPLER_GAP:g} and {MAX_FIRST_LOG_RATIO:g}. Either the model computes a cached sequence "
            "differently from a whole one (try model_kwargs={'attn_implementation': 'eager'}; on a GPU, full fp32 "
            "products: torch.set_float32_matmul_precision('highest')), or another engine samples in lower precision, "
            "or something in the model changes from one pass to the next, such as dropout, a batch norm or random "
            "routing. The step was not taken. "
            "To continue anyway, set TrainingConfig(self_checks=False)."
        )


def _learning_rate(schedule: Schedule, index: int, config: TrainingConfig) -> float:
    step = schedule.first_step + index
    return learning_rate_at(
        step, schedule.total_steps, schedule.peak, config.warmup_steps, config.lr_scheduler, schedule.falls_from
    )


def _step(policy: Policy, optimizer: torch.optim.Optimizer, rate: float, max_grad_norm: float, world: World) -> float:
    """Take one optimizer step with the accumulated gradients; return their norm before clipping."""
    gradients = {name: p.grad for name, p in policy.trainable().items() if p.grad is not None}
    whole = [p for p in policy.trainable().values() if not is_divided(p)]
    parts = [own_part(gradient) for gradient in gradients.values() if is_divided(gradient)]
    norm = torch.nn.utils.get_total_norm([p.grad for p in whole if p.grad is not None])
    if parts:
        own = torch.nn.utils.get_total_norm(parts).item()
        messages = world.gather({"norm": own})
        norm = parts[0].new_tensor(math.hypot(norm.item(), *(each["norm"] for each in messages)))
    if not norm.isfinite():
        broken = (name for name, gradient in gradients.items() if not own_part(gradient).isfinite().all())
        name = next(broken, "all weights together")
        raise NotFiniteError(f"The gradient of {name} is not finite. The step was not taken; lower the learning rate.")
    torch.nn.utils.clip_grads_with_norm_(whole, max_grad_norm, norm)
    for part in parts:
        part.mul_(torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def _explained_variance(rollout: Rollout, advantages: Advantages) -> float:
    if not advantages.mask.any():
        return math.nan
    return explained_variance(rollout.values, advantages.returns, advantages.mask).item()
