"""The record of an evaluation: a policy's responses to given prompts, and their rewards."""

from dataclasses import dataclass, field
from typing import Any

from konic.finetuning.results.intervals import nanmean


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Responses of one policy to N prompts, with their rewards and their KL."""

    prompts: list[str]
    responses: list[str]
    rewards: list[float]
    """[N]; NaN if every part abstained or one failed."""
    breakdown: dict[str, list[float]]
    """Each part's own values [N], before normalising and weights; NaN if it abstained or failed."""
    kl_per_response: list[float]
    """[N] exact KL from the reference, summed over the response, nats."""
    response_lengths: list[int]
    """[N] tokens, the end-of-sequence token counted."""
    errors: list[str | None] = field(default_factory=list)
    """[N] one line that shows what failed on each response, or None."""

    @property
    def reward_mean(self) -> float:
        """Mean over the responses that have a reward."""
        return nanmean(self.rewards)

    @property
    def reward_breakdown_mean(self) -> dict[str, float]:
        """Mean of each part's own values, before weights, over the responses that have one."""
        return {name: nanmean(values) for name, values in self.breakdown.items()}

    def to_dict(self) -> dict[str, Any]:
        """The dict that `engine.evaluate` returns."""
        names = "prompts", "responses", "rewards", "reward_mean", "reward_breakdown_mean"
        values = {name: getattr(self, name) for name in (*names, "kl_per_response", "response_lengths")}
        return values | {"reward_breakdown": self.breakdown}
