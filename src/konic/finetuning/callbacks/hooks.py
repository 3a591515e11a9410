"""The hooks of a run."""

from typing import Any

from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.results.summary import FinetuningResult


class BaseKonicFinetuningCallback:
    """Every hook, doing nothing. Subclass it and override what you need."""

    def on_train_begin(self, config: dict[str, Any]) -> None:
        """Before the first iteration; `config` holds the run's settings by name."""

    def on_iteration_begin(self, iteration: int) -> None:
        """Before an iteration, counted from 1."""

    def on_generation_begin(self, prompts: list[str]) -> None:
        """Before responses are sampled."""

    def on_generation_end(self, prompts: list[str], responses: list[str]) -> None:
        """After responses are sampled."""

    def on_reward_computed(self, rewards: list[float], reward_breakdown: dict[str, list[float]]) -> None:
        """After responses are scored; NaN where a sample, or a part of it, has no value."""

    def on_iteration_end(self, result: FinetuningIterationResult) -> None:
        """After an iteration's update."""

    def on_checkpoint_saved(self, path: str, iteration: int) -> None:
        """After a checkpoint is whole on disk."""

    def on_train_end(self, result: FinetuningResult) -> None:
        """After the last iteration, when everything is saved."""

    def on_train_error(self, error: BaseException) -> None:
        """When an error ends the run, before it is raised."""

    def should_stop_early(self, result: FinetuningIterationResult) -> bool:
        """True to end the run after this iteration."""
        return False
