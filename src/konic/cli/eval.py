"""`konic eval RUN`: weights of a run compared with its base model, or with others of its weights, on prompts."""

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from konic.cli.completion import complete_run, complete_weights
from konic.cli.paths import read_name, read_path, read_run
from konic.output import is_terminal, write_line
from konic.text import printable

if TYPE_CHECKING:
    from konic.finetuning.results.intervals import Interval
    from konic.saved.evaluation import Comparison


def evaluate(
    run: Annotated[
        Path,
        typer.Argument(help="The folder or URL of a run.", parser=read_run, metavar="RUN", autocompletion=complete_run),
    ],
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A txt, csv, json, jsonl or parquet file. Default: the prompts that the run held out.",
            parser=read_name,
            metavar="<file>",
        ),
    ] = None,
    prompt_column: Annotated[
        str | None, typer.Option(help="The column of the prompts. Default: the run's; in a txt file, its lines.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="For a folder with a file for each split. Default: train.")] = None,
    max_prompts: Annotated[int | None, typer.Option(help="Only so many prompts, the first ones.", min=1)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Give each plain prompt as a chat with one message.")] = False,
    rewards: Annotated[
        Path | None,
        typer.Option(
            help="The script or YAML file of the rewards. They are imported.", parser=read_path, metavar="<file>"
        ),
    ] = None,
    recorded_rewards: Annotated[
        bool,
        typer.Option(
            "--recorded-rewards", help="Import the script that RUN names, if it is yours and unchanged since the run."
        ),
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            help="final, best, checkpoint-20, base. Default: the last.",
            parser=read_name,
            metavar="<str>",
            autocompletion=complete_weights,
        ),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            help="What to compare with, named as in --weights.",
            parser=read_name,
            metavar="<str>",
            autocompletion=complete_weights,
        ),
    ] = "base",
    samples: Annotated[int, typer.Option(help="Responses to each prompt.", min=1)] = 1,
    k: Annotated[
        list[int] | None,
        typer.Option("--k", help="The best of k responses, and with rewards of 0 and 1 pass@k. Repeatable.", min=1),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Default: the run's.", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: the run's.", min=0.01)] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same responses.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="A file for the numbers and all responses, as JSON.", parser=read_path, metavar="<file>"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Compare weights of a run with its base model on the same prompts and random numbers, with 95 % intervals.

    Example: konic eval runs/kind --prompts prompts.txt --rewards my_rewards.py --samples 4
    """
    write_line(f"Loading {run} ...", sys.stderr)
    from konic.cli.run_rewards import load_rewards
    from konic.finetuning.errors import OutputError
    from konic.finetuning.system.files import require_writable_file, write_text
    from konic.saved.agents import SavedRun
    from konic.saved.evaluation import compare
    from konic.saved.prompts import held_out_prompts, read_prompts
    from konic.saved.rewards import require_rewards_given

    if prompts is None and (prompt_column or split or chat):
        raise typer.BadParameter(
            "give --prompts, the file that it is about", param_hint="--prompt-column, --split, --chat"
        )
    if output is not None:
        if not output.absolute().parent.is_dir():
            raise OutputError(f"--output {output}: there is no folder {output.absolute().parent}.")
        require_writable_file(output, "--output")
    saved = SavedRun.read(run, {"max_new_tokens": max_new_tokens, "temperature": temperature}, seed)
    names = saved.name_of(weights), saved.name_of(against)
    if prompts is None:
        chosen = held_out_prompts(saved.run, max_prompts)
    else:
        chosen = read_prompts(prompts, saved.run, prompt_column, split, max_prompts, chat)
    say = partial(write_line, stream=sys.stderr)
    composer = load_rewards(saved.run, rewards, recorded_rewards, say)
    if composer is None:
        require_rewards_given(saved.run)
    ks = sorted(set(k or ([samples] if samples > 1 else [])))
    comparison = compare(saved, *names, chosen, composer, samples, ks, device, say)
    found = {"run": str(run), "seed": seed, "generation": saved.generation.to_dict()} | comparison.to_dict()
    try:
        if output is not None:
            write_text(output, json.dumps(found | {"responses": comparison.responses()}, indent=1) + "\n")
    finally:  # what was computed is shown, also where the disk is full
        if as_json:
            write_line(json.dumps(found, indent=1), sys.stdout)
        else:
            show(comparison)


def show(comparison: "Comparison") -> None:
    """Print the table of a comparison."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from konic.finetuning.results.intervals import FEWEST_PAIRS

    console = Console(highlight=False, width=None if is_terminal(sys.stdout) else 100)
    count = f", {comparison.num_samples} responses to each" if comparison.num_samples > 1 else ""
    prompts = "prompts" if comparison.num_prompts > 1 else "prompt"
    title = f"{comparison.weights[0]} against {comparison.against[0]} on {comparison.num_prompts} {prompts}{count}"
    table: Any = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", title_justify="left")
    table.add_column("", overflow="fold")
    for heading in (comparison.against[0], comparison.weights[0], "difference"):
        table.add_column(heading, justify="right")
    for measure in comparison.measures():
        digits = _digits(measure.difference)
        sides = _cell(measure.against, digits), _cell(measure.weights, digits)
        cells = *sides, _cell(measure.difference, digits, "+")
        style = "bold" if measure.name == "mean reward" else None
        table.add_row(Text(printable(measure.name)), *cells, style=style)
    console.print(table)
    if comparison.num_prompts < FEWEST_PAIRS:
        console.print(f"Fewer than {FEWEST_PAIRS} prompts are too few for intervals.")
    else:
        console.print(
            "In brackets: 95 % intervals, by the bootstrap over prompts, Wilson's for a reward of 0 or 1; of the "
            "difference, by the bootstrap over pairs."
        )


def _digits(difference: "Interval") -> int:
    """The decimals of a row: two, or up to five where more show on which side of 0 each end of the difference is."""
    ends = [end for end in (difference.low, difference.high) if abs(end) > 0.5e-5]
    return next((digits for digits in range(2, 5) if all(round(end, digits) for end in ends)), 5)


def _cell(interval: "Interval", digits: int, sign: str = "") -> str:
    if math.isnan(interval.mean):
        return "–"
    low, high = (round(end, digits) + 0.0 for end in (interval.low, interval.high))  # never "-0.00"
    ends = f" [{low:.{digits}f}, {high:.{digits}f}]" if interval.is_known else ""
    return f"{interval.mean:{sign}.{max(3, digits)}f}{ends}"
