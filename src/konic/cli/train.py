"""`konic train SCRIPT_OR_YAML`: trains the agent that a script or a YAML file defines."""

import os
import shlex
import sys
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from konic.cli.paths import is_yaml, read_path, read_place
from konic.output import reserved_output, write_line


class TrackerName(StrEnum):
    """The experiment trackers."""

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    MLFLOW = "mlflow"
    TRACKIO = "trackio"


_FOLDER = "The run's folder"
_WORKERS = "Several processes, through Ray"


def train(
    script: Annotated[
        Path,
        typer.Argument(
            help="A Python file with an `agent` or a `build_agent()`, or a YAML file.",
            parser=read_path,
            metavar="SCRIPT_OR_YAML",
        ),
    ],
    max_iterations: Annotated[
        int | None, typer.Option(help="Number of iterations. Default: the YAML file's, or 100.", min=0)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting other than the file's: training_config.algorithm=dapo. Repeatable."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ... Default: the YAML file's, or auto.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="The run's folder, or its URL, such as s3://bucket/run. Default: the YAML file's, or a new one under "
            "runs/.",
            parser=read_place,
            metavar="<path>",
            rich_help_panel=_FOLDER,
        ),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(
            help="Iterations between checkpoints. Default: a checkpoint every ten minutes.",
            min=0,
            rich_help_panel=_FOLDER,
        ),
    ] = None,
    save_total_limit: Annotated[
        int | None,
        typer.Option(help="Number of newest checkpoints to keep. Default: all.", min=1, rich_help_panel=_FOLDER),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Resume from the newest complete checkpoint in --output.", rich_help_panel=_FOLDER
        ),
    ] = False,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes",
            help="Resume although settings differ; the result is then a different run.",
            rich_help_panel=_FOLDER,
        ),
    ] = False,
    num_workers: Annotated[
        int | None,
        typer.Option(
            help="Train in this many processes; with --device cuda, each has a GPU.", min=1, rich_help_panel=_WORKERS
        ),
    ] = None,
    min_workers: Annotated[
        int | None,
        typer.Option(
            help="Go on with as few as this while there is no room for more.", min=1, rich_help_panel=_WORKERS
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="host:port of a Ray cluster. Default: RAY_ADDRESS, or this machine.", rich_help_panel=_WORKERS
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per event and nothing else on standard output.")
    ] = False,
    track: Annotated[
        list[TrackerName] | None, typer.Option(help="Also log to this experiment tracker. Repeatable.")
    ] = None,
) -> None:
    """Train the agent that SCRIPT_OR_YAML defines.

    Example: konic train my_rewards.py --max-iterations 50 --output runs/kind --save-every 10
    """
    if resume and output is None and not is_yaml(script):
        raise typer.BadParameter("give --output, the folder of the run to resume", param_hint="--resume")
    with reserved_output() if as_json else nullcontext() as events:
        write_line(f"Loading {script} ...", sys.stderr)
        from konic.cli.jobs import load_job
        from konic.cli.settings import set_settings
        from konic.finetuning import (
            KonicFinetuningCallback,
            KonicFinetuningEngine,
            MLflowCallback,
            TensorBoardCallback,
            TrackioCallback,
            WandbCallback,
        )
        from konic.finetuning.callbacks.json_lines import JsonLinesCallback
        from konic.finetuning.run.session import INTERRUPTED

        printer = JsonLinesCallback(events) if as_json else KonicFinetuningCallback()
        kinds = (TensorBoardCallback, WandbCallback, MLflowCallback, TrackioCallback)
        trackers = [dict(zip(TrackerName, kinds, strict=True))[name]() for name in dict.fromkeys(track or [])]
        job = load_job(script)
        if resume and output is None and job.options.output is None:
            raise typer.BadParameter("give --output, the folder of the run to resume", param_hint="--resume")
        agent, changes = set_settings(job.agent, settings or [])
        for line in changes:
            write_line(line, sys.stderr)
        given = {
            "max_iterations": max_iterations,
            "output": output,
            "device": device,
            "save_every": save_every,
            "save_total_limit": save_total_limit,
            "num_workers": num_workers,
            "min_workers": min_workers,
            "ray_address": ray_address,
        }
        options = job.options.with_fields({name: value for name, value in given.items() if value is not None})
        scaling = options.scaling()
        if options.ray_address is not None:
            os.environ["RAY_ADDRESS"] = options.ray_address
        engine = KonicFinetuningEngine.from_agent(
            agent,
            checkpoint_dir=options.output,
            device=options.device,
            callback=[printer, *trackers],
            scaling=scaling,
        )
        engine.job_file = script
        result = engine.train(
            100 if options.max_iterations is None else options.max_iterations,
            options.save_every,
            resume,
            save_total_limit=options.save_total_limit,
            allow_changes=allow_changes,
        )
    if options.max_iterations == 0:
        write_line("--max-iterations 0: nothing is trained.", sys.stderr)
    if result.stopped_because == INTERRUPTED:
        if result.model_path is not None:
            run = shlex.quote(os.path.dirname(result.model_path))
            write_line(f"The same command with --output {run} --resume goes on from here.", sys.stderr)
        raise typer.Exit(130)  # as a shell says that Ctrl-C ended a command
