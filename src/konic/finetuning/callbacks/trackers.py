"""Settings, metrics and samples -> an experiment tracker, whose faults are warnings: they never end a run.

Every tracker gets the same names: those of docs/metrics.md, and `reward/name` for each reward.
"""

import contextlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from konic.finetuning.arguments import require_count
from konic.finetuning.callbacks.hooks import BaseKonicFinetuningCallback
from konic.finetuning.errors import ConfigError
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.results.summary import FinetuningResult
from konic.finetuning.system.files import write_text
from konic.finetuning.system.places import read_regular
from konic.output import get_logger
from konic.text import describe_error, redact, redact_all

logger = get_logger(__name__)

FOLDER = "trackers"
"""What trackers keep of a run, in the run's folder."""
_RUNS_FILE = "runs.json"
_RUN_ID = re.compile(r"[\w-]{1,64}")
_NOT_IN_A_NAME = re.compile(r"[^\w\-. :/]")
"""Characters that MLflow refuses in the name of a metric."""
_LONGEST_NAME = 250
_MAX_FAILURES = 3
"""Number of failed calls in a row after which nothing more is logged: a server that is gone must cost little time."""


class Tracker(BaseKonicFinetuningCallback):
    """Logs a run to an experiment tracker.

    A call that fails, such as one to a server that is gone, is a warning, the first time; the run goes on. After three
    failures in a row nothing more is logged. The run's own `metrics.jsonl` holds everything in any case.

    Args:
        samples_every: Iterations between tables of samples; 0 logs none.
        max_samples: Number of samples in a table.

    Raises:
        ConfigError: The tracker's package is not installed.
    """

    label: ClassVar[str]
    """The tracker's own name."""
    extra: ClassVar[str]
    """The extra of konic that installs its package."""
    module: ClassVar[str]

    def __init__(self, samples_every: int = 10, max_samples: int = 4) -> None:
        for name, value in {"samples_every": samples_every, "max_samples": max_samples}.items():
            require_count(type(self).__name__, name, value, least=0)
        self._samples_every, self._max_samples = samples_every, max_samples
        try:
            self._package: Any = import_module(self.module)
        except ImportError as error:
            raise ConfigError(
                f"{type(self).__name__} needs {self.label}, which cannot be imported ({describe_error(error)}): "
                f"pip install 'konic[{self.extra}]', or pip install {self.extra}."
            ) from None
        self._has_warned = False
        self._failures_in_a_row = 0
        self._iteration = 0
        self._texts: list[tuple[str, str]] = []
        self._samples: list[dict[str, Any]] = []

    def _start(self, settings: dict[str, Any], run_id: str | None, folder: Path | None) -> str | None:
        """Start a run or continue the one with this id, and log the settings; return its id, if it has one."""
        raise NotImplementedError

    def _log(self, values: dict[str, float], samples: list[dict[str, Any]], step: int) -> None:
        """Log the metrics of an iteration and, if there are any, its samples."""
        raise NotImplementedError

    def _finish(self, has_failed: bool) -> None:
        """End what was started."""
        raise NotImplementedError

    def on_train_begin(self, config: dict[str, Any]) -> None:
        """Start the tracker's run, or continue it, and log the settings."""
        self._failures_in_a_row = 0
        folder = Path(config["run_folder"]) / FOLDER if "run_folder" in config else None
        known = _read_runs(folder) if config.get("iterations_done") else {}
        settings = redact_all({name: value for name, value in config.items() if name != "run_folder"})

        def start() -> None:
            run_id = self._start(settings, known.get(self.extra), folder)
            if folder is not None and run_id is not None:
                folder.mkdir(exist_ok=True)
                write_text(folder / _RUNS_FILE, json.dumps(_read_runs(folder) | {self.extra: run_id}, indent=1))

        self._tried(start)

    def on_iteration_begin(self, iteration: int) -> None:
        """Note the iteration."""
        self._iteration, self._samples = iteration, []

    def on_generation_end(self, prompts: list[str], responses: list[str]) -> None:
        """Keep samples, if it is the turn of this iteration."""
        is_due = self._samples_every and (self._iteration - 1) % self._samples_every == 0
        count = self._max_samples if is_due and not self._samples else 0
        self._texts = list(zip(prompts, responses, strict=True))[:count]

    def on_reward_computed(self, rewards: list[float], reward_breakdown: dict[str, list[float]]) -> None:
        """Add the rewards to the samples that are kept."""
        for row, (prompt, response) in enumerate(self._texts):
            parts = {f"reward/{name}": values[row] for name, values in reward_breakdown.items()}
            numbers = {"reward": rewards[row], **parts}
            texts = {"prompt": redact(prompt), "response": redact(response)}
            self._samples.append(
                {"iteration": self._iteration, **texts}
                | {name: value if math.isfinite(value) else None for name, value in numbers.items()}
            )
        self._texts = []

    def on_iteration_end(self, result: FinetuningIterationResult) -> None:
        """Log every metric that is a number, each reward as `reward/name`, and the samples that are kept."""
        values = metric_values(result)
        self._tried(lambda: self._log(values, self._samples, result.iteration))

    def on_train_end(self, result: FinetuningResult) -> None:
        """End the tracker's run."""
        self._end(has_failed=False)

    def on_train_error(self, error: BaseException) -> None:
        """End the tracker's run as failed."""
        self._end(has_failed=True)

    def _end(self, has_failed: bool) -> None:
        """End what was started, also where nothing more is logged: the next training must not go on in an open run."""
        self._failures_in_a_row = 0
        self._tried(lambda: self._finish(has_failed))

    def _tried(self, call: Callable[[], Any]) -> bool:
        """Make a call; return False if it fails, with a warning the first time and when it is given up."""
        if self._failures_in_a_row >= _MAX_FAILURES:
            return False
        try:
            with contextlib.redirect_stdout(sys.stderr):  # a tracker's own lines are none of the run's
                call()
        except Exception as error:  # a tracker may raise anything
            self._failures_in_a_row += 1
            if not self._has_warned:
                logger.warning("%s: %s. The run goes on without it.", self.label, describe_error(error).rstrip("."))
            if self._failures_in_a_row == _MAX_FAILURES:
                logger.warning(
                    "%s: %d calls in a row failed: this run logs nothing more to it.", self.label, _MAX_FAILURES
                )
            self._has_warned = True
            return False
        self._failures_in_a_row = 0
        return True


def metric_values(result: FinetuningIterationResult) -> dict[str, float]:
    """The metrics of an iteration that are numbers, under the names that every tracker gets."""
    values = {k: v for k, v in result.to_dict().items() if isinstance(v, int | float) and k != "iteration"}
    values |= {f"reward/{name}": value for name, value in result.reward_breakdown.items() if math.isfinite(value)}
    return dict(zip(_metric_names(values), values.values(), strict=True))


def _read_runs(folder: Path | None) -> dict[str, str]:
    """The ids of the trackers' runs, by extra; empty where the file is missing or not ours."""
    try:
        runs = json.loads(read_regular(folder / _RUNS_FILE)) if folder is not None else {}
    except (OSError, ValueError, RecursionError):
        return {}
    pairs = runs.items() if isinstance(runs, dict) else ()
    return {name: value for name, value in pairs if isinstance(value, str) and _RUN_ID.fullmatch(value)}


def _metric_names(names: Iterable[str]) -> list[str]:
    """Names that MLflow takes, each once: it refuses a whole iteration for a single name that it does not like."""
    taken: dict[str, None] = {}
    for name in names:
        steps = (step for step in _NOT_IN_A_NAME.sub("_", name).split("/") if step not in ("", ".", ".."))
        clean = unique = "/".join(steps)[: _LONGEST_NAME - 10] or "_"
        number = 1
        while unique in taken:
            number += 1
            unique = f"{clean}_{number}"
        taken[unique] = None
    return list(taken)
