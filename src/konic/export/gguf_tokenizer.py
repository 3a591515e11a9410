"""Tokenizer -> the keys of a GGUF file with which llama.cpp splits text into the same tokens."""

import json
from typing import Any

import gguf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from konic.finetuning.errors import ModelError

_INSTEAD = "Use --format merged, and the convert_hf_to_gguf.py of llama.cpp, which knows more tokenizers."
_BYTE_LEVEL = {"type": "ByteLevel", "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Write tokens, merges, types, special ids and the chat template.

    Raises:
        ModelError: llama.cpp has no name for the way in which this tokenizer splits text.
    """
    state = _state(tokenizer)
    tokens, types = _tokens(state, model.config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(state))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in state["model"]["merges"]])
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the contents of tokenizer.json, if it is byte-level BPE.

    Raises:
        ModelError: It is another kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    model = state.get("model", {})
    odd = [name for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(name)]
    if model.get("type") != "BPE" or model.get("byte_fallback") or odd or state.get("normalizer") is not None:
        raise ModelError(f"--format gguf: only byte-level BPE tokenizers without normalizer are written. {_INSTEAD}")
    if not model.get("merges"):
        raise ModelError(f"--format gguf: the tokenizer has no merges, which llama.cpp requires. {_INSTEAD}")
    return state


def _pre_tokenizer(state: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way in which text is cut before the merges.

    Raises:
        ModelError: It has none that is known here.
    """
    pre = state.get("pre_tokenizer") or {}
    steps = [_without(step) for step in (pre.get("pretokenizers") or [pre])]
    ignores = bool(state["model"].get("ignore_merges"))
    if steps == [_BYTE_LEVEL] and not ignores:
        return "gpt-2"
    if steps == [_DIGITS, _BYTE_LEVEL] and not ignores:
        return "smollm"
    split = {"type": "Split", "pattern": {"Regex": _LLAMA_3}, "behavior": "Isolated", "invert": False}
    if steps == [split, _BYTE_LEVEL | {"use_regex": False}] and ignores:
        return "llama-bpe"
    raise ModelError(
        "--format gguf: the tokenizer cuts text in a way that has no name here; known are those of GPT-2, SmolLM and "
        f"Llama 3. {_INSTEAD}"
    )


def _without(step: dict[str, Any]) -> dict[str, Any]:
    """Return a step without what does not change the tokens; a space put before the text does."""
    ignored = ("trim_offsets", *(() if step.get("add_prefix_space") else ("add_prefix_space",)))
    return {name: value for name, value in step.items() if name not in ignored}


def _tokens(state: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return the tokens by id, and their types; ids of the model that the tokenizer lacks are unused."""
    named = {number: token for token, number in state["model"]["vocab"].items()}
    added = {token["id"]: token for token in state.get("added_tokens", [])}
    named |= {number: token["content"] for number, token in added.items()}
    if max(named) >= size:
        raise ModelError(f"--format gguf: the tokenizer has the token {max(named)}, but the model only {size} tokens.")
    types = [
        gguf.TokenType.UNUSED
        if number not in named
        else gguf.TokenType.NORMAL
        if number not in added
        else gguf.TokenType.CONTROL
        if added[number]["special"]
        else gguf.TokenType.USER_DEFINED
        for number in range(size)
    ]
    return [named.get(number, f"[PAD{number}]") for number in range(size)], [int(kind) for kind in types]
