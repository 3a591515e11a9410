"""Rollout + Advantages -> the gradients of one optimizer step, over its micro-batches and over all processes.

Shapes: B sequences, R response tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from konic.finetuning.algorithms import Average
from konic.finetuning.config import TrainingConfig
from konic.finetuning.errors import NotFiniteError
from konic.finetuning.learning.estimators import Advantages
from konic.finetuning.learning.losses import (
    POLICY_LOSSES,
    clipped_tokens,
    k3,
    level_log_ratios,
    log_ratio,
    moves_outward,
    value_loss,
)
from konic.finetuning.models.length_groups import group_by_length
from konic.finetuning.models.policy import Policy
from konic.finetuning.models.sharding import is_divided
from konic.finetuning.models.token_scores import divergences, score_tokens
from konic.finetuning.rollout.rollout import Rollout
from konic.finetuning.system.world import World


@dataclass(frozen=True, kw_only=True)
class StepStats:
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


@dataclass(frozen=True, kw_only=True)
class _Losses:
    """A micro-batch's losses [B, R], what they are made of, and the log-ratio per token."""

    losses: Tensor
    """With the gradient. The step's loss is their sum over all its micro-batches, divided by its tokens."""
    terms: dict[str, Tensor]
    """What becomes a mean of :class:`StepStats`, by name, without gradient."""
    token_ratios: Tensor
    """[B, R] log π_new − log π_old."""


class StepGradients:
    """Accumulates the gradients of the optimizer steps on one rollout."""

    def __init__(
        self,
        policy: Policy,
        rollout: Rollout,
        advantages: Advantages,
        config: TrainingConfig,
        train_policy: bool,
        world: World,
    ) -> None:
        self._policy = policy
        self._rollout = rollout
        self._advantages = advantages
        self._config = config
        self._train_policy = train_policy
        self._world = world

    def accumulate(self, rows: np.ndarray, num_tokens: int) -> StepStats:
        """Accumulate the gradients of one optimizer step over all processes; return the means over its tokens.

        Args:
            rows: The sequences of the step.
            num_tokens: Their tokens that have an advantage.

        Raises:
            NotFiniteError: A loss is not finite, in any process.
        """
        policy, world = self._policy, self._world
        of_step = torch.from_numpy(rows).to(self._rollout.ids.device)
        num_responses = int(self._advantages.mask[of_step].any(dim=1).sum())
        sums: dict[str, float] = {}
        largest, problem = 0.0, None
        try:
            with policy.sharding.passes():
                sums, largest = self._accumulate_own(self._rollout.states.own(of_step), num_tokens, num_responses)
        except NotFiniteError as error:
            problem = error
        parameters = [*policy.trainable().values()]
        learned = [parameter.grad is not None for parameter in parameters]
        lines = problem and [*problem.args]
        messages = world.gather({"sums": sums, "largest": largest, "learned": learned, "problem": lines})
        for message in messages:
            if message["problem"]:
                raise problem or NotFiniteError(*message["problem"])
        for parameter, *learned_by in zip(parameters, *(message["learned"] for message in messages), strict=True):
            if parameter.grad is None and any(learned_by):
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        world.sum_(
            [gradient for gradient in gradients if not is_divided(gradient)]
        )  # the backward pass adds the others
        names = dict.fromkeys(name for message in messages for name in message["sums"])
        means = {name: sum(message["sums"].get(name, 0.0) for message in messages) / num_tokens for name in names}
        return StepStats(**means, largest_log_ratio=max(message["largest"] for message in messages))

    def _accumulate_own(self, rows: Tensor, num_tokens: int, num_responses: int) -> tuple[dict[str, float], float]:
        """Accumulate the gradients of those responses of an optimizer step that this process sampled.

        Returns the sums over their tokens by name, and their largest absolute log-ratio.
        """
        policy, rollout, config, model = self._policy, self._rollout, self._config, self._policy.language_model
        totals: dict[str, float] = {}
        largest, problem = 0.0, None
        prompt_mask, response_mask = rollout.batch.mask[rows], rollout.response_mask[rows]
        groups = group_by_length(prompt_mask, response_mask, config.micro_batch_size) if len(rows) else []
        has_advantages = [group for group in groups if self._advantages.mask[rows[group]].any()]
        for group in policy.sharding.padded(has_advantages):
            if group is None:
                self._take_part()
                continue
            chosen = rows[group]
            mask = self._advantages.mask[chosen]
            weights = loss_weights(config.algorithm_row.average, mask, num_tokens, num_responses)
            if not isinstance(weights, float):
                weights = weights.to(rollout.log_probs.dtype)
            found = self._losses(chosen, weights)
            problem = problem or _find_nonfinite(found.losses, mask, rollout, chosen)
            if problem is not None and not model.in_step:
                raise problem
            torch.autograd.backward(found.losses.sum() / num_tokens)
            sums = torch.stack([term.double().sum() for term in found.terms.values()]).tolist()
            totals = {name: totals.get(name, 0.0) + value for name, value in zip(found.terms, sums, strict=True)}
            largest = max(largest, found.token_ratios.abs().max().item())
        if problem is not None:
            raise problem
        return totals, largest

    def _take_part(self) -> None:
        """A pass over nothing, where other processes have one more micro-batch and layers are divided."""
        with torch.set_grad_enabled(self._train_policy):
            nothing = self._policy.language_model.empty_pass()
        if self._train_policy:
            torch.autograd.backward(nothing)

    def _losses(self, chosen: Tensor, weights: Tensor | float) -> _Losses:
        """Run the model over a micro-batch.

        Args:
            chosen: [B] its rows of the rollout.
            weights: [B, R] how much each token's policy loss counts, from :func:`loss_weights`.
        """
        policy, rollout, advantages, config = self._policy, self._rollout, self._advantages, self._config
        row, model, states = config.algorithm_row, policy.language_model, rollout.states
        mask, places = advantages.mask[chosen], states.places[chosen]
        with torch.set_grad_enabled(self._train_policy):
            hidden = model.response_hidden(rollout.ids[chosen], rollout.mask[chosen], mask.shape[1])
            scored = score_tokens(
                model, hidden, rollout.samples.response_ids[chosen], mask, rollout.temperature,
                needs_entropy=config.entropy_coef > 0,
                reference=(policy.reference_logits, states.ref_hidden[places]) if advantages.kl_loss_weight else None,
            )  # fmt: skip
            token_ratios = log_ratio(scored.log_probs, rollout.log_probs[chosen], mask)
            ratios = level_log_ratios(token_ratios, mask, row.ratio_level)
            signal, beyond = advantages.advantages[chosen], torch.zeros_like(mask)
            if config.divergence_limit is not None:
                moved = divergences(model, states.hidden[places], hidden, mask, rollout.temperature, config.divergence)
                beyond = moves_outward(ratios, signal, moved, config.divergence_limit)
            policy_losses = POLICY_LOSSES[row.policy_loss](ratios, signal, mask & ~beyond, config.clip_ratios)
            entropy = rollout.entropy[chosen] * mask if scored.entropy is None else scored.entropy
            kl = torch.zeros_like(policy_losses) if scored.kl is None else scored.kl
            losses = weights * (policy_losses - config.entropy_coef * entropy + advantages.kl_loss_weight * kl)
        value_losses = torch.zeros_like(policy_losses)
        if advantages.value_loss_weight:
            values, old_values = policy.value_head(hidden), rollout.values[chosen]
            value_losses = value_loss(values, old_values, advantages.returns[chosen], mask, config.clip_ratio)
            losses = losses + advantages.value_loss_weight * value_losses
        with torch.no_grad():
            is_clipped = beyond if row.policy_loss == "unclipped" else clipped_tokens(ratios, mask, config.clip_ratios)
            terms = {
                "policy_loss": weights * policy_losses,
                "value_loss": value_losses.detach(),
                "entropy_loss": -(weights * entropy),
                "kl_loss": weights * kl,
                "clip_fraction": is_clipped,
                "approx_kl": torch.where(mask, k3(-token_ratios), 0.0),
                "sampler_gap": torch.where(mask, scored.log_probs - rollout.samples.log_probs[chosen], 0.0).abs(),
            }
        return _Losses(losses=losses, terms=terms, token_ratios=token_ratios.detach())


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
    return mask.double() * num_tokens / (mask.sum(dim=1, keepdim=True).clamp(min=1) * num_responses)


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
