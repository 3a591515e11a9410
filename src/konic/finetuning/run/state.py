"""The state of a run, and what the next iteration needs from it: β, the place in the schedule, the best so far."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_origin, get_type_hints

from torch import Tensor

from konic.finetuning.config import TrainingConfig
from konic.finetuning.learning.kl_controller import adapted_kl_weight
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.results.summary import Selection
from konic.finetuning.rewards.moments import RunningMoments


@dataclass
class TrainerState:
    """Everything in a run except its weights. Random numbers follow from the iteration.

    A field added here is saved and loaded with the others, if :meth:`to_dict` and :meth:`from_dict` can write it.
    """

    iteration: int = 0
    """Iterations done."""
    num_steps: int = 0
    """Optimizer steps planned so far, skipped ones included: the place in the learning-rate schedule."""
    planned_iterations: int = 0
    """The last iteration for which the learning rate is planned."""
    falls_from: int = 0
    """Optimizer steps planned before the learning rate began to fall."""
    num_prompts: int = 0
    """Prompts used so far: the place in the data."""
    group_spreads: dict[str, float] = field(default_factory=dict)
    """By dataset row, the standard deviation of the scores of its last group; kept for `prefer_undecided`."""
    elapsed_seconds: float = 0.0
    history: list[FinetuningIterationResult] = field(default_factory=list)
    best_weights: dict[str, Tensor] | None = field(default=None, repr=False)
    """The trained weights with which the best iteration sampled; on the CPU."""
    reward_moments: dict[str, RunningMoments] = field(default_factory=dict)
    """Mean and spread of every normalised part of the rewards, over all samples so far."""
    reward_weights: dict[str, float] = field(default_factory=dict)
    """The weights of the rewards after the last iteration: a callback may have changed them."""

    def to_dict(self) -> dict[str, Any]:
        """Every field but the weights as JSON values."""
        values = {name: getattr(self, name) for name in _FIELDS}
        values["history"] = [result.to_dict() for result in self.history]
        values["reward_moments"] = {name: asdict(moments) for name, moments in self.reward_moments.items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainerState":
        """The state that :meth:`to_dict` wrote. Other values are ignored.

        Raises:
            KeyError: A field is missing.
            TypeError: A field is not of its kind.
        """
        given = {name: values[name] for name in _FIELDS}
        for name, kind in _FIELDS.items():
            if not isinstance(given[name], (int, float) if kind is float else kind):
                raise TypeError(f"{name} is {type(given[name]).__name__}, not {kind.__name__}")
        given["history"] = [FinetuningIterationResult.from_dict(result) for result in given["history"]]
        given["reward_moments"] = {name: RunningMoments(**own) for name, own in given["reward_moments"].items()}
        given["reward_weights"] = {name: float(weight) for name, weight in given["reward_weights"].items()}
        return cls(**given)

    def is_best(self, reward: float, kl_per_response: float, selection: Selection) -> bool:
        """True if the policy is within the KL budget and its objective is above all earlier ones."""
        objective = selection.objective_of(reward, kl_per_response)
        before = (selection.objective(result) for result in self.history)
        return not math.isnan(objective) and not any(earlier >= objective for earlier in before)

    def kl_penalty_weight(self, start: float, config: TrainingConfig) -> float:
        """β of the next iteration: the configured value, or with kl_target adapted to the KL of the last iteration.

        Iterations that were dropped do not count.
        """
        begun = config.value_warmup_iterations
        moved = [result for result in self.history if result.iteration > begun and not result.was_dropped]
        if config.kl_target is None or not moved or moved[-1].kl_penalty_weight == 0:
            return start
        last = moved[-1]
        paid, size = last.kl_per_response, config.batch_size
        return adapted_kl_weight(last.kl_penalty_weight, paid, config.kl_target, size, config.kl_horizon)

    def plan(self, last_iteration: int) -> None:
        """Plan the learning rate until the last iteration: a plan goes on, and after its end a new fall begins."""
        if self.iteration >= self.planned_iterations:
            self.falls_from = self.num_steps
        self.planned_iterations = max(last_iteration, self.iteration)

    def scores_have_varied(self, rewards: Sequence[float]) -> bool:
        """True unless all rewards of the run so far, and these, are equal."""
        ends = [end for result in self.history for end in (result.reward_min, result.reward_max)]
        finite = [end for end in (*ends, *rewards) if not math.isnan(end)]
        return len(set(finite)) > 1

    def add(
        self,
        result: FinetuningIterationResult,
        num_steps: int,
        num_prompts: int,
        group_spreads: Mapping[str, float],
        elapsed_seconds: float,
        reward_moments: dict[str, RunningMoments],
        best_weights: dict[str, Tensor] | None,
    ) -> None:
        """Count an iteration as done."""
        self.iteration = result.iteration
        self.num_steps += num_steps
        self.num_prompts += num_prompts
        self.group_spreads |= group_spreads
        self.elapsed_seconds = elapsed_seconds
        self.history.append(result)
        self.reward_moments = reward_moments
        self.best_weights = best_weights


_FIELDS = {
    name: get_origin(kind) or kind for name, kind in get_type_hints(TrainerState).items() if name != "best_weights"
}
"""The fields in the record of a checkpoint, with their types. The weights have a file of their own."""
