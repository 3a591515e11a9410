"""Text of others -> text that is safe to show: it holds no secret, steers no terminal and marks up no page."""

import json
import os
import re
import shlex
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Any
from urllib.parse import quote

_SHORTEST_SECRET = 6
_SECRET_VARIABLES = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "API_KEY", "APIKEY", "ACCESS_KEY")
"""How the names of environment variables end that hold a secret."""
_KEY = r"""
      \bhf_[A-Za-z0-9]{16,}\b                    # no longer name, which has more underscores
    | \b(?:api_org_|sk-|gh[oprsu]_|github_pat_|glpat-|xox[a-z]-|AKIA|ASIA|AIza)[\w-]{16,}
    | (?<![\w-])eyJ[\w-]{10,}+\.[\w.-]{10,}      # a JSON Web Token
    | (?<=PRIVATE\ KEY-----)(?s:.*?)(?=-----END|\Z)
    """
_KNOWN_KEY = re.compile(_KEY, re.VERBOSE)
_LOOKS_SECRET = re.compile(
    rf"""
      (?<=://)[^\s/?\#]+(?=@)                    # the user and password of an address
    | (?<=[?&])[\w.~%-]+=[^\s'"<>\\]*           # what follows an address, and may sign it
    | (?<=\bBearer\ )[\w.~+/=-]{{6,}}
    | {_KEY}
    """,
    re.VERBOSE,
)
_NAME = r"(?:token|secret|passw(?:or)?d|signature|\bsig|authorization|(?:api|access|secret)[_-]?key)"
_SECRET_NAME = re.compile(f"{_NAME}$", re.IGNORECASE)
_NAMED_SECRETS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"""({_NAME}\\*["']?\s*[=:]\s*b?\\*["'])[^\s"'\\<\[][^\n"'\\]{{3,}}""",  # token='...', and as JSON
        rf"""([(\[]\s*b?["'][\w-]{{0,30}}{_NAME}["'],\s*b?["'])[^\n"'\\]+""",  # ('token', '...')
        rf"""({_NAME}=)[^\s"'\\<\[.=][^\s"'\\,;&)}}]{{3,}}""",  # token=...
        r"""((?:authorization|cookie|-key|-token|-signature): )[^\n"']+""",
    )
]
"""A value by its name; the markup of a tokenizer, such as pad_token='<pad>', is no secret."""
_MARKUP = re.compile(r'"(?:bos|eos|unk|sep|pad|cls|mask)_token": "[^"]*"')
_given: set[str] = set()


def keep_secret(value: object) -> None:
    """From here on, :func:`redact` hides this text, an access token that a setting was given."""
    if isinstance(value, str) and len(value) >= _SHORTEST_SECRET:
        _given.add(value)


def redact(text: str) -> str:
    """Return text with *** for access tokens, passwords, and the part of an address that signs it.

    Hidden are the tokens that settings were given, the secrets of the environment, and what looks like one.
    """
    for secret in _known_secrets():
        text = text.replace(secret, "***")
    text = _LOOKS_SECRET.sub("***", text)
    for named in _NAMED_SECRETS:
        text = named.sub(r"\1***", text)
    return text


def _known_secrets() -> list[str]:
    of_environment = (os.environ.get(name, "") for name in os.environ if name.upper().endswith(_SECRET_VARIABLES))
    forms = {form for secret in (*_given, *of_environment) if secret for form in _forms(secret)}
    return sorted((form for form in forms if len(form) >= _SHORTEST_SECRET), key=len, reverse=True)


@lru_cache(maxsize=256)
def _forms(secret: str) -> set[str]:
    """Return a secret as it stands in a text: as it is, in Python, JSON, an address or a command, and on one line."""
    written = repr(secret)[1:-1], json.dumps(secret)[1:-1], shlex.quote(secret).strip("'"), " ".join(secret.split())
    return {secret, quote(secret), quote(secret, safe=""), *written}


def find_secret(text: str, is_vocabulary: bool = False) -> int | None:
    """Return the number of the first line that :func:`redact` would change, or None.

    Args:
        text: Of a file.
        is_vocabulary: True for the tokens of a tokenizer, such as `&page=`: only a known secret counts, or a key.
    """
    places = [text.find(secret) for secret in _known_secrets()]
    places += [found.start() for found in [_KNOWN_KEY.search(text)] if found]
    found_at = min((place for place in places if place >= 0), default=None)
    last = None if found_at is None else text.count("\n", 0, found_at) + 1
    if is_vocabulary:
        return last
    lines = (_MARKUP.sub("", line) for line in text.split("\n")[:last])
    return next((number for number, line in enumerate(lines, start=1) if redact(line) != line), last)


def redact_all(value: Any) -> Any:
    """Return a value with every text in its dicts, lists and tuples redacted, and every secret by its name."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {
            name: "***" if isinstance(part, str) and _SECRET_NAME.search(str(name)) else redact_all(part)
            for name, part in value.items()
        }
    return type(value)(map(redact_all, value)) if type(value) in (list, tuple) else value


def printable(text: str) -> str:
    """Return text on one line, without secrets, and with control and format characters escaped."""
    return _on_one_line(redact(text))


def printable_lines(text: str) -> str:
    """Return text whose line breaks are wanted, each line of it printable."""
    return "\n".join(map(_on_one_line, redact(text).split("\n")))


def _on_one_line(text: str) -> str:
    return "".join(
        char if char == " " or unicodedata.category(char)[0] not in "CZ" else char.encode("unicode_escape").decode()
        for char in text
    )


def indented(lines: Iterable[str]) -> list[str]:
    """Return lines of others, indented below a line of ours."""
    return [f"  {line}" for line in lines]


def escape_markdown(text: str) -> str:
    """Return text that a page in Markdown or HTML shows as it is, on one line, without secrets."""
    markup = r"[^\w .,/+-]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\."
    return re.sub(markup, lambda found: f"&#{ord(found[0])};", printable(text))


def describe_error(error: BaseException, most: int = 300) -> str:
    """Return `ValueError: its message` on one line, printable, of which at most so many characters are the message.

    It has no full stop at its end: what it stands in has its own.
    """
    try:
        whole = str(error)
    except Exception:
        whole = "its message could not be read"
    message = printable(" ".join(whole[: 20 * most].split()))  # no secret may be cut before it is found
    if len(message) > most:
        message = f"{message[:most]} … ({len(whole)} characters)"
    message = message if message.endswith("..") else message.removesuffix(".")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
