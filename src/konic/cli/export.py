"""`konic export RUN`: a run's model for other tools: an adapter, a full model, a GGUF file; on request on the Hub."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from konic.cli.paths import read_name, read_path, read_run
from konic.output import is_terminal, write_line

if TYPE_CHECKING:
    from konic.export.push import Repo
    from konic.export.saved import SavedModel


class Format(StrEnum):
    """What is written."""

    adapter = "adapter"
    merged = "merged"
    gguf = "gguf"


def export(
    run: Annotated[Path, typer.Argument(help="The folder or URL of a run.", parser=read_run, metavar="RUN")],
    kind: Annotated[
        Format,
        typer.Option("--format", help="adapter: for PEFT. merged: for transformers. gguf: for llama.cpp and Ollama."),
    ] = Format.merged,
    output: Annotated[
        Path | None,
        typer.Option(help="A new folder. Default: RUN-FORMAT, here.", parser=read_path, metavar="<path>"),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="A folder in RUN: final, best, checkpoint-20. Default: the last one.",
            parser=read_name,
            metavar="<str>",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16, bfloat16 (merged) or q8_0 (gguf). Default: the run's; of gguf, float16.",
            parser=read_name,
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            help="Then send the folder to this repo of the Hub, after a question.",
            parser=read_name,
            metavar="USER/NAME",
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Everybody may read the repo. Default: private.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Send without a question.")] = False,
) -> None:
    """Write the model of a run to a folder that other tools open.

    Example: konic export runs/kind --format merged --output kind-model
    """
    if kind is Format.adapter and dtype is not None:
        raise typer.BadParameter("an adapter keeps the dtype that it was trained in", param_hint="--dtype")
    if push_to_hub is None and (public or yes):
        raise typer.BadParameter("says how to send, and nothing is sent without --push-to-hub USER/NAME",
                                 param_hint="--public" if public else "--yes")  # fmt: skip
    if push_to_hub is not None and not yes and not is_terminal(sys.stdin):
        raise typer.BadParameter("standard input is no terminal, so nobody can be asked. Pass --yes to send unasked",
                                 param_hint="--push-to-hub")  # fmt: skip
    write_line(f"Reading {run} ...", sys.stderr)
    from konic.export.folders import require_new, write_adapter, write_gguf_folder, write_merged
    from konic.export.saved import SavedModel

    saved = SavedModel.find(run, weights)
    folder = output or Path(f"{saved.run.name}-{kind.value}")
    require_new(folder)
    repo = None if push_to_hub is None else _find_repo(push_to_hub, public, saved, kind)
    if kind is Format.adapter:
        notes = write_adapter(saved, folder)
    elif kind is Format.merged:
        notes = write_merged(saved, folder, dtype)
    else:
        notes = write_gguf_folder(saved, folder, dtype)
    write_line(f"{saved.name} of {run} is in {folder}.", sys.stdout)
    for note in notes:
        write_line(note, sys.stdout)
    if repo is not None:
        _push(repo, saved, folder, yes)


def _find_repo(name: str, is_public: bool, saved: "SavedModel", kind: Format) -> "Repo":
    """Check before anything is written that the model can be sent."""
    from konic.export.push import find_repo
    from konic.finetuning.errors import OutputError
    from konic.finetuning.models.locations import PACKAGED_MODELS

    is_adapter = kind is Format.adapter and saved.is_adapter
    if is_adapter and not saved.base_is_on_the_hub and saved.base not in PACKAGED_MODELS:
        raise OutputError(
            f"--push-to-hub {name}: the base model of this adapter is a folder of this machine, so nobody else could "
            "open it. Send --format merged."
        )
    return find_repo(name, is_public)


def _push(repo: "Repo", saved: "SavedModel", folder: Path, is_agreed: bool) -> None:
    """Show what would be sent, ask, and send it."""
    from konic.export.private import own_places
    from konic.export.push import files_to_send, send_files

    files, left = files_to_send(folder, own_places(saved))
    state = "exists: files of the same names are replaced there" if repo.exists else "new"
    write_line(f"To send to {repo.address} ({repo.visibility}, {state}):", sys.stdout)
    for file in files:
        write_line(f"  {file.name:<40} {_size(file.size):>12}", sys.stdout)
    if left:
        write_line(f"Not sent: {', '.join(left)}", sys.stdout)
    if not is_agreed:
        write_line("Send them? [y/N] ", sys.stdout, end="")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            write_line(f"Nothing was sent. The export stays in {folder}.", sys.stdout)
            return
    write_line(f"Sent: {send_files(repo, files)}", sys.stdout)


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
