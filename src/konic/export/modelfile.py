"""Tokenizer + generation_config -> the Modelfile with which Ollama makes a model of a GGUF file."""

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from konic.finetuning.data.chat_templates import render_chat
from konic.finetuning.errors import ModelError, first_of
from konic.finetuning.settings import short_repr
from konic.report.run import as_number

CHATML = """\
{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
"""ChatML, in the language of Ollama's templates."""
_TALK = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
]


def modelfile(
    file: str, tokenizer: PreTrainedTokenizerBase, generation: Mapping[str, Any], system_prompt: Any = None
) -> tuple[str, str]:
    """Return the text of the Modelfile, and what to say about it.

    Args:
        file: The name of the GGUF file beside it.
        tokenizer: Of the model.
        generation: The run's generation_config.
        system_prompt: Of the run's dataset_config: what the model was trained under.
    """
    lines, note = [f"FROM ./{file}"], "The model has no chat template: give Ollama and llama.cpp plain text."
    if tokenizer.chat_template is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    else:
        system = of_template = _chatml_system(tokenizer)
        if isinstance(system_prompt, str) and system_prompt:
            system = system_prompt
        note = "Its chat template is ChatML, which the Modelfile has too."
        if of_template is None:
            note = "Its chat template is not ChatML, so the Modelfile has none: Ollama takes that of the GGUF file."
        else:
            lines += [f'TEMPLATE """{CHATML}"""', 'PARAMETER stop "<|im_end|>"']
        if system and _is_quotable(system):
            lines.append(f'SYSTEM """{system}"""')
        elif system:
            note += " The run's system prompt cannot stand in a Modelfile: give it to Ollama yourself."
    stops = _stops(generation)
    left = [short_repr(text) for text in stops if not _is_plain(text)]
    if left:
        note += f" Stop texts that cannot stand in a Modelfile: {first_of(left)}. Give them to Ollama yourself."
    lines += [*_parameters(generation), *(f'PARAMETER stop "{text}"' for text in stops if _is_plain(text))]
    return "\n".join(lines) + "\n", note


def _parameters(generation: Mapping[str, Any]) -> list[str]:
    """Sampling as in the run; Ollama's own defaults cut the distribution."""
    greedy = generation.get("do_sample") is False
    numbers = {
        "temperature": 0.0 if greedy else generation.get("temperature"),
        "top_k": generation.get("top_k"),
        "top_p": generation.get("top_p"),
        "repeat_penalty": generation.get("repetition_penalty"),
    }
    known = {name: value for name, value in numbers.items() if type(value) in (int, float)}
    return [f"PARAMETER {name} {value}" for name, value in known.items() if not math.isnan(as_number(value))]


def _stops(generation: Mapping[str, Any]) -> list[str]:
    """The texts at which the run's responses ended."""
    stop = generation.get("stop")
    stops = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    return [text for text in stops if isinstance(text, str) and text]


def _chatml_system(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the system message that the template adds, empty if none; None if the template is not ChatML."""
    system = {"role": "system", "content": "e"}
    try:
        with_system = render_chat([system, *_TALK], tokenizer, {"add_generation_prompt": True})
        without = render_chat(_TALK, tokenizer, {"add_generation_prompt": True})
    except ModelError:
        return None
    said = _chatml(_TALK)
    if with_system != _chatml([system, *_TALK]) or not without.endswith(said):
        return None
    start, end = "<|im_start|>system\n", "<|im_end|>\n"
    added = without.removesuffix(said)
    if not added:
        return ""
    own = added.removeprefix(start).removesuffix(end)
    return own if added == f"{start}{own}{end}" and _is_plain(own) else None


def _chatml(chat: list[dict[str, str]]) -> str:
    turns = [f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in chat]
    return "".join(turns) + "<|im_start|>assistant\n"


def _is_quotable(text: str) -> bool:
    is_shown = all(letter.isprintable() or letter in "\n\t" for letter in text)
    return is_shown and '"""' not in text and not text.endswith('"')


def _is_plain(text: str) -> bool:
    return '"' not in text and text.isprintable() and bool(text)
