"""What is given for a path or a name on the command line: empty text, as an unset shell variable gives, is an error."""

import shlex
from pathlib import Path

import typer


def read_name(value: str | Path) -> str:
    """Return the text given. The default value of an option also comes here, and may be a path.

    Raises:
        typer.BadParameter: It is empty; the message names the option.
    """
    if not str(value).strip():
        raise typer.BadParameter("it is empty. The current folder is .")
    return str(value)


def read_path(value: str | Path) -> Path:
    """Return the path given, which may not be empty; `~` is a home folder, also where the shell left it as it is."""
    path = Path(read_name(value))
    try:
        return path if path.exists() else path.expanduser()
    except RuntimeError as problem:
        raise typer.BadParameter(f"{value}: {problem}") from None


def read_place(value: str) -> str:
    """Return the path or the URL given, which may not be empty."""
    return value if "://" in value else str(read_path(value))


def read_run(value: str) -> Path:
    """Return the folder of a run; of a URL, that of its copy, which is made or renewed."""
    if "://" not in value:
        return read_path(value)
    from konic.finetuning.run.remote import fetched

    return Path(fetched(value, only_reads=True))


def is_yaml(file: Path) -> bool:
    """Return True for a file whose name ends as those of YAML do."""
    return file.suffix.lower() in (".yaml", ".yml")


def require_file(file: Path) -> None:
    """Raise an error unless a path is that of a file.

    Raises:
        ConfigError: There is no such file, or it is a folder.
    """
    from konic.finetuning.errors import ConfigError

    if file.is_dir():
        is_run = (file / "run.json").exists()
        run = shlex.quote(str(file))
        hint = f" To go on with this run, give that file, --output {run} and --resume." if is_run else ""
        raise ConfigError(f"{file}: is a folder. Name a Python or YAML file.{hint}")
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such file.")
