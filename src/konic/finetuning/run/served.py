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
from konic.output import get_logger

logger = get_logger(__name__)

ROUNDING_GAP = 1e-4
"""A smaller gap is rounding in fp32: no other weights are looked for that would explain it."""
MAX_ROUNDING_GAP = 1e-3
"""The most that rounding explains where server and trainer compute in fp32; it was 6e-6 at most (docs/vllm.md)."""
ROWS_TO_COMPARE = 8
"""Responses on which older weights are compared with the current ones."""
TOKENS_TO_JUDGE = 16
"""Fewest tokens of a response that is judged by itself: a server may have several copies, one of them out of date."""


class ServedCheck:
    """Checks each rollout of a server before the update that would learn from it."""

    def __init__(self, policy: Policy, sampler: VllmSampler, is_own: bool) -> None:
        """`is_own` says that konic has started the server, which then computes in the trainer's precision."""
        self._policy, self._sampler, self._is_own = policy, sampler, is_own
        self._has_warned = False
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
        who, other = f"Iteration {iteration}: {self._sampler.server}", self._find_other(rollout)
        if other is not None:
            raise SamplerError(
                f"{who} has sampled from {other}, and not from the current weights, which it calls "
                f"{self._sampler.served_name}. Nothing was updated."
            )
        if gap > MAX_CORRECTED_GAP:
            raise SamplerError(
                f"{who} gives log-probs that differ from the trainer's by {gap:.2g} nats per token on average, and "
                f"rounding explains at most {MAX_CORRECTED_GAP:g}. It serves another model or revision, or computes in "
                "a very low precision, or was started without --logprobs-mode=processed_logprobs. Nothing was updated."
            )
        if gap > MAX_ROUNDING_GAP and rollout.in_full_precision:
            self._judge_fp32(who, gap)

    def _judge_fp32(self, who: str, gap: float) -> None:
        """Raise SamplerError if a server of our own is that far from a trainer in fp32; of another one, warn once."""
        differ = f"{who} gives log-probs that differ by {gap:.2g} nats per token on average from the trainer's in fp32"
        if self._is_own:
            raise SamplerError(
                f"{differ}, as the server does: rounding explains at most {MAX_ROUNDING_GAP:g}. Nothing was updated."
            )
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s. That is usual if the server computes in 16 bits, and sampler_correction then weights the tokens. "
                "If it computes in fp32, it has other weights, such as those that an earlier run left there (start it "
                "again), or was started without --logprobs-mode=processed_logprobs.", differ,
            )  # fmt: skip

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
        if self._policy.resumes_adapter:
            with self._policy.adapter_off():
                others["the base model without its adapter"] = policy_log_probs(self._policy, rollout, range(len(mask)))
        found = [name for name, other in others.items() if _any_is_other(sampled, current, other, mask)]
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


def is_other(sampled: Tensor, current: Tensor, other: Tensor, mask: Tensor, num_errors: float = 4) -> bool:
    """Return True if the other policy has sampled: its share is between ½ and 1½ by so many standard errors."""
    share, error = share_of_other(sampled, current, other, mask)
    return abs(share - 1) + num_errors * error < 0.5


def _any_is_other(sampled: Tensor, current: Tensor, other: Tensor, mask: Tensor) -> bool:
    """Return True if the other policy has sampled all responses, or one that is long enough to be judged by itself."""
    rows = [slice(row, row + 1) for row in range(len(mask)) if mask[row].sum() >= TOKENS_TO_JUDGE]
    far = [row for row in rows if (sampled - current)[row][mask[row]].abs().mean() > ROUNDING_GAP]
    return is_other(sampled, current, other, mask) or any(
        is_other(sampled[row], current[row], other[row], mask[row], num_errors=8) for row in far
    )
