"""When a run is written to its folder, and what of it: checkpoints, the best model, the final one."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from konic.finetuning.callbacks import Callbacks
from konic.finetuning.checkpoint import checkpoints, save_checkpoint, weights_of
from konic.finetuning.errors import NotFiniteError, OutputError, TrainingError
from konic.finetuning.folders import discard, written_whole
from konic.finetuning.learner import Learner
from konic.finetuning.paths import unwritable
from konic.finetuning.results import FinetuningResult
from konic.finetuning.run_folder import RunFolder
from konic.finetuning.state import TrainerState

logger = logging.getLogger(__name__)

SAVE_AFTER_SECONDS = 600.0
"""Without `save_every` a checkpoint is written when the last one is this old."""


class Saving:
    """Writes what a run leaves behind, besides its metrics and completions.

    Args:
        folder: Where to.
        learner: The policy and its optimizer.
        state: Where the run stands; read at each save.
        callbacks: Told of every checkpoint.
        settings: Gives the run's settings, by name.
        save_every: Iterations between checkpoints; None goes by the clock.
        save_total_limit: Checkpoints kept, the newest; None keeps all.
        saved_iteration: The iteration whose checkpoint is in the folder already: the one resumed from.
    """

    def __init__(
        self,
        folder: RunFolder,
        learner: Learner,
        state: TrainerState,
        callbacks: Callbacks,
        settings: Callable[[], dict[str, Any]],
        save_every: int | None,
        save_total_limit: int | None,
        saved_iteration: int | None = None,
    ) -> None:
        self._folder, self._learner, self._state = folder, learner, state
        self._callbacks, self._settings = callbacks, settings
        self._save_every, self._save_total_limit = save_every, save_total_limit
        self._saved_iteration = saved_iteration
        self._saved_at = time.monotonic()
        self._names = list(learner.policy.trainable())

    def after_iteration(self) -> None:
        """Write a checkpoint if it is time."""
        if self._save_every is not None:
            is_time = self._state.iteration % self._save_every == 0
        else:
            is_time = time.monotonic() - self._saved_at >= SAVE_AFTER_SECONDS
        if is_time:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Write a checkpoint of the iterations done, unless there is one by this run, and drop those past the limit."""
        iteration = self._state.iteration
        path = self._folder.path / f"checkpoint-{iteration}"
        is_new = self._saved_iteration != iteration or not path.is_dir()
        if is_new:
            if list(self._learner.policy.trainable()) != self._names:
                raise TrainingError("The model has lost layers that learn: no checkpoint of it is written.")
            save_checkpoint(path, self._learner.policy, self._learner.optimizer, self._state, self._settings())
            self._saved_iteration, self._saved_at = iteration, time.monotonic()
        if self._save_total_limit is not None:
            for old in checkpoints(self._folder.path)[: -self._save_total_limit]:
                try:
                    discard(old)
                except OSError as error:
                    raise unwritable(old, error) from None
        if is_new:
            self._callbacks.on_checkpoint_saved(str(path), iteration)

    def best(self, result: FinetuningResult) -> None:
        """Write the weights of the best iteration so far, if there is one."""
        if self._state.best_weights is not None:
            told = replace(result, history=result.history[: result.best_iteration])
            with weights_of(self._learner.policy, self._state.best_weights):
                self._model(self._folder.path / "best", told)

    def final(self, result: FinetuningResult) -> None:
        """Write the last checkpoint, the model as it is now, and the best one."""
        self.checkpoint()
        self._model(self._folder.path / "final", result)
        self.best(result)

    def after_error(self, result: FinetuningResult, weights_are_whole: bool) -> None:
        """Write the last whole iteration if the weights are still its own, and the best ones in any case.

        What cannot be written either is told as a warning: the error that ended the run is the one to raise.
        """
        try:
            if self._state.iteration and weights_are_whole:
                self.checkpoint()
            self.best(result)
        except (OutputError, NotFiniteError) as error:
            logger.warning("After the error below, this failed too: %s", error)

    def _model(self, path: Path, result: FinetuningResult) -> None:
        with written_whole(path) as target:
            self._learner.write(target, result, self._settings())
