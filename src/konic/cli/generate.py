"""`konic generate RUN PROMPT ...`: responses of a run's model, beside those of the model that it started from."""

import json
import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from konic.cli.completion import complete_run, complete_weights
from konic.cli.paths import read_name, read_path, read_run
from konic.cli.typewriter import Typewriter
from konic.output import is_terminal, write_line


def generate(
    run: Annotated[
        Path,
        typer.Argument(help="The folder or URL of a run.", parser=read_run, metavar="RUN", autocompletion=complete_run),
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Prompts; - reads one from each line of standard input.", metavar="PROMPT..."),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option("--prompts", help="A txt, csv, json, jsonl or parquet file.", parser=read_name, metavar="<file>"),
    ] = None,
    prompt_column: Annotated[
        str | None, typer.Option(help="The column of the prompts. Default: the run's; in a txt file, its lines.")
    ] = None,
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
    rewards: Annotated[
        Path | None,
        typer.Option(
            help="Score the responses with the rewards of this script or YAML file. They are imported.",
            parser=read_path,
            metavar="<file>",
        ),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Default: the run's.", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: the run's.", min=0.01)] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same responses.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: a list with an object per prompt.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Respond to prompts with the model of a run, and with the model that it started from, on the same random numbers.

    On a terminal, the responses to one prompt appear token by token.

    Example: konic generate runs/kind "The film was" --max-new-tokens 32
    """
    if bool(prompts) == (file is not None):
        raise typer.BadParameter("give prompts, or - for standard input, or --prompts FILE", param_hint="PROMPT...")
    if prompt_column and file is None:
        raise typer.BadParameter("give --prompts, the file that it is about", param_hint="--prompt-column")
    write_line(f"Loading {run} ...", sys.stderr)
    from konic.cli.run_rewards import load_rewards
    from konic.saved.agents import BASE, SavedRun
    from konic.saved.evaluation import plain_numbers, require_columns, score_responses
    from konic.saved.prompts import given_prompts, read_prompts
    from konic.saved.weights import Weights

    saved = SavedRun.read(run, {"max_new_tokens": max_new_tokens, "temperature": temperature}, seed)
    names = dict.fromkeys([*([BASE] if base else []), saved.name_of(weights)])
    if file is not None:
        given = read_prompts(file, saved.run, prompt_column, None, None, chat)
    else:
        given = given_prompts(_texts(prompts or []), saved.run, chat)
    composer = load_rewards(saved.run, rewards, False, partial(write_line, stream=sys.stderr))
    if composer is not None:
        require_columns(composer, given)
    if len(given) == 1 and not as_json and is_terminal(sys.stdout):
        write_line(f"prompt: {given[0].text.strip()}", sys.stdout)
        for model in [Weights.load(name, saved.agent(name), device) for name in names]:
            write_line(f"{model.name}: ", sys.stdout, end="")
            typewriter = Typewriter(sys.stdout)
            sample = model.stream(given[0], seed, typewriter)
            typewriter.end(sample.response)
            if composer is not None:
                write_line(shown_rewards(score_responses(composer, [sample], saved.scoring)[0]), sys.stdout)
        return
    rows: list[dict[str, Any]] = [{"prompt": prompt.text} for prompt in given]
    scores: dict[str, list[dict[str, float]]] = {}
    for name in names:
        samples = Weights.load(name, saved.agent(name), device).respond(given, seed)
        for row, sample in zip(rows, samples, strict=True):
            row[name] = sample.response
        if composer is not None:
            scores[name] = score_responses(composer, samples, saved.scoring)
    if as_json:
        for number, row in enumerate(rows):
            row |= (
                {"rewards": {name: plain_numbers(values[number]) for name, values in scores.items()}} if scores else {}
            )
        write_line(json.dumps(rows, indent=1), sys.stdout)
        return
    for number, row in enumerate(rows):
        for name, text in row.items():
            write_line(f"{name}: {text.strip()}", sys.stdout)
            if name in scores:
                write_line(shown_rewards(scores[name][number]), sys.stdout)
        write_line("", sys.stdout)


def _texts(prompts: list[str]) -> list[str]:
    """Return the prompts, with the lines of standard input in the place of -."""
    return [text for prompt in prompts for text in (_lines() if prompt == "-" else [prompt])]


def _lines() -> list[str]:
    from konic.finetuning.errors import ConfigError, is_valid_text

    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"Standard input is not UTF-8: {error.reason} at byte {error.start}.") from None
    if not is_valid_text(text):  # where Python lets other bytes pass
        raise ConfigError("Standard input is not UTF-8. Convert it first.")
    lines = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
    if not lines:
        raise ConfigError("Standard input holds no prompt: give one on each line.")
    return lines


def shown_rewards(values: Mapping[str, float]) -> str:
    """Return a line with the reward of a response and with its parts."""
    return "  " + " | ".join(
        f"{name} {'none' if math.isnan(value) else format(value, '.3f')}" for name, value in values.items()
    )
