"""Requests -> texts: the child process that renders chat templates, with a bound on its time and memory.

It runs as a script and imports nothing of konic. A request is a length and marshalled arguments, a reply a line of
JSON. Linux enforces both bounds, macOS the one on time.
"""

import json
import marshal
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

_MEMORY = 256 * 2**20
"""Bytes that a template may take, besides what the process has taken to start."""
_LONGEST = 1_000_000
"""Number of characters of a rendered chat that are always allowed; more must be at most 100 times what was given."""


def _bound_memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _bound_time(seconds: float) -> None:
    """Let the system end this process after so many seconds of work, also where Python cannot be interrupted."""
    if os.name == "posix":
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _reply(request: bytes, render: Callable[..., Any]) -> dict[str, str]:
    seconds, options = marshal.loads(request)  # noqa: S302 - by konic itself
    _bound_time(seconds)
    try:
        (text,), _ = render(**options)
        if len(text) > max(_LONGEST, 100 * len(request)):
            return {"error": f"it makes {len(text)} characters of a chat of {len(request)}"}
        return {"text": text}
    except MemoryError:
        return {"error": f"it takes more than {_MEMORY / 1e6:.0f} MB"}
    except Exception as error:  # a template is a program, so it can fail in any way
        return {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
    finally:
        _bound_time(0)


def _main() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    if os.name == "posix":
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the parent may ignore or block it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
        _bound_memory()
    print("ready", flush=True)  # noqa: T201
    while size := sys.stdin.buffer.read(8):
        request = sys.stdin.buffer.read(int.from_bytes(size, "little"))
        print(json.dumps(_reply(request, render_jinja_template)), flush=True)  # noqa: T201


if __name__ == "__main__":
    _main()
