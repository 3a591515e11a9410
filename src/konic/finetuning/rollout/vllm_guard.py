"""A command -> the command, run until it ends or standard input closes; then whatever it has started is ended too.

It runs as a script in a session of its own and imports nothing of konic. Standard input closes also when konic is
killed, so a server is never left behind.
"""

import os
import select
import signal
import subprocess
import sys
import time

SECONDS_TO_END = 10.0
"""After a SIGTERM, before a SIGKILL."""


def _main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, preexec_fn=_take_signals)  # noqa: S603
    while child.poll() is None and not select.select([sys.stdin], [], [], 0.2)[0]:
        pass
    if child.poll() is None:
        os.killpg(0, signal.SIGTERM)
        until = time.monotonic() + SECONDS_TO_END
        while child.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
    else:
        print(f"The server ended by itself, with the code {child.returncode}.", flush=True)  # noqa: T201
    os.killpg(0, signal.SIGKILL)  # this process too


def _take_signals() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


if __name__ == "__main__":
    _main()
