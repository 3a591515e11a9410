"""`konic train SCRIPT`: train the agent that a script defines."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    script: Annotated[Path, typer.Argument(help="A Python file with a module-level `agent` or a `build_agent()`.")],
    max_iterations: Annotated[int, typer.Option(help="Iterations to do.")] = 100,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    output: Annotated[Path | None, typer.Option(help="The run's folder. Default: a new one under runs/.")] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Iterations between checkpoints. Default: one when ten minutes have passed.")
    ] = None,
    save_total_limit: Annotated[int | None, typer.Option(help="Checkpoints kept, the newest. Default: all.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in --output.")
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume with other settings, which makes it another run.")
    ] = False,
) -> None:
    """Train the agent that SCRIPT defines.

    Example: konic train my_rewards.py --max-iterations 50 --output runs/kind --save-every 10
    """
    typer.echo(f"Loading {script} ...", err=True)
    from konic.cli.scripts import load_agent
    from konic.finetuning import KonicFinetuningEngine

    agent = load_agent(script)
    KonicFinetuningEngine.from_agent(agent, checkpoint_dir=output, device=device).train(
        max_iterations, save_every, resume, save_total_limit=save_total_limit, allow_changes=allow_changes
    )
