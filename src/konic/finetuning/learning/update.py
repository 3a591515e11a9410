"""Rollout + Advantages -> UpdateStats: trains the policy in epochs, minibatches and micro-batches.

Shapes: B sequences, R response tokens.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from konic.finetuning.algorithms import Average
from konic.finetuning.config import TrainingConfig
from konic.finetuning.errors import NotFiniteError, TrainingError
from konic.finetuning.learning.estimators import Advantages
from konic.finetuning.learning.losses import (
    POLICY_LOSSES,
    clipped_tokens,
    explained_variance,
    k3,
    level_log_ratios,
    log_ratio,
    moves_outward,
    value_loss,
)
from konic.finetuning.learning.schedule import Schedule, learning_rate_at
from konic.finetuning.models.length_groups import group_by_length
from konic.finetuning.models.policy import Policy
from konic.finetuning.models.sharding import is_divided, own_part
from konic.finetuning.models.token_scores import divergences, score_tokens
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


@dataclass(frozen=True, kw_only=True)
class _StepStats:
    """Statistics of one optimizer step: means over its tokens."""

    policy_loss: float
    value_loss: float
    entropy_loss: float
    kl_loss: float
    clip_fraction: float
    approx_kl: float
    sampler_gap: float
    largest_log_ratio: float
    """Largest absolute log-ratio of the step's tokens."""
    grad_norm: float = 0.0
    """Gradient norm before clipping."""


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
    steps: list[_StepStats] = []
    first_log_ratio = sampler_gap = rate = 0.0
    num_nonfinite = 0
    train_policy = schedule.train_policy and (advantages.has_signal or config.entropy_coef > 0)
    learns = train_policy or advantages.value_loss_weight > 0
    with policy.saving_memory(), policy.fast_products(), _gradients_dropped_after(optimizer):
        for index, rows in enumerate(_minibatches(len(rollout.batch), config, schedule.first_step)):
            num_tokens = int(advantages.mask[rows].sum())
            if num_tokens == 0 or not learns:
                continue  # no sample of this minibatch has a score, or the scores teach nothing: there is no gradient
            try:
                step = _accumulate(policy, rollout, advantages, rows, num_tokens, config, train_policy, world)
                if not steps:
                    first_log_ratio, sampler_gap = step.largest_log_ratio, step.sampler_gap
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


def _mean_over_steps(steps: list[_StepStats]) -> dict[str, float]:
    """Return the means that become metrics, by name; 0 if no step was taken."""
    names = [field.name for field in fields(_StepStats) if field.name not in ("sampler_gap", "largest_log_ratio")]
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


def _accumulate(
    policy: Policy,
    rollout: Rollout,
    advantages: Advantages,
    rows: np.ndarray,
    num_tokens: int,
    config: TrainingConfig,
    train_policy: bool,
    world: World,
) -> _StepStats:
    """Accumulate the gradients of one optimizer step over all processes; return the means over its tokens."""
    of_step = torch.from_numpy(rows).to(rollout.ids.device)
    num_responses, own = int(advantages.mask[of_step].any(dim=1).sum()), rollout.states.own(of_step)
    sums: dict[str, float] = {}
    largest, problem = 0.0, None
    try:
        with policy.sharding.passes():
            sums, largest = _accumulate_own(
                policy, rollout, advantages, own, num_tokens, num_responses, config, train_policy
            )
    except NotFiniteError as error:
        problem = error
    parameters = [*policy.trainable().values()]
    learned = [parameter.grad is not None for parameter in parameters]
    lines = problem and [*problem.args]
    told = world.gather({"sums": sums, "largest": largest, "learned": learned, "problem": lines})
    for part in told:
        if part["problem"]:
            raise problem or NotFiniteError(*part["problem"])
    for parameter, *learned_by in zip(parameters, *(part["learned"] for part in told), strict=True):
        if parameter.grad is None and any(learned_by):
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    world.sum_([gradient for gradient in gradients if not is_divided(gradient)])  # the backward pass adds the others
    names = dict.fromkeys(name for part in told for name in part["sums"])
    means = {name: sum(part["sums"].get(name, 0.0) for part in told) / num_tokens for name in names}
    return _StepStats(**means, largest_log_ratio=max(part["largest"] for part in told))


def _accumulate_own(
    policy: Policy,
    rollout: Rollout,
    advantages: Advantages,
    rows: Tensor,
    num_tokens: int,
    num_responses: int,
    config: TrainingConfig,
    train_policy: bool,
) -> tuple[dict[str, float], float]:
    """Accumulate the gradients of those responses of an optimizer step that this process sampled.

    Returns the sums over their tokens by name, and their largest absolute log-ratio.
    """
    row, clip_ratios, model = config.algorithm_row, config.clip_ratios, policy.language_model
    totals: dict[str, float] = {}
    largest, problem = 0.0, None
    prompt_mask, response_mask = rollout.batch.mask[rows], rollout.response_mask[rows]
    states, places = rollout.states, rollout.states.places[rows]
    groups = group_by_length(prompt_mask, response_mask, config.micro_batch_size) if len(rows) else []
    for group in policy.sharding.padded([group for group in groups if advantages.mask[rows[group]].any()]):
        if group is None:
            with torch.set_grad_enabled(train_policy):
                nothing = model.empty_pass()
            if train_policy:
                torch.autograd.backward(nothing)
            continue
        chosen = rows[group]
        mask = advantages.mask[chosen]
        weights = loss_weights(row.average, mask, num_tokens, num_responses)
        num_response_tokens = mask.shape[1]
        with torch.set_grad_enabled(train_policy):
            hidden = model.response_hidden(rollout.ids[chosen], rollout.mask[chosen], num_response_tokens)
            scored = score_tokens(
                model, hidden, rollout.samples.response_ids[chosen], mask, rollout.temperature,
                needs_entropy=config.entropy_coef > 0,
                reference=(policy.reference_logits, states.ref_hidden[places[group]])
                if advantages.kl_loss_weight else None,
            )  # fmt: skip
            token_ratios = log_ratio(scored.log_probs, rollout.log_probs[chosen], mask)
            ratios = level_log_ratios(token_ratios, mask, row.ratio_level)
            policy_loss, signal = POLICY_LOSSES[row.policy_loss], advantages.advantages[chosen]
            beyond = torch.zeros_like(mask)
            if config.divergence_limit is not None:
                old_hidden = states.hidden[places[group]]
                moved = divergences(model, old_hidden, hidden, mask, rollout.temperature, config.divergence)
                beyond = moves_outward(ratios, signal, moved, config.divergence_limit)
            policy_losses = policy_loss(ratios, signal, mask & ~beyond, clip_ratios)
            entropy = rollout.entropy[chosen] * mask if scored.entropy is None else scored.entropy
            kl = torch.zeros_like(policy_losses) if scored.kl is None else scored.kl
            losses = weights * (policy_losses - config.entropy_coef * entropy + advantages.kl_loss_weight * kl)
        value_losses = torch.zeros_like(policy_losses)
        if advantages.value_loss_weight:
            values, old_values = policy.value_head(hidden), rollout.values[chosen]
            value_losses = value_loss(values, old_values, advantages.returns[chosen], mask, config.clip_ratio)
            losses = losses + advantages.value_loss_weight * value_losses
        problem = problem or _find_nonfinite(losses, mask, rollout, chosen)
        if problem is not None and not model.in_step:
            raise problem
        torch.autograd.backward(losses.sum() / num_tokens)
        with torch.no_grad():
            gaps = torch.where(mask, scored.log_probs - rollout.samples.log_probs[chosen], 0.0).abs()
            sums = {
                "policy_loss": weights * policy_losses,
                "value_loss": value_losses,
                "entropy_loss": -(weights * entropy),
                "kl_loss": weights * kl,
                "clip_fraction": beyond
                if row.policy_loss == "unclipped"
                else clipped_tokens(ratios, mask, clip_ratios),
                "approx_kl": torch.where(mask, k3(-token_ratios), 0.0),
                "sampler_gap": gaps,
            }
            group_sums = torch.stack([tensor.double().sum() for tensor in sums.values()]).tolist()
            totals = {name: totals.get(name, 0.0) + value for name, value in zip(sums, group_sums, strict=True)}
            largest = max(largest, token_ratios.abs().max().item())
    if problem is not None:
        raise problem
    return totals, largest


def loss_weights(average: Average, mask: Tensor, num_tokens: int, num_responses: int) -> Tensor | float:
    """Return how much each token [B, R] of a part of an optimizer step counts: 1 on average over the whole step.

    Args:
        average: "token" gives every token the same weight, "response" every response.
        mask: [B, R] of this part.
        num_tokens: Tokens that count in the whole step.
        num_responses: Responses with such tokens in the whole step.
    """
    if average == "token":
        return 1.0
    return mask * num_tokens / (mask.sum(dim=1, keepdim=True).clamp(min=1) * num_responses)


def _require_same_policy(step: _StepStats, rollout: Rollout, config: TrainingConfig) -> None:
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


def _find_nonfinite(losses: Tensor, mask: Tensor, rollout: Rollout, rows: Tensor) -> NotFiniteError | None:
    bad = (mask & ~losses.isfinite()).any(dim=1).nonzero()
    if not len(bad):
        return None
    prompt = rollout.batch.prompts[int(rows[int(bad[0])])]
    return NotFiniteError(
        f"The loss is not finite for the sample of dataset row {prompt.row}, prompt {prompt.text[:100]!r}. "
        "The step was not taken. Usual causes: a learning rate that is too high, half precision, or damaged "
        "weights."
    )


def _learning_rate(schedule: Schedule, index: int, config: TrainingConfig) -> float:
    step = schedule.first_step + index
    return learning_rate_at(step, schedule.total_steps, schedule.peak, config.warmup_steps, config.lr_scheduler)


def _step(policy: Policy, optimizer: torch.optim.Optimizer, rate: float, max_grad_norm: float, world: World) -> float:
    """Take one optimizer step with the accumulated gradients; return their norm before clipping."""
    gradients = {name: p.grad for name, p in policy.trainable().items() if p.grad is not None}
    whole = [p for p in policy.trainable().values() if not is_divided(p)]
    parts = [own_part(gradient) for gradient in gradients.values() if is_divided(gradient)]
    norm = torch.nn.utils.get_total_norm([p.grad for p in whole if p.grad is not None])
    if parts:
        own = torch.nn.utils.get_total_norm(parts).item()
        told = world.gather({"norm": own})
        norm = parts[0].new_tensor(math.hypot(norm.item(), *(each["norm"] for each in told)))
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
