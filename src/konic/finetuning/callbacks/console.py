"""The callback that prints a run's lines, shows it live on a terminal and stops it early."""

import math
import re
import shutil
import sys
import time
from typing import Any

from konic.finetuning.arguments import require_count, require_flags, with_known_arguments
from konic.finetuning.callbacks.display import Display, open_display, peak_memory_bytes
from konic.finetuning.callbacks.hooks import BaseKonicFinetuningCallback
from konic.finetuning.callbacks.live import LiveState
from konic.finetuning.callbacks.mlflow import MLflowCallback
from konic.finetuning.errors import ConfigError
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.results.summary import FinetuningResult
from konic.output import is_terminal, write_line
from konic.text import printable


class KonicFinetuningCallback(BaseKonicFinetuningCallback):
    """Prints a run's lines, shows it live on a terminal, logs to MLflow if asked, and stops when KL gets too high.

    Args:
        log_interval: Print the first iteration, and every iteration whose number is a multiple of this.
        log_samples: Also print prompts and responses, on standard error.
        max_samples_to_log: Number of samples to print per iteration.
        use_mlflow: Log settings and metrics to the active MLflow run, or to a new one.
        early_stop_kl_threshold: KL above which an iteration counts, in nats per token; None never stops.
        early_stop_patience: Number of iterations in a row above the threshold that end the run.
        verbose: False prints nothing.
    """

    @with_known_arguments
    def __init__(
        self,
        log_interval: int = 1,
        log_samples: bool = False,
        max_samples_to_log: int = 3,
        use_mlflow: bool = False,
        early_stop_kl_threshold: float | None = None,
        early_stop_patience: int = 5,
        verbose: bool = True,
    ) -> None:
        counts = (("log_interval", log_interval, 1), ("early_stop_patience", early_stop_patience, 1))
        for name, value, least in (*counts, ("max_samples_to_log", max_samples_to_log, 0)):
            require_count("KonicFinetuningCallback", name, value, least)
        require_flags("KonicFinetuningCallback", log_samples=log_samples, use_mlflow=use_mlflow, verbose=verbose)
        threshold = early_stop_kl_threshold
        is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if threshold is not None and not (is_number and threshold >= 0):
            raise ConfigError(
                f"KonicFinetuningCallback(early_stop_kl_threshold={threshold!r}): it must be a number of at least 0 "
                "(nats per token), or None."
            )
        self.log_interval = log_interval
        self.log_samples = log_samples
        self.max_samples_to_log = max_samples_to_log
        self.early_stop_kl_threshold = early_stop_kl_threshold
        self.early_stop_patience = early_stop_patience
        self.verbose = verbose
        self.is_second = False
        """True beside another callback of a run that prints its lines: this one prints only samples."""
        self.use_mlflow = use_mlflow
        self._tracker = MLflowCallback() if use_mlflow else BaseKonicFinetuningCallback()
        self._iterations_above = 0
        self._live: LiveState | None = None
        self._display: Display | None = None
        self._samples: list[tuple[str, str]] = []

    def on_train_begin(self, config: dict[str, Any]) -> None:
        """Print the banner, start the live view and the MLflow run."""
        self._iterations_above = 0
        self._tracker.on_train_begin(config)
        if not self._prints_lines:
            return
        rule = "=" * 60
        lines = [rule, "Starting RLHF Training", rule, f"Model: {printable(str(config['model_name']))}"]
        lines += [f"LoRA: {config['use_lora']}", f"Learning Rate: {config['learning_rate']:g}"]
        lines += [f"Batch Size: {config['batch_size']}", f"Max Iterations: {config['max_iterations']}", rule, ""]
        _print("\n".join(lines))
        state = LiveState(config, time.monotonic())
        self._display = open_display(state)
        self._live = state if self._display is not None else None

    def on_iteration_begin(self, iteration: int) -> None:
        """Show the phase: an iteration that evaluates does so first."""
        if self._live is not None:
            self._live.begin_iteration(time.monotonic())
        self._tracker.on_iteration_begin(iteration)
        self._phase("evaluating")

    def on_generation_begin(self, prompts: list[str]) -> None:
        """Show the phase."""
        self._phase("sampling")

    def on_generation_end(self, prompts: list[str], responses: list[str]) -> None:
        """Show the phase; keep samples to log."""
        self._phase("rewarding")
        self._samples = list(zip(prompts, responses, strict=True))
        self._tracker.on_generation_end(prompts, responses)

    def on_reward_computed(self, rewards: list[float], reward_breakdown: dict[str, list[float]]) -> None:
        """Show the phase; log samples with their rewards."""
        if self._live is not None and self._samples and rewards:
            self._live.set_sample(*self._samples[0], rewards[0])
        self._tracker.on_reward_computed(rewards, reward_breakdown)
        self._phase("updating")
        if self.verbose and self.log_samples:
            for (prompt, response), reward in zip(self._samples[: self.max_samples_to_log], rewards, strict=False):
                write_line(f"  {reward:+.3f}  {printable(prompt)} → {printable(response)}", sys.stderr)

    def on_iteration_end(self, result: FinetuningIterationResult) -> None:
        """Print the iteration's line and log its metrics."""
        self._tracker.on_iteration_end(result)
        if self._live is not None:
            self._live.memory_bytes = peak_memory_bytes()
            self._live.add(result, time.monotonic())
        if self._prints_lines and (result.iteration % self.log_interval == 0 or result.iteration == 1):
            line = iteration_line(result)
            _print(line if self._display is None else _fitted(line, _left_out(result)))

    def on_checkpoint_saved(self, path: str, iteration: int) -> None:
        """Show the phase."""
        self._phase("saving")

    def on_train_end(self, result: FinetuningResult) -> None:
        """Print the summary; end the live view, and the MLflow run if this callback started it."""
        self._end_display()
        self._tracker.on_train_end(result)
        if self._prints_lines:
            _print(result.summary())

    def on_train_error(self, error: BaseException) -> None:
        """End the live view, and the MLflow run if this callback started it."""
        self._end_display()
        self._tracker.on_train_error(error)

    def should_stop_early(self, result: FinetuningIterationResult) -> bool:
        """True once KL has been above the threshold for `early_stop_patience` iterations in a row."""
        if self._live is not None:
            self._live.add(result)  # of an earlier process: a resume asks about each of its iterations
        threshold = self.early_stop_kl_threshold
        above = threshold is not None and result.kl_divergence > threshold
        self._iterations_above = self._iterations_above + 1 if above else 0
        return self._iterations_above >= self.early_stop_patience

    @property
    def _prints_lines(self) -> bool:
        return self.verbose and not self.is_second

    def _phase(self, name: str) -> None:
        if self._live is not None and self._display is not None:
            self._live.phase = name
            self._display.show()

    def _end_display(self) -> None:
        if self._display is not None:
            self._phase("ended")
            self._display.stop()
            self._display = None


def iteration_line(result: FinetuningIterationResult) -> str:
    """The line that a run prints for an iteration."""
    return (
        f"[Iter {result.iteration:4d}] Reward: {result.reward_mean:7.3f} (+/- {result.reward_std:.3f}) | "
        f"KL: {abs(result.kl_divergence):.4f} | Loss: {result.total_loss:.4f} | Time: {result.total_time_sec:.1f}s"
    )


def _left_out(result: FinetuningIterationResult) -> str:
    """What a terminal's line adds where responses are left out of the loss."""
    count = result.num_in_equal_groups + result.num_cut_off + result.num_unscored
    return f" | Left out: {count} of {result.num_samples}" if count else ""


def _fitted(line: str, more: str) -> str:
    """The line for a terminal: with more where there is room, without its padding where it would wrap."""
    columns = shutil.get_terminal_size().columns if is_terminal(sys.stdout) else math.inf
    if len(line + more) <= columns:
        return line + more
    return line if len(line) <= columns else re.sub(" {2,}", " ", line)


def _print(text: str) -> None:
    write_line(text, sys.stdout)
