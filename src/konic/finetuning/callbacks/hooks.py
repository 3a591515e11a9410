"""The hooks of a run."""

from typing import Any

from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.results.summary import FinetuningResult


class BaseKonicFinetuningCallback:
    """Base class with all hooks; they do nothing. Subclass it and override the hooks that you need."""

    def on_train_begin(self, config: dict[str, Any]) -> None:
        """Called before the first iteration; `config` holds the run's settings by name."""

    def on_iteration_begin(self, iteration: int) -> None:
        """Called before an iteration; iterations are counted from 1."""

    def on_generation_begin(self, prompts: list[str]) -> None:
        """Called before responses are sampled."""

    def on_generation_end(self, prompts: list[str], responses: list[str]) -> None:
        """Called after responses are sampled."""

    def on_reward_computed(self, rewards: list[float], reward_breakdown: dict[str, list[float]]) -> None:
        """Called after responses are scored; a value is NaN if a sample, or a part of it, has none."""

    def on_iteration_end(self, result: FinetuningIterationResult) -> None:
        """Called after an iteration's update."""

    def on_checkpoint_saved(self, path: str, iteration: int) -> None:
        """Called after a checkpoint is completely written to disk."""

    def on_train_end(self, result: FinetuningResult) -> None:
        """Called after the last iteration, when everything is saved."""

    def on_train_error(self, error: BaseException) -> None:
        """Called when an error ends the run, before the error is raised."""

    def should_stop_early(self, result: FinetuningIterationResult) -> bool:
        """Return True to end the run after this iteration."""
        return False
