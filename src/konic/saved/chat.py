"""The turns of a chat so far and a new message -> the prompt that saved weights answer, cut to what they can read."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from konic.finetuning.data.prompts import Prompt, with_system_prompt
from konic.finetuning.data.tokenization import encode_prompt
from konic.finetuning.models.positions import length_limit
from konic.saved.weights import Weights

Turns = Sequence[tuple[str, str]]
"""What the user said and what the model answered, in order."""
_USUAL_ROOM = 1024
"""Tokens of history, where the run's own prompts are shorter and the model's context is long enough."""


def with_room_for_chat(weights: Weights) -> Weights:
    """Return weights that read prompts as long as a chat needs: longer than those of training, within the context."""
    config = weights.policy.language_model.causal_lm.config.get_text_config()
    context = min(getattr(config, "max_position_embeddings", None) or 2**31, length_limit(config)[0])
    own, new_tokens = weights.generation.max_prompt_length, weights.generation.max_new_tokens
    room = max(own, min(_USUAL_ROOM, int(context) - new_tokens))
    return replace(weights, generation=weights.generation.with_fields({"max_prompt_length": room}))


def next_prompt(
    weights: Weights, turns: Turns, text: str, system: str | None, template_kwargs: Mapping[str, Any]
) -> tuple[Prompt, str | None]:
    """Return the prompt for a new message, and a sentence if not all of the chat fits into it.

    The oldest turns are left out first. If the message alone is too long, its beginning is cut, as in training. Without
    a chat template, the prompt is everything so far as plain text, and keeps its end.

    Raises:
        KonicError: The chat template fails, or leaves the system message out.
    """
    tokenizer, room = weights.policy.tokenizer, weights.generation.max_prompt_length
    if not tokenizer.chat_template:
        prompt = Prompt(len(turns), "".join(f"{said}{answer}\n" for said, answer in turns) + text)
        return prompt, _cut(weights.name, prompt, tokenizer, room, "what came first is left out")
    for start in range(len(turns) + 1):
        kept = [
            {"role": role, "content": content}
            for turn in turns[start:]
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        messages = [*kept, {"role": "user", "content": text}]
        prompt = with_system_prompt(Prompt(len(turns), messages, {}, template_kwargs), system)
        cut = _cut(weights.name, prompt, tokenizer, room, "the beginning of your message is cut")
        if cut is None:
            break
    if start and cut is None:
        count = f"the first {start} turns are" if start > 1 else "the first turn is"
        cut = f"{weights.name} reads at most {room} tokens: {count} left out."
    return prompt, cut


def _cut(name: str, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, room: int, what: str) -> str | None:
    """Return a sentence that says what is cut if a prompt is longer than `room` tokens, or None."""
    length = len(encode_prompt(prompt, tokenizer, 2**31)[0])
    return f"{name} reads at most {room} tokens: {what}." if length > room else None
