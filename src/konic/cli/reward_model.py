"""`konic reward-model train`: preferences or labelled texts -> a reward model."""

from pathlib import Path
from typing import Annotated

import typer

reward_model = typer.Typer(help="Make reward models.", no_args_is_help=True)


@reward_model.callback()
def _group() -> None:
    """Make reward models."""


@reward_model.command()
def train(
    data: Annotated[str, typer.Argument(help="A csv, json, jsonl or parquet file, or a dataset of the Hub.")],
    base: Annotated[str, typer.Option(help="What to start from: a Hub id, a folder, a packaged model.")],
    output: Annotated[Path, typer.Option(help="The folder to write the model into.")] = Path("reward-model"),
    text: Annotated[str | None, typer.Option(help="Column of texts, with --label instead of pairs.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of labels.")] = None,
    test: Annotated[str | None, typer.Option(help="More data of the same columns, to measure accuracy on.")] = None,
    test_text: Annotated[str | None, typer.Option(help="Its column of texts, where it has another name.")] = None,
    test_label: Annotated[str | None, typer.Option(help="Its column of labels, where it has another name.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 3,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 1e-4, with --lora-r 1e-3.")] = None,
    batch_size: Annotated[int, typer.Option(help="Pairs or texts per step.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens read of a text at most.")] = 256,
    lora_r: Annotated[int | None, typer.Option(help="Train a LoRA of this rank, merged in the end.")] = None,
    seed: Annotated[int, typer.Option(help="Seeds the split, the order and the new head.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Fit a reward model to pairs (prompt, chosen, rejected), or with --text and --label to labelled texts.

    Examples: konic reward-model train pairs.jsonl --base all-minilm-l6-v2
              konic reward-model train films.csv --base all-minilm-l6-v2 --text review --label sentiment
    """
    typer.echo(f"Loading {data} and {base} ...", err=True)
    from konic.finetuning.errors import ConfigError
    from konic.finetuning.reward_models.feedback import read_labelled, read_preferences
    from konic.finetuning.reward_models.training import RewardTrainingConfig, train_reward_model

    if (text is None) != (label is None):
        raise ConfigError("--text and --label go together; without them the data are pairs (prompt, chosen, rejected).")
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
        tests = read_labelled(test, test_text or text, test_label or label) if test else []
        report = train_reward_model(examples, base, output, config, tests, device, typer.echo)
    else:
        pairs, more = read_preferences(data), read_preferences(test) if test else []
        report = train_reward_model(pairs, base, output, config, more, device, typer.echo)
    measured = [("held out", report.accuracy, report.num_held_out), ("test", report.test_accuracy, report.num_test)]
    for name, share, size in measured:
        if share is not None and size:
            typer.echo(
                f"Accuracy, {name}: {share.mean:.3f} (95 % interval {share.low:.3f} to {share.high:.3f}, n={size})"
            )
    typer.echo(f"Saved in {report.folder}; use it as HuggingFaceRewardModel({str(output)!r}).")
