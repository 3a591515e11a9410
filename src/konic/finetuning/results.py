"""What a run reports: plain values, one record per iteration and one for the whole."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from konic.finetuning.errors import printable
from konic.finetuning.intervals import Interval, mean, paired_bootstrap


@dataclass(frozen=True)
class FinetuningIterationResult:
    """One iteration. Reward, KL, entropy and lengths are those of the policy that sampled, before its update."""

    iteration: int
    """From 1."""
    reward_mean: float
    """Over the samples that have a reward; NaN if none has."""
    reward_std: float
    """Unbiased; 0 for fewer than two."""
    reward_min: float
    reward_max: float
    kl_divergence: float
    """Exact KL(π ‖ π_ref), nats per response token, never negative."""
    policy_loss: float
    value_loss: float
    entropy_loss: float
    """−entropy, nats per token: during the update where entropy_coef > 0, else of the policy that sampled."""
    total_loss: float
    response_length_mean: float
    """Tokens, the end-of-sequence token counted."""
    response_length_std: float
    learning_rate: float
    """Of the last optimizer step."""
    clip_fraction: float
    """Share of tokens whose ratio left the clip range, over all optimizer steps."""
    approx_kl: float
    """How far the update moved the policy: k3 estimate, nats per token, over all optimizer steps."""
    explained_variance: float
    """Of the returns by the value head before the update; NaN where returns do not vary."""
    reward_breakdown: dict[str, float]
    """Mean of each reward, before weights, over the samples where it did not abstain."""
    generation_time_sec: float
    """Sampling, and scoring under policy and reference."""
    reward_compute_time_sec: float
    update_time_sec: float
    total_time_sec: float
    kl_per_response: float = 0.0
    """Exact KL summed over each response, mean, nats."""
    kl_k1: float = 0.0
    """Mean of log π − log π_ref of the sampled tokens: unbiased, noisy, of either sign."""
    kl_k3: float = 0.0
    """The k3 estimate from the sampled tokens, mean: unbiased, less noisy near 0, never negative."""
    kl_loss: float = 0.0
    """Exact KL(π ‖ π_ref) per token at the update's steps, nats; 0 where the penalty is in the reward."""
    kl_penalty_weight: float = 0.0
    """β of this iteration; it changes with kl_target."""
    entropy: float = 0.0
    """Of the sampling distribution, nats per token."""
    sampler_gap: float = 0.0
    """Mean |Δ log-prob| per token between sampler and trainer, nats: rounding only, or a bug."""
    first_log_ratio: float = 0.0
    """Largest |log-ratio| before the first optimizer step."""
    grad_norm: float = 0.0
    """Before clipping, mean over optimizer steps."""
    num_steps: int = 0
    """Optimizer steps taken: fewer than planned where target_kl stopped the update or no sample had a score."""
    no_signal_fraction: float = 0.0
    """Share of the samples with a reward whose every advantage is 0: for group methods, those of equal groups."""
    ended_fraction: float = 0.0
    """Share of responses that ended by themselves rather than at max_new_tokens."""
    num_samples: int = 0
    num_unscored: int = 0
    """Samples without a reward: every part abstained, or one failed. They got advantage 0."""
    num_reward_errors: int = 0
    """Samples on which a reward failed, with on_reward_error="skip"."""
    num_nonfinite: int = 0
    """Batches and optimizer steps dropped because a number in them was not finite, with on_nonfinite="skip"."""
    eval_reward_mean: float = math.nan
    """Of the same policy on the held-out prompts; NaN where it was not evaluated."""
    eval_kl_per_response: float = math.nan
    """Nats, mean over the held-out prompts; NaN where it was not evaluated."""
    checks: tuple[str, ...] = ()
    """Names of the self-checks that this iteration was the first to fail."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; NaN becomes None."""
        return _json_values(asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FinetuningIterationResult":
        """The result that :meth:`to_dict` made."""
        floats = {f.name for f in fields(cls) if f.type is float}
        filled: dict[str, Any] = {n: math.nan if v is None and n in floats else v for n, v in values.items()}
        filled["checks"] = tuple(values.get("checks", ()))
        filled["reward_breakdown"] = {n: math.nan if v is None else v for n, v in values["reward_breakdown"].items()}
        return cls(**filled)


@dataclass(frozen=True)
class Evaluation:
    """Responses of one policy to N prompts, and what they were worth."""

    prompts: list[str]
    responses: list[str]
    rewards: list[float]
    """[N]; NaN where every part abstained or one failed."""
    breakdown: dict[str, list[float]]
    """Each part's own values [N], before normalising and weights; NaN where it abstained or failed."""
    kl_per_response: list[float]
    """[N] exact KL from the reference, summed over the response, nats."""
    response_lengths: list[int]
    """[N] tokens, the end-of-sequence token counted."""
    errors: list[str | None] = field(default_factory=list)
    """[N] what failed on each response, in a line."""

    @property
    def reward_mean(self) -> float:
        """Over the responses that have a reward."""
        return mean_of_present(self.rewards)

    @property
    def reward_breakdown(self) -> dict[str, float]:
        """Mean of each reward, before weights, where it did not abstain."""
        return {name: mean_of_present(values) for name, values in self.breakdown.items()}

    def to_dict(self) -> dict[str, Any]:
        """What `engine.evaluate` returns."""
        names = ("prompts", "responses", "rewards", "reward_mean", "reward_breakdown")
        return {name: getattr(self, name) for name in (*names, "kl_per_response", "response_lengths")}


@dataclass(frozen=True)
class Selection:
    """How the best iteration is chosen: by the mean reward of its sampling policy, where that kept to its budget."""

    on_held_out: bool = False
    """On the held-out prompts, with eval_every; else on the iteration's own batch."""
    kl_budget: float | None = None
    """Nats per response; a policy that paid more is out."""

    def reward(self, result: FinetuningIterationResult) -> float:
        """What an iteration is chosen by, NaN where it is out."""
        if result.num_nonfinite and not result.num_steps:
            return math.nan
        if self.on_held_out:
            return self.allowed(result.eval_reward_mean, result.eval_kl_per_response)
        return self.allowed(result.reward_mean, result.kl_per_response)

    def allowed(self, reward: float, kl_per_response: float) -> float:
        """A reward, or NaN where the KL paid for it is beyond the budget."""
        is_in_budget = self.kl_budget is None or kl_per_response <= self.kl_budget
        return reward if is_in_budget else math.nan


@dataclass(frozen=True)
class FinetuningResult:
    """A whole run, across resumes."""

    model_name: str
    history: list[FinetuningIterationResult] = field(repr=False)
    total_time_sec: float
    model_path: str | None
    """The folder of the final model."""
    stopped_because: str | None = None
    """Why it ended before max_iterations, or None."""
    selection: Selection = Selection()
    """How the best iteration is chosen."""
    before: Evaluation | None = field(default=None, repr=False)
    """The held-out prompts before training; None without any."""
    after: Evaluation | None = field(default=None, repr=False)
    """The same prompts with the same random numbers after it; None without any, or after Ctrl-C."""

    @property
    def total_iterations(self) -> int:
        """Iterations done."""
        return len(self.history)

    @property
    def best(self) -> FinetuningIterationResult | None:
        """The iteration with the highest reward by `selection`; the first of equals."""
        allowed = [result for result in self.history if not math.isnan(self.selection.reward(result))]
        return max(allowed, key=self.selection.reward, default=None)

    @property
    def held_out_gain(self) -> Interval | None:
        """After less before, per held-out prompt, with its 95 % interval; None without both."""
        if self.before is None or self.after is None:
            return None
        return paired_bootstrap(self.before.rewards, self.after.rewards)

    @property
    def best_iteration(self) -> int:
        """Its number; 0 before any. The weights kept for it are those that sampled, before its update."""
        return self.best.iteration if self.best else 0

    @property
    def best_reward(self) -> float:
        """Its mean reward, on held-out prompts with eval_every; NaN before any iteration."""
        return self.selection.reward(self.best) if self.best else math.nan

    @property
    def final_reward_mean(self) -> float:
        """Mean reward of the last iteration."""
        return self.history[-1].reward_mean if self.history else math.nan

    @property
    def final_kl_divergence(self) -> float:
        """KL of the last iteration, nats per token."""
        return self.history[-1].kl_divergence if self.history else math.nan

    @property
    def total_samples(self) -> int:
        """Responses sampled for training."""
        return sum(result.num_samples for result in self.history)

    def get_reward_curve(self) -> list[float]:
        """Mean reward of every iteration."""
        return [result.reward_mean for result in self.history]

    def get_kl_curve(self) -> list[float]:
        """KL of every iteration, nats per token."""
        return [result.kl_divergence for result in self.history]

    def summary(self) -> str:
        """The block that a run prints at its end."""
        rule = "=" * 50
        lines = [rule, "Finetuning Results Summary", rule, f"Model: {printable(self.model_name)}"]
        lines.append(f"Total Iterations: {self.total_iterations}")
        if self.history:
            lines.append(f"Best Reward: {self.best_reward:.4f} (iteration {self.best_iteration})")
            lines.append(f"Final Reward: {self.final_reward_mean:.4f}")
            lines.append(f"Samples: {self.total_samples}")
        gain = self.held_out_gain
        if gain is not None and self.before is not None and self.after is not None:
            lines.append(f"Held-out Reward: {self.before.reward_mean:.4f} -> {self.after.reward_mean:.4f}")
            lines.append(f"Held-out Gain: {gain.mean:+.4f} (95 % interval {gain.low:+.4f} to {gain.high:+.4f})")
        lines.append(f"Time: {self.total_time_sec:.1f}s")
        if self.stopped_because:
            lines.append(f"Stopped early: {self.stopped_because}")
        if self.model_path:
            lines.append(f"Saved in: {self.model_path}")
        return "\n".join([*lines, rule])

    def to_dict(self) -> dict[str, Any]:
        """The numbers and the history as JSON values."""
        names = ("total_iterations", "best_iteration", "best_reward", "final_reward_mean", "final_kl_divergence")
        values = {name: getattr(self, name) for name in names}
        values |= {"total_samples": self.total_samples, "total_time_sec": self.total_time_sec}
        values |= {
            "model_name": self.model_name,
            "model_path": self.model_path,
            "stopped_because": self.stopped_because,
        }
        return _json_values(values) | {"history": [result.to_dict() for result in self.history]}


def mean_of_present(values: Sequence[float]) -> float:
    """The mean of the values that are not NaN, NaN of none."""
    return mean([value for value in values if not math.isnan(value)])


def _json_values(values: dict[str, Any]) -> dict[str, Any]:
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: clean(value) for key, value in values.items()}
