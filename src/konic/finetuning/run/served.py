"""Rollout of a server -> whether the current weights sampled it, judged by the server's own log-probs.

Shapes: B sequences, R response tokens. A mask is True where a token counts.
"""

import math

from torch import Tensor

from konic.finetuning.errors import SamplerError
from konic.finetuning.models.policy import Policy
from konic.finetuning.rollout.rollout import Rollout, policy_log_probs
from konic.finetuning.rollout.vllm_sampler import VllmSampler
from konic.finetuning.run.checkpoint import snapshot, swapped_weights
from konic.finetuning.run.checks import MAX_CORRECTED_GAP

ROUNDING_GAP = 1e-4
"""A smaller gap is rounding in fp32: no other weights are looked for that would explain it."""
ROWS_TO_COMPARE = 8
"""Responses on which older weights are compared with the current ones."""


class ServedCheck:
    """Checks each rollout of a server before the update that would learn from it."""

    def __init__(self, policy: Policy, sampler: VllmSampler) -> None:
        self._policy, self._sampler = policy, sampler
        self._current: tuple[int, dict[str, Tensor]] | None = None
        self._older: tuple[int, dict[str, Tensor]] | None = None

    def require_current(self, rollout: Rollout, iteration: int) -> None:
        """Check that the responses were sampled from the weights of this iteration.

        The adapter of the iteration before is compared only where the gap is more than rounding in fp32.

        Raises:
            SamplerError: They were sampled from the base model, from an older adapter, or from another model.
        """
        if self._policy.uses_lora and (self._current is None or self._current[0] != iteration):
            self._older, self._current = self._current, (iteration, snapshot(self._policy))
        sampled, current, mask = rollout.samples.log_probs, rollout.log_probs, rollout.response_mask
        gap = (sampled - current)[mask].abs().mean().item()
        if gap <= ROUNDING_GAP or math.isnan(gap):  # what is not finite is found, and named, later
            return
        told, other = f"Iteration {iteration}: {self._sampler.server} ", self._find_other(rollout)
        if other is not None:
            raise SamplerError(
                f"{told}has sampled from {other}, and not from the current weights, which it calls "
                f"{self._sampler.served_name}. Nothing was updated."
            )
        if gap > MAX_CORRECTED_GAP:
            raise SamplerError(
                f"{told}gives log-probs that differ from the trainer's by {gap:.2g} nats per token on average, and "
                f"rounding explains at most {MAX_CORRECTED_GAP:g}. It serves another model or revision, or computes in "
                "a very low precision, or was started without --logprobs-mode=processed_logprobs. Nothing was updated."
            )

    def _find_other(self, rollout: Rollout) -> str | None:
        """Return what has sampled instead of the current weights: the likeliest of those known, or None."""
        part = slice(0, ROWS_TO_COMPARE)
        sampled, current = rollout.samples.log_probs[part], rollout.log_probs[part]
        mask, others = rollout.response_mask[part], {"the model before training": rollout.ref_log_probs[part]}
        if self._older is not None:
            iteration, weights = self._older
            with swapped_weights(self._policy, weights):
                older = policy_log_probs(self._policy, rollout, range(len(sampled)))
            others[f"the adapter of iteration {iteration}, which is out of date"] = older
        found = [name for name, other in others.items() if is_other(sampled, current, other, mask)]
        return min(found, key=lambda name: (sampled - others[name])[mask].abs().sum().item(), default=None)


def share_of_other(sampled: Tensor, current: Tensor, other: Tensor, mask: Tensor) -> tuple[float, float]:
    """Return how much of another policy is in the log-probs of a sampler, and the standard error of that share.

    It is the least-squares estimate of s in: sampled - current = s · (other - current) + rounding. It is near 0 if
    the current policy has sampled and near 1 if the other one has, whatever the precision of the sampler.

    Args:
        sampled: [B, R] log-probs of the tokens as the sampler reported them.
        current: [B, R] under the policy that should have sampled.
        other: [B, R] under another one.
        mask: [B, R] True on the tokens that count.

    Returns:
        The share and its standard error, which is infinite where the two policies do not differ.
    """
    gap, apart = ((side - current)[mask].double() for side in (sampled, other))
    scale, count = (apart**2).sum().item(), int(mask.sum())
    if scale == 0 or count < 2:
        return 0.0, math.inf
    share = (gap * apart).sum().item() / scale
    residual = ((gap - share * apart) ** 2).sum().item() / (count - 1)
    return share, math.sqrt(residual / scale)


def is_other(sampled: Tensor, current: Tensor, other: Tensor, mask: Tensor) -> bool:
    """Return True if the other policy has sampled: its share is between ½ and 1½ by 4 standard errors."""
    share, error = share_of_other(sampled, current, other, mask)
    return abs(share - 1) + 4 * error < 0.5
