"""Tokens -> text, and where a text of tokens may be cut."""

from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

HALF_A_CHARACTER = "\ufffd"
"""The replacement character, which decoding gives for a character that a cut split."""
ORDINARY = "a"
"""A text without a special token."""


def read_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = False) -> str:
    """Return the text of tokens as it is: no space is taken out before punctuation, as some tokenizers would."""
    text = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    return str(text)


def read_response(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = False) -> str:
    """Return the text that tokens add to the text before them: many tokenizers leave out the space of a first token."""
    before = ordinary_tokens(tokenizer)
    start = read_text(before, tokenizer, skip_special_tokens)
    whole = read_text([*before, *ids], tokenizer, skip_special_tokens)
    return whole[len(start) :] if whole.startswith(start) else read_text(ids, tokenizer, skip_special_tokens)


@lru_cache(maxsize=8)
def ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens of an ordinary text; none if that is not in the vocabulary."""
    try:
        return tuple(tokenizer(ORDINARY, add_special_tokens=False, verbose=False).input_ids)
    except Exception:  # the tokenizers of Rust raise no class of their own
        return ()


def decode_from(start: int, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of `ids[start:]`, without the pieces of a character that the cut splits."""
    return read_text(ids[next_character(start, ids, tokenizer) :], tokenizer)


def next_character(start: int, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the first index from `start` on at which a cut splits no character."""
    while (text := read_text(ids[start:], tokenizer)).startswith(HALF_A_CHARACTER):
        # A split character counts on both sides of the cut. Other replacement characters are the text's own.
        if len(read_text(ids[:start], tokenizer)) + len(text) <= len(read_text(ids, tokenizer)):
            break
        start += 1
    return start
