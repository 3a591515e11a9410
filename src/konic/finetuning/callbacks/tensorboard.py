"""A run -> TensorBoard's event files: scalars, settings and samples as text."""

import json
from pathlib import Path
from typing import Any

from konic.finetuning.arguments import with_known_arguments
from konic.finetuning.callbacks.trackers import Tracker
from konic.text import escape_markdown


class TensorBoardCallback(Tracker):
    """Writes event files for `tensorboard --logdir`; a resume continues them from its iteration on.

    Args:
        log_dir: Where to write; None is `trackers/tensorboard` in the run's folder.
        samples_every: Iterations between tables of samples; 0 logs none.
        max_samples: Number of samples in a table.
    """

    label, extra, module = "TensorBoard", "tensorboard", "torch.utils.tensorboard"

    @with_known_arguments
    def __init__(self, log_dir: str | Path | None = None, samples_every: int = 10, max_samples: int = 4) -> None:
        super().__init__(samples_every, max_samples)
        self._log_dir = log_dir
        self._writer: Any = None

    def _start(self, settings: dict[str, Any], run_id: str | None, folder: Path | None) -> str | None:
        done = settings.get("iterations_done", 0)
        log_dir = self._log_dir or (folder or Path("runs")) / "tensorboard"
        self._writer = self._package.SummaryWriter(str(log_dir), purge_step=done + 1 if done else None)
        lines = json.dumps(settings, indent=1, default=str).splitlines()
        self._writer.add_text("settings", "\n".join(f"    {line}" for line in lines), done)
        self._writer.flush()
        return None

    def _log(self, values: dict[str, float], samples: list[dict[str, Any]], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if samples:
            rows = [["---"] * len(samples[0]), *(map(_cell, sample.values()) for sample in samples)]
            table = "\n".join(f"| {' | '.join(row)} |" for row in [map(_cell, samples[0]), *rows])
            self._writer.add_text("samples", table, step)
        self._writer.flush()

    def _finish(self, has_failed: bool) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else escape_markdown("" if value is None else str(value))
