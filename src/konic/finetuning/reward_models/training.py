"""Preferences or labelled texts -> a reward model: trains a sequence classifier that plain `transformers` can load.

Preference pairs train a Bradley-Terry head: P(chosen over rejected) = σ(r(chosen) − r(rejected)), by maximum likelihood
(Bradley and Terry 1952; Ouyang et al. 2022, equation 1). Labelled texts train a softmax over the labels.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from konic.finetuning.errors import DatasetError, OutputError, TrainingError, first_of
from konic.finetuning.learning.schedule import learning_rate_at
from konic.finetuning.models.loading import pick_device
from konic.finetuning.models.locations import locate_model
from konic.finetuning.models.reading import read_model
from konic.finetuning.results.intervals import Interval, proportion
from konic.finetuning.reward_models.classifier import batches_by_length, choose_text_format, forward, longest_input
from konic.finetuning.reward_models.feedback import Labelled, Preference
from konic.finetuning.reward_models.saving import RewardModelReport, save_reward_model
from konic.finetuning.reward_models.texts import TextFormat, encode_pair
from konic.finetuning.settings import Settings, describe, short_repr
from konic.finetuning.system.files import as_path, require_writable
from konic.output import get_logger

logger = get_logger(__name__)

WARMUP_SHARE = 0.1
MAX_GRAD_NORM = 1.0
_KINDS = {Preference: "Preference(prompt, chosen, rejected)", Labelled: "Labelled(text, label)"}
_Encoded = dict[str, list[int]]


class RewardTrainingConfig(Settings):
    """How to train a reward model."""

    epochs: int = Field(default=3, ge=1)
    """Passes over the examples."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of AdamW, reached after a tenth of the steps and then falling to zero; None takes 1e-4, or
    1e-3 with LoRA."""
    batch_size: int = Field(default=16, ge=1)
    """Pairs or texts per optimizer step."""
    max_length: int = Field(default=256, ge=8)
    """Maximum number of tokens read from a text, in training and by default when the model is used."""
    held_out: float = Field(default=0.2, ge=0, lt=1)
    """Share of the examples held out to measure accuracy. Copies of an example are held out together."""
    lora_r: int | None = Field(default=None, ge=1)
    """Rank of a LoRA adapter on every linear layer, merged before saving; None trains every weight."""
    text_format: Literal["auto", "chat", "pair", "joined", "response"] = "auto"
    """What the model reads: see HuggingFaceRewardModel. "auto" is "response" for labelled texts; for pairs it is "chat"
    if the tokenizer has a template, else "pair"."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Random seed for which examples are held out, their order, and the initial weights of the new head."""


def train_reward_model(
    examples: Sequence[Preference] | Sequence[Labelled],
    base: str,
    output: str | Path,
    config: RewardTrainingConfig | Mapping[str, Any] | None = None,
    test: Sequence[Preference] | Sequence[Labelled] = (),
    device: str = "auto",
    tell: Callable[[str], None] = logger.info,
) -> RewardModelReport:
    """Train a reward model and write it into a folder.

    Args:
        examples: Preference pairs, or labelled texts.
        base: The model to start from: a Hub id, a folder, or a packaged model such as "all-minilm-l6-v2".
        output: The folder to write; an earlier model in it moves into a folder `earlier-N` there.
        config: How to train; it may be a dict.
        test: More examples, used only to measure accuracy.
        device: "auto", or a torch device.
        tell: Called with one line of text per epoch.

    Raises:
        ConfigError: The config is invalid.
        DatasetError: There are too few examples, or only one label, or labels that only `test` has, or most pairs are
            equal within `max_length`, or an example is of another type.
        ModelError: The base model cannot be loaded.
        OutputError: The folder cannot be written; this is checked before training.
        TrainingError: The loss or a weight is no longer finite; nothing is written.
    """
    config, folder = RewardTrainingConfig.from_value(config, "config"), as_path(output, "output", OutputError)
    require_writable(folder, "output")
    _require_examples(examples, test)
    labels = _labels(examples)
    _require_known_labels(test, labels)
    train, held_out = _split(examples, config)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model, tokenizer = _base(base, labels, config, pick_device(device))
        text_format = _text_format(config, model, tokenizer, labels)
        task = _Task(tokenizer, text_format, min(config.max_length, longest_input(model, tokenizer)), labels)
        encoded = [task.encoded(example) for example in train]
        if labels is None:
            _warn_of_equal_pairs([*encoded, *map(task.encoded, held_out)], task.max_length)
        for epoch, loss in enumerate(_epochs(model, encoded, task, config), 1):
            share = task.accuracy(model, held_out)
            tell(
                f"Epoch {epoch}/{config.epochs}: loss {loss:.4f}"
                + (f", held-out accuracy {share.mean:.3f}" if held_out else "")
            )
    report = RewardModelReport(
        folder=folder,
        num_examples=len(train),
        accuracy=task.accuracy(model, held_out),
        num_held_out=len(held_out),
        test_accuracy=task.accuracy(model, test) if test else None,
        num_test=len(test),
    )
    save_reward_model(model, tokenizer, task.text_format, task.max_length, task.labels, base, report)
    return report


class _Task:
    """The training task, for preference pairs or labelled texts: encoding, log-probs of the options, accuracy."""

    def __init__(self, tokenizer: Any, text_format: TextFormat, max_length: int, labels: list[str] | None) -> None:
        self.tokenizer, self.text_format, self.max_length, self.labels = tokenizer, text_format, max_length, labels

    def encoded(self, example: Preference | Labelled) -> tuple[list[_Encoded], int]:
        """Return the encoded texts of an example, chosen before rejected, and the index of its label (0 for pairs)."""
        if isinstance(example, Labelled):
            assert self.labels is not None  # noqa: S101
            return [self._read("", example.text)], self.labels.index(example.label)
        texts = (example.chosen, example.rejected)
        return [self._read(example.prompt, text, example.messages) for text in texts], 0

    def _read(self, prompt: str, response: str, messages: Any = None) -> _Encoded:
        return encode_pair(self.tokenizer, prompt, response, self.text_format, self.max_length, messages)

    def scores(self, model: Any, batch: Sequence[tuple[list[_Encoded], int]]) -> Tensor:
        """Return the log-probs [B, options] of each option being right: each label, or (chosen, rejected)."""
        logits = forward(model, [text for texts, _ in batch for text in texts]).float()
        if self.labels is None:
            logits = logits.view(len(batch), 2)
        return logits.log_softmax(dim=1)

    def accuracy(self, model: Any, examples: Sequence[Preference] | Sequence[Labelled]) -> Interval:
        """Return the share of examples whose right option is strictly the most likely one, with its 95 % interval."""
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
    model: Any, examples: list[tuple[list[_Encoded], int]], task: _Task, config: RewardTrainingConfig
) -> Iterator[float]:
    """Train the model; yield the mean loss after every epoch."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    rate = config.learning_rate or (1e-3 if config.lora_r else 1e-4)
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    steps = math.ceil(len(examples) / config.batch_size) * config.epochs
    warmup = math.ceil(WARMUP_SHARE * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_at(step, steps, 1.0, warmup, "linear")
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
    """Return every index once, in batches of similar lengths (for little padding), with the batches in random order."""
    order = torch.randperm(len(lengths)).tolist()
    pools = [order[start : start + 8 * size] for start in range(0, len(order), 8 * size)]
    batches = [
        [pool[row] for row in rows]
        for pool in pools
        for rows in batches_by_length([lengths[row] for row in pool], size)
    ]
    return [batches[place] for place in torch.randperm(len(batches)).tolist()]


def _base(base: str, labels: list[str] | None, config: RewardTrainingConfig, device: torch.device) -> tuple[Any, Any]:
    """Load the base model, with a new head, and its tokenizer."""
    location = locate_model(base, option="base")
    names = labels or ["reward"]
    model, _, tokenizer = read_model(
        AutoModelForSequenceClassification,
        location,
        f"base={base!r}",
        {},
        own_code="train it elsewhere: here only models that transformers knows are trained (trust_remote_code=False)",
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
    )
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
        with warnings.catch_warnings(action="ignore"):  # a warning on GPT-2's layers, which PEFT handles itself
            model = peft.get_peft_model(model, adapter)
    return model.to(device), tokenizer


def _text_format(config: RewardTrainingConfig, model: Any, tokenizer: Any, labels: list[str] | None) -> TextFormat:
    if config.text_format != "auto":
        return config.text_format
    if labels is not None:
        return "response"
    natural = choose_text_format(model.config, tokenizer)
    return "pair" if natural == "joined" else natural


def _require_examples(examples: Any, test: Any) -> None:
    """Raise DatasetError if the examples are no list, or not all of one kind."""
    both = " or ".join(_KINDS.values())
    for argument, given in (("examples", examples), ("test", test)):
        if not isinstance(given, Sequence) or isinstance(given, str | bytes):
            raise DatasetError(
                f"{argument} must be a list of {both}, got {describe(given)}. read_preferences and read_labelled make "
                "one of a file."
            )
    kind = next((kind for kind in _KINDS if examples and isinstance(examples[0], kind)), None)
    for argument, given in (("examples", examples), ("test", test if examples else ())):
        for number, example in enumerate(given):
            wanted = f"{argument}[{number}] must be {_KINDS[kind] if kind else both}"
            if kind is None or not isinstance(example, kind):
                raise DatasetError(f"{wanted}, got {describe(example)}.")
            for value in _texts(example):
                if not isinstance(value, str):
                    raise DatasetError(f"{wanted}, made of texts, got {describe(value)} in it.")


def _texts(example: Any) -> tuple[Any, ...]:
    is_pair = isinstance(example, Preference)
    return (example.prompt, example.chosen, example.rejected) if is_pair else (example.text, example.label)


def _labels(examples: Sequence[Preference] | Sequence[Labelled]) -> list[str] | None:
    """Return the labels in sorted order; None for preference pairs."""
    if not examples or isinstance(examples[0], Preference):
        return None
    labels = sorted({example.label for example in examples if isinstance(example, Labelled)})
    if len(labels) < 2:
        raise DatasetError(f"All texts have the label {labels[0]!r}. Give texts of at least two labels.")
    if len(labels) > 100:
        raise DatasetError(
            f"There are {len(labels)} different labels, such as {', '.join(labels[:3])}; at most 100 are "
            "allowed. Check that the label column is the right one."
        )
    return labels


def _require_known_labels(test: Sequence[Preference] | Sequence[Labelled], labels: list[str] | None) -> None:
    """Raise DatasetError if test examples have labels that the training examples lack."""
    given = {example.label for example in test if isinstance(example, Labelled)}
    unknown = sorted(given.difference(labels or ()))
    if unknown and labels:
        raise DatasetError(
            f"test: the examples to train on lack its labels {first_of([*map(short_repr, unknown)])}; they have "
            f"{first_of([*map(short_repr, labels)])}. Correct the labels, or leave these test examples out."
        )


def _warn_of_equal_pairs(pairs: Sequence[tuple[list[_Encoded], int]], max_length: int) -> None:
    """Warn of pairs of which the model reads two equal texts; raise DatasetError if they are more than half."""
    equal = sum(chosen == rejected for (chosen, rejected), _ in pairs)
    if not equal:
        return
    found = (
        f"The chosen and the rejected text of {equal} of {len(pairs)} pairs are the same to the model, which reads "
        f"{max_length} tokens of a text. Such pairs teach nothing"
    )
    if 2 * equal > len(pairs):
        raise DatasetError(f"{found}: raise max_length, or take a base model that tells these texts apart.")
    logger.warning("%s.", found)


def _split(
    examples: Sequence[Preference] | Sequence[Labelled], config: RewardTrainingConfig
) -> tuple[list[Any], list[Any]]:
    """Return the training examples and the held-out examples; copies of an example are all on one side."""
    copies: dict[Any, list[Any]] = {}
    for example in examples:
        text = (example.prompt, example.chosen, example.rejected) if isinstance(example, Preference) else example.text
        copies.setdefault(text, []).append(example)
    if len(copies) < 8:
        raise DatasetError(
            f"{len(copies)} examples are too few to learn from; give at least 8 different ones, preferably hundreds."
        )
    order = torch.randperm(len(copies), generator=torch.Generator().manual_seed(config.seed)).tolist()
    count = min(round(config.held_out * len(copies)), len(copies) - 4)
    groups = list(copies.values())
    train, held_out = (chain.from_iterable(groups[row] for row in rows) for rows in (order[count:], order[:count]))
    return list(train), list(held_out)
