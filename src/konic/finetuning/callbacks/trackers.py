"""Settings and metrics -> an experiment tracker. A tracker is a callback: pass it to the engine like any other."""

from typing import Any

from konic.finetuning.callbacks.hooks import BaseKonicFinetuningCallback
from konic.finetuning.errors import ConfigError
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.results.summary import FinetuningResult


class MLflowTracker(BaseKonicFinetuningCallback):
    """Logs to the active MLflow run, or to a new one that ends with the training.

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

    def on_train_begin(self, config: dict[str, Any]) -> None:
        """Log the settings."""
        self._owns_run = self._mlflow.active_run() is None
        if self._owns_run:
            self._mlflow.start_run()
        self._mlflow.log_params(config)

    def on_iteration_end(self, result: FinetuningIterationResult) -> None:
        """Log every metric that is a number, and each reward as `reward/name`."""
        values = {k: v for k, v in result.to_dict().items() if isinstance(v, int | float) and k != "iteration"}
        values |= {f"reward/{name}": value for name, value in result.reward_breakdown.items()}
        self._mlflow.log_metrics(values, step=result.iteration)

    def on_train_end(self, result: FinetuningResult) -> None:
        """End the MLflow run if this tracker started it."""
        self._end("FINISHED")

    def on_train_error(self, error: BaseException) -> None:
        """End the MLflow run with the status FAILED if this tracker started it."""
        self._end("FAILED")

    def _end(self, status: str) -> None:
        if self._owns_run:
            self._mlflow.end_run(status)
            self._owns_run = False
