"""Settings and metrics -> an experiment tracker, whose faults are warnings: they never end a run."""

import os
import re
from collections.abc import Callable, Iterable
from typing import Any

from konic.finetuning.callbacks.hooks import BaseKonicFinetuningCallback
from konic.finetuning.errors import ConfigError
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.results.summary import FinetuningResult
from konic.output import get_logger
from konic.text import describe_error

logger = get_logger(__name__)

_NOT_IN_A_NAME = re.compile(r"[^\w\-. :/]")
"""Characters that MLflow refuses in the name of a metric."""
_LONGEST_NAME = 250
_MAX_FAILURES = 3
"""Number of failed calls in a row after which nothing more is logged: a server that is gone must cost little time."""
_MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""MLflow's own settings, where the user has not set them: by default it retries a single call for two minutes."""


class MLflowTracker(BaseKonicFinetuningCallback):
    """Logs to the active MLflow run, or to a new one that ends with the training.

    A call that fails, such as one to a server that is gone, is a warning, the first time; the run goes on. After three
    failures in a row nothing more is logged. The run's own `metrics.jsonl` holds everything in any case.

    Raises:
        ConfigError: MLflow is not installed.
    """

    def __init__(self) -> None:
        for name, value in _MLFLOW_SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            import mlflow
        except ImportError:
            raise ConfigError(
                "KonicFinetuningCallback(use_mlflow=True) needs MLflow, which is not installed: pip install mlflow"
            ) from None
        self._mlflow = mlflow
        self._owns_run = False
        self._has_warned = False
        self._failures_in_a_row = 0

    def on_train_begin(self, config: dict[str, Any]) -> None:
        """Log the settings."""
        self._failures_in_a_row = 0
        if not self._owns_run and self._mlflow.active_run() is None:
            self._owns_run = self._tried(self._mlflow.start_run)
        self._tried(lambda: self._log_settings(config))

    def _log_settings(self, config: dict[str, Any]) -> None:
        """Log the settings that the MLflow run does not hold yet: it refuses another value for the same name."""
        run = self._mlflow.active_run()
        known = run.data.params if run is not None else {}
        if run is not None:
            known = self._mlflow.get_run(run.info.run_id).data.params
        self._mlflow.log_params({name: value for name, value in config.items() if name not in known})

    def on_iteration_end(self, result: FinetuningIterationResult) -> None:
        """Log every metric that is a number, and each reward as `reward/name`."""
        values = {k: v for k, v in result.to_dict().items() if isinstance(v, int | float) and k != "iteration"}
        values |= {f"reward/{name}": value for name, value in result.reward_breakdown.items()}
        named = dict(zip(_metric_names(values), values.values(), strict=True))
        self._tried(lambda: self._mlflow.log_metrics(named, step=result.iteration))

    def on_train_end(self, result: FinetuningResult) -> None:
        """End the MLflow run if this tracker started it."""
        self._end("FINISHED")

    def on_train_error(self, error: BaseException) -> None:
        """End the MLflow run with the status FAILED if this tracker started it."""
        self._end("FAILED")

    def _end(self, status: str) -> None:
        if self._owns_run:
            self._tried(lambda: self._mlflow.end_run(status))
            self._owns_run = False

    def _tried(self, call: Callable[[], Any]) -> bool:
        """Make a call; return False if it fails, with a warning the first time and when it is given up."""
        if self._failures_in_a_row >= _MAX_FAILURES:
            return False
        try:
            call()
        except Exception as error:  # a tracker may raise anything
            self._failures_in_a_row += 1
            if not self._has_warned:
                logger.warning("MLflow: %s. The run goes on without it.", describe_error(error))
            if self._failures_in_a_row == _MAX_FAILURES:
                logger.warning("MLflow: %d calls in a row failed: this run logs nothing more to it.", _MAX_FAILURES)
            self._has_warned = True
            return False
        self._failures_in_a_row = 0
        return True


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
