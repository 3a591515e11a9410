"""`konic report RUN`: one page that shows what came of a run, or of several beside each other."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from konic.cli.completion import complete_run
from konic.cli.paths import read_path, read_run
from konic.output import write_line


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Folders or URLs of runs, finished or going on.",
            parser=read_run,
            metavar="RUN...",
            autocompletion=complete_run,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The page. Default: report.html in the run's folder; for several runs, here.",
            parser=read_path,
            metavar="<path>",
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve the page on this machine, and follow the run. Ctrl-C ends it.")
    ] = False,
    port: Annotated[
        int, typer.Option(help="Of --watch. Default: a free one.", min=0, max=65535, show_default=False)
    ] = 0,
) -> None:
    """Write one HTML page that shows what came of a run: outcome, curves, samples, settings.

    The page needs no network and no server. Several runs are compared. With --watch nothing is written.

    Example: konic report runs/kind
    """
    if watch and output:
        raise typer.BadParameter("--watch writes no file: leave --output out.")
    if port and not watch:
        raise typer.BadParameter("--port is where --watch serves the page: give --watch too.")
    twice = next(
        (run for at, run in enumerate(runs) if run.resolve() in [other.resolve() for other in runs[:at]]), None
    )
    if twice:
        raise typer.BadParameter(f"{twice} is named twice: name each run once.")
    write_line(f"Reading {', '.join(map(str, runs))} ...", sys.stderr)
    if watch:
        from konic.finetuning.run.remote import is_copy
        from konic.report.watch import watch as serve

        if any(map(is_copy, runs)):
            raise typer.BadParameter("--watch follows runs on this machine, not those at a URL.")
        serve(runs, port)
        return
    from konic.report import Run, write_report
    from konic.report.words import outcome

    read = [Run.read(run) for run in runs]
    path = output or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    write_report(read, path)
    for run in read:
        write_line(f"{run.name}: {outcome(run).sentence()}", sys.stdout)
    write_line(f"Open {path.absolute()} in a browser.", sys.stdout)
