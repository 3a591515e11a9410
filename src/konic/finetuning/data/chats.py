"""A cell -> a prompt, plain text or the messages of a chat, or why it can be neither.

Chats are often stored as text: as JSON, or as Python prints them.
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from konic.finetuning.data.rows import require_distinct
from konic.finetuning.errors import is_valid_text
from konic.finetuning.settings import short_repr, texts_in

SKIPPABLE = ("empty", "missing", "no messages", "the last message is empty")
"""Problems of rows that are left out with a warning, as long as they are at most half of all."""
_KEYS = ({"role", "content"}, {"from", "value"})
"""Keys of a message, and of a message of ShareGPT."""
_OBJECT = re.compile(r"""b?["']*(?:[\[(\s]|array|list)*\{\s*\\*["'“]?\w+\\*["'”]?\s*:""")
"""How text begins that holds objects, perhaps in lists; quotes are escaped where it was encoded as JSON twice."""
_SPEAKER = re.compile(
    r"""\b(?:role|from)\\*["'”]?\s*:\s*\\*["'“](?:user|assistant|system|developer|tool|human|gpt|model)\b""",
    re.IGNORECASE,
)
_YAML = re.compile(
    r"""(?:\w+:\s*\n\s*)?-\s+(?:(?:role|from):\s*["']?(?:user|assistant|system|developer|tool|human|gpt|model)\b.*\n"""
    r"""\s+(?:content|value):|(?:content|value):[^\n]*\n\s+(?:role|from):)""",
    re.IGNORECASE,
)
"""How a chat in YAML begins."""
_SPEECH = re.compile(r"""\b(?:content|value|parts)\\*["'”]?\s*:""", re.IGNORECASE)
"""What every chat's text holds: who speaks, and what is said."""

_MARKUP = re.compile(
    r"<\|(?:im_start|start_header_id|header_start|start_of_role|start|turn|user|User|START_OF_TURN_TOKEN)\|>"
    r"|<start_of_turn>|<｜User｜>|\[INST\]"
)
"""With what the chat templates of known models begin a message."""


def read_json(text: str) -> Any:
    """Return what JSON says.

    Raises:
        ValueError: It is not JSON, or an object names a key twice.
    """
    return json.loads(text, object_pairs_hook=_distinct_object)


def read_chat(text: str) -> Any:
    """Return what the text of a chat stands for; other text as it is.

    Raises:
        ValueError: The text begins as a chat, but it cannot be read, or is cut off.
    """
    bare = text.strip("\ufeff \t\r\n")
    if _YAML.match(bare):
        raise ValueError("text that begins as a chat in YAML: write the list of messages as JSON")
    if not (_OBJECT.match(bare) and _SPEAKER.search(bare) and _SPEECH.search(bare)):
        return text
    for read in (read_json, _read_literal):
        try:
            found = read(bare)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        found = read_chat(found) if isinstance(found, str) else found
        if _holds_message(found):
            return found
    raise ValueError(
        "text that begins as a chat but cannot be read as one: write the list of messages as JSON, with each key once"
    )


def find_markup(text: str) -> str | None:
    """Return the first mark of a chat template in a text, such as `<|im_start|>`; None if there is none."""
    found = _MARKUP.search(text)
    return found and found[0]


def is_chat(value: Any) -> bool:
    """Return True for a list of messages."""
    return isinstance(value, list | tuple) and bool(value) and all(map(is_message, value))


def is_message(value: Any) -> bool:
    """Return True for a message, also one in the form of ShareGPT."""
    return isinstance(value, Mapping) and any(keys <= {str(key).lower() for key in value} for keys in _KEYS)


def is_missing(cell: Any) -> bool:
    """Return True for None, and for NaN, NaT and pandas' NA, which tables have for a missing value."""
    if isinstance(cell, float | np.floating | np.datetime64 | np.timedelta64):
        return bool(cell != cell)  # as only NaN and NaT are
    return cell is None or (type(cell).__name__ in ("NAType", "NaTType") and type(cell).__module__.startswith("pandas"))


def find_problem(content: Any) -> str | None:
    """Return why a prompt cannot be used, or None if it can."""
    if isinstance(content, str):
        return _find_text_problem(content, "empty")
    if is_missing(content):
        return "missing"
    if is_message(content) and any(isinstance(content.get(name), list | tuple) for name in ("role", "from")):
        return "a dict of lists: give a list of messages, each with its role and content"
    if is_message(content):
        return "one message, not a list of messages: put it in a list"
    columns = content.items() if isinstance(content, Mapping) else ()
    inside = next((name for name, part in columns if _holds_message(part)), None)
    if inside is not None:
        return f"a dict with a chat in {inside!r}: give the list of messages itself"
    if not isinstance(content, list | tuple):
        return f"{type(content).__name__}, not text"
    if not content:
        return "no messages"
    if any(map(is_chat, content)):
        return "a list with a chat inside: give the list of messages itself"
    for number, message in enumerate(content, start=1):
        if isinstance(message, Mapping) and {"from", "value"} <= message.keys():
            return (
                "messages with 'from' and 'value': name these 'role' and 'content', with the roles user and assistant"
            )
        if isinstance(message, Mapping) and message.get("tool_calls") and message.get("content") is None:
            return f"message {number} has tool calls and no content: write 'content': ''"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            keys = f": it has {', '.join(map(short_repr, message))}" if isinstance(message, Mapping) and message else ""
            return f"message {number} is without role and content{keys}"
        if isinstance(message["content"], list | tuple):
            return f"message {number} has a content that is a list of parts: give their text as one string"
        if not isinstance(message["content"], str) or not isinstance(message["role"], str):
            return f"message {number} has a role or content that is not text"
    if content[-1]["role"] != "user":
        role = short_repr(content[-1]["role"])
        return f"the last message is not the user's: its role is {role}. End the chat before the answer"
    return next(filter(None, map(_find_text_problem, texts_in(content))), None) or _find_text_problem(
        content[-1]["content"], "the last message is empty"
    )


def _find_text_problem(text: str, empty: str | None = None) -> str | None:
    if not is_valid_text(text):
        return "not valid text: it contains half a character (a lone surrogate)"
    return None if text.strip() else empty


def _holds_message(value: Any, levels: int = 5) -> bool:
    """Return True for a message, and for a list or a dict with a message inside, down to a number of levels."""
    if levels == 0:
        return False
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return is_message(value) or any(_holds_message(part, levels - 1) for part in parts)


def _distinct_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        require_distinct(name for name, _ in pairs)
    return found


def _read_literal(text: str) -> Any:
    """Return what Python prints as `text`.

    Raises:
        ValueError: It is not a literal, or a dict names a key twice; SyntaxError and others: It is not Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of a backslash in text that is no Python
        tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            require_distinct(key.value for key in node.keys if isinstance(key, ast.Constant))
    return ast.literal_eval(tree)
