"""A forked process is what one of its own would be: arguments, `__main__`, folder, streams, signals and exit code."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import warm
from conftest import children_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every process is one of its own")
WHERE = """
import os, sys
names = [name for name in globals() if not name.startswith("__")]
print(sys.argv, __name__, globals().get("__file__"), names, sys.path[0], os.getcwd(), os.environ.get("RANK"))
"""


def code(text):
    return [sys.executable, "-c", textwrap.dedent(text)]


def is_forked(process):
    return b"warm.py" in Path(f"/proc/{process.pid}/cmdline").read_bytes()


@pytest.mark.parametrize("command", [["-c", WHERE, "a", "b c"], ["where.py", "a"], ["-m", "where", "--x"]])
def test_it_starts_as_a_process_of_its_own_does(command, tmp_path):
    (tmp_path / "where.py").write_text(WHERE)
    command = [sys.executable, *command]
    environment = os.environ | {"RANK": "3"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": True}
    assert warm.run(command, **options).stdout == subprocess.run(command, **options).stdout


@pytest.mark.parametrize(
    ("text", "returncode", "errors"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("import atexit; atexit.register(print, 'bye', file=__import__('sys').stderr)", 0, "bye\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt\n"),
        ("import os; os._exit(9)", 9, ""),
    ],
)
def test_it_ends_as_a_process_of_its_own_does(text, returncode, errors):
    done = warm.run(code(text), capture_output=True, text=True)
    assert (done.returncode, done.stderr[-len(errors) :] if errors else done.stderr) == (returncode, errors)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_it(number):
    with warm.Popen(code("import time; print('up', flush=True); time.sleep(100)"), stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n" and is_forked(process)
        process.send_signal(number)
    assert process.returncode == -number


def test_its_server_is_not_taken_for_a_process_of_a_run():
    warm.run(code("pass"))
    assert len(warm.server_ids()) == 1
    assert warm.server_ids()[0] not in [child.pid for child in children_of()]


def test_what_hangs_is_ended():
    started = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        warm.run(code("import time; time.sleep(100)"), timeout=0.5)
    assert time.monotonic() - started < 50


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ([], {"env": os.environ | {"HF_HOME": "/elsewhere"}}),
        ([], {"preexec_fn": os.getpid}),
        ([], {"start_new_session": True}),
        (["-I"], {}),
    ],
)
def test_what_an_import_could_read_starts_a_process_of_its_own(options, more):
    _, *program = code("input()")
    command = [sys.executable, *options, *program]
    with warm.Popen(command, stdin=subprocess.PIPE, **more) as process:
        assert not is_forked(process)
        process.communicate(b"\n")
    assert process.returncode == 0
