"""Prompts + responses -> scores: HuggingFaceRewardModel, a sequence classifier with its own tokenizer as a reward."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from konic.finetuning.arguments import require_count
from konic.finetuning.errors import ConfigError, ModelError, did_you_mean, no_attribute
from konic.finetuning.models.loading import pick_device
from konic.finetuning.models.locations import locate_model
from konic.finetuning.models.model_kwargs import check_dtype, check_model_kwargs, require_no_revision
from konic.finetuning.models.quantised import unify_products
from konic.finetuning.models.reading import read_model
from konic.finetuning.reward_models.texts import TEXT_FORMATS, TextFormat, encode_pair
from konic.finetuning.rewards.composer import BaseRewardModel
from konic.finetuning.rewards.marks import checked_flag
from konic.finetuning.system.files import as_path
from konic.output import get_logger
from konic.text import keep_secret

logger = get_logger(__name__)

_COUNTS_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "xlm-roberta-xl", "data2vec-text")
"""Types of encoders that number positions from the padding token's index plus one."""
_OUTPUTS = ("logit", "probability", "log_odds")


class HuggingFaceRewardModel(BaseRewardModel):
    """Scores responses with a sequence classifier from the Hub or a folder. Give it to a composer's `reward_models`.

    The classifier's own tokenizer encodes the text again, so the policy may use a different tokenizer. A text longer
    than `max_length` loses the start of its prompt, not of its response.

    Args:
        model_id: A Hub id or a folder.
        device: "auto" or None (CUDA if there is one, else the CPU), or a torch device.
        dtype: A torch dtype or its name; None takes the checkpoint's dtype on CUDA and float32 on the CPU.
        max_length: Maximum number of tokens that the classifier reads; None takes that with which konic trained the
            model, and 512 for other models.
        label_index: The label whose score is the reward, as an index or a name. A classifier with one label needs none;
            with two labels, None takes the second.
        normalize: During training, express scores in standard deviations from their running mean.
        output: "logit"; "probability", by softmax, or by a sigmoid for a single label or a multi-label classifier; or
            "log_odds", the logarithm of p / (1 − p).
        text_format: What the classifier reads: "chat" (the tokenizer's chat template), "pair" (prompt and response as a
            text pair), "joined" (both as one text), or "response" (the response alone). "auto" takes the format that
            konic trained the model with; for other models "chat" if the tokenizer has a template, else "joined".
        batch_size: Number of texts scored at once, after sorting by length.
        name: The reward's name; None derives it from `model_id`.
        model_kwargs: Passed to `from_pretrained`: revision, token, attn_implementation, trust_remote_code,
            quantization_config.

    Raises:
        ConfigError: The label does not exist, or a setting is out of bounds or of the wrong type.
        ModelError: There is no model at `model_id`, it cannot be loaded, or it has no trained classification head.
    """

    def __init__(
        self,
        model_id: str,
        device: str | None = "auto",
        dtype: torch.dtype | str | None = None,
        max_length: int | None = None,
        label_index: int | str | None = None,
        normalize: bool = False,
        output: Literal["logit", "probability", "log_odds"] = "logit",
        text_format: TextFormat | Literal["auto"] = "auto",
        batch_size: int = 16,
        name: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        for option in unknown:
            hint = " normalize=True gives standard deviations from the running mean." if "normalize" in option else ""
            raise ConfigError(f"HuggingFaceRewardModel has no argument {option!r}.{hint}")
        _check(output=(output, _OUTPUTS), text_format=(text_format, ("auto", *TEXT_FORMATS)))
        require_count("HuggingFaceRewardModel", "batch_size", batch_size, least=1)
        if max_length is not None:
            require_count("HuggingFaceRewardModel", "max_length", max_length, least=1)
        check_dtype(dtype, "HuggingFaceRewardModel(dtype={})")
        as_path(model_id, "model_id", ModelError)
        self.model_id = str(model_id)
        self.name = name or reward_name(model_id)
        self.normalize = checked_flag("HuggingFaceRewardModel: normalize", normalize)
        self._device = pick_device(device or "auto")
        self.model, self.tokenizer = _load(str(model_id), self._device, dtype, model_kwargs or {})
        self.model.eval().requires_grad_(False)
        self.max_length = min(
            max_length or _trained_length(self.model.config), longest_input(self.model, self.tokenizer)
        )
        self.label = _label(self.model.config, label_index, self.name)
        self.output = output
        self.text_format = (
            choose_text_format(self.model.config, self.tokenizer) if text_format == "auto" else text_format
        )
        self.batch_size = batch_size
        if self.text_format == "chat" and not self.tokenizer.chat_template:
            raise ConfigError(
                f"HuggingFaceRewardModel({model_id!r}, text_format='chat'): its tokenizer has no chat template. "
                "Use another text_format."
            )

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], messages: Sequence[Any] | None = None
    ) -> list[float]:
        """Return the score of each response.

        Args:
            prompts: [B] the text of each prompt.
            responses: [B] the text of each response.
            messages: [B] the chat whose last message is the prompt; None for a plain prompt.
        """
        chats = messages or [None] * len(prompts)
        encoded = [
            encode_pair(self.tokenizer, prompt, response, self.text_format, self.max_length, chat)
            for prompt, response, chat in zip(prompts, responses, chats, strict=True)
        ]
        scores = [0.0] * len(encoded)
        for rows in batches_by_length([len(text["input_ids"]) for text in encoded], self.batch_size):
            logits = forward(self.model, [encoded[row] for row in rows])
            for row, value in zip(rows, self._scores(logits.float()), strict=True):
                scores[row] = value
        return scores

    def batch_compute_reward(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return the score of each response, as :meth:`score` does."""
        return self.score(prompts, responses)

    def compute_reward(self, prompt: str, response: str) -> float:
        """Return the score of one response."""
        return self.score([prompt], [response])[0]

    def cleanup(self) -> None:
        """Drop the classifier, to free its memory; it cannot score after that."""
        self.__dict__.pop("model", None)

    def __getattr__(self, name: str) -> Any:
        raise no_attribute(self, name, {"model": "cleanup() has dropped it: make a new HuggingFaceRewardModel."})

    def _scores(self, logits: Tensor) -> list[float]:
        """Convert [B, labels] logits to [B] scores."""
        is_alone = logits.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification"
        own = logits[:, self.label]
        if self.output == "logit":
            return own.tolist()
        if is_alone:
            log_odds = own
        else:
            others = [label for label in range(logits.shape[1]) if label != self.label]
            log_odds = own - logits[:, others].logsumexp(dim=1)
        return (log_odds if self.output == "log_odds" else log_odds.sigmoid()).tolist()


def reward_name(model_id: str) -> str:
    """Return `hf_` plus the Hub id or the last part of a folder's path, with `/` and `-` replaced by `_`."""
    path = Path(model_id).expanduser()
    is_folder = path.is_dir() or path.is_absolute()
    return "hf_" + (path.resolve().name if is_folder else str(model_id)).replace("/", "_").replace("-", "_")


def choose_text_format(config: Any, tokenizer: Any) -> TextFormat:
    """Return the format that konic trained the model with, else "chat" if there is a template, else "joined"."""
    trained_with = getattr(config, "konic_text_format", None)
    if trained_with in TEXT_FORMATS:
        return trained_with
    return "chat" if tokenizer.chat_template else "joined"


def _trained_length(config: Any) -> int:
    """Return the number of tokens of a text that konic trained the model with, else 512."""
    trained_with = getattr(config, "konic_max_length", None)
    if isinstance(trained_with, int) and not isinstance(trained_with, bool) and 0 < trained_with < 2**31:
        return trained_with
    return 512


def longest_input(model: Any, tokenizer: Any) -> int:
    """Return the maximum number of tokens that the model and its tokenizer can read."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and model.config.model_type in _COUNTS_FROM_PADDING:
        positions -= (model.config.pad_token_id or 0) + 1
    limits = (positions, tokenizer.model_max_length)
    return min(int(limit) for limit in limits if limit and limit > 0)


def batches_by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield indices in batches of similar lengths, longest first: little padding, and the memory peak comes at once."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def forward(model: Any, encoded: Sequence[Mapping[str, list[int]]]) -> Tensor:
    """Return the logits [B, labels] of texts, padded on the right. Padding does not change the logits of a text.

    Raises:
        ModelError: A text holds a token that the model does not have.
    """
    length = max(len(text["input_ids"]) for text in encoded)
    present = {token for text in encoded for token in text["input_ids"]}
    size = model.get_input_embeddings().weight.shape[0]
    if max(present, default=0) >= size:
        raise ModelError(
            f"The reward model's tokenizer makes the token {max(present)}; the model has {size}. Use the model with "
            "its own tokenizer."
        )
    with _padding(model, present) as pad, torch.set_grad_enabled(model.training):
        padded = {
            name: [
                list(text[name]) + [pad if name == "input_ids" else 0] * (length - len(text[name])) for text in encoded
            ]
            for name in encoded[0]
        }
        inputs = {name: torch.tensor(rows, device=model.device) for name, rows in padded.items()}
        return model(**inputs).logits


@contextmanager
def _padding(model: Any, present: set[int]) -> Iterator[int]:
    """Yield the token to pad with: the model's padding token, or without one a token that is not in the texts.

    A decoder reads the last token that is not padding, so no token of the texts may count as padding.
    """
    own = model.config.pad_token_id
    pad = (
        own
        if own is not None and own >= 0
        else next(token for token in range(len(present) + 1) if token not in present)
    )
    model.config.pad_token_id = pad
    try:
        yield pad
    finally:
        model.config.pad_token_id = own


def _load(model_id: str, device: torch.device, dtype: Any, model_kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    check_model_kwargs(model_kwargs)
    keep_secret(model_kwargs.get("token"))
    location = locate_model(model_id, option="model_id")
    dtype = dtype or model_kwargs.get("dtype") or ("auto" if device.type == "cuda" else torch.float32)
    asked = f"reward model {model_id!r}"
    require_no_revision(location, asked, model_kwargs)
    model, info, tokenizer = read_model(AutoModelForSequenceClassification, location, asked, model_kwargs, dtype=dtype)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ModelError(f"reward model {model_id!r} has no tokenizer: its folder must contain one.")
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ModelError(
            f"reward model {model_id!r} has no trained classification head ({missing} would be random). Give a "
            f"sequence classifier, or train one from it: konic reward-model train DATA --base {model_id}"
        )
    if not getattr(model, "is_quantized", False):
        model.to(device)
    unify_products(model)
    return model, tokenizer


def _label(config: Any, wanted: int | str | None, name: str) -> int:
    """Return the index of the label whose score is the reward."""
    labels = [config.id2label[index] for index in range(config.num_labels)]
    if isinstance(wanted, str):
        if wanted not in labels:
            raise ConfigError(
                f"{name}: there is no label {wanted!r}.{did_you_mean(wanted, labels)} Its labels: {', '.join(labels)}."
            )
        return labels.index(wanted)
    if wanted is None and len(labels) > 2:
        raise ConfigError(
            f"{name} has {len(labels)} labels. Select the reward with label_index, such as {labels[-1]!r}. "
            f"Its labels: {', '.join(labels)}."
        )
    if wanted is None and len(labels) == 2:
        logger.warning("%s: label_index is not given; the reward is the score of label 1, %r.", name, labels[1])
    index = len(labels) - 1 if wanted is None else wanted
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(labels):
        raise ConfigError(f"{name}: label_index={wanted!r} is not one of its labels: {', '.join(labels)}.")
    return index


def _check(**options: tuple[Any, Sequence[str]]) -> None:
    for option, (value, known) in options.items():
        if value not in known:
            raise ConfigError(
                f"HuggingFaceRewardModel({option}={value!r}) is not one of {', '.join(known)}."
                f"{did_you_mean(str(value), known)}"
            )
