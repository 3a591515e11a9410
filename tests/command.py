"""The `konic` command in a process of its own, and scripts for it."""

import subprocess
import sys
import textwrap


def konic(*arguments, cwd=None):
    command = [sys.executable, "-c", "from konic.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def script(tmp_path, text, name="job.py"):
    path = tmp_path / name
    path.write_text(textwrap.dedent(text))
    return path
