"""The `konic` command, in a process of its own or in this one, and scripts for it."""

import contextlib
import io
import subprocess
import sys
import textwrap
from unittest import mock

import warm
from konic.cli import main


def konic(*arguments, cwd=None):
    command = [sys.executable, "-m", "konic", *map(str, arguments)]
    return warm.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def konic_here(*arguments):
    """The command in this process, which takes a tenth of the time. No script stays loaded."""
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        mock.patch.object(sys, "argv", ["konic", *map(str, arguments)]),
        mock.patch.object(sys, "path", [*sys.path]),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
        finally:
            for name in [name for name in sys.modules if name == "job" or name.startswith("konic_script_")]:
                del sys.modules[name]
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def script(tmp_path, text, name="job.py"):
    path = tmp_path / name
    path.write_text(textwrap.dedent(text))
    return path
