"""Trained weights -> files: which checkpoints and models are written, and when."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from konic.finetuning.callbacks.composite import Callbacks
from konic.finetuning.errors import KonicError, OutputError, TrainingError
from konic.finetuning.learning.learner import Learner
from konic.finetuning.models.policy_files import save_merged, save_model
from konic.finetuning.results.summary import FinetuningResult
from konic.finetuning.run.card import model_card
from konic.finetuning.run.checkpoint import checkpoints, save_checkpoint, swapped_weights
from konic.finetuning.run.folder import RunFolder
from konic.finetuning.run.state import TrainerState
from konic.finetuning.system.files import discard, replacing_folder, unwritable, write_text
from konic.finetuning.system.world import World, from_first
from konic.output import get_logger
from konic.text import describe_error

logger = get_logger(__name__)

SAVE_AFTER_SECONDS = 600.0
"""Without `save_every`, a checkpoint is written when the last one is this old."""


class Saver:
    """Writes the checkpoints and models of a run.

    Args:
        folder: The folder of the run.
        learner: The policy and its optimizer.
        state: Where the run stands; read at each save.
        callbacks: `on_checkpoint_saved` is called for every checkpoint.
        settings: Returns the settings of the run by name.
        save_every: Iterations between checkpoints; None writes one every ten minutes, 0 only at the end.
        save_total_limit: Checkpoints kept, the newest; None keeps all.
        world: The processes of the run.
        saved_iteration: The iteration that was resumed, whose checkpoint is in the folder already.
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
        world: World,
        saved_iteration: int | None = None,
    ) -> None:
        self._folder, self._learner, self._state = folder, learner, state
        self._callbacks, self._settings = callbacks, settings
        self._save_every, self._save_total_limit, self._world = save_every, save_total_limit, world
        self._saved_iteration = saved_iteration
        self._saved_at = time.monotonic()
        self._names = list(learner.policy.trainable())

    def after_iteration(self) -> None:
        """Write a checkpoint if it is time."""
        if self._save_every is not None:
            is_time = self._save_every > 0 and self._state.iteration % self._save_every == 0
        else:
            is_time = time.monotonic() - self._saved_at >= SAVE_AFTER_SECONDS
        if self._agreed(is_time):
            self.checkpoint()

    def _agreed(self, own: bool) -> bool:
        """The first process's answer, where all have to give it their parts of the weights; else the own one."""
        divides = self._learner.policy.sharding.divides_trained
        return bool(from_first(self._world, own)) if divides else own

    def checkpoint(self) -> None:
        """Write a checkpoint, unless this run has written it already, and delete old ones over the limit."""
        iteration = self._state.iteration
        path = self._folder.path / f"checkpoint-{iteration}"
        is_new = self._agreed(self._saved_iteration != iteration or not path.is_dir())
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
            self._folder.publish()
            self._callbacks.on_checkpoint_saved(self._folder.address(path), iteration)

    def best(self, result: FinetuningResult) -> None:
        """Write the weights of the best iteration so far, if there is one."""
        if self._state.best_weights is not None:
            up_to_best = replace(result, history=result.history[: result.best_iteration])
            with swapped_weights(self._learner.policy, self._state.best_weights):
                self._model(self._folder.path / "best", up_to_best)

    def final(self, result: FinetuningResult) -> None:
        """Write the last checkpoint, the model as it is now, and the best one."""
        self.checkpoint()
        self._model(self._folder.path / "final", result)
        self.best(result)

    def after_error(self, result: FinetuningResult, weights_are_whole: bool) -> None:
        """Write a checkpoint of the last whole iteration, if the weights are still its own, and the best weights.

        If this fails too, whatever the reason, it is a warning: the error that ended the run is the one to raise.
        """
        try:
            if self._state.iteration and weights_are_whole:
                self.checkpoint()
            self.best(result)
        except Exception as error:
            what = error if isinstance(error, KonicError) else describe_error(error)
            logger.warning("After the error below, this failed too: %s", what)

    def _model(self, path: Path, result: FinetuningResult) -> None:
        with replacing_folder(path, keep_others=True) as target:
            write_model(self._learner, target, result, self._settings())


class NoSaver(Saver):
    """The saver of a process that is not the first of its run: it gives its part of the weights to the first one."""

    def checkpoint(self) -> None:
        """Nothing is written."""
        if self._learner.policy.sharding.divides_trained and self._agreed(False):
            save_checkpoint(None, self._learner.policy, self._learner.optimizer, self._state, {})

    def _model(self, path: Path, result: FinetuningResult) -> None:
        """Nothing is written."""
        save_model(self._learner.policy, None)


def write_model(
    learner: Learner, folder: Path | None, result: FinetuningResult, settings: dict[str, Any], merge: bool = False
) -> None:
    """Fill a folder with the model (the adapter, or with `merge` the full one), the tokenizer and a model card.

    None for the folder is for a process that only gives its part of the weights to the first one.
    """
    if merge:
        save_merged(learner.policy, folder)
    else:
        save_model(learner.policy, folder)
    if folder is not None:
        write_card(learner, folder, result, settings, merge)


def require_no_other_kind(folder: Path, is_adapter: bool) -> None:
    """Raise OutputError if a folder holds a full model and an adapter is to be saved there, or the other way round.

    `transformers` would load both and compute what neither of them does.
    """
    adapter = "an adapter", ("adapter_config.json", "adapter_model.*")
    full = "a full model", ("config.json", "model*.safetensors*")
    (new, _), (other, patterns) = (adapter, full) if is_adapter else (full, adapter)
    found = sorted(file.name for pattern in patterns for file in folder.glob(pattern))
    if found:
        raise OutputError(
            f"{folder}: holds {other} ({found[0]}), and {new} beside it would be loaded together with it. Name another "
            "folder, or empty this one first."
        )


def write_card(
    learner: Learner, folder: Path, result: FinetuningResult, settings: dict[str, Any], merge: bool = False
) -> None:
    """Write the README.md of a saved model."""
    card = model_card(result, settings, learner.location, is_adapter=learner.policy.uses_lora and not merge)
    write_text(folder / "README.md", card)
