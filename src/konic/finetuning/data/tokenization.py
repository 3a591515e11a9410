"""Prompts -> PromptBatch: chat template, truncation from the left, left padding.

Shapes: B prompts, P prompt tokens of the longest. A mask is True where a token counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from konic.finetuning.data.prompts import Prompt
from konic.finetuning.errors import ConfigError, DatasetError, ModelError

_HALF_A_CHARACTER = "\ufffd"
"""What is left of a character that a cut went through."""


@dataclass(frozen=True)
class PromptBatch:
    """Prompts as the model reads them."""

    prompts: Sequence[Prompt]
    texts: list[str]
    """What rewards get as `prompt`: the text that the model read, without chat markup."""
    ids: Tensor
    """[B, P] int64, padded on the left."""
    mask: Tensor
    """[B, P] True on prompt tokens."""
    sample_indices: list[int]
    """Which response to its row each one is: a row that stands twice in a batch gets different random numbers."""

    def __len__(self) -> int:
        return len(self.prompts)


def make_prompt_batch(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    pad_token_id: int,
    device: torch.device,
) -> PromptBatch:
    """The prompts tokenised, each cut to its last `max_prompt_length` tokens, padded on the left to one length."""
    if not prompts:
        raise ConfigError("There are no prompts to respond to.")
    encoded = [encode_prompt(prompt, tokenizer, max_prompt_length) for prompt in prompts]
    length = max(len(ids) for ids, _ in encoded)
    ids = torch.full((len(encoded), length), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, (tokens, _) in enumerate(encoded):
        ids[row, length - len(tokens) :] = torch.tensor(tokens)
        mask[row, length - len(tokens) :] = True
    rows = [prompt.row for prompt in prompts]
    sample_indices = [rows[:position].count(row) for position, row in enumerate(rows)]
    return PromptBatch(prompts, [text for _, text in encoded], ids.to(device), mask.to(device), sample_indices)


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], str]:
    """The tokens of one prompt, at most `max_length`, and the text they stand for.

    Plain text keeps its end, and a beginning-of-sequence token if the tokenizer puts one. Chat messages go through the
    model's template; only the last user message is shortened, from its start.

    Raises:
        DatasetError: A prompt without tokens, or messages that do not fit even with the last one emptied.
        ModelError: Chat messages for a tokenizer without a chat template.
    """
    if isinstance(prompt.content, str):
        ids, text = _encode_text(prompt.content, tokenizer, max_length)
    else:
        ids, text = _encode_chat(prompt, tokenizer, max_length)
    if not ids:
        raise DatasetError(f"Row {prompt.row}: the tokenizer makes no tokens of the prompt {prompt.text!r}.")
    return ids, text


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], str]:
    ids = tokenizer(text, verbose=False).input_ids
    if len(ids) <= max_length:
        return ids, text
    starts_with_bos = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    head = ids[:1] if starts_with_bos and max_length > 1 else []
    tail = ids[len(ids) - max_length + len(head) :]
    return head + tail, tokenizer.decode(tail, skip_special_tokens=True).lstrip(_HALF_A_CHARACTER)


def _encode_chat(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], str]:
    if not tokenizer.chat_template:
        raise ModelError(
            f"Row {prompt.row} holds chat messages, but the model's tokenizer has no chat template. "
            "Use a chat model, or prompts that are plain text."
        )
    messages = [dict(message) for message in prompt.content if isinstance(message, dict)]
    ids, text = shorten_chat(messages, [], tokenizer, max_length)
    if len(ids) > max_length:
        raise DatasetError(
            f"Row {prompt.row}: the messages before the last one take {len(ids)} tokens, over "
            f"max_prompt_length={max_length}, and only the last is shortened. Raise max_prompt_length."
        )
    return ids, text


def shorten_chat(
    messages: list[dict[str, Any]],
    answer: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> tuple[list[int], str]:
    """The tokens of a chat, and its last message's text, cut from its start until at most `max_length` tokens are left.

    Args:
        messages: The chat, ending with the message that may be cut; emptied, it may still leave too many tokens.
        answer: A message that follows and stays whole; without one the template opens the assistant's turn.
        tokenizer: One with a chat template.
        max_length: Tokens.
    """
    *before, last = messages
    words = tokenizer(last["content"], add_special_tokens=False, verbose=False).input_ids
    text, dropped = last["content"], 0
    while True:
        chat = [*before, {**last, "content": text}, *answer]
        try:
            rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=not answer, tokenize=False)
        except TemplateError as error:
            raise ModelError(f"The tokenizer's chat template fails: {type(error).__name__}: {error}.") from None
        ids = tokenizer(rendered, add_special_tokens=False, verbose=False).input_ids
        if len(ids) <= max_length or dropped >= len(words):
            return ids, text
        dropped += len(ids) - max_length
        text = tokenizer.decode(words[dropped:], skip_special_tokens=False).lstrip(_HALF_A_CHARACTER)
