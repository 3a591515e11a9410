"""A trained reward model -> a folder that `transformers` loads: saves the model, its tokenizer and a model card."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from konic.finetuning.models.locations import quiet_transformers
from konic.finetuning.results.intervals import Interval
from konic.finetuning.reward_models.texts import TextFormat
from konic.finetuning.system.files import filling_folder, set_aside
from konic.output import get_logger
from konic.text import escape_markdown, printable

logger = get_logger(__name__)

_WRITTEN = (
    "config.json", "*.safetensors*", "tokenizer*", "vocab.*", "merges.txt", "*.model", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "README.md",
)  # fmt: skip
"""What a model writes into its folder."""


@dataclass(frozen=True, kw_only=True)
class RewardModelReport:
    """The result of training a reward model."""

    folder: Path
    num_examples: int
    accuracy: Interval
    """Accuracy on the held-out examples, with its 95 % interval; NaN if there are none."""
    num_held_out: int
    test_accuracy: Interval | None = None
    """Accuracy on the separate test examples; None if there are none."""
    num_test: int = 0


def save_reward_model(
    model: Any,
    tokenizer: Any,
    text_format: TextFormat,
    max_length: int,
    labels: Sequence[str] | None,
    base: str,
    report: RewardModelReport,
) -> None:
    """Write the model (after merging a LoRA adapter), its tokenizer and its model card into the report's folder.

    An earlier model that is there moves into a folder `earlier-N` in it, and a warning says so.

    Raises:
        OutputError: The folder cannot be written.
    """
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.config.konic_text_format = text_format
    model.config.konic_max_length = max_length
    with filling_folder(report.folder) as target, quiet_transformers():
        model.save_pretrained(target)
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()  # otherwise the truncation of the last text is saved too
        tokenizer.save_pretrained(target)
        (target / "README.md").write_text(_card(text_format, labels, base, report), encoding="utf-8")
        earlier = [path for pattern in _WRITTEN for path in sorted(report.folder.glob(pattern)) if path.is_file()]
        if earlier:
            aside = set_aside(report.folder, earlier)
            logger.warning("An earlier model was in %s; its files are now in %s.", report.folder, aside)


def _card(text_format: TextFormat, labels: Sequence[str] | None, base: str, report: RewardModelReport) -> str:
    learned = "preference pairs" if labels is None else f"texts labelled {', '.join(map(escape_markdown, labels))}"
    header = ModelCardData(
        base_model=printable(base),
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["konic", "reward-model"],
    )
    lines = ["# A reward model", ""]
    lines += [f"Fitted to {report.num_examples} {learned}; it reads texts as {text_format!r}.", ""]
    measured = [("held out", report.accuracy, report.num_held_out), ("test", report.test_accuracy, report.num_test)]
    for name, share, size in measured:
        if share is not None and size:
            interval = f"{share.mean:.3f} (95 % interval {share.low:.3f} to {share.high:.3f})"
            lines.append(f"- accuracy, {name} ({size} examples): {interval}")
    lines += ["", "```python", "from konic.finetuning import HuggingFaceRewardModel", ""]
    lines += ["reward_model = HuggingFaceRewardModel(FOLDER)", "```", ""]
    return str(ModelCard(f"---\n{header.to_yaml()}\n---\n\n" + "\n".join(lines)))
