"""checkpoint_dir + what to resume -> the folder of a run, locked, and the checkpoint that it goes on from."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from konic.finetuning.errors import ConfigError, OutputError
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.run.folder import ReadOnlyFolder, RunFolder
from konic.finetuning.run.remote import copy_of, fetched, named_folder, renew_copies
from konic.finetuning.run.resume import checkpoint_to_resume, newest_checkpoint
from konic.finetuning.system.places import is_url
from konic.finetuning.system.world import World, from_first
from konic.output import get_logger

logger = get_logger(__name__)


class RunPlace:
    """Where a run is written: the first process chooses the folder and opens it, the others read it."""

    def __init__(self, model_name: str, world: World) -> None:
        self.checkpoint_dir: str | os.PathLike[str] | None = None
        """The folder or URL that the user named, if any; may change between two trainings."""
        self._model_name = model_name
        self._world = world
        self._folder: RunFolder | None = None
        self._folder_named: str | os.PathLike[str] | None = None

    @property
    def folder(self) -> RunFolder:
        """The folder of the run. It exists only after :meth:`opened`."""
        assert self._folder is not None  # noqa: S101
        return self._folder

    @contextmanager
    def opened(
        self, resume: bool | str | os.PathLike[str] | None, history: list[FinetuningIterationResult]
    ) -> Iterator[Path | None]:
        """Within it the folder is locked. Yields the checkpoint to resume from, which the first process chooses.

        Args:
            resume: As in `KonicFinetuningEngine.train`.
            history: The iterations that the run already has, which it goes on from.

        Raises:
            KonicError: There is no such checkpoint, or the folder cannot be written.
        """
        if self._world.rank > 0:
            chosen = from_first(self._world, None)
            renew_copies(self._world, self.checkpoint_dir, resume)
            folder, checkpoint = chosen["folder"], chosen["checkpoint"]
            self._folder = ReadOnlyFolder(Path(copy_of(folder)))
            yield Path(copy_of(checkpoint)) if checkpoint else None
            return
        if is_url(resume) and self.checkpoint_dir is None:
            raise ConfigError(f"train(resume_from_checkpoint={resume!r}) needs checkpoint_dir, the URL of the run.")
        local = fetched(resume, self.checkpoint_dir)
        checkpoint = checkpoint_to_resume(local, copy_of(self.checkpoint_dir)) if resume is not True else None
        self._folder = folder = self._choose(checkpoint, resume is True)
        with folder.opened():
            if checkpoint is None and not resume:
                self._make_own(history)
            folder.require_own_files()
            if resume is True:
                checkpoint = self._newest_checkpoint(has_begun=bool(history))
            named = checkpoint and (str(resume) if is_url(resume) else folder.address(checkpoint.absolute()))
            from_first(self._world, {"folder": folder.address(folder.path.absolute()), "checkpoint": named})
            renew_copies(self._world, self.checkpoint_dir, resume)
            yield checkpoint

    def _choose(self, checkpoint: Path | None, resumes_newest: bool) -> RunFolder:
        """The folder that was named, or that of the checkpoint, or the one in use, or a new one."""
        if resumes_newest and self.checkpoint_dir is None:
            raise ConfigError("train(resume_from_checkpoint=True) needs checkpoint_dir, the run's folder.")
        folder = self._folder
        if folder is None or self.checkpoint_dir != self._folder_named:
            given = _run_folder_of(checkpoint) if checkpoint is not None else None
            folder = named_folder(self.checkpoint_dir or given, self._model_name)
            self._folder_named = self.checkpoint_dir
        is_own = checkpoint is not None and _run_folder_of(checkpoint).resolve() == folder.path.resolve()
        if checkpoint is not None and not is_own and folder.holds_a_run:
            raise OutputError(f"{folder.path}: holds another run than {checkpoint}. Name another folder.")
        return folder

    def _newest_checkpoint(self, has_begun: bool) -> Path | None:
        """The checkpoint to resume from. None if the run ended before its first one; its files are then set aside."""
        if not self.folder.holds_no_checkpoint_yet or has_begun:
            return newest_checkpoint(self.folder.path)
        logger.warning("%s: the run ended before its first checkpoint. It starts from the beginning.", self.folder.path)
        self._set_earlier_run_aside()
        self.folder.go_back_to([])
        return None

    def _make_own(self, history: list[FinetuningIterationResult]) -> None:
        """Move what another run wrote here away, and complete the record of a run that goes on here."""
        recorded, own = self.folder.recorded(), [(result.iteration, result.total_time_sec) for result in history]
        if not recorded or not set(recorded).issubset(own):
            self._set_earlier_run_aside()
        if history and recorded != own:
            self.folder.require_own_files()
            self.folder.go_back_to(history)

    def _set_earlier_run_aside(self) -> None:
        """Move the files of an earlier run away, so that nothing is lost, and say where they are."""
        aside = self.folder.set_earlier_run_aside()
        if aside is not None:
            logger.warning("An earlier run was in %s; its files are now in %s.", self.folder.path, aside)


def _run_folder_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint belongs to; the checkpoint may be reached through a link elsewhere."""
    behind_link = checkpoint.resolve().parent
    is_elsewhere = not RunFolder(checkpoint.parent).holds_metrics and RunFolder(behind_link).holds_metrics
    return behind_link if is_elsewhere else checkpoint.parent
