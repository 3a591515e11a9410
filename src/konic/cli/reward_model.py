"""`konic reward-model train`: preferences or labelled texts -> a reward model."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from konic.cli.paths import read_name, read_path
from konic.output import write_line

reward_model = typer.Typer(help="Train reward models.", no_args_is_help=True)


@reward_model.callback()
def _group() -> None:
    """Train reward models."""


@reward_model.command()
def train(
    data: Annotated[
        str,
        typer.Argument(
            help="A csv, json, jsonl or parquet file, or a dataset of the Hub.", parser=read_name, metavar="DATA"
        ),
    ],
    base: Annotated[
        str,
        typer.Option(help="The base model: a Hub id, a folder or a packaged model.", parser=read_name, metavar="<str>"),
    ],
    output: Annotated[
        Path, typer.Option(help="The folder to write the model into.", parser=read_path, metavar="<path>")
    ] = Path("reward-model"),
    text: Annotated[str | None, typer.Option(help="Column of texts; use it with --label, instead of pairs.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of labels.")] = None,
    test: Annotated[
        str | None,
        typer.Option(help="Test data with the same columns, to measure accuracy.", parser=read_name, metavar="<str>"),
    ] = None,
    test_text: Annotated[str | None, typer.Option(help="Column of texts in --test, if its name differs.")] = None,
    test_label: Annotated[str | None, typer.Option(help="Column of labels in --test, if its name differs.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 3,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 1e-4, or 1e-3 with --lora-r.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pairs or texts per step.")] = 16,
    max_length: Annotated[int, typer.Option(help="Maximum number of tokens read from a text.")] = 256,
    lora_r: Annotated[int | None, typer.Option(help="Train a LoRA of this rank and merge it at the end.")] = None,
    seed: Annotated[int, typer.Option(help="Seeds the split, the order and the new head.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Train a reward model on pairs (prompt, chosen, rejected), or on labelled texts with --text and --label.

    Examples:
    konic reward-model train pairs.jsonl --base all-minilm-l6-v2
    konic reward-model train films.csv --base all-minilm-l6-v2 --text review --label sentiment
    """
    write_line(f"Loading {data} and {base} ...", sys.stderr)
    from konic.finetuning.errors import ConfigError
    from konic.finetuning.reward_models.feedback import read_labelled, read_preferences
    from konic.finetuning.reward_models.training import RewardTrainingConfig, train_reward_model

    if (text is None) != (label is None):
        raise ConfigError(
            "Give --text and --label together; without them the data are pairs (prompt, chosen, rejected)."
        )
    for option, column in (("--test-text", test_text), ("--test-label", test_label)):
        if column is not None and (test is None or text is None):
            needs = "--test, the test data" if test is None else "--text and --label; pairs have columns of fixed names"
            raise ConfigError(f"{option} needs {needs}.")
    say = partial(write_line, stream=sys.stdout)
    config = RewardTrainingConfig(
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_length=max_length,
        lora_r=lora_r,
        seed=seed,
    )
    if text is not None and label is not None:
        examples = read_labelled(data, text, label)
        tests = read_labelled(test, test_text or text, test_label or label) if test is not None else []
        report = train_reward_model(examples, base, output, config, tests, device, say)
    else:
        pairs, more = read_preferences(data), read_preferences(test) if test is not None else []
        report = train_reward_model(pairs, base, output, config, more, device, say)
    measured = [("held out", report.accuracy, report.num_held_out), ("test", report.test_accuracy, report.num_test)]
    for name, share, size in measured:
        if share is not None and size:
            interval = f"95 % interval {share.low:.3f} to {share.high:.3f}"
            say(f"Accuracy, {name}: {share.mean:.3f} ({interval}, n={size})")
    say(f"Saved in {report.folder}; use it as HuggingFaceRewardModel({str(output)!r}).")
