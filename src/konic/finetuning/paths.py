"""What a user names as a path -> a Path that the system can take."""

import os
from pathlib import Path
from typing import Any

from konic.finetuning.errors import ConfigError, KonicError


def as_path(value: Any, option: str, error: type[KonicError]) -> Path:
    """An absolute path, `~` resolved; whether anything is there is not looked at.

    Raises:
        ConfigError: It is no path; the message names `option`.
        KonicError: Of the kind given: no file can have that path.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise ConfigError(f"{option} takes a path, got {value!r}.")
    try:
        path = Path(value).expanduser().absolute()
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, RuntimeError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{option}={str(value)[:400]!r}: there can be no such file or folder: {reason}.") from None
    return path
