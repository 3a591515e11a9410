"""A tokenizer.json -> which of its rules could take for ever or fill the memory. It is a stranger's program.

The `tokenizers` library searches by expressions that backtrack, and cannot be interrupted.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from konic.finetuning.system.places import read_json
from konic.text import printable

_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_MOST_GROWTH = 1_000
"""Times that the rules may make a text longer; the usual ones make it three times as long at most."""
_FEW = 4
"""Repetitions of a group that count as few."""
_PIECE = re.compile(
    r"""(?P<escape>\\[pPkgx]\{[^}]*\}|\\.)
      | (?P<set>\[\^?\]?(?:\\.|\[:\w+:\]|[^\\\]])*+\])
      | (?P<start>\((?:\?(?:<?[=!]|[:>]|<\w+>|[a-z-]+:))?)
      | (?P<end>\))
      | (?P<repeat>[*+?][+?]?|\{[0-9,]+\}(?:\?|\+(?=\||\Z))?)
      | (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)


def find_unbounded_rule(path: Path) -> str | None:
    """Return what is wrong with the rules of a tokenizer.json: a part of a sentence; None if nothing is.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no JSON.
    """
    rules, growth = read_json(path), 1.0
    for rule in _rules({part: rules.get(part) for part in _PARTS} if isinstance(rules, dict) else {}):
        pattern = rule.get("pattern")
        expression = pattern.get("Regex") if isinstance(pattern, dict) else None
        if isinstance(expression, str) and repeats_a_repetition(expression):
            return f"its expression {printable(expression[:100])!r} repeats a repetition, which may take for ever"
        if rule.get("type") == "Replace":
            growth *= max(1, len(str(rule.get("content"))))
    return f"its rules make a text {growth:.3g} times as long" if growth > _MOST_GROWTH else None


def _rules(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        yield from _rules(part)


def repeats_a_repetition(expression: str) -> bool:
    """Return True for an expression that repeats a group that fits a text in several ways: `(a+)+`, `(a|a)*`.

    It reads as much of the syntax as this needs. What it does not understand counts as a group of its own.
    """
    groups = [False]  # of each open group: whether it fits in several ways
    piece = False  # the same of what was read last
    for found in _PIECE.finditer(expression):
        kind, text = str(found.lastgroup), found[0]
        if kind == "repeat":
            counts = [int(count) for count in re.findall(r"[0-9]{1,9}", text)]
            is_long = text[0] in "*+" or text.endswith((",}", "}+")) or max(counts, default=0) > _FEW
            if is_long and piece:
                return True
            varies = text[0] != "{" or len(set(counts)) > 1 or ",}" in text
            groups[-1] |= varies
            piece |= varies
        elif kind == "start":
            groups.append(False)
        elif kind == "end" and len(groups) > 1:
            piece = groups.pop()
            groups[-1] |= piece
        else:
            groups[-1] |= text == "|"
            piece = False
    return False
