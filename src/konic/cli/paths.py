"""What is given for a path or a name on the command line: empty text, as an unset shell variable gives, is an error."""

from pathlib import Path

import typer


def read_name(value: str) -> str:
    """Return the text given.

    Raises:
        typer.BadParameter: It is empty; the message names the option.
    """
    if not value.strip():
        raise typer.BadParameter("it is empty. The current folder is .")
    return value


def read_path(value: str) -> Path:
    """Return the path given, which may not be empty."""
    return Path(read_name(value))


def is_yaml(file: Path) -> bool:
    """Return True for a file whose name ends as those of YAML do."""
    return file.suffix.lower() in (".yaml", ".yml")
