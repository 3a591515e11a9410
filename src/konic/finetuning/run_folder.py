"""Results -> files: one folder per run, written by one process, readable while it is written."""

import hashlib
import html
import inspect
import json
import logging
import math
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from filelock import FileLock, Timeout

from konic.finetuning.checkpoint import checkpoints, iteration_of
from konic.finetuning.errors import OutputError, printable
from konic.finetuning.folders import discard, flaw, sync, write_text
from konic.finetuning.paths import as_path, unwritable
from konic.finetuning.results import Evaluation, FinetuningIterationResult, FinetuningResult
from konic.finetuning.rollout import Rollout
from konic.finetuning.scoring import Scores

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
RUN_FILE = "run.json"
LOCK_FILE = ".lock"
_PART = "reward/"


class RunFolder:
    """`metrics.jsonl`, `completions/`, `checkpoint-{n}/`, `best/`, `final/` and `run.json` of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: list[Path] = []

    @classmethod
    def named(cls, checkpoint_dir: str | os.PathLike[str] | None, model_name: str) -> "RunFolder":
        """The folder that a user named, or a new one under `runs/` named by time and model."""
        if checkpoint_dir is not None:
            return cls(as_path(checkpoint_dir, "checkpoint_dir", OutputError))
        model = Path(model_name).name or "model"
        stem = f"{datetime.now():%Y%m%d-%H%M%S}-{model}"
        runs = Path("runs").absolute()
        names = (stem, *(f"{stem}-{number}" for number in range(2, 1000)))
        return cls(next(runs / name for name in names if not (runs / name).exists()))

    @property
    def holds_a_run(self) -> bool:
        """True where an earlier run has written."""
        return (self.path / METRICS_FILE).exists()

    @property
    def holds_no_checkpoint_yet(self) -> bool:
        """True where a run has begun that ended before its first checkpoint."""
        return (self.path / RUN_FILE).exists() and not checkpoints(self.path)

    def require_no_run(self) -> None:
        """Raise OutputError if an earlier run is in the folder."""
        if self.holds_a_run:
            raise OutputError(
                f"{self.path}: an earlier run is in this folder. Go on with train(resume_from_checkpoint=True), or "
                "name another checkpoint_dir."
            )

    def prepare(self) -> None:
        """Make the folder and see that it can be written.

        Raises:
            OutputError: It cannot.
        """
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise unwritable(f"checkpoint_dir {self.path}", error) from None

    def take_back_if_unused(self) -> None:
        """Remove the folders that :meth:`prepare` made for a run that came to nothing."""
        with suppress(OSError):
            if self._made and not {path.name for path in self.path.iterdir()} - {RUN_FILE}:
                (self.path / RUN_FILE).unlink(missing_ok=True)
                for folder in self._made:
                    folder.rmdir()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within it no other process or engine writes here; the system frees the lock of a process that was killed.

        Raises:
            OutputError: Another one does.
        """
        path = self.path / LOCK_FILE
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(
                f"{self.path}: another run is writing here ({_owner(self.path / RUN_FILE)}). Stop it or wait for its "
                "end, or name another checkpoint_dir."
            ) from None
        except OSError as error:
            raise unwritable(path, error) from None
        try:
            yield
        finally:
            with suppress(OSError):  # what has become read-only keeps it, and no error of the run is hidden by that
                path.unlink(missing_ok=True)  # one who opened it before sees that it is gone and makes another
            lock.release()

    def write_run(self, settings: dict[str, Any], environment: dict[str, Any], composer: Any) -> None:
        """Write `run.json`: settings, versions, machine, and where the rewards' source is, with its hash."""
        record = {
            "settings": settings,
            "rewards": _source_of(type(composer)),
            "environment": environment,
            "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
            "process": {"id": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M}"},
        }
        write_text(self.path / RUN_FILE, json.dumps(record, indent=1, default=str))

    def write_iteration(self, result: FinetuningIterationResult, rollout: Rollout, scores: Scores) -> None:
        """Write one iteration's completions, then its line of metrics: a line stands for whole files."""
        self._write_completions(result.iteration, rollout, scores)
        try:
            with (self.path / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(_line(result))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(self.path / METRICS_FILE, error) from None

    def write_evaluation(self, iterations_done: int, evaluation: Evaluation) -> None:
        """Write what a policy made of the held-out prompts, named by the iterations it had learned from."""
        columns: dict[str, Any] = {
            "prompt": evaluation.prompts,
            "response": evaluation.responses,
            "reward": _nulls(evaluation.rewards),
            "kl": evaluation.kl_per_response,
            "length": evaluation.response_lengths,
            "error": pyarrow.array(evaluation.errors or [None] * len(evaluation.prompts), pyarrow.string()),
        }
        columns |= {f"{_PART}{name}": _nulls(values) for name, values in evaluation.breakdown.items()}
        self._write_table("evaluations", iterations_done, columns)

    def read_evaluation(self, iterations_done: int) -> Evaluation | None:
        """What :meth:`write_evaluation` wrote, or None; a file that cannot be read is told of and counts as none."""
        path = self.path / "evaluations" / f"{iterations_done:06d}.parquet"
        if not path.is_file():
            return None
        try:
            table = pyarrow.parquet.read_table(path).to_pydict()
            breakdown = {name.removeprefix(_PART): _nans(table[name]) for name in table if name.startswith(_PART)}
            return Evaluation(
                table["prompt"],
                table["response"],
                _nans(table["reward"]),
                breakdown,
                table["kl"],
                table["length"],
                table["error"],
            )
        except (OSError, KeyError, ValueError, TypeError, pyarrow.ArrowException) as error:
            logger.warning("%s is made anew, since it cannot be read: %s", path, printable(str(error)))
            return None

    def go_back_to(self, history: list[FinetuningIterationResult]) -> None:
        """Drop what came after the last of these iterations, and what was left half written, before a resume.

        A broken checkpoint is put aside as `broken-checkpoint-{n}`.

        Raises:
            OutputError: Something cannot be removed or written.
        """
        try:
            self._go_back_to(history)
        except OSError as error:
            raise unwritable(error.filename or self.path, error) from None

    def _go_back_to(self, history: list[FinetuningIterationResult]) -> None:
        iteration = history[-1].iteration if history else 0
        for folder in checkpoints(self.path):
            if iteration_of(folder) > iteration and flaw(folder) is None:
                discard(folder)
            elif iteration_of(folder) > iteration:
                aside = folder.with_name(f"broken-{folder.name}")
                if aside.exists():
                    shutil.rmtree(aside)
                os.replace(folder, aside)
        metrics = self.path / METRICS_FILE
        if metrics.is_file() and metrics.read_bytes().count(b"\n") > len(history):  # the models are of what is dropped
            for name in ("final", "best"):
                if (self.path / name).is_dir():
                    shutil.rmtree(self.path / name)
        for pattern in (".checkpoint-*", ".best-*", ".final-*", f".{METRICS_FILE}", f".{RUN_FILE}"):
            for left in self.path.glob(pattern):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        write_text(metrics, "".join(_line(result) for result in history))
        for name in ("completions", "evaluations"):
            for file in (*(self.path / name).glob("[0-9]*.parquet"), *(self.path / name).glob(".[0-9]*")):
                if file.name.startswith(".") or (file.stem.isdigit() and int(file.stem) > iteration):
                    file.unlink()

    def _write_completions(self, iteration: int, rollout: Rollout, scores: Scores) -> None:
        mask = rollout.response_mask
        columns: dict[str, Any] = {
            "iteration": [iteration] * len(mask),
            "row": [prompt.row for prompt in rollout.batch.prompts],
            "prompt": rollout.batch.texts,
            "response": rollout.texts,
            "reward": _nulls(scores.rewards),
            "kl": rollout.kl.sum(dim=1).tolist(),
            "ended": rollout.samples.ended.tolist(),
            "error": pyarrow.array(scores.errors, pyarrow.string()),
            "token_ids": [ids[keep].tolist() for ids, keep in zip(rollout.samples.response_ids, mask, strict=True)],
        }
        columns |= {f"{_PART}{name}": _nulls(values) for name, values in scores.breakdown.items()}
        self._write_table("completions", iteration, columns)

    def _write_table(self, folder_name: str, number: int, columns: dict[str, Any]) -> None:
        folder = self.path / folder_name
        beside = folder / f".{number:06d}"
        try:
            folder.mkdir(exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.table(columns), beside)
            sync(beside)
            os.replace(beside, folder / f"{number:06d}.parquet")
        except OSError as error:
            raise unwritable(folder, error) from None


def model_card(result: FinetuningResult, settings: dict[str, Any], base_location: str, is_adapter: bool) -> str:
    """The README.md of a saved model: what it is, what it was trained to, how far it went, how to load it."""
    algorithm = settings["algorithm"]
    first, last = (result.history[0], result.history[-1]) if result.history else (None, None)
    header = {"library_name": "peft" if is_adapter else "transformers", "pipeline_tag": "text-generation"}
    front = [f"{key}: {value}" for key, value in header.items()]
    front += [f"base_model: {json.dumps(base_location)}", f"tags: [konic, reinforcement-learning, {algorithm}]"]
    lines = ["---", *front, "---", "", f"# {_escaped(result.model_name)}, finetuned by reinforcement learning", ""]
    lines += [f"Trained with konic {version('konic')} by {algorithm} for {result.total_iterations} iterations", ""]
    if first and last:
        lines += ["| | first iteration | last iteration |", "|---|---|---|"]
        lines += [f"| reward | {first.reward_mean:.4f} | {last.reward_mean:.4f} |"]
        for name, mean in last.reward_breakdown.items():
            lines.append(f"| {_escaped(name)} | {first.reward_breakdown.get(name, math.nan):.4f} | {mean:.4f} |")
        lines += [f"| KL per response (nats) | {first.kl_per_response:.3f} | {last.kl_per_response:.3f} |"]
        lines += [f"| response tokens | {first.response_length_mean:.1f} | {last.response_length_mean:.1f} |", ""]
    gain = result.held_out_gain
    if gain is not None and result.before is not None and result.after is not None:
        lines += [
            f"On {len(result.before.prompts)} held-out prompts, with the same random numbers before and after, the "
            f"mean reward went from {result.before.reward_mean:.4f} to {result.after.reward_mean:.4f}: a gain of "
            f"{gain.mean:+.4f} (95 % interval {gain.low:+.4f} to {gain.high:+.4f}, paired bootstrap).",
            "",
        ]
    loading = (
        "from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained(FOLDER)"
        if is_adapter
        else "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained(FOLDER)"
    )
    lines += [
        "```python",
        loading,
        "```",
        "",
        "Settings:",
        "",
        "```json",
        json.dumps(settings, indent=1, default=str),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Text that neither markdown, HTML nor a terminal takes for more than text; for a table's cell."""
    return html.escape(printable(text)).replace("|", "&#124;").replace("[", "&#91;").replace("`", "&#96;")


def _line(result: FinetuningIterationResult) -> str:
    return json.dumps(result.to_dict()) + "\n"


def _owner(run_file: Path) -> str:
    """Which process a run's file names."""
    try:
        process = json.loads(run_file.read_text(encoding="utf-8"))["process"]
        return f"process {process['id']} on {process['host']}, since {process['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its process is not known"


def _nulls(values: list[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def _nans(values: list[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _source_of(kind: type) -> dict[str, str | None]:
    """Where a class was written, without importing anything: its file, name, and the file's hash."""
    try:
        path = inspect.getsourcefile(kind)
    except (TypeError, OSError):  # a class of a notebook or an interactive session
        path = None
    readable = path is not None and Path(path).is_file()
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest() if path and readable else None
    return {
        "class": kind.__qualname__,
        "file": str(Path(path).absolute()) if path and readable else None,
        "sha256": digest,
    }
