"""`konic demo`: trains a small chat model and shows what changed."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from konic.cli.paths import read_path
from konic.output import write_line


def demo(
    max_iterations: Annotated[int, typer.Option(help="Maximum number of iterations.")] = 22,
    max_minutes: Annotated[float, typer.Option(help="Maximum minutes of training.")] = 4.75,
    output: Annotated[
        Path | None,
        typer.Option(help="The run's folder. Default: a new one under runs/.", parser=read_path, metavar="<path>"),
    ] = None,
) -> None:
    """Teach a small chat model to end movie reviews briefly, kindly and coherently, and show what changed.

    Needs no GPU, no account and no network: about six minutes on two CPU cores. Example: konic demo --max-minutes 2
    """
    write_line("konic demo: loading a 135M-parameter chat model (at first it is unpacked into a cache) ...", sys.stderr)
    from konic.demo import run_demo
    from konic.finetuning.run.session import INTERRUPTED

    if run_demo(max_iterations, max_minutes, output).stopped_because == INTERRUPTED:
        raise typer.Exit(130)
