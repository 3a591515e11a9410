"""A run -> Trackio's store on this machine."""

import secrets
from pathlib import Path
from typing import Any

from konic.finetuning.arguments import with_known_arguments
from konic.finetuning.callbacks.trackers import Tracker


class TrackioCallback(Tracker):
    """Logs to a Trackio run, which `trackio show` opens; a resume continues it.

    Args:
        project: The Trackio project.
        name: The run's name; None makes one.
        samples_every: Iterations between tables of samples; 0 logs none.
        max_samples: Number of samples in a table.
    """

    label, extra, module = "Trackio", "trackio", "trackio"

    @with_known_arguments
    def __init__(
        self, project: str = "konic", name: str | None = None, samples_every: int = 10, max_samples: int = 4
    ) -> None:
        super().__init__(samples_every, max_samples)
        self._project, self._name = project, name
        self._run: Any = None

    def _start(self, settings: dict[str, Any], run_id: str | None, folder: Path | None) -> str | None:
        name = run_id or self._name or f"konic-{secrets.token_hex(4)}"
        resume = "allow" if run_id else "never"
        off = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        self._run = self._package.init(self._project, name, config=settings, resume=resume, **off)
        return name

    def _log(self, values: dict[str, float], samples: list[dict[str, Any]], step: int) -> None:
        logged: dict[str, Any] = dict(values)
        if samples:
            import pandas

            logged["samples"] = self._package.Table(dataframe=pandas.DataFrame(samples))
        self._run.log(logged, step=step)

    def _finish(self, has_failed: bool) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish()
