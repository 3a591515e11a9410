"""What a user names as a path -> a Path that the system can take, and what is said of one that cannot be written."""

import os
from pathlib import Path
from typing import Any

from konic.finetuning.errors import ConfigError, KonicError, OutputError


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
        raise error(
            f"{option}={str(value)[:400]!r}: there can be no such file or folder: {_reason(problem)}."
        ) from None
    return path


def unwritable(path: Path | str, problem: Exception) -> OutputError:
    """The error of a file or folder that cannot be written, for the system's own reason."""
    return OutputError(f"{path}: cannot be written: {_reason(problem)}.")


def _reason(problem: Exception) -> Any:
    number = getattr(problem, "errno", None)
    return os.strerror(number) if number else problem
