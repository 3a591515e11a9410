"""Preferences or labelled texts -> a reward model, a sequence classifier that plain `transformers` loads too.

From pairs it fits a Bradley-Terry head: P(chosen over rejected) = σ(r(chosen) − r(rejected)), by maximum likelihood
(Bradley and Terry 1952; Ouyang et al. 2022, equation 1). From labelled texts it fits a softmax over the labels.
"""

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from konic.finetuning.config import Settings
from konic.finetuning.errors import DatasetError, ModelError, TrainingError, did_you_mean
from konic.finetuning.folders import written_into
from konic.finetuning.intervals import Interval, proportion
from konic.finetuning.loaders import read_hub, read_local
from konic.finetuning.models import loading_failed, locate_model, pick_device, quiet_transformers
from konic.finetuning.reward_model import batches_by_length, forward, longest_input, text_format_of
from konic.finetuning.reward_texts import TextFormat, encode_pair

logger = logging.getLogger(__name__)

WARMUP_SHARE = 0.1
MAX_GRAD_NORM = 1.0
Encoded = dict[str, list[int]]


class RewardTrainingConfig(Settings):
    """How a reward model is fitted."""

    epochs: int = Field(default=3, ge=1)
    """Passes over the examples."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak step size of AdamW, after a tenth of the steps, falling to zero; None takes 1e-4, with LoRA 1e-3."""
    batch_size: int = Field(default=16, ge=1)
    """Pairs or texts per optimizer step."""
    max_length: int = Field(default=256, ge=8)
    """Tokens read of a text at most."""
    held_out: float = Field(default=0.2, ge=0, lt=1)
    """Share of the examples kept aside to measure accuracy on."""
    lora_r: int | None = Field(default=None, ge=1)
    """Rank of a LoRA on every linear layer, merged before saving; None trains every weight."""
    text_format: Literal["auto", "chat", "pair", "joined", "response"] = "auto"
    """What the model reads: see HuggingFaceRewardModel. "auto": a chat where there is a template, else for pairs a text
    pair."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seeds which examples are held out, their order, and the new head."""


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt, of which the first was preferred."""

    prompt: str
    chosen: str
    rejected: str
    messages: list[dict[str, str]] | None = None
    """The chat that the prompt is the last message of."""


@dataclass(frozen=True)
class Labelled:
    """A text and its label."""

    text: str
    label: str


@dataclass(frozen=True)
class RewardModelReport:
    """What came of a fit."""

    folder: Path
    num_examples: int
    accuracy: Interval
    """On the examples held out, with its 95 % interval; NaN without any."""
    num_held_out: int
    test_accuracy: Interval | None = None
    """On other examples that were given for it."""
    num_test: int = 0


def read_preferences(data: str) -> list[Preference]:
    """Preference pairs of a csv, json, jsonl or parquet file, a folder of one kind, or a dataset of the Hub.

    Rows hold `chosen` and `rejected`, as texts beside a `prompt`, or as chats whose last message is the response.

    Raises:
        DatasetError: A row that holds something else; the message names it.
    """
    rows = _rows(data, "prompt", "chosen", "rejected")
    _require_columns(data, rows, ("chosen", "rejected"))
    return [_preference(row, f"{data}, row {number}") for number, row in enumerate(rows)]


def read_labelled(data: str, text: str, label: str) -> list[Labelled]:
    """Labelled texts of a file, a folder of one kind, or a dataset of the Hub.

    Raises:
        DatasetError: No such columns, or a row without a text or a label.
    """
    rows = _rows(data, text, label)
    _require_columns(data, rows, (text, label))
    for number, row in enumerate(rows):
        if not isinstance(row[text], str) or not row[text].strip() or row[label] is None:
            raise DatasetError(f"{data}, row {number}: needs a text in {text!r} and a label in {label!r}.")
    return [Labelled(row[text], str(row[label])) for row in rows]


def train_reward_model(
    examples: Sequence[Preference] | Sequence[Labelled],
    base: str,
    output: str | Path,
    config: RewardTrainingConfig | None = None,
    test: Sequence[Preference] | Sequence[Labelled] = (),
    device: str = "auto",
    tell: Callable[[str], None] = logger.info,
) -> RewardModelReport:
    """Fit a reward model and write it into a folder.

    Args:
        examples: Preference pairs, or labelled texts.
        base: What to start from: a Hub id, a folder, or a packaged model such as "all-minilm-l6-v2".
        output: The folder.
        config: How to fit.
        test: More examples, to measure accuracy on.
        device: "auto", or a torch device.
        tell: Gets a line per epoch.

    Raises:
        DatasetError: Too few examples, or a single label.
        ModelError: A base that cannot be loaded.
        TrainingError: The loss is no longer finite; nothing is written.
    """
    config = config or RewardTrainingConfig()
    labels = _labels([*examples, *test])
    train, held_out = _split(examples, config)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model, tokenizer = _base(base, labels, config, pick_device(device))
        text_format = _text_format(config, model, tokenizer, labels)
        task = _Task(tokenizer, text_format, min(config.max_length, longest_input(model, tokenizer)), labels)
        for epoch, loss in enumerate(_epochs(model, [task.encoded(example) for example in train], task, config), 1):
            share = task.accuracy(model, held_out)
            tell(
                f"Epoch {epoch}/{config.epochs}: loss {loss:.4f}"
                + (f", held-out accuracy {share.mean:.3f}" if held_out else "")
            )
    report = RewardModelReport(
        Path(output).expanduser().absolute(),
        len(train),
        task.accuracy(model, held_out),
        len(held_out),
        task.accuracy(model, test) if test else None,
        len(test),
    )
    _save(model, tokenizer, task, base, report)
    return report


class _Task:
    """What is read of an example, what is lost on a batch, and which are right: of pairs, or of labelled texts."""

    def __init__(self, tokenizer: Any, text_format: TextFormat, max_length: int, labels: list[str] | None) -> None:
        self.tokenizer, self.text_format, self.max_length, self.labels = tokenizer, text_format, max_length, labels

    def encoded(self, example: Preference | Labelled) -> tuple[list[Encoded], int]:
        """The texts of an example, chosen before rejected, and the index of its label."""
        if isinstance(example, Labelled):
            assert self.labels is not None  # noqa: S101
            return [self._read("", example.text)], self.labels.index(example.label)
        texts = (example.chosen, example.rejected)
        return [self._read(example.prompt, text, example.messages) for text in texts], 0

    def _read(self, prompt: str, response: str, messages: Any = None) -> Encoded:
        return encode_pair(self.tokenizer, prompt, response, self.text_format, self.max_length, messages)

    def scores(self, model: Any, batch: Sequence[tuple[list[Encoded], int]]) -> Tensor:
        """Log-probabilities of what is right [B, options]: of the labels, or of (chosen, rejected)."""
        logits = forward(model, [text for texts, _ in batch for text in texts]).float()
        if self.labels is None:
            logits = logits.view(len(batch), 2)
        return logits.log_softmax(dim=1)

    def accuracy(self, model: Any, examples: Sequence[Preference] | Sequence[Labelled]) -> Interval:
        """Share of examples whose right option is strictly the likeliest, with its 95 % interval."""
        encoded = [self.encoded(example) for example in examples]
        right = 0
        was_training = model.training
        model.eval()
        for rows in batches_by_length([len(texts[0]["input_ids"]) for texts, _ in encoded], 32):
            batch = [encoded[row] for row in rows]
            scores = self.scores(model, batch)
            truth = torch.tensor([label for _, label in batch], device=scores.device)
            own = scores.gather(1, truth[:, None])
            right += int(((scores >= own).sum(dim=1) == 1).sum())
        model.train(was_training)
        return proportion(right, len(encoded))


def _epochs(
    model: Any, examples: list[tuple[list[Encoded], int]], task: _Task, config: RewardTrainingConfig
) -> Iterator[float]:
    """Fit; after every epoch, its mean loss."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    rate = config.learning_rate or (1e-3 if config.lora_r else 1e-4)
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    steps = math.ceil(len(examples) / config.batch_size) * config.epochs
    warmup = math.ceil(WARMUP_SHARE * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
    )
    for _ in range(config.epochs):
        model.train()
        losses = []
        for rows in _random_batches([len(texts[0]["input_ids"]) for texts, _ in examples], config.batch_size):
            batch = [examples[row] for row in rows]
            scores = task.scores(model, batch)
            loss = F.nll_loss(scores, torch.tensor([label for _, label in batch], device=scores.device))
            if not torch.isfinite(loss):
                raise TrainingError(f"The reward model's loss became {loss.item()}. Lower learning_rate={rate:g}.")
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses += [loss.item()] * len(batch)
        model.eval()
        if not all(torch.isfinite(weight).all() for weight in weights):
            raise TrainingError(f"The reward model's weights are no longer finite. Lower learning_rate={rate:g}.")
        yield math.fsum(losses) / len(losses)


def _random_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Every index once, in batches of like lengths, so that little is padding, in random order."""
    order = torch.randperm(len(lengths)).tolist()
    pools = [order[start : start + 8 * size] for start in range(0, len(order), 8 * size)]
    batches = [
        [pool[row] for row in rows]
        for pool in pools
        for rows in batches_by_length([lengths[row] for row in pool], size)
    ]
    return [batches[place] for place in torch.randperm(len(batches)).tolist()]


def _base(base: str, labels: list[str] | None, config: RewardTrainingConfig, device: torch.device) -> tuple[Any, Any]:
    """The base model with a new head, and its tokenizer."""
    location = locate_model(base, option="base")
    names = labels or ["reward"]
    try:
        with quiet_transformers():
            model = AutoModelForSequenceClassification.from_pretrained(
                location,
                num_labels=len(names),
                id2label=dict(enumerate(names)),
                label2id={name: index for index, name in enumerate(names)},
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(location)
    except Exception as error:
        raise ModelError(loading_failed(f"base={base!r}", location, error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.problem_type = "single_label_classification" if labels else "regression"
    if config.lora_r:
        import peft

        adapter = peft.LoraConfig(
            task_type="SEQ_CLS",
            r=config.lora_r,
            lora_alpha=2 * config.lora_r,
            target_modules="all-linear",
            exclude_modules=r".*pre_classifier",
        )
        with warnings.catch_warnings(action="ignore"):  # advice on GPT-2's layers, which PEFT follows by itself
            model = peft.get_peft_model(model, adapter)
    return model.to(device), tokenizer


def _text_format(config: RewardTrainingConfig, model: Any, tokenizer: Any, labels: list[str] | None) -> TextFormat:
    if config.text_format != "auto":
        return config.text_format
    if labels is not None:
        return "response"
    natural = text_format_of(model.config, tokenizer)
    return "pair" if natural == "joined" else natural


def _save(model: Any, tokenizer: Any, task: _Task, base: str, report: RewardModelReport) -> None:
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.config.konic_text_format = task.text_format
    with written_into(report.folder) as target, quiet_transformers():
        model.save_pretrained(target)
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()  # that of the last text read
        tokenizer.save_pretrained(target)
        (target / "README.md").write_text(_card(task, base, report), encoding="utf-8")


def _card(task: _Task, base: str, report: RewardModelReport) -> str:
    learned = "preference pairs" if task.labels is None else f"texts labelled {', '.join(task.labels)}"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-classification",
        f"base_model: {json.dumps(base)}",
    ]
    lines += ["tags: [konic, reward-model]", "---", "", "# A reward model", ""]
    lines += [f"Fitted to {report.num_examples} {learned}; it reads texts as {task.text_format!r}.", ""]
    measured = [("held out", report.accuracy, report.num_held_out), ("test", report.test_accuracy, report.num_test)]
    for name, share, size in measured:
        if share is not None and size:
            told = f"{share.mean:.3f} (95 % interval {share.low:.3f} to {share.high:.3f})"
            lines.append(f"- accuracy, {name} ({size} examples): {told}")
    lines += ["", "```python", "from konic.finetuning import HuggingFaceRewardModel", ""]
    return "\n".join([*lines, "reward_model = HuggingFaceRewardModel(FOLDER)", "```", ""])


def _labels(examples: Sequence[Preference] | Sequence[Labelled]) -> list[str] | None:
    """The labels in order, None for preference pairs."""
    if not examples or isinstance(examples[0], Preference):
        return None
    labels = sorted({example.label for example in examples if isinstance(example, Labelled)})
    if len(labels) < 2:
        raise DatasetError(f"All texts have the label {labels[0]!r}: there is nothing to tell apart.")
    if len(labels) > 100:
        raise DatasetError(
            f"There are {len(labels)} different labels, such as {', '.join(labels[:3])}: is that a label?"
        )
    return labels


def _split(
    examples: Sequence[Preference] | Sequence[Labelled], config: RewardTrainingConfig
) -> tuple[list[Any], list[Any]]:
    """Examples to learn from, and those held out."""
    if len(examples) < 8:
        raise DatasetError(f"{len(examples)} examples are too few to learn from; give at least 8, better hundreds.")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(config.seed)).tolist()
    count = min(round(config.held_out * len(examples)), len(examples) - 4)
    return [examples[row] for row in order[count:]], [examples[row] for row in order[:count]]


def _rows(data: str, *text_columns: str) -> list[Any]:
    if Path(data).expanduser().exists():
        return read_local(data, *text_columns)
    return list(read_hub(data, None, "train", None, None, streaming=False))


def _require_columns(data: str, rows: Sequence[Any], names: Sequence[str]) -> None:
    if not rows:
        raise DatasetError(f"{data}: holds no rows.")
    for name in names:
        missing = next(
            (number for number, row in enumerate(rows) if not isinstance(row, Mapping) or name not in row), None
        )
        if missing is not None:
            known = list(rows[missing]) if isinstance(rows[missing], Mapping) else []
            raise DatasetError(
                f"{data}, row {missing}: there is no column {name!r}.{did_you_mean(name, known)} "
                f"It has: {', '.join(map(str, known)) or 'none'}."
            )


def _preference(row: Mapping[str, Any], where: str) -> Preference:
    chosen, rejected, prompt = (_chat(row.get(name), f"{where}: {name!r}") for name in ("chosen", "rejected", "prompt"))
    if not all(side and side[-1]["content"].strip() for side in (chosen, rejected)):
        raise DatasetError(f"{where}: 'chosen' or 'rejected' holds no response.")
    before = chosen[:-1] or prompt
    text = before[-1]["content"] if before else ""
    is_chat = not isinstance(row["chosen"], str) or not isinstance(row.get("prompt", ""), str)
    return Preference(text, chosen[-1]["content"], rejected[-1]["content"], before if before and is_chat else None)


def _chat(value: Any, where: str) -> list[dict[str, str]]:
    """Messages; a plain text is one of them."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}] if value.strip() else []
    if value is None:
        return []
    is_chat = isinstance(value, Sequence) and all(
        isinstance(message, Mapping) and isinstance(message.get("content"), str) for message in value
    )
    if not is_chat:
        raise DatasetError(f"{where} is neither a text nor a chat: {value!r:.200}.")
    return [{"role": str(message.get("role", "user")), "content": message["content"]} for message in value]
