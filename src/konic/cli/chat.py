"""`konic chat RUN`: a chat on the terminal with the model of a run, beside the model that it started from."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from konic.cli.completion import complete_run, complete_weights
from konic.cli.paths import read_name, read_path, read_run
from konic.output import is_terminal, write_line

HELP = """/base         show the model before training, or hide it
/weights NAME talk to other weights: final, best, checkpoint-20
/system TEXT  set the system message; without TEXT there is none
/seed NUMBER  other random numbers
/reset        forget the chat
/quit         end, as Ctrl-D does; Ctrl-C stops an answer"""


def chat(
    run: Annotated[
        Path,
        typer.Argument(help="The folder or URL of a run.", parser=read_run, metavar="RUN", autocompletion=complete_run),
    ],
    weights: Annotated[
        str | None,
        typer.Option(
            help="A folder in RUN: final, best, checkpoint-20. Default: the last.",
            parser=read_name,
            metavar="<str>",
            autocompletion=complete_weights,
        ),
    ] = None,
    base: Annotated[bool, typer.Option(help="Also the answers of the model before training.")] = True,
    system: Annotated[str | None, typer.Option(help="A system message. Default: the run's.")] = None,
    rewards: Annotated[
        Path | None,
        typer.Option(
            help="Score the answers with the rewards of this script or YAML file. They are imported.",
            parser=read_path,
            metavar="<file>",
        ),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Default: the run's.", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: the run's.", min=0.01)] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answers.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Talk to the model of a run and to the model that it started from, side by side. /help shows what else there is.

    Example: konic chat runs/kind --max-new-tokens 200
    """
    write_line(f"Loading {run} ...", sys.stderr)
    from konic.cli.conversation import Conversation
    from konic.cli.run_rewards import load_rewards
    from konic.finetuning.errors import KonicError
    from konic.saved.agents import SavedRun

    saved = SavedRun.read(run, {"max_new_tokens": max_new_tokens, "temperature": temperature}, seed)
    name = saved.name_of(weights)
    composer = load_rewards(saved.run, rewards, False, partial(write_line, stream=sys.stderr))
    talk = Conversation(saved, name, base, composer, device, system)
    read = _reader()
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            write_line("\nCtrl-D or /quit ends the chat.", sys.stdout)
            continue
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                write_line(_command(talk, line), sys.stdout)
            elif line:
                talk.answer(line)
        except KeyboardInterrupt:
            write_line("Stopped.", sys.stdout)
        except KonicError as error:
            write_line(f"Error: {error}", sys.stdout)


def _command(talk: Any, line: str) -> str:
    """Do what a line asks for; return what to say about it."""
    name, _, value = line.partition(" ")
    commands: dict[str, Callable[[str], str]] = {
        "/help": lambda _: HELP,
        "/reset": talk.reset,
        "/base": talk.toggle_base,
        "/weights": talk.load,
        "/system": talk.set_system,
        "/seed": talk.set_seed,
    }
    if name not in commands:
        return f"There is no {name}.\n{HELP}"
    return commands[name](value.strip())


def _reader() -> Callable[[], str]:
    """Return what reads the next line of the user, and raises EOFError at the end."""
    if is_terminal(sys.stdin) and is_terminal(sys.stdout):
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() then knows the arrow keys
        write_line("/help shows what you can do besides talking.", sys.stdout)
        return partial(input, "> ")
    return _read_line


def _read_line() -> str:
    from konic.finetuning.errors import ConfigError

    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise ConfigError(f"Standard input is not UTF-8: {error.reason} at byte {error.start}.") from None
    if not line:
        raise EOFError
    if line.strip():
        write_line(f"you: {line.strip()}", sys.stdout)
    return line
