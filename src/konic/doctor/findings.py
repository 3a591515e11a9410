"""A finding: one line of `konic doctor`."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and what to do where it is not well."""

    name: str
    status: Literal["ok", "warn", "fail"]
    what: str
    fix: str = ""
    numbers: dict[str, Any] | None = None
    """The same for programs, in `--json`."""
