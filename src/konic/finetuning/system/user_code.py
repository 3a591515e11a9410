"""User code -> the process as it was before: changes that a run depends on are undone, and no Ctrl-C is lost.

Not kept, because they change no number of a run: random states (konic has its own generators), environment variables,
the locale, logging, warning filters and the standard streams.
"""

import _signal  # type: ignore[import-not-found]  # the functions of `signal` make enums, ten times slower
import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from konic.finetuning.system.places import current_folder
from konic.finetuning.system.signals import QUIET_SIGNALS, SIGNALS, StopHandler, in_main_thread
from konic.output import get_logger

logger = get_logger(__name__)

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
        names = ", ".join(name for name, read, _, value in changed if read() == value)
        if names:
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


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _alarms() -> list[bool]:
    return [signal.getitimer(timer)[0] > 0 for timer in _TIMERS]


def _end_alarms(before: list[bool]) -> None:
    for timer, was_set in zip(_TIMERS, before, strict=True):
        if not was_set:  # one that ran before the call cannot be wound up again
            signal.setitimer(timer, 0)


def _blocked_signals() -> Any:
    return _signal.pthread_sigmask(signal.SIG_BLOCK, ())


def _block_signals(numbers: Any) -> None:
    _signal.pthread_sigmask(signal.SIG_SETMASK, numbers)


def _change_folder(folder: str | None) -> None:
    if folder is None:
        return
    try:
        os.chdir(folder)
    except FileNotFoundError:
        _warn_once(f"The current folder, {folder}, no longer exists: change to one that does.")


_PYTHON: tuple[Setting, ...] = (
    ("the working directory", current_folder, _change_folder),
    ("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
    ("the umask", _umask, os.umask),
)
_TIMERS = tuple(getattr(signal, f"ITIMER_{name}") for name in ("REAL", "VIRTUAL", "PROF") if os.name == "posix")
_ALARMS = tuple(getattr(signal, name) for name in ("SIGALRM", "SIGVTALRM", "SIGPROF") if hasattr(signal, name))
_SIGNAL_HANDLERS: tuple[Setting, ...] = (
    ("an alarm that is set", _alarms, _end_alarms),
    *((("the blocked signals", _blocked_signals, _block_signals),) if hasattr(signal, "pthread_sigmask") else ()),
    *(
        (
            f"the handler of {number.name}",
            functools.partial(_signal.getsignal, int(number)),
            functools.partial(signal.signal, number),
        )
        for number in (*SIGNALS, *QUIET_SIGNALS, *_ALARMS)
    ),
)


def _denormals_are_flushed() -> bool:
    return _SMALLEST_NORMAL / 2 == 0.0


_SMALLEST_NORMAL = sys.float_info.min


def _function_modes() -> list[Any]:
    """Return the modes that stand before torch's functions, the innermost last; the default device is one too."""
    modes = sys.modules["torch.overrides"]._get_current_function_mode_stack()
    return [mode for mode in modes if type(mode).__name__ != "DeviceContext"]


def _end_function_modes(before: list[Any]) -> None:
    while len(_function_modes()) > len(before):
        sys.modules["torch.overrides"]._pop_mode()


def _dispatch_modes() -> list[Any]:
    return list(sys.modules["torch.utils._python_dispatch"]._get_current_dispatch_mode_stack())


def _end_dispatch_modes(before: list[Any]) -> None:
    while len(_dispatch_modes()) > len(before):
        sys.modules["torch.utils._python_dispatch"]._pop_mode()


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

    def set_precision(precision: str | None) -> None:
        if precision is not None:
            torch.backends.fp32_precision = precision

    def set_default_device(device: Any) -> None:
        torch.set_default_device(None if device.type == "cpu" else device)

    def set_mkldnn(on: bool) -> None:
        torch.backends.mkldnn.enabled = on

    sums = (
        (
            f"torch's {name}",
            functools.partial(getattr, torch.backends.cuda.matmul, name, None),
            functools.partial(setattr, torch.backends.cuda.matmul, name),
        )
        for name in (
            "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction",
            "allow_fp16_accumulation",  # from 2.7
        )
    )  # fmt: skip
    attention = (
        (f"torch's {name} attention", getattr(torch.backends.cuda, f"{name}_sdp_enabled"), set_it)
        for name, set_it in (
            ("flash", torch.backends.cuda.enable_flash_sdp),
            ("mem_efficient", torch.backends.cuda.enable_mem_efficient_sdp),
            ("math", torch.backends.cuda.enable_math_sdp),
            ("cudnn", torch.backends.cuda.enable_cudnn_sdp),
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
        ("torch's function modes", _function_modes, _end_function_modes),
        ("torch's dispatch modes", _dispatch_modes, _end_dispatch_modes),
        ("torch's number of threads", torch.get_num_threads, torch.set_num_threads),
        ("torch's deterministic mode", torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        ("torch's precision of matmuls", matmul_precision, set_matmul_precision),
        ("torch's fp32 precision", lambda: getattr(torch.backends, "fp32_precision", None), set_precision),  # from 2.9
        ("torch's flushing of denormals", _denormals_are_flushed, torch.set_flush_denormal),
        ("torch's anomaly detection", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        ("torch's use of oneDNN", lambda: torch.backends.mkldnn.enabled, set_mkldnn),
        *autocast,
        *attention,
        *sums,
    )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
