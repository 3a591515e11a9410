"""`konic doctor [SCRIPT_OR_YAML]`: what would keep a training from going well, before it starts."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from konic.cli.paths import read_path
from konic.output import is_terminal, write_line

if TYPE_CHECKING:
    from konic.doctor.findings import Finding

_COLOURS = {"ok": "\x1b[32m", "warn": "\x1b[33m", "fail": "\x1b[31m"}


def doctor(
    script: Annotated[
        Path | None,
        typer.Argument(
            help="A job: without it, only the machine is examined.", parser=read_path, metavar="[SCRIPT_OR_YAML]"
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting other than the file's, as for konic train.")
    ] = None,
    max_iterations: Annotated[
        int | None, typer.Option(help="What the time is estimated for. Default: the YAML file's, or 100.", min=1)
    ] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Also ask the Hub whether it answers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: a list with an object per finding.")] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = None,
) -> None:
    """Examine the machine and, with a job, train one or two iterations of it to see what a whole run takes.

    Each line is ok, warn or fail, with what to do. Nothing is written. Exit code 1 if a line fails.

    Example: konic doctor job.yaml
    """
    if script is None and (settings or max_iterations):
        raise typer.BadParameter("--set and --max-iterations are about a job: name one too.")
    write_line(
        "Examining this machine ..." if script is None else f"Examining this machine and {script} ...", sys.stderr
    )
    found = []
    for finding in _findings(script, settings or [], max_iterations, hub, device):
        found.append(finding)
        if not as_json:
            colour = _COLOURS[finding.status] if is_terminal(sys.stdout) else ""
            write_line(f"{finding.status:4}  {finding.name}: {finding.what}", sys.stdout, colour)
            if finding.fix:
                write_line(f"      {finding.fix}", sys.stdout)
    if as_json:
        write_line(json.dumps([asdict(finding) for finding in found], indent=1), sys.stdout)
    if any(finding.status == "fail" for finding in found):
        raise typer.Exit(1)


def _findings(
    script: Path | None, settings: list[str], max_iterations: int | None, hub: bool, device: str | None
) -> "Iterator[Finding]":
    from konic.cli.jobs import load_job
    from konic.cli.settings import set_settings
    from konic.cli.wording import with_options
    from konic.doctor.findings import Finding
    from konic.doctor.job import examine_job
    from konic.doctor.machine import examine_machine
    from konic.finetuning.errors import KonicError

    try:
        job = None if script is None else load_job(script)
        place = device or (job and job.options.device) or "auto"
        yield from examine_machine(place, hub)
        if job is not None:
            agent, _ = set_settings(job.agent, settings)
            yield from examine_job(agent, max_iterations or job.options.max_iterations or 100, place)
    except KonicError as error:
        yield Finding("job", "fail", with_options(str(error)))
