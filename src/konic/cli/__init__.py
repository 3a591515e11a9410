"""The `konic` command. Each subcommand has its own file, and imports the library only when it runs."""

import sys
import traceback

import typer

from konic import __version__
from konic.cli.demo import demo
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
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(init)
app.command()(train)
app.command()(report)
app.command()(inspect)
app.command()(generate)
app.command()(rewards)
app.add_typer(reward_model, name="reward-model")


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        write_line(f"konic {__version__}", sys.stdout)
        raise typer.Exit


def main() -> None:
    """Run the command line. A user's mistake prints one message and exits with code 1, without a traceback.

    Another error, a fault of konic, prints its traceback, without secrets.
    """
    try:
        with tolerant_streams():
            app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from konic.finetuning.errors import KonicError

        is_mistake = isinstance(error, KonicError)
        write_line(f"Error: {error}" if is_mistake else traceback.format_exc().rstrip(), sys.stderr, RED)
        sys.exit(1)
    finally:
        end_streams()
