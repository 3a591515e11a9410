"""A chat -> tokens: through the chat template, with the last message shortened from its start."""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from konic.finetuning.data.chat_templates import render_chat
from konic.finetuning.data.decoding import decode_from
from konic.finetuning.data.template_names import names_read
from konic.finetuning.errors import ConfigError, ModelError, did_you_mean
from konic.text import printable


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
        text = decode_from(dropped, words, tokenizer)
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


def require_messages_shown(
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


def check_template_kwargs(kwargs: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ConfigError for a name that the chat template never reads, because it would change nothing."""
    if not kwargs:
        return
    templates = tokenizer.chat_template.values() if isinstance(tokenizer.chat_template, dict) else None
    try:
        names = {name for template in templates or [tokenizer.chat_template] for name in names_read(template)}
    except (jinja2.TemplateError, RecursionError, ValueError):
        return  # rendering says what is wrong with the template
    unread = next((name for name in kwargs if name not in names), None)
    if unread is not None:
        hint = did_you_mean(unread, names)
        raise ConfigError(
            f"DatasetConfig.chat_template_kwargs: the model's chat template does not read {unread!r}.{hint}"
        )


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
