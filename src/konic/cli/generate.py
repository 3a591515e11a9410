"""`konic generate RUN PROMPT ...`: responses of a run's model, beside those of the model that it started from."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from konic.cli.completion import complete_run, complete_weights
from konic.cli.paths import read_name, read_path
from konic.output import write_line


def generate(
    run: Annotated[
        Path, typer.Argument(help="The folder of a run.", parser=read_path, metavar="RUN", autocompletion=complete_run)
    ],
    prompts: Annotated[list[str], typer.Argument(help="Prompts.", metavar="PROMPT...")],
    weights: Annotated[
        str | None,
        typer.Option(
            help="A folder in RUN: final, best, checkpoint-20. Default: the last one.",
            parser=read_name,
            metavar="<str>",
            autocompletion=complete_weights,
        ),
    ] = None,
    base: Annotated[bool, typer.Option(help="Also the responses of the model before training.")] = True,
    chat: Annotated[bool, typer.Option("--chat", help="Give each prompt as a chat with one user message.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="Default: the run's.", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: the run's.", min=0.01)] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same responses.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: a list with an object per prompt.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Respond to prompts with the model of a run, and with the model that it started from, on the same random numbers.

    Example: konic generate runs/kind "The film was" --max-new-tokens 32
    """
    write_line(f"Loading {run} ...", sys.stderr)
    from konic.saved.agents import BASE, SavedRun
    from konic.saved.prompts import given_prompts
    from konic.saved.weights import Weights

    saved = SavedRun.read(run, {"max_new_tokens": max_new_tokens, "temperature": temperature}, seed)
    names = dict.fromkeys([*([BASE] if base else []), saved.name_of(weights)])
    given = given_prompts(prompts, saved.run, chat)
    responses = {
        name: [sample.response for sample in Weights.load(name, saved.agent(name), device).respond(given, seed)]
        for name in names
    }
    rows = [
        {"prompt": prompt} | {name: texts[number] for name, texts in responses.items()}
        for number, prompt in enumerate(prompts)
    ]
    if as_json:
        write_line(json.dumps(rows, indent=1), sys.stdout)
        return
    for row in rows:
        for name, text in row.items():
            write_line(f"{name}: {text.strip()}", sys.stdout)
        write_line("", sys.stdout)
