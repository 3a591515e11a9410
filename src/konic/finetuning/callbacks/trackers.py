"""Settings and metrics -> an experiment tracker, whose faults are warnings: they never end a run."""

import logging
import re
from collections.abc import Callable
from typing import Any

from konic.finetuning.callbacks.hooks import BaseKonicFinetuningCallback
from konic.finetuning.errors import ConfigError
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.results.summary import FinetuningResult

logger = logging.getLogger(__name__)

_NOT_IN_A_NAME = re.compile(r"[^\w\-. :/]")
"""Characters that MLflow refuses in the name of a metric."""


class MLflowTracker(BaseKonicFinetuningCallback):
    """Logs to the active MLflow run, or to a new one that ends with the training.

    A call that fails, such as one to a server that is gone, is a warning, the first time; the run goes on.

    Raises:
        ConfigError: MLflow is not installed.
    """

    def __init__(self) -> None:
        try:
            import mlflow
        except ImportError:
            raise ConfigError(
                "KonicFinetuningCallback(use_mlflow=True) needs MLflow, which is not installed: pip install mlflow"
            ) from None
        self._mlflow = mlflow
        self._owns_run = False
        self._has_warned = False

    def on_train_begin(self, config: dict[str, Any]) -> None:
        """Log the settings."""
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
        named = {_NOT_IN_A_NAME.sub("_", name): value for name, value in values.items()}
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
        """Make a call; return False, with a warning the first time, if it fails."""
        try:
            call()
        except Exception as error:  # a tracker may raise anything
            if not self._has_warned:
                logger.warning("MLflow: %s: %s. The run goes on without it.", type(error).__name__, error)
            self._has_warned = True
            return False
        return True
