"""Every command and the library on local inputs ask for no address: Python's sockets are closed, and where the system
allows it there is no route either, so that what libraries in C or Rust try is counted too."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

SESSION = Path(__file__).parent / "offline_session.py"
COMMANDS = [
    "--version",
    "train",
    "train",
    "init",
    "doctor",
    "report",
    "inspect",
    "eval",
    "eval",
    "generate",
    "generate",
    "chat",
    "export",
    "rewards",
    "rewards",
    "reward-model",
    "demo",
    "library",
]


@functools.cache
def without_routes():
    """The command that starts another one in a network namespace of its own; empty where the system has none."""
    prefix = ["unshare", "--map-root-user", "--net"]
    try:
        probe = subprocess.run([*prefix, "true"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return prefix if probe.returncode == 0 else []


@pytest.fixture(scope="module")
def session(tmp_path_factory, model_folders):
    """The lines that the session printed about itself."""
    prefix = without_routes()
    command = [*prefix, sys.executable, str(SESSION), str(tmp_path_factory.mktemp("session")), model_folders["llama"]]
    command += ["without routes"] if prefix else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SESSION.parent), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_every_command_works_and_asks_python_for_no_address(session):
    assert [line for line in session if line.startswith("RAN ")] == [f"RAN {name} 0" for name in COMMANDS]
    reached = [line for line in session if line.startswith(("REACHED", "ASKED"))]
    assert reached == ["ASKED FOR pypi.org"]  # the session's own probe, at its end
    assert "PYTHON IS CLOSED" in session


@pytest.mark.skipif(not without_routes(), reason="this system starts no network namespace: unshare -rn fails")
def test_every_command_works_without_any_route_and_the_kernel_counts_no_attempt(session):
    counted = [line for line in session if line.startswith("NO ROUTE")]
    assert counted == ["NO ROUTE 0", "NO ROUTE 1"]  # the second after the session's own probe
