"""`konic inspect RUN`: why a response got its advantage, token by token."""

import json
import math
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from konic.cli.paths import read_run
from konic.output import write_line

if TYPE_CHECKING:
    from konic.report.replay import Replay

_RISES = ("color(194)", "color(157)", "color(114)")
_FALLS = ("color(224)", "color(217)", "color(210)")
_PREVIEW = 60


class Number(StrEnum):
    """What colours the tokens."""

    ADVANTAGE = "advantage"
    KL = "kl"
    VALUE = "value"
    LOG_PROB = "log_prob"
    ENTROPY = "entropy"


def inspect(
    run: Annotated[Path, typer.Argument(help="The folder or URL of a run.", parser=read_run, metavar="RUN")],
    iteration: Annotated[int | None, typer.Option(help="Default: the last one.", min=1)] = None,
    sample: Annotated[int | None, typer.Option(help="A response of the iteration, from 1.", min=1)] = None,
    best: Annotated[bool, typer.Option("--best", help="The response with the highest reward.")] = False,
    worst: Annotated[bool, typer.Option("--worst", help="The response with the lowest reward.")] = False,
    most_moved: Annotated[bool, typer.Option("--most-moved", help="The response with the highest KL.")] = False,
    by: Annotated[Number, typer.Option(help="What colours the tokens.")] = Number.ADVANTAGE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the responses of an iteration, or one response with the numbers of each token and why it got its advantage.

    Without colours (NO_COLOR, or not on a terminal), each token has a line of its own with its numbers.

    Example: konic inspect runs/kind --iteration 17 --sample 3
    """
    if sum((sample is not None, best, worst, most_moved)) > 1:
        raise typer.BadParameter("--sample, --best, --worst and --most-moved each choose a response: give one of them.")
    write_line(f"Reading {run} ...", sys.stderr)
    from konic.finetuning.errors import OutputError
    from konic.report.replay import choose, replays
    from konic.report.run import Run

    read = Run.read(run)
    number = iteration or max(row["iteration"] for row in read.history)
    samples = replays(read, number)
    for note in read.notes:
        write_line(f"Note: {note}", sys.stderr)
    chosen = samples[sample - 1] if sample and sample <= len(samples) else None
    if sample and chosen is None:
        raise OutputError(f"--sample {sample}: iteration {number} has {len(samples)} responses, counted from 1.")
    wanted = "best" if best else "worst" if worst else "most moved" if most_moved else None
    if wanted:
        chosen = choose(samples).get(wanted)
        if chosen is None:
            raise OutputError(f"No response of iteration {number} has a {'KL' if most_moved else 'reward'}.")
    if as_json:
        found = chosen.as_json() if chosen else [one.as_json() for one in samples]
        write_line(json.dumps({"iteration": number, "sample" if chosen else "samples": found}, indent=1), sys.stdout)
    elif chosen:
        _show_sample(chosen, number, by)
    else:
        _show_table(samples, number)


def _show_table(samples: "list[Replay]", iteration: int) -> None:
    from konic.finetuning.results.intervals import nanmean

    write_line(f"Iteration {iteration}: {len(samples)} responses\n", sys.stdout)
    write_line("sample   reward       KL  tokens  advantage  response", sys.stdout)
    for one in samples:
        signal = nanmean(one.numbers.get("advantage", []))
        note = one.left_out or ("no reward" if math.isnan(one.reward) else "" if one.ended else "no end")
        start = " ".join(one.response.split())
        start = start if len(start) <= _PREVIEW else f"{start[:_PREVIEW]} …"
        write_line(
            f"{one.sample:6d} {_shown(one.reward):>8} {_shown(one.kl):>8} {len(one.tokens):7d} {_shown(signal):>10}  "
            f"{f'({note}) ' if note else ''}{start}",
            sys.stdout,
        )


def _show_sample(one: "Replay", iteration: int, by: Number) -> None:
    from rich.console import Console

    write_line(f"Iteration {iteration}, sample {one.sample}\n\nPrompt: {one.prompt}\n", sys.stdout)
    console = Console(highlight=False, soft_wrap=False)
    if console.color_system and not console.no_color and by in one.numbers:
        _show_colours(one, by, console)
    else:
        _show_numbers(one)
    if by is Number.VALUE and one.numbers and by not in one.numbers:
        write_line("\nThe algorithm of this run learns no values, so --by value colours nothing.", sys.stdout)
    write_line("", sys.stdout)
    for name, value in one.parts.items():
        seconds = one.seconds.get(name.split(".")[0], one.seconds.get(name, math.nan))
        took = "" if math.isnan(seconds) else f"  in {seconds * 1000:.1f} ms"
        write_line(f"  {name}: {'abstained or failed' if math.isnan(value) else f'{value:.4g}'}{took}", sys.stdout)
    write_line(f"  reward: {_shown(one.reward)}", sys.stdout)
    write_line(f"  KL: {_shown(one.kl)} nats", sys.stdout)
    if one.error:
        write_line(f"  error: {one.error}", sys.stdout)
    if not one.ended:
        write_line("  It did not end by itself: max_new_tokens cut it off.", sys.stdout)
    write_line(f"\n{one.why}", sys.stdout)


def _show_colours(one: "Replay", by: Number, console: object) -> None:
    """Print the response with the colour of each token, and what the colours mean."""
    from rich.text import Text

    from konic.text import printable

    values = one.numbers[by]
    most = max((abs(value) for value in values if not math.isnan(value)), default=0.0)
    text = Text()
    for token, value in zip(one.tokens, values, strict=True):
        text.append(printable(token), _style(value, most))
    console.print(text)  # type: ignore[attr-defined]
    legend = Text(f"\n{by.value}: ")
    for level in (-1.0, -0.5, 0.0, 0.5, 1.0):
        legend.append(f" {level * most:+.3f} ", _style(level * most, most))
    console.print(legend)  # type: ignore[attr-defined]


def _style(value: float, most: float) -> str:
    if math.isnan(value) or not most or abs(value) < most / 20:
        return ""
    colours = _RISES if value > 0 else _FALLS
    return f"black on {colours[min(2, int(3 * abs(value) / most))]}"


def _show_numbers(one: "Replay") -> None:
    """Print a line for each token."""
    write_line("   #" + "".join(f"{name:>11}" for name in one.numbers) + "  token", sys.stdout)
    for index, token in enumerate(one.tokens):
        numbers = "".join(f"{_shown(values[index]):>11}" for values in one.numbers.values())
        text = token.replace("\n", "\\n") if token else "(a part of the next character)"
        write_line(f"{index + 1:4d}{numbers}  {text}", sys.stdout)


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
