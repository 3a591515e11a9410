"""Prompts -> PromptBatch: applies the chat template, truncates on the left, and pads on the left.

Shapes: B prompts, P tokens of the longest prompt. A mask is True where a token counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Self

import jinja2
import torch
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import TrackingCodeGenerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from konic.finetuning.data.chat_templates import render_chat
from konic.finetuning.data.chats import find_markup
from konic.finetuning.data.prompts import Prompt
from konic.finetuning.errors import ConfigError, DatasetError, ModelError, did_you_mean
from konic.output import get_logger
from konic.text import printable

logger = get_logger(__name__)

_HALF_A_CHARACTER = "\ufffd"
"""The replacement character, which decoding gives for a character that a cut split."""
_ORDINARY = "a"
"""A text without a special token."""


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
    rows = [prompt.row for prompt in (*earlier, *prompts)]
    sample_indices = [rows[:position].count(row) for position, row in enumerate(rows)][len(earlier) :]
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


def read_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = False) -> str:
    """Return the text of tokens as it is: no space is taken out before punctuation, as some tokenizers would."""
    text = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    return str(text)


def read_response(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = False) -> str:
    """Return the text that tokens add to the text before them: many tokenizers leave out the space of a first token."""
    before = _ordinary_tokens(tokenizer)
    start = read_text(before, tokenizer, skip_special_tokens)
    whole = read_text([*before, *ids], tokenizer, skip_special_tokens)
    return whole[len(start) :] if whole.startswith(start) else read_text(ids, tokenizer, skip_special_tokens)


@lru_cache(maxsize=8)
def _ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens of an ordinary text; none if that is not in the vocabulary."""
    try:
        return tuple(tokenizer(_ORDINARY, add_special_tokens=False, verbose=False).input_ids)
    except Exception:  # the tokenizers of Rust raise no class of their own
        return ()


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], str]:
    head = _added_before(tokenizer, _ORDINARY if _ordinary_tokens(tokenizer) else text)
    own = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if head and own[: len(head)] == head:  # text that a chat template made begins with them already
        own = own[len(head) :]
    if len(head) + len(own) <= max_length:
        return head + own, text
    head = head if len(head) < max_length else []
    kept = own[_next_character(len(own) - max_length + len(head), own, tokenizer) :]
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
    _check_template_kwargs(prompt.chat_template_kwargs, tokenizer)
    try:
        ids, text = shorten_chat(messages, [], tokenizer, max_length, prompt.chat_template_kwargs)
        _require_messages_shown(messages, tokenizer, prompt.chat_template_kwargs)
    except ModelError as error:
        raise ModelError(f"Row {prompt.row}: {error}") from None
    if len(ids) > max_length or not text.strip():
        raise DatasetError(
            f"Row {prompt.row}: the messages before the last one take {len(ids)} tokens with the chat markup, and "
            f"max_prompt_length={max_length} leaves no room for the last one, the only one that is shortened. Raise "
            "max_prompt_length."
        )
    return ids, text


def _require_messages_shown(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]
) -> None:
    """Raise a ModelError if the chat template leaves a message before the last one out: some do without an error."""
    rendered = _render(messages, tokenizer, True, kwargs) if len(messages) > 1 else ""
    for number, message in enumerate(messages[:-1]):
        content = message["content"].strip()
        if not content or content in rendered:
            continue
        without = [*messages[:number], {**message, "content": ""}, *messages[number + 1 :]]
        try:
            is_shown = rendered != _render(without, tokenizer, True, kwargs)
        except ModelError:  # the template refuses an empty message, so it reads it
            is_shown = True
        if not is_shown:
            which = "system message" if message["role"] == "system" else f"message {number + 1} of the chat"
            raise ModelError(
                f"The tokenizer's chat template does not show the {which} (role: {printable(message['role'])}). Put "
                "its text into a message of the user that is shown, leave it out, or use another chat model."
            )


def _check_template_kwargs(kwargs: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ConfigError for a name that the chat template never reads, because it would change nothing."""
    if not kwargs:
        return
    templates = tokenizer.chat_template.values() if isinstance(tokenizer.chat_template, dict) else None
    try:
        names = {name for template in templates or [tokenizer.chat_template] for name in _names_read(template)}
    except (jinja2.TemplateError, RecursionError, ValueError):
        return  # rendering says what is wrong with the template
    unread = next((name for name in kwargs if name not in names), None)
    if unread is not None:
        hint = did_you_mean(unread, names)
        raise ConfigError(
            f"DatasetConfig.chat_template_kwargs: the model's chat template does not read {unread!r}.{hint}"
        )


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, with which `transformers` marks the tokens of the assistant."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _NameFinder(TrackingCodeGenerator):
    """Finds the names that a template reads as `jinja2.meta` does, but computes no constants: they may be huge."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.optimizer = None

    def visit_Output(self, node: Any, frame: Any) -> None:  # noqa: N802 - the name of the node
        for child in node.nodes:
            self.visit(child, frame)


@lru_cache(maxsize=8)
def _names_read(template: str) -> frozenset[str]:
    """Return the variables that a chat template takes from outside; its loop variables, keys and words are none."""
    environment = jinja2.Environment(extensions=[_Generation, loopcontrols])  # noqa: S701 - nothing is rendered
    environment.globals |= dict.fromkeys(("raise_exception", "strftime_now"))
    finder = _NameFinder(environment)
    finder.visit(environment.parse(template))
    return frozenset(finder.undeclared_identifiers)


def shorten_chat(
    messages: list[dict[str, Any]],
    answer: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[int], str]:
    """Return the tokens of a chat and the text of its last message, after shortening that message from its start.

    The last message keeps the longest end with which the chat has at most `max_length` tokens. Where there is none, the
    message is empty, and the chat may still have more than `max_length` tokens.

    The text of a shortened message is what the template shows of it: some templates trim it.

    Args:
        messages: The chat. Only its last message may be shortened.
        answer: A message that follows and is not shortened; if empty, the template opens the assistant's turn.
        tokenizer: A tokenizer with a chat template.
        max_length: Maximum number of tokens of the chat, answer included.
        template_kwargs: More values for the template, such as enable_thinking.

    Raises:
        ModelError: The template fails, or leaves the last message out.
    """
    *before, last = messages

    def render(text: str) -> str:
        chat = [*before, {**last, "content": text}, *answer]
        return _render(chat, tokenizer, add_generation_prompt=not answer, template_kwargs=template_kwargs or {})

    def tokenise(rendered: str) -> list[int]:
        return list(tokenizer(rendered, add_special_tokens=False, verbose=False).input_ids)

    def encode(text: str) -> list[int]:
        return tokenise(render(text))

    rendered, content = render(last["content"]), last["content"].strip()
    ids = tokenise(rendered)
    if content and content not in rendered and ids == encode(""):
        raise ModelError("The tokenizer's chat template does not show the last message. Use another chat model.")
    if len(ids) <= max_length:
        return ids, last["content"]
    words = tokenizer(last["content"], add_special_tokens=False, verbose=False).input_ids
    excess, found = len(ids) - max_length, None
    guesses = iter((excess, excess - 1))  # where a template shows the message once, these two end the search
    too_few, enough = 0, len(words)
    while enough - too_few > 1:
        guess = next(guesses, 0)
        dropped = guess if too_few < guess < enough else (too_few + enough) // 2
        text = _decode_from(dropped, words, tokenizer)
        ids = encode(text)
        if len(ids) <= max_length:
            enough, found = dropped, (ids, text)
        else:
            too_few = dropped
    if found is None:
        return encode(""), ""
    ids, text = found
    shown = (text.strip(), text.lstrip(), text.rstrip())
    return ids, next((part for part in shown if part != text and encode(part) == ids), text)


def _render(
    chat: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    add_generation_prompt: bool,
    template_kwargs: Mapping[str, Any],
) -> str:
    """Return a chat as text.

    Raises:
        ModelError: The template fails, or none of several is named 'default'.
    """
    names = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {"default"}
    if "default" not in names and not ("tool_use" in names and template_kwargs.get("tools")):
        raise ModelError(
            f"The tokenizer has the chat templates {', '.join(names)} and none named 'default'. Set "
            "tokenizer.chat_template to one of them, and save the tokenizer with the model."
        )
    return render_chat(chat, tokenizer, {"add_generation_prompt": add_generation_prompt, **template_kwargs})


def _decode_from(start: int, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of `ids[start:]`, without the pieces of a character that the cut splits."""
    return read_text(ids[_next_character(start, ids, tokenizer) :], tokenizer)


def _next_character(start: int, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the first index from `start` on at which a cut splits no character."""
    while (text := read_text(ids[start:], tokenizer)).startswith(_HALF_A_CHARACTER):
        # A split character counts on both sides of the cut. Other replacement characters are the text's own.
        if len(read_text(ids[:start], tokenizer)) + len(text) <= len(read_text(ids, tokenizer)):
            break
        start += 1
    return start
