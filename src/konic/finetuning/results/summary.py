"""The result of a whole run, and how its best iteration is chosen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from konic.finetuning.errors import no_attribute
from konic.finetuning.results.evaluation import Evaluation
from konic.finetuning.results.intervals import Interval, paired_bootstrap
from konic.finetuning.results.iteration import FinetuningIterationResult, json_values
from konic.text import printable

_SUCCESSORS = {
    "get_loss_curves": "Each iteration of `history` has policy_loss, value_loss, entropy_loss and total_loss.",
    "lora_config": "engine.lora_config has it, and run.json in the run's folder.",
    "training_config": "engine.training_config has it, and run.json in the run's folder.",
    "add_iteration_result": "The engine fills `history`, and the other numbers follow from it.",
}
"""For what the result of konic 0.1 had: what to use instead."""


@dataclass(frozen=True)
class Selection:
    """How the best iteration is chosen: by the objective of its sampling policy, within the KL budget.

    On held-out prompts the objective is their mean reward; on the iteration's own batch it is the mean reward less the
    penalties of the settings and the price of its KL.
    """

    on_held_out: bool = False
    """True to look at the held-out prompts (with eval_every), False at the iteration's own batch."""
    kl_budget: float | None = None
    """Nats per response; a policy with a higher KL is excluded."""
    kl_price: float = 0.0
    """β: what a nat per response costs on the iteration's own batch, in units of reward."""
    kl_free: float = 0.0
    """Nats per response that cost nothing there: `kl_target`, which a run with an adaptive β is meant to pay."""

    def objective(self, result: FinetuningIterationResult) -> float:
        """What an iteration is chosen by; NaN if the iteration is excluded."""
        if result.was_dropped:
            return math.nan
        kl = result.eval_kl_per_response if self.on_held_out else result.kl_per_response
        penalty = 0.0 if self.on_held_out else result.penalty_mean
        return self.objective_of(self.reward(result) - penalty, kl)

    def best(self, history: Sequence[FinetuningIterationResult]) -> FinetuningIterationResult | None:
        """The iteration with the highest objective, the first of several equal ones; None if all are excluded."""
        allowed = [result for result in history if not math.isnan(self.objective(result))]
        return max(allowed, key=self.objective, default=None)

    def reward(self, result: FinetuningIterationResult) -> float:
        """The mean reward of an iteration's policy."""
        return result.eval_reward_mean if self.on_held_out else result.reward_mean

    def objective_of(self, reward: float, kl_per_response: float) -> float:
        """What a policy with this mean reward and KL is chosen by; NaN if its KL is above the budget."""
        if self.kl_budget is not None and kl_per_response > self.kl_budget:
            return math.nan
        return reward if self.on_held_out else self.priced(reward, kl_per_response)

    def priced(self, reward: float, kl_per_response: float) -> float:
        """The reward less the price of the KL."""
        return reward - self.kl_price * max(0.0, kl_per_response - self.kl_free)


@dataclass(frozen=True)
class FinetuningResult:
    """The result of a whole run, including the iterations before it was resumed."""

    model_name: str
    history: list[FinetuningIterationResult] = field(repr=False)
    total_time_sec: float
    model_path: str | None
    """The folder of the final model."""
    stopped_because: str | None = None
    """Why the run ended before max_iterations, or None."""
    selection: Selection = Selection()
    """How the best iteration is chosen."""
    before: Evaluation | None = field(default=None, repr=False)
    """Evaluation on the held-out prompts before training; None without held-out prompts."""
    after: Evaluation | None = field(default=None, repr=False)
    """Evaluation after training, on the same prompts with the same random numbers.

    None without held-out prompts, or after Ctrl-C.
    """

    def __getattr__(self, name: str) -> Any:
        raise no_attribute(self, name, _SUCCESSORS)

    @property
    def total_iterations(self) -> int:
        """Number of iterations done."""
        return len(self.history)

    @property
    def best(self) -> FinetuningIterationResult | None:
        """The iteration with the highest objective by `selection`; the first of several equal ones."""
        return self.selection.best(self.history)

    @property
    def held_out_gain(self) -> Interval | None:
        """Mean of `after` − `before` per held-out prompt, with its 95 % interval; None unless both are there."""
        if self.before is None or self.after is None:
            return None
        return paired_bootstrap(self.before.rewards, self.after.rewards)

    @property
    def best_iteration(self) -> int:
        """Number of the best iteration; 0 if there is none.

        The weights kept for it are those that sampled, before its update.
        """
        return self.best.iteration if self.best else 0

    @property
    def best_reward(self) -> float:
        """Mean reward of the best iteration, on the held-out prompts with eval_every; NaN if there is none."""
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
        """Number of responses sampled for training."""
        return sum(result.num_samples for result in self.history)

    @property
    def left_out(self) -> dict[str, int]:
        """How many of them were left out of the loss, by reason; empty if none was."""
        counts = {
            "in groups of equal rewards": sum(result.num_in_equal_groups for result in self.history),
            "cut off": sum(result.num_cut_off for result in self.history),
            "without a reward": sum(result.num_unscored for result in self.history),
        }
        return {reason: count for reason, count in counts.items() if count}

    def get_reward_curve(self) -> list[float]:
        """Mean reward of every iteration."""
        return [result.reward_mean for result in self.history]

    def get_objective_curve(self) -> list[float]:
        """Reward − β · KL per response of every iteration."""
        return [result.objective for result in self.history]

    def get_kl_curve(self) -> list[float]:
        """KL of every iteration, nats per token."""
        return [result.kl_divergence for result in self.history]

    def summary(self) -> str:
        """The block that a run prints at its end."""
        rule = "=" * 50
        lines = [rule, "Finetuning Results Summary", rule, f"Model: {printable(self.model_name)}"]
        lines.append(f"Total Iterations: {self.total_iterations}")
        if self.history:
            best = f"{self.best_reward:.4f} (iteration {self.best_iteration})" if self.best else "none"
            lines.append(f"Best Reward: {best}")
            lines.append(f"Final Reward: {self.final_reward_mean:.4f}")
            lines.append(f"Samples: {self.total_samples}")
            if self.left_out:
                lines.append(f"Left Out: {', '.join(f'{count} {reason}' for reason, count in self.left_out.items())}")
        gain = self.held_out_gain
        if gain is not None and self.before is not None and self.after is not None:
            lines.append(f"Held-out Reward: {self.before.reward_mean:.4f} -> {self.after.reward_mean:.4f}")
            lines.append(f"Held-out Gain: {gain.mean:+.4f} ({gain.words(4)})")
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
        return json_values(values) | {"history": [result.to_dict() for result in self.history]}
