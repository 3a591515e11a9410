"""Chat + template -> text: renders chat templates in a child process, because each is a program of the model's makers.

The child has a bound on its time and memory. It is started for the first chat and renders all that follow.
"""

import atexit
import contextlib
import dataclasses
import json
import marshal
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from konic.finetuning.errors import ModelError
from konic.finetuning.system.child import child_environment
from konic.text import printable

SECONDS = 5.0
"""Seconds of a processor that one chat may take."""


def render_chat(
    chat: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> str:
    """Return a chat as text, as the tokenizer's own `apply_chat_template` does.

    Raises:
        ModelError: The template fails, or takes too much time or memory.
    """
    try:
        if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:  # not a template
            return str(tokenizer.apply_chat_template(chat, tokenize=False, **template_kwargs))
        present = [{name: value for name, value in message.items() if value is not None} for message in chat]
        template = tokenizer.get_chat_template(None, tools=template_kwargs.get("tools"))
        variables = {**tokenizer.special_tokens_map, **template_kwargs}
        reply = _child.ask({"conversations": [present], "chat_template": template, **variables})
    except Exception as error:
        reply = {"error": f"{type(error).__name__}: {error}"}
    if "error" in reply:
        raise ModelError(f"The tokenizer's chat template fails: {printable(reply['error'])}.")
    return reply["text"]


def _plain(value: Any) -> Any:
    """Return a value made of Python's own types, as `transformers` shows it to a template."""
    if value is None or type(value) in (str, bool, int, float):
        return value
    for kind in (str, int, float):  # a class of its own may print itself in another way
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [_plain(part) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, np.generic):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"


class _Child:
    """The process that renders templates; it is started when it is first asked, and again after a failure."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, options: Mapping[str, Any]) -> dict[str, str]:
        """Send the arguments of a rendering; return the text, or the error."""
        request = marshal.dumps((SECONDS, _plain(options)))
        with self._lock:
            try:
                process = self._started()
                assert process.stdin is not None and process.stdout is not None  # noqa: S101
                with contextlib.suppress(BrokenPipeError):  # it has ended, which the next line tells
                    process.stdin.write(len(request).to_bytes(8, "little") + request)
                    process.stdin.flush()
                line = process.stdout.readline()
                return dict(json.loads(line)) if line else {"error": _ending(process.wait())}
            except BaseException:
                self.end()  # what it would answer later belongs to no question
                raise

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            self.end()
            self._process = _start()
            assert self._process.stdout is not None  # noqa: S101
            lines = iter(self._process.stdout.readline, b"")
            if not any(line == b"ready\n" for line in lines):
                raise ChildProcessError(f"its process cannot start: code {self._process.wait()}")
        return self._process

    def end(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def leave_to_parent(self) -> None:
        """Start another one in a forked process: the child belongs to the process that started it."""
        process: Any = self._process
        if process is not None:
            process.returncode = 0  # it is not waited for here
            for stream in (process.stdin, process.stdout):
                stream.raw.close()  # without what another thread was writing
        self.__init__()  # type: ignore[misc]


def _ending(code: int) -> str:
    """Return why the process has ended."""
    is_slow = code == -getattr(signal, "SIGPROF", 0)
    return f"it takes longer than {SECONDS:g} s for one chat" if is_slow else f"its process ended with the code {code}"


def _start() -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-P", str(Path(__file__).with_name("template_process.py"))]
    return subprocess.Popen(  # noqa: S603 - this Python, with a file of this package
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=child_environment(), start_new_session=True,
    )  # fmt: skip


_child = _Child()
atexit.register(_child.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_child.leave_to_parent)
