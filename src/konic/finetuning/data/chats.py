"""A chat's text -> its messages: chats are often stored as JSON, or as Python prints them."""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from konic.finetuning.data.rows import require_distinct

_KEYS = ({"role", "content"}, {"from", "value"})
"""Keys of a message, and of a message of ShareGPT."""
_OBJECT = re.compile(r"""b?["']*(?:[\[(\s]|array|list)*\{\s*\\*["'“]?\w+\\*["'”]?\s*:""")
"""How text begins that holds objects, perhaps in lists; quotes are escaped where it was encoded as JSON twice."""
_SPEAKER = re.compile(
    r"""\b(?:role|from)\\*["'”]?\s*:\s*\\*["'“](?:user|assistant|system|developer|tool|human|gpt|model)\b""",
    re.IGNORECASE,
)
_SPEECH = re.compile(r"""\b(?:content|value|parts)\\*["'”]?\s*:""", re.IGNORECASE)
"""What every chat's text holds: who speaks, and what is said."""


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
    if not (_OBJECT.match(bare) and _SPEAKER.search(bare) and _SPEECH.search(bare)):
        return text
    for read in (read_json, _read_literal):
        try:
            found = read(bare)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        found = read_chat(found) if isinstance(found, str) else found
        if holds_message(found):
            return found
    raise ValueError(
        "text that begins as a chat but cannot be read as one: write the list of messages as JSON, with each key once"
    )


def is_chat(value: Any) -> bool:
    """Return True for a list of messages."""
    return isinstance(value, list | tuple) and bool(value) and all(map(is_message, value))


def is_message(value: Any) -> bool:
    """Return True for a message, also one in the form of ShareGPT."""
    return isinstance(value, Mapping) and any(keys <= {str(key).lower() for key in value} for keys in _KEYS)


def holds_message(value: Any, levels: int = 5) -> bool:
    """Return True for a message, and for a list or a dict with a message inside, down to a number of levels."""
    if levels == 0:
        return False
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return is_message(value) or any(holds_message(part, levels - 1) for part in parts)


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
