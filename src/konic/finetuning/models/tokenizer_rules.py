"""A tokenizer.json -> which of its rules could take for ever or fill the memory. It is a stranger's program.

The `tokenizers` library searches by expressions that backtrack, and cannot be interrupted: the rules are read first,
then tried in another process.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from konic.finetuning.system.child import child_environment
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

    Rules that read as usual are tried, once in each process, on texts of each character of ASCII and some others.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no JSON.
    """
    whole, growth = read_json(path), 1.0
    rules = {part: whole.get(part) for part in _PARTS} if isinstance(whole, dict) else {}
    for rule in _rules(rules):
        pattern = rule.get("pattern")
        expression = pattern.get("Regex") if isinstance(pattern, dict) else None
        if isinstance(expression, str) and repeats_a_repetition(expression):
            return f"its expression {printable(expression[:100])!r} repeats a repetition, which may take for ever"
        if rule.get("type") == "Replace":
            growth *= max(1, len(str(rule.get("content"))))
    if growth > _MOST_GROWTH:
        return f"its rules make a text {growth:.3g} times as long"
    return _try(json.dumps({"added_tokens": whole.get("added_tokens") or [], **rules})) if rules else None


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


_SECONDS = 5.0
"""Seconds of a processor that a trial may take."""
_TEXTS = [*(300 * chr(code) for code in (*range(32, 127), 9, 10, 0xE9, 0x4E2D, 0x1F600)), "A text, of 1 kind.\n" * 15]
_TRIAL = f"""
import json, os, signal, sys
from tokenizers import Tokenizer, decoders, models
seconds, rules, texts = json.load(sys.stdin)
if os.name == "posix":
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + 2**28
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.setitimer(signal.ITIMER_PROF, seconds)
try:
    model = dict(type="WordLevel", vocab=dict(x=0), unk_token="x")
    tokenizer = Tokenizer.from_str(json.dumps(dict(rules, version="1.0", truncation=None, padding=None, model=model)))
    for text in texts:
        num_tokens = len(tokenizer.encode(text).ids)
        if num_tokens > {_MOST_GROWTH} * len(text):
            print(f"they make {{num_tokens}} tokens of {{len(text)}} characters")
            break
        if tokenizer.decoder is not None:
            tokenizer.decoder.decode(list(text))
except Exception:  # the library says what is wrong with such rules when the model is loaded
    pass
except BaseException as panic:
    print("PanicError:", panic)
"""
"""A vocabulary is not needed: each piece of a text counts as one unknown token."""


@lru_cache(maxsize=32)
def _try(rules: str) -> str | None:
    """Return what happens when a process uses the rules: a part of a sentence; None if they are bounded."""
    done = subprocess.run(  # noqa: S603 - this Python, with the lines above
        [sys.executable, "-P", "-S", "-c", _TRIAL], input=json.dumps([_SECONDS, json.loads(rules), _TEXTS]), text=True,
        capture_output=True, check=False, env=child_environment() | {"TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    if done.returncode == -getattr(signal, "SIGPROF", 0):
        return f"its rules take more than {_SECONDS:g} s for texts of 300 characters"
    if done.returncode < 0 or "memory" in done.stderr:
        return "its rules take more than 256 MB for texts of 300 characters"
    return f"its rules fail: {printable(done.stdout.strip()[:300])}" if done.stdout else None
