"""Results -> files: one folder per run, written by one process and readable during the run."""

import json
import os
import platform
import re
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from filelock import FileLock, Timeout

from konic.finetuning.data.formats import columns_of, read_table
from konic.finetuning.errors import OutputError
from konic.finetuning.learning.estimators import Advantages
from konic.finetuning.results.evaluation import Evaluation
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.results.trained import iterations_in_card
from konic.finetuning.rewards.composer import KonicLLMRewardComposer, origin_of
from konic.finetuning.rewards.origin import file_and_hash
from konic.finetuning.rewards.scoring import Scores
from konic.finetuning.rollout.rollout import Rollout
from konic.finetuning.run.checkpoint import checkpoints, iteration_number
from konic.finetuning.run.tables import completion_columns, evaluation_columns, evaluation_of
from konic.finetuning.system.files import (
    as_path,
    find_corruption,
    remove,
    replacing_file,
    require_no_link,
    set_aside,
    unwritable,
    write_text,
)
from konic.finetuning.system.places import current_folder, find_stray, open_no_link, open_regular, read_regular
from konic.output import get_logger
from konic.text import describe_error, redact

logger = get_logger(__name__)

_METRICS_FILE = "metrics.jsonl"
_RUN_FILE = "run.json"
_LOCK_FILE = ".lock"
_WRITTEN = (
    _METRICS_FILE, _RUN_FILE, "completions", "evaluations", "checkpoint-*", "broken-checkpoint-*", "best", "final",
    "trackers",
)  # fmt: skip
"""What a run writes into its folder."""
_REPORT_FILE = "report.html"
"""What `konic report` writes there: it links to the run's models, and says nothing of whether there is a run."""
_UNFINISHED = (
    ".checkpoint-*", ".best-*", ".final-*", f".{_METRICS_FILE}", f".{_RUN_FILE}", "completions/.[0-9]*",
    "evaluations/.[0-9]*",
)  # fmt: skip
"""What a run that was killed has left half written."""


class RunFolder:
    """`metrics.jsonl`, `completions/`, `checkpoint-{n}/`, `best/`, `final/` and `run.json` of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def named(cls, checkpoint_dir: str | os.PathLike[str] | None, model_name: str) -> "RunFolder":
        """The folder that a user named, or a new one under `runs/` named by time and model.

        Raises:
            OutputError: No file can have this path, or it is in a folder that another run writes.
        """
        if checkpoint_dir is not None:
            folder = as_path(checkpoint_dir, "checkpoint_dir", OutputError)
            _require_outside_of_runs(folder)
            return cls(folder)
        model = Path(model_name).name or "model"
        stem = f"{datetime.now():%Y%m%d-%H%M%S}-{model}"
        runs = as_path("runs", "checkpoint_dir", OutputError)
        names = (stem, *(f"{stem}-{number}" for number in range(2, 1000)))
        return cls(next(runs / name for name in names if not (runs / name).exists()))

    @property
    def holds_a_run(self) -> bool:
        """True where an earlier run has written something; its settings alone do not count."""
        return any(path.name != _RUN_FILE for path in self._written())

    @property
    def holds_metrics(self) -> bool:
        """True in the folder of a run that has done an iteration."""
        return (self.path / _METRICS_FILE).exists()

    def recorded(self) -> list[tuple[int, float]]:
        """Number and seconds of the iterations recorded here, which no two runs share, up to a line cut off."""
        rows: list[tuple[int, float]] = []
        with suppress(OSError, ValueError, KeyError, TypeError), open_regular(self.path / _METRICS_FILE) as file:
            for row in map(json.loads, file):
                rows.append((row["iteration"], row["total_time_sec"]))
        return rows

    def _written(self) -> list[Path]:
        return [path for pattern in _WRITTEN for path in sorted(self.path.glob(pattern))]

    @property
    def holds_no_checkpoint_yet(self) -> bool:
        """True where a run started and ended before its first checkpoint and its first model."""
        models = ((self.path / name).exists() for name in ("final", "best"))
        return (self.path / _RUN_FILE).exists() and not checkpoints(self.path) and not any(models)

    def set_earlier_run_aside(self) -> Path | None:
        """Move what an earlier run wrote here into a new folder `earlier-N` beside it; None if there is nothing.

        Raises:
            OutputError: Something cannot be moved.
        """
        return self._set_aside([*self._written(), *self.path.glob(_REPORT_FILE)]) if self.holds_a_run else None

    def set_evaluations_aside(self) -> Path | None:
        """Move the evaluations so far as :meth:`set_earlier_run_aside` does; None if there are none.

        Raises:
            OutputError: They cannot be moved.
        """
        folder = self.path / "evaluations"
        return self._set_aside([folder]) if folder.is_dir() else None

    def _set_aside(self, written: list[Path]) -> Path:
        try:
            return set_aside(self.path, written)
        except OSError as error:
            raise unwritable(error.filename or self.path, error) from None

    def publish(self, is_last: bool = False) -> None:
        """Let others have what was written: on a disk they have it."""

    def address(self, path: Path) -> str:
        """How others name a file or folder of the run."""
        return str(path)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Within it the folder exists and is locked. Folders that were created for nothing are removed at the end.

        Raises:
            OutputError: The folder cannot be written, or another run is writing here.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self._create()
            with self.locked():
                yield
        finally:
            with suppress(OSError):
                if made and not {path.name for path in self.path.iterdir()} - {_RUN_FILE}:
                    (self.path / _RUN_FILE).unlink(missing_ok=True)
                    for folder in made:
                        folder.rmdir()

    def _create(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise unwritable(f"checkpoint_dir {self.path}", error) from None

    def require_own_files(self) -> None:
        """Check that what is written into and read again is really here: a run that others made may hold links.

        Raises:
            OutputError: It is a link, or is not a regular file; or a model cannot be written because of a file.
        """
        for name in ("best", "final"):
            if (self.path / name).is_file() and not (self.path / name).is_symlink():  # a link is replaced
                raise OutputError(f"{self.path / name}: is not a folder, and the run writes its model there. Move it.")
        named = (self.path / name for name in (_METRICS_FILE, "completions", "evaluations", "trackers"))
        for path in (*named, *(self.path / "trackers").glob("*")):
            require_no_link(path, self.path)
        metrics = self.path / _METRICS_FILE
        stray = find_stray([metrics], self.path) if metrics.exists() else None
        if stray is not None:
            raise OutputError(f"{self.path}: {stray}. Remove it.")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within it no other process or engine can write here. The system releases the lock of a killed process.

        Raises:
            OutputError: Another one does.
        """
        path = self.path / _LOCK_FILE
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(
                f"{self.path}: {_writer(self.path / _RUN_FILE)}, or name another checkpoint_dir."
            ) from None
        except OSError as error:
            raise unwritable(path, error) from None
        try:
            yield
        finally:
            with suppress(OSError):  # a folder that has become read-only keeps it; the error of the run is not hidden
                path.unlink(missing_ok=True)  # a process that has it open sees that it is gone and makes another
            lock.release()

    def write_run(
        self,
        settings: dict[str, Any],
        environment: dict[str, Any],
        composer: KonicLLMRewardComposer,
        job_file: Path | None,
        driver: Mapping[str, Any] | None = None,
    ) -> None:
        """Write `run.json`: settings, command, versions, machine, and the files of the job and of its rewards.

        `driver` is the process to stop, by id and host, if it is another one than this.
        """
        process = {"id": os.getpid(), "host": socket.gethostname(), **(driver or {})}
        record = {
            "command": redact(shlex.join(sys.argv)),
            "current_folder": current_folder(),
            "settings": settings,
            "job": None if job_file is None else file_and_hash(job_file),
            "rewards": origin_of(composer).file,
            "environment": environment,
            "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
            "process": process | {"since": f"{datetime.now():%Y-%m-%d %H:%M}"},
        }
        write_text(self.path / _RUN_FILE, json.dumps(record, indent=1, default=str))

    def write_iteration(
        self,
        result: FinetuningIterationResult,
        rollout: Rollout,
        scores: Scores,
        left_out: list[str | None],
        advantages: Advantages,
        learned_rows: list[int],
    ) -> None:
        """Write the completions of an iteration, then its line of metrics: a line means that its file is whole.

        `left_out` [B] says why responses are left out of the loss; `advantages` are those of the rows `learned_rows`.
        """
        columns = completion_columns(result.iteration, rollout, scores, left_out, advantages, learned_rows)
        self._write_table("completions", result.iteration, columns)
        self.require_own_files()
        try:
            with open(self.path / _METRICS_FILE, "a", encoding="utf-8", opener=open_no_link) as file:
                file.write(_line(result))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(self.path / _METRICS_FILE, error) from None

    def write_evaluation(self, iterations_done: int, evaluation: Evaluation) -> None:
        """Write an evaluation on the held-out prompts, named by the iterations that the policy had learned from."""
        self._write_table("evaluations", iterations_done, evaluation_columns(evaluation))

    def read_evaluation(self, iterations_done: int) -> Evaluation | None:
        """The evaluation that :meth:`write_evaluation` wrote. None, with a warning, if the file cannot be read."""
        path = self.path / "evaluations" / f"{iterations_done:06d}.parquet"
        if not path.is_file():
            return None
        try:
            return evaluation_of(columns_of(read_table(path, path.parent)))
        except (OSError, KeyError, ValueError, TypeError, pyarrow.ArrowException) as error:
            logger.warning("%s cannot be read, so its prompts are evaluated again: %s", path, describe_error(error))
            return None

    def go_back_to(self, history: list[FinetuningIterationResult]) -> Path | None:
        """Leave nothing here that was written after the last of these iterations, before a resume.

        Where a model or a whole checkpoint is among it, all of it is moved into a new folder `earlier-N`, which is
        returned. Otherwise it is what an interrupted run had not saved, and is removed, because the resumed run writes
        it again. A broken checkpoint is renamed to `broken-checkpoint-{n}`.

        Raises:
            OutputError: Something cannot be moved, removed or written.
        """
        try:
            return self._go_back_to(history)
        except OSError as error:
            raise unwritable(error.filename or self.path, error) from None

    def _go_back_to(self, history: list[FinetuningIterationResult]) -> Path | None:
        iteration, metrics = history[-1].iteration if history else 0, self.path / _METRICS_FILE
        later = [folder for folder in checkpoints(self.path) if iteration_number(folder) > iteration]
        broken = [folder for folder in later if find_corruption(folder) is not None]
        models = [folder for folder in later if folder not in broken]
        if metrics.is_file() and metrics.read_bytes().count(b"\n") > len(history):
            models += [folder for name in ("final", "best") if _is_later(folder := self.path / name, iteration)]
        tables = [file for name in ("completions", "evaluations") for file in (self.path / name).glob("[0-9]*.parquet")]
        tables = [file for file in tables if re.fullmatch("[0-9]+", file.stem) and int(file.stem) > iteration]
        for folder in broken:
            aside = folder.with_name(f"broken-{folder.name}")
            if os.path.lexists(aside):
                remove(aside)
            os.replace(folder, aside)
        for left in (path for pattern in _UNFINISHED for path in self.path.glob(pattern)):
            remove(left)
        earlier = set_aside(self.path, [*models, *tables]) if models else None
        if earlier is not None and metrics.is_file():
            shutil.copy2(metrics, earlier)
        write_text(metrics, "".join(_line(result) for result in history))
        for file in tables:
            file.unlink(missing_ok=True)
        return earlier

    def _write_table(self, folder_name: str, number: int, columns: dict[str, Any]) -> None:
        folder = self.path / folder_name
        require_no_link(folder, self.path)
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise unwritable(folder, error) from None
        with replacing_file(folder / f"{number:06d}.parquet") as file:
            pyarrow.parquet.write_table(pyarrow.table(columns), file)


class ReadOnlyFolder(RunFolder):
    """The folder of a run for a process that is not the first of that run: the first one writes, moves and reads."""

    def write_run(self, *_: Any, **__: Any) -> None:
        """Nothing is written."""

    def write_iteration(self, *_: Any, **__: Any) -> None:
        """Nothing is written."""

    def write_evaluation(self, *_: Any, **__: Any) -> None:
        """Nothing is written."""

    def read_evaluation(self, iterations_done: int) -> Evaluation | None:
        """Nothing is read."""

    def set_evaluations_aside(self) -> Path | None:
        """Nothing is moved."""

    def go_back_to(self, history: list[FinetuningIterationResult]) -> Path | None:
        """Nothing is moved."""


def _require_outside_of_runs(folder: Path) -> None:
    """Raise OutputError for a folder in `final`, a checkpoint or another folder that a run writes, and replaces."""
    for place in (folder.resolve(), *folder.resolve().parents):
        is_of_run = any(place.match(pattern) for pattern in _WRITTEN)
        if is_of_run and any((place.parent / name).is_file() for name in (_METRICS_FILE, _RUN_FILE)):
            raise OutputError(
                f"checkpoint_dir {folder}: is in {place.name} of the run {place.parent}, which that run replaces. Name "
                f"another folder, or {place.parent} itself."
            )


def _is_later(model: Path, iteration: int) -> bool:
    """Return True for `final` or `best` of a later iteration, or of one that its card does not name."""
    trained = iterations_in_card(model)
    return model.is_dir() and (trained is None or trained > iteration)


def _line(result: FinetuningIterationResult) -> str:
    return json.dumps(result.to_dict()) + "\n"


def _writer(run_file: Path) -> str:
    """Who is writing, by the file of a run, and what to do about it."""
    owner, advice = "its process is not known", "Stop it or wait for its end"
    try:
        process = json.loads(read_regular(run_file))["process"]
        owner = f"process {process['id']} on {process['host']}, since {process['since']}"
        if (process["id"], process["host"]) == (os.getpid(), socket.gethostname()):
            owner = f"a train() of this process, since {process['since']}"
            advice = "A callback of that run cannot call it; elsewhere, wait for its end"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return f"another run is writing here ({owner}). {advice}"
