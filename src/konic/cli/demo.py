"""`konic demo`: trains a small chat model and shows what changed."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from konic.cli.paths import read_path
from konic.output import write_line


def demo(
    max_iterations: Annotated[
        int | None, typer.Option(help="Maximum number of iterations. Default: 22; with --quick, 5.")
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Maximum minutes of training. Default: 4.75; with --quick, 0.75.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Show every step in about a minute; too short to show a gain.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="The run's folder. Default: a new one under runs/.", parser=read_path, metavar="<path>"),
    ] = None,
) -> None:
    """Teach a small chat model to end movie reviews briefly, kindly and coherently, and show what changed.

    Needs no GPU, no account and no network: about six minutes on two CPU cores.

    Example: konic demo --quick
    """
    write_line("konic demo: loading a 135M-parameter chat model (at first it is unpacked into a cache) ...", sys.stderr)
    from konic.demo import FULL, QUICK, run_demo
    from konic.finetuning.run.session import INTERRUPTED

    length = QUICK if quick else FULL
    if max_iterations is not None:
        length = replace(length, iterations=max_iterations)
    if max_minutes is not None:
        length = replace(length, minutes=max_minutes)
    if run_demo(length, output).stopped_because == INTERRUPTED:
        raise typer.Exit(130)
