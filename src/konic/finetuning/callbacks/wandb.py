"""A run -> Weights & Biases, offline unless the user says otherwise."""

import os
import secrets
from pathlib import Path
from typing import Any

from konic.finetuning.arguments import with_known_arguments
from konic.finetuning.callbacks.trackers import Tracker


class WandbCallback(Tracker):
    """Logs to a W&B run, which is kept on this machine unless WANDB_MODE=online; `wandb sync` sends it later.

    A resume continues the run: it has the same id, which `wandb sync` joins.

    Args:
        project: The W&B project.
        name: The run's name; None lets W&B choose.
        samples_every: Iterations between tables of samples; 0 logs none.
        max_samples: Number of samples in a table.
    """

    label, extra, module = "W&B", "wandb", "wandb"

    @with_known_arguments
    def __init__(
        self, project: str = "konic", name: str | None = None, samples_every: int = 10, max_samples: int = 4
    ) -> None:
        super().__init__(samples_every, max_samples)
        self._project, self._name = project, name
        self._run: Any = None

    def _start(self, settings: dict[str, Any], run_id: str | None, folder: Path | None) -> str | None:
        mode = os.environ.get("WANDB_MODE", "offline")
        if folder is not None:
            folder.mkdir(exist_ok=True)
        own = {"console": "off", "silent": True, "disable_git": True, "disable_code": True, "save_code": False}
        self._run = self._package.init(
            project=self._project,
            name=self._name,
            config=settings,
            dir=str(folder) if folder is not None else None,
            id=run_id or secrets.token_hex(4),
            resume="allow" if run_id and mode == "online" else None,
            mode=mode,
            settings=self._package.Settings(**own, x_disable_machine_info=True, x_save_requirements=False),
        )
        self._run.define_metric("*", step_metric="iteration")
        return str(self._run.id)

    def _log(self, values: dict[str, float], samples: list[dict[str, Any]], step: int) -> None:
        logged: dict[str, Any] = {"iteration": step, **values}
        if samples:
            rows = [list(sample.values()) for sample in samples]
            logged["samples"] = self._package.Table(columns=list(samples[0]), data=rows)
        self._run.log(logged)

    def _finish(self, has_failed: bool) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish(exit_code=int(has_failed))
