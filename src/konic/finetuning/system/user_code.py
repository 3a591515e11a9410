"""User code -> the process as it was before: changes that a run depends on are undone, and no Ctrl-C is lost.

Not kept, because they change no number of a run: random states (konic has its own generators), environment variables,
the locale, logging, warning filters and the standard streams.
"""

import contextlib
import functools
import logging
import os
import signal
import sys
from _signal import getsignal  # type: ignore[import-not-found]  # the one of `signal` makes enums, ten times slower
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from konic.finetuning.system.signals import SIGNALS, StopHandler, in_main_thread

logger = logging.getLogger(__name__)

Setting = tuple[str, Callable[[], Any], Callable[[Any], Any]]
"""Its name in a warning, how to read it and how to write it."""


@contextlib.contextmanager
def preserved_state(who: str) -> Iterator[None]:
    """Undo on exit what the block changed of the process, with a warning, once, that `who` did it.

    Raises:
        KeyboardInterrupt: A request to stop came inside the block, whatever the block made of it.
    """
    settings = _settings()
    before = [read() for _, read, _ in settings]
    stop = next((value for value in before if isinstance(value, StopHandler) and not value.has_come), None)
    try:
        yield
    finally:
        changed = [(*setting, value) for setting, value in zip(settings, before, strict=True) if setting[1]() != value]
        for _, _, write, value in changed:
            write(value)
        if changed:
            names = ", ".join(name for name, *_ in changed)
            _warn_once(f"{who} left changed: {names}. konic undoes that after each call.")
        if stop is not None and stop.has_come:
            raise KeyboardInterrupt


@contextlib.contextmanager
def standard_torch_modes() -> Iterator[None]:
    """Within the block torch has the modes that it starts with, whatever the user's script has set; then the script's.

    The number of threads, deterministic mode, precision and attention kernels stay as the script chose them.
    """
    torch = sys.modules["torch"]
    standard = {
        "torch's inference mode": False,
        "torch's gradient mode": True,
        "torch's default dtype": torch.float32,
        "torch's default device": torch.device("cpu"),
        "torch's autocast on cpu": False,
        "torch's autocast on cuda": False,
    }
    modes = [setting for setting in _torch_settings(torch) if setting[0] in standard]
    before = [read() for _, read, _ in modes]
    for (name, _, write), value in zip(modes, before, strict=True):
        if value != standard[name]:
            write(standard[name])
            if not isinstance(value, bool):  # with torch.no_grad(): engine.evaluate() is usual
                _warn_once(f"{name} is {value} in this process; the run, rewards included, uses {standard[name]}.")
    try:
        yield
    finally:
        for (_, read, write), value in zip(modes, before, strict=True):
            if read() != value:
                write(value)


def _settings() -> tuple[Setting, ...]:
    """Everything that is kept. torch's part counts only where torch is loaded: a reward worker may do without it."""
    torch = sys.modules.get("torch")
    own = (*_PYTHON, *_SIGNAL_HANDLERS) if in_main_thread() else _PYTHON
    return own if torch is None else (*own, *_torch_settings(torch))


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _alarm_is_set() -> bool:
    return signal.getitimer(signal.ITIMER_REAL)[0] > 0


def _set_alarm(on: bool) -> None:
    if not on:  # one that ran before the call cannot be wound up again
        signal.setitimer(signal.ITIMER_REAL, 0)


def _change_folder(folder: str | None) -> None:
    if folder is not None:
        os.chdir(folder)


_PYTHON: tuple[Setting, ...] = (
    ("the working directory", _working_folder, _change_folder),
    ("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
    ("the umask", _umask, os.umask),
)
_ALARM = (signal.SIGALRM,) if hasattr(signal, "SIGALRM") else ()
_SIGNAL_HANDLERS: tuple[Setting, ...] = (
    *((("an alarm that is set", _alarm_is_set, _set_alarm),) if _ALARM else ()),
    *(
        (
            f"the handler of {number.name}",
            functools.partial(getsignal, int(number)),
            functools.partial(signal.signal, number),
        )
        for number in (*SIGNALS, *_ALARM)
    ),
)


@functools.cache
def _torch_settings(torch: ModuleType) -> tuple[Setting, ...]:
    open_guards: list[Any] = []

    def set_inference_mode(on: bool) -> None:
        guard = torch.inference_mode(on)  # in force as long as the guard exists
        guard.__enter__()
        open_guards.append(guard)

    def matmul_precision() -> str | None:
        try:
            return str(torch.get_float32_matmul_precision())
        except RuntimeError:  # set by torch's newer functions
            return None

    def set_matmul_precision(precision: str | None) -> None:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)

    def set_default_device(device: Any) -> None:
        torch.set_default_device(None if device.type == "cpu" else device)

    def set_mkldnn(on: bool) -> None:
        torch.backends.mkldnn.enabled = on

    attention = (
        (f"torch's {name} attention", getattr(torch.backends.cuda, f"{name}_sdp_enabled"), set_it)
        for name, set_it in (
            ("flash", torch.backends.cuda.enable_flash_sdp),
            ("mem_efficient", torch.backends.cuda.enable_mem_efficient_sdp),
            ("math", torch.backends.cuda.enable_math_sdp),
        )
    )
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    autocast = (
        (
            f"torch's autocast on {device}",
            functools.partial(torch.is_autocast_enabled, device),
            functools.partial(torch.set_autocast_enabled, device),
        )
        for device in devices
    )
    return (
        ("torch's inference mode", torch.is_inference_mode_enabled, set_inference_mode),
        ("torch's gradient mode", torch.is_grad_enabled, torch.set_grad_enabled),
        ("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
        ("torch's default device", lambda: torch.empty(0).device, set_default_device),
        ("torch's number of threads", torch.get_num_threads, torch.set_num_threads),
        ("torch's deterministic mode", torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        ("torch's precision of matmuls", matmul_precision, set_matmul_precision),
        ("torch's use of oneDNN", lambda: torch.backends.mkldnn.enabled, set_mkldnn),
        *autocast,
        *attention,
    )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
