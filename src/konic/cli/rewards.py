"""`konic rewards SCRIPT_OR_YAML`: tries a job's rewards on responses, without training."""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from konic.cli.paths import read_name, read_path
from konic.output import is_terminal, write_line
from konic.text import printable

if TYPE_CHECKING:
    from konic.finetuning.agent import KonicFinetuningAgent
    from konic.finetuning.data.samples import Sample
    from konic.finetuning.rewards.trial import ComposerTrial


def rewards(
    script: Annotated[
        Path,
        typer.Argument(
            help="A Python file with an `agent`, a `build_agent()` or a composer, or a YAML file.",
            parser=read_path,
            metavar="SCRIPT_OR_YAML",
        ),
    ],
    texts: Annotated[
        str | None,
        typer.Option(
            help="A csv, json, jsonl or parquet file with columns `prompt`, or those of the template, and `response`.",
            parser=read_name,
            metavar="<str>",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Without --texts: number of responses to sample.", min=1)] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Try the rewards that SCRIPT_OR_YAML defines, on given texts or on new samples of its base model.

    Shows what each reward does, what moves the total, and what could go wrong, before you spend time on training.
    With --texts, a script needs only a composer. Without it, a script needs an agent, which names the base model.
    Ends with code 1 if every call of a reward fails, or of the composer's own compose.

    Examples:
    konic rewards my_rewards.py
    konic rewards my_rewards.py --texts responses.jsonl
    """
    write_line(f"Loading {script} ...", sys.stderr)
    from konic.cli.jobs import load_job, load_rewards
    from konic.finetuning.rewards.responses import read_responses
    from konic.finetuning.rewards.trial import try_rewards

    if texts is not None:
        composer, dataset = load_rewards(script)
        tried = read_responses(texts, dataset.prompt_column, dataset.prompt_template, dataset.system_prompt)
    else:
        agent = load_job(script).agent
        write_line(f"Sampling {samples} responses from {agent.get_base_model()} ...", sys.stderr)
        composer, tried = agent.get_reward_composer(), sample_responses(agent, samples, device)
    trial = try_rewards(composer, tried)
    show(trial)
    if any(reward.always_fails for reward in trial.rewards):
        raise typer.Exit(1)


def sample_responses(agent: "KonicFinetuningAgent", count: int, device: str = "auto") -> "list[Sample]":
    """Sample responses of the agent's base model to rows of its dataset."""
    from konic.finetuning.agent import read_agent
    from konic.finetuning.data.prompts import load_prompts
    from konic.finetuning.learning.learner import build_learner
    from konic.finetuning.models.loading import pick_device
    from konic.finetuning.rollout.evaluation import respond

    agent = read_agent(agent)
    learner, dataset = build_learner(agent, pick_device(device)), load_prompts(agent.get_dataset_config())
    generation, seed = agent.get_generation_config(), agent.get_training_config().seed
    size = len(dataset.rows)
    samples: list[Sample] = []
    for pass_number, start in enumerate(range(0, count, size)):  # each pass uses its own random numbers
        chosen = dataset.batch(start, min(size, count - start))
        pass_seed, tokens = seed + pass_number, learner.special_tokens
        samples += respond(learner.policy, learner.sampler, chosen, generation, tokens, pass_seed)
    return samples


def show(trial: "ComposerTrial") -> None:
    """Print a trial: the values of the rewards, their calls, their values on the probes, and the warnings."""
    from rich.console import Console
    from rich.text import Text

    from konic.finetuning.rewards.trial import PROBES

    console = Console(highlight=False, width=None if is_terminal(sys.stdout) else 100)
    rows = [*trial.parts, trial.total]
    failed = {reward.name: len(reward.faults) for reward in trial.rewards}
    faults: dict[str, Any] = {reward.name: reward.probe_faults for reward in trial.rewards}
    values = {
        part.name: [
            *(_number(value) for value in (part.mean, part.std, part.low, part.high)),
            "" if part is trial.total or math.isnan(part.share_of_variance) else f"{part.share_of_variance:.0%}",
            "" if math.isnan(part.length_correlation) else f"{part.length_correlation:+.2f}",
            "" if part is trial.total else str(part.num_none - failed[part.reward]),
        ]
        for part in rows
    }
    headings = ("mean", "spread", "lowest", "highest", "moves total", "r(length)", "None")
    console.print(_table(f"Rewards on {trial.num_responses} responses", headings, values, trial.total.name))
    calls = {
        reward.name: [
            f"{reward.milliseconds:.2f}",
            str(failed[reward.name]),
            "–" if reward.always_fails else "yes" if reward.is_deterministic else "NO",
        ]
        for reward in trial.rewards
    }
    console.print(_table("Calls", ("ms each", "errors", "repeatable"), calls))
    faults[trial.total.reward] = {**trial.probe_faults, **faults.get(trial.total.reward, {})}
    probes = {
        part.name: [
            "error" if probe in faults.get(part.reward, ()) else _number(part.probes[probe]) for probe in PROBES
        ]
        for part in rows
    }
    console.print(_table("Unusual responses", tuple(PROBES), probes, trial.total.name))
    for warning in trial.warnings:
        console.print(Text(f"! {printable(warning)}", style="yellow"))
    if not trial.warnings:
        console.print("Nothing stands out.")


def _table(title: str, headings: tuple[str, ...], rows: dict[str, list[str]], bold: str | None = None) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", title_justify="left")
    table.add_column("", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, cells in rows.items():
        table.add_row(Text(printable(name)), *cells, style="bold" if name == bold else None)
    return table


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"
