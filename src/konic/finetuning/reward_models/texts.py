"""(prompt, response) -> classifier inputs: encodes both, and shortens the prompt before the response."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from konic.finetuning.data.chat_tokens import shorten_chat

TextFormat = Literal["chat", "pair", "joined", "response"]
TEXT_FORMATS: tuple[TextFormat, ...] = get_args(TextFormat)


def encode_pair(
    tokenizer: Any,
    prompt: str,
    response: str,
    text_format: TextFormat,
    max_length: int,
    messages: Sequence[Mapping[str, str]] | None = None,
) -> dict[str, list[int]]:
    """Return the classifier's inputs for one response, at most `max_length` tokens.

    Text that does not fit is cut from the start of the prompt, or for a chat from the start of the last user message.
    If the response alone is too long, its start is cut too.
    """
    if text_format == "chat":
        chat = [dict(message) for message in messages or [{"role": "user", "content": prompt}]]
        answer = {"role": "assistant", "content": response}
        ids = shorten_chat(chat, [answer], tokenizer, max_length)[0]
        return {"input_ids": ids[-max_length:], "attention_mask": [1] * min(len(ids), max_length)}
    side, tokenizer.truncation_side = tokenizer.truncation_side, "left"
    try:
        if text_format == "pair":
            room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
            answer_tokens = len(tokenizer(response, add_special_tokens=False, verbose=False).input_ids)
            fits = answer_tokens < room
            texts, cut = ((prompt, response), "only_first") if fits else (("", response), "only_second")
            encoded = tokenizer(*texts, truncation=cut, max_length=max_length, verbose=False)
        else:
            text = prompt + response if text_format == "joined" else response
            encoded = tokenizer(text, truncation=True, max_length=max_length, verbose=False)
    finally:
        tokenizer.truncation_side = side
    if not encoded["input_ids"]:  # an empty text, and the tokenizer adds no special tokens
        ends = (tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
        return {"input_ids": [next(token for token in ends if token is not None)], "attention_mask": [1]}
    return {name: list(values) for name, values in encoded.items()}
