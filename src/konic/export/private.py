"""What an export would say of this machine: the folders that its texts name."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from konic.export.saved import SavedModel

_ABSOLUTE = re.compile(r"(?:[A-Za-z]:[\\/]|/|\\\\|~[\w.-]*/)(?=[^\s/\\])")
"""How a path begins that says where something lies on this machine."""


def without_paths(value: Any) -> Any:
    """Return a value with the last part of each absolute path in it, alone."""
    if isinstance(value, dict):
        return {name: without_paths(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(part) for part in value]
    if isinstance(value, str) and _ABSOLUTE.match(value):
        return Path(value.replace("\\", "/")).name
    return value


def own_places(saved: SavedModel) -> list[Path]:
    """Return the folders that no text for others names: home, the current one, the run's, and the base model's."""
    base = [Path(saved.base)] if saved.is_adapter else []
    return [Path.home(), Path(os.getcwd()), saved.run.path.resolve(), *(path for path in base if path.is_absolute())]


def without_places(value: Any, places: Iterable[Path]) -> Any:
    """Return a value with the last part of each path in its texts that begins with one of some folders."""
    pattern = _naming(places)
    if isinstance(value, dict):
        return {name: without_places(part, places) for name, part in value.items()}
    if isinstance(value, list):
        return [without_places(part, places) for part in value]
    return pattern.sub(lambda found: Path(found[0]).name, value) if isinstance(value, str) else value


def find_place(text: str, places: Iterable[Path]) -> int | None:
    """Return the number of the first line that names one of some folders, or None."""
    found = _naming(places).search(text)
    return None if found is None else text.count("\n", 0, found.start()) + 1


def _naming(places: Iterable[Path]) -> re.Pattern[str]:
    """What finds paths in some folders, as they are and as JSON spells them; the root of all folders is none."""
    named = {str(place) for place in places if len(place.parts) > 1}
    spelt = sorted({*named, *(json.dumps(name)[1:-1] for name in named)}, key=len, reverse=True)
    rest = r"(?![\w-])(?:[\\/][^\s\"'`<>|:;,()\[\]{}]*)*"
    return re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, spelt)) or '(?!)'}){rest}")
