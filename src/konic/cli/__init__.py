"""The `konic` command. Each subcommand has its own file, and imports the library only when it runs."""

import atexit
import signal
import sys
import traceback
from collections.abc import Callable

import typer

from konic import __version__
from konic.cli.chat import chat
from konic.cli.demo import demo
from konic.cli.doctor import doctor
from konic.cli.eval import evaluate
from konic.cli.export import export
from konic.cli.generate import generate
from konic.cli.init import init
from konic.cli.inspect import inspect
from konic.cli.report import report
from konic.cli.reward_model import reward_model
from konic.cli.rewards import rewards
from konic.cli.train import train
from konic.output import RED, end_streams, tolerant_streams, write_line

app = typer.Typer(
    name="konic",
    help="Finetune language models by reinforcement learning with your own Python rewards.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Start": {"demo": demo, "init": init, "doctor": doctor},
    "Train": {"rewards": rewards, "train": train},
    "See what came of it": {
        "report": report,
        "inspect": inspect,
        "eval": evaluate,
        "generate": generate,
        "chat": chat,
        "export": export,
    },
}
for panel, commands in _COMMANDS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel)(command)
app.add_typer(reward_model, name="reward-model", rich_help_panel="Train")


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        write_line(f"konic {__version__}", sys.stdout)
        raise typer.Exit


def _end_at_ctrl_c() -> None:
    """While Python ends, let another Ctrl-C print no traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    """Run the command line; docs/commands.md has its exit codes. A user's mistake is one message without a traceback.

    Another error, a fault of konic, prints its traceback, without secrets.
    """
    try:
        with tolerant_streams():
            app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from konic.cli.wording import with_options
        from konic.finetuning.errors import KonicError

        is_mistake = isinstance(error, KonicError)
        said = "\n".join([str(error), *getattr(error, "__notes__", ())])
        shown = f"Error: {with_options(said)}" if is_mistake else traceback.format_exc().rstrip()
        write_line(shown, sys.stderr, RED)
        sys.exit(1)
    finally:
        atexit.register(_end_at_ctrl_c)
        end_streams()
