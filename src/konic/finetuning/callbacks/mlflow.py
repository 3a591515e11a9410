"""A run -> MLflow: params, metrics, and tables of samples as artifacts."""

import os
from pathlib import Path
from typing import Any

from konic.finetuning.arguments import with_known_arguments
from konic.finetuning.callbacks.trackers import Tracker
from konic.output import get_logger
from konic.text import describe_error

logger = get_logger(__name__)

_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""MLflow's own settings, where the user has not set them: by default it retries a single call for two minutes."""
_GROWING = {"max_iterations", "iterations_done"}
"""Settings that a resume changes as a rule."""


class MLflowCallback(Tracker):
    """Logs to the active MLflow run, or to a new one that ends with the training and that a resume continues."""

    label, extra, module = "MLflow", "mlflow", "mlflow"

    @with_known_arguments
    def __init__(self, samples_every: int = 10, max_samples: int = 4) -> None:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        super().__init__(samples_every, max_samples)
        self._owns_run = False
        self._run_id: str | None = None

    def _start(self, settings: dict[str, Any], run_id: str | None, folder: Path | None) -> str | None:
        if not self._owns_run and self._package.active_run() is None:
            self._open(run_id)
            self._owns_run = True
        self._run_id = str(self._package.active_run().info.run_id)
        known = self._package.get_run(self._run_id).data.params  # it refuses another value for the same name
        self._package.log_params({name: value for name, value in settings.items() if name not in known})
        other = [name for name in settings if known.get(name, str(settings[name])) != str(settings[name])]
        if set(other) - _GROWING:
            logger.warning("MLflow keeps the first values of a run for %s: see this run's run.json.", ", ".join(other))
        return self._run_id if self._owns_run else None

    def _open(self, run_id: str | None) -> None:
        """Continue a run, or start a new one."""
        if run_id is not None:
            try:
                self._package.start_run(run_id=run_id)
                return
            except Exception as error:  # it was deleted, or is of another server
                what = describe_error(error).rstrip(".")
                logger.warning("MLflow: the run so far cannot be continued: %s. A new one is started.", what)
        self._package.start_run()

    def _log(self, values: dict[str, float], samples: list[dict[str, Any]], step: int) -> None:
        if self._run_id is None:  # MLflow would start a run of its own, and leave it open
            return
        self._package.log_metrics(values, step=step, run_id=self._run_id)
        if samples:
            table = {name: [sample[name] for sample in samples] for name in samples[0]}
            self._package.log_table(table, artifact_file=f"samples/{step:06d}.json", run_id=self._run_id)

    def _finish(self, has_failed: bool) -> None:
        self._run_id = None
        if self._owns_run:
            self._owns_run = False
            self._package.end_run("FAILED" if has_failed else "FINISHED")
