"""Settings -> a running vLLM server of konic's own, on a Unix socket that no other user can open."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from konic.finetuning.config import GenerationConfig
from konic.finetuning.errors import ConfigError, SamplerError, safe_cause
from konic.finetuning.rollout.vllm_client import KEY_VARIABLE, VllmClient
from konic.finetuning.system.files import as_path
from konic.finetuning.system.signals import uninterrupted
from konic.text import describe_error, indented, keep_secret, printable

BASE_NAME = "konic-base"
"""The name under which a server of konic's own serves the base model."""
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",  # konic has loaded the same files
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
}
_SECONDS_TO_END = 15.0
_LONGEST_SOCKET = 100
"""Bytes in the path of a Unix socket; Linux takes 107, macOS 103."""


def require_vllm(python: str) -> None:
    """Check that a Python can import vLLM, without importing it.

    Raises:
        ConfigError: There is no such Python, or it has no vLLM.
    """
    path = as_path(shutil.which(python) or python, "GenerationConfig(vllm_python)", ConfigError)
    probe = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
    try:
        code = subprocess.run([path, "-c", probe], capture_output=True, timeout=60, env=_environment()).returncode  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"GenerationConfig.vllm_python={python!r} is not a Python that runs: {describe_error(error)}. Give the "
            "path of the Python in an environment with vLLM, such as .vllm/bin/python."
        ) from safe_cause(error)
    if code:
        raise ConfigError(f"GenerationConfig.vllm_python={python!r} has no vLLM. Install it there: pip install vllm.")


@contextlib.contextmanager
def started_server(generation: GenerationConfig, model: Sequence[str], reloads: bool) -> Iterator[VllmClient]:
    """Start a server and yield a client that talks to it once it answers; end it and what it has started on exit.

    Args:
        generation: The settings; vllm_python is set.
        model: The arguments that name the model, and say what the server must be able to do with it.
        reloads: True if it has to reload the whole model, which vLLM offers in its developers' mode.

    Raises:
        SamplerError: It ends, or does not answer within vllm_timeout_seconds.
    """
    assert generation.vllm_python is not None  # noqa: S101
    with tempfile.TemporaryDirectory(prefix="konic-vllm-", ignore_cleanup_errors=True) as folder:  # for this user alone
        path, key = Path(folder) / "socket", secrets.token_hex(32)
        if len(os.fsencode(path)) > _LONGEST_SOCKET:
            raise SamplerError(f"{path} is too long for a Unix socket. Set TMPDIR to a folder with a short path.")
        keep_secret(key)
        python = shutil.which(generation.vllm_python) or generation.vllm_python
        command = [python, "-m", "vllm.entrypoints.openai.api_server", *model, *generation.vllm_arguments]
        command += ["--uds", str(path), "--served-model-name", BASE_NAME, "--generation-config", "vllm"]
        command += ["--logprobs-mode", "processed_logprobs", "--disable-uvicorn-access-log"]
        with (Path(folder) / "log").open("a+b") as log, _running(command, key, reloads, log) as process:

            def require_running() -> None:
                if process.poll() is not None:
                    raise SamplerError("The vLLM server has ended. The end of what it printed:", *_end_of(log))

            client = VllmClient(f"unix:{path}", generation.vllm_timeout_seconds, key, require_running)
            _wait_until_ready(client, path, generation.vllm_timeout_seconds, log)
            yield client


@contextlib.contextmanager
def _running(command: Sequence[str], key: str, reloads: bool, log: IO[bytes]) -> Iterator["subprocess.Popen[bytes]"]:
    guard = [sys.executable, "-P", str(Path(__file__).with_name("vllm_guard.py"))]
    process = subprocess.Popen(  # noqa: S603 - the user's own Python
        [*guard, *command], stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
        env=_environment() | _ENVIRONMENT | {KEY_VARIABLE: key, "VLLM_SERVER_DEV_MODE": str(int(reloads))},
    )  # fmt: skip
    try:
        yield process
    finally:
        with uninterrupted():
            assert process.stdin is not None  # noqa: S101
            process.stdin.close()  # the guard ends the server, then itself
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_END)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_until_ready(client: VllmClient, path: Path, seconds: float, log: IO[bytes]) -> None:
    until = time.monotonic() + seconds
    while True:
        client.require_running()
        if path.exists():
            with contextlib.suppress(SamplerError):
                client.get("/health")
                return
        if time.monotonic() > until:
            raise SamplerError(
                f"The vLLM server did not start within {seconds:g} s. Raise vllm_timeout_seconds if it needs longer. "
                "The end of what it printed:",
                *_end_of(log),
            )
        time.sleep(0.2)


def _environment() -> dict[str, str]:
    """Return the environment of this process without what belongs to its own Python.

    Nothing is imported from the current folder, which may be a stranger's.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return own | {"PYTHONSAFEPATH": "1"}


def _end_of(log: IO[bytes], most: int = 6) -> list[str]:
    """Return the lines of a log that name errors, and its last one, without secrets."""
    log.flush()
    log.seek(max(0, log.seek(0, os.SEEK_END) - 2**18))
    lines = [printable(line)[:300] for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b\w*(Error|Exception): ", line)]
    named = [line for line in errors if not re.search("WARNING|root cause", line)]
    last = [line for line in lines[-1:] if line not in named]
    return indented([*named[1 - most :], *last] if named else lines[-most:])
