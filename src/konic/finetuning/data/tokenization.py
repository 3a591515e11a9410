"""Prompts -> PromptBatch: applies the chat template, truncates on the left, and pads on the left.

Shapes: B prompts, P tokens of the longest prompt. A mask is True where a token counts.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from konic.finetuning.data.chat_tokens import check_template_kwargs, require_messages_shown, shorten_chat
from konic.finetuning.data.chats import find_markup
from konic.finetuning.data.decoding import ORDINARY, next_character, ordinary_tokens, read_text
from konic.finetuning.data.prompts import Prompt
from konic.finetuning.errors import ConfigError, DatasetError, ModelError
from konic.output import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Prompts as the model reads them."""

    prompts: Sequence[Prompt]
    texts: list[str]
    """The `prompt` that rewards get: the text that the model read, without chat markup."""
    ids: Tensor
    """[B, P] int64, padded on the left."""
    mask: Tensor
    """[B, P] bool, True on prompt tokens."""
    sample_indices: list[int]
    """[B] number of earlier prompts of the iteration from the same row; gives repeats of a row different random
    numbers."""

    def __len__(self) -> int:
        return len(self.prompts)

    def part(self, rows: range) -> Self:
        """Return some of the prompts, padded as before."""
        if len(rows) == len(self):
            return self
        chosen = slice(rows.start, rows.stop)
        return replace(self, **{field.name: getattr(self, field.name)[chosen] for field in fields(self)})


def warn_of_cuts(batch: PromptBatch, max_prompt_length: int) -> bool:
    """Warn if prompts of a batch are longer than the model gets to read; return whether one is."""
    cut = {prompt.row for prompt, text in zip(batch.prompts, batch.texts, strict=True) if text != prompt.text}
    if cut:
        logger.warning(
            "The start of %d of %d prompts of this batch, such as row %d, is cut off at max_prompt_length=%d tokens. "
            "Rewards get the same cut text as their prompt, but a chat whole. Raise it if the model should read all of "
            "a prompt.",
            len(cut), len({prompt.row for prompt in batch.prompts}), min(cut), max_prompt_length,
        )  # fmt: skip
    return bool(cut)


def make_prompt_batch(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    pad_token_id: int,
    device: torch.device,
    earlier: Sequence[Prompt] = (),
) -> PromptBatch:
    """Tokenise the prompts, at most `max_prompt_length` tokens each, and pad them on the left to one length.

    `earlier` are the prompts that the same policy has already answered with the same random key.
    """
    if not prompts:
        raise ConfigError("There are no prompts to respond to. Give at least one.")
    encoded = [encode_prompt(prompt, tokenizer, max_prompt_length) for prompt in prompts]
    length = max(len(ids) for ids, _ in encoded)
    ids = torch.full((len(encoded), length), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, (tokens, _) in enumerate(encoded):
        ids[row, length - len(tokens) :] = torch.tensor(tokens)
        mask[row, length - len(tokens) :] = True
    seen, sample_indices = Counter(prompt.row for prompt in earlier), []
    for prompt in prompts:
        sample_indices.append(seen[prompt.row])
        seen[prompt.row] += 1
    return PromptBatch(
        prompts=prompts,
        texts=[text for _, text in encoded],
        ids=ids.to(device),
        mask=mask.to(device),
        sample_indices=sample_indices,
    )


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], str]:
    """Return the tokens of one prompt, at most `max_length`, and the text that they represent.

    Plain text that is cut keeps its end, and what the tokenizer adds before it, such as a beginning of sequence. Chat
    messages go through the model's chat template; only the last user message is shortened, from its start.

    Raises:
        DatasetError: The prompt has no tokens, or too many even if nothing is left of the text or last message.
        ModelError: The prompt is a chat, and the tokenizer has no chat template, or its template fails or leaves a
            message out.
    """
    if isinstance(prompt.content, str):
        markup = find_markup(prompt.content)
        if markup is not None and not _knows(tokenizer, markup):
            _warn_of_markup(markup)
        ids, text = _encode_text(prompt.content, tokenizer, max_length)
        if prompt.content and not text:
            raise DatasetError(
                f"Row {prompt.row}: max_prompt_length={max_length} leaves no room for the last character, which has "
                "more tokens. Raise max_prompt_length."
            )
    else:
        ids, text = _encode_chat(prompt, tokenizer, max_length)
    if not ids:
        raise DatasetError(f"Row {prompt.row}: the tokenizer makes no tokens from the prompt {prompt.text!r}.")
    return ids, text


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], str]:
    head = _added_before(tokenizer, ORDINARY if ordinary_tokens(tokenizer) else text)
    own = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if head and own[: len(head)] == head:  # text that a chat template made begins with them already
        own = own[len(head) :]
    if len(head) + len(own) <= max_length:
        return head + own, text
    head = head if len(head) < max_length else []
    kept = own[next_character(len(own) - max_length + len(head), own, tokenizer) :]
    return head + kept, read_text(kept, tokenizer)


def _knows(tokenizer: PreTrainedTokenizerBase, markup: str) -> bool:
    """True if a mark of a chat template is a token of this model, or text that its own template writes."""
    is_token = len(tokenizer(markup, add_special_tokens=False, verbose=False).input_ids) == 1
    return is_token or markup in str(tokenizer.chat_template or "")


@lru_cache(maxsize=8)
def _warn_of_markup(markup: str) -> None:
    logger.warning(
        "Prompts of plain text hold %r, which begins a message of a chat, and this model reads it as ordinary text. "
        "Give lists of messages, [{'role': 'user', 'content': ...}], or take the model that the text was made for.",
        markup,
    )


@lru_cache(maxsize=8)
def _added_before(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens that the tokenizer adds before a text, such as a beginning of sequence.

    What it adds after a text, such as an end of sequence, would end the prompt and is not wanted.
    """
    ids = tokenizer(text, verbose=False).input_ids
    own = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    starts = range(len(ids) - len(own) + 1)
    return ids[: next((start for start in starts if ids[start : start + len(own)] == own), 0)]


def _encode_chat(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], str]:
    if not tokenizer.chat_template:
        raise ModelError(
            f"Row {prompt.row} holds chat messages, but the model's tokenizer has no chat template. "
            "Use a chat model, or plain-text prompts."
        )
    messages = [dict(message) for message in prompt.content if isinstance(message, dict)]
    check_template_kwargs(prompt.chat_template_kwargs, tokenizer)
    try:
        ids, text = shorten_chat(messages, [], tokenizer, max_length, prompt.chat_template_kwargs)
        require_messages_shown(messages, tokenizer, prompt.chat_template_kwargs)
    except ModelError as error:
        raise ModelError(f"Row {prompt.row}: {error}") from None
    if len(ids) > max_length or not text.strip():
        raise DatasetError(
            f"Row {prompt.row}: the messages before the last one take {len(ids)} tokens with the chat markup, and "
            f"max_prompt_length={max_length} leaves no room for the last one, the only one that is shortened. Raise "
            "max_prompt_length."
        )
    return ids, text
