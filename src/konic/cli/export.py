"""`konic export RUN`: a run's model for other tools: an adapter, a full model, a GGUF file; also on the Hub."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from konic.cli.paths import read_name, read_path
from konic.output import write_line


class Format(StrEnum):
    """What is written."""

    adapter = "adapter"
    merged = "merged"
    gguf = "gguf"


def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run.", parser=read_path, metavar="RUN")],
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
) -> None:
    """Write the model of a run to a folder that other tools open.

    Example: konic export runs/kind --format merged --output kind-model
    """
    if kind is Format.adapter and dtype is not None:
        raise typer.BadParameter("an adapter keeps the dtype that it was trained in", param_hint="--dtype")
    write_line(f"Reading {run} ...", sys.stderr)
    from konic.export.folders import require_new, write_adapter, write_gguf_folder, write_merged
    from konic.export.saved import SavedModel

    saved = SavedModel.find(run, weights)
    folder = output or Path(f"{saved.run.name}-{kind.value}")
    require_new(folder)
    if kind is Format.adapter:
        notes = write_adapter(saved, folder)
    elif kind is Format.merged:
        notes = write_merged(saved, folder, dtype)
    else:
        notes = write_gguf_folder(saved, folder, dtype)
    write_line(f"{saved.name} of {run} is in {folder}.", sys.stdout)
    for note in notes:
        write_line(note, sys.stdout)
