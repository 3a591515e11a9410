"""What is shown of a response while it is sampled is its beginning, and in the end the response."""

import random

import pytest

from conftest import byte_tokenizer
from konic.finetuning.config import GenerationConfig
from konic.finetuning.rollout.sampler import SpecialTokens, decode_response
from konic.finetuning.rollout.streaming import TextStream, certain_part

TOKENIZER, SPECIAL = byte_tokenizer("gpt2"), SpecialTokens(eos=(0,), pad=0)


def shown(ids, stop=None):
    generation, texts = GenerationConfig(stop=stop), []
    stream = TextStream(TOKENIZER, SPECIAL, generation, texts.append)
    for token in ids:
        stream({0: token})
    whole = decode_response(list(ids), TOKENIZER, SPECIAL, generation)
    stream.update(whole)
    return texts, whole


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語です", "a 🙂 and 👩‍👩‍👧", "\ufffd real", ""])
def test_only_whole_characters_are_shown_and_each_text_begins_the_next(text):
    texts, whole = shown([*TOKENIZER(text, add_special_tokens=False).input_ids, 0])
    assert whole == text
    assert (texts[-1] if texts else "") == text
    for first, second in zip(["", *texts], [*texts, text], strict=True):
        assert second.startswith(first)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in texts)
        assert len(texts) == len(text)  # a character a time


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_known_to_be_none():
    texts, whole = shown(TOKENIZER("ab EN and END more", add_special_tokens=False).input_ids[:13], stop=("END",))
    assert whole == "ab EN and "
    assert texts[-1] == whole and "ab E" not in texts and "ab EN" not in texts and "ab EN " in texts
    assert certain_part("see </", ("</s>", "e </x")) == "se"
    assert certain_part("b\ufffd", ("bé",)) == ""


def test_random_bytes_and_stop_strings_never_show_what_is_not_in_the_response():
    pick = random.Random(0)
    for _ in range(150):
        ids = [pick.randrange(1, 257) for _ in range(pick.randrange(1, 20))]
        stop = tuple(TOKENIZER.decode([pick.choice(ids) for _ in range(2)]) for _ in range(2))
        stop = tuple(text for text in stop if text.strip()) or None
        end = next((n for n in range(1, len(ids) + 1) if any(s in TOKENIZER.decode(ids[:n]) for s in stop or ())), None)
        texts, whole = shown(ids[:end], stop)
        assert all(whole.startswith(text) for text in texts) and (texts[-1] if texts else "") == whole
