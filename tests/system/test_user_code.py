"""What user code leaves behind in the process: undone after each call, with one warning."""

import contextlib
import os
import signal
import sys
import threading
import time

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from konic.finetuning.system.signals import stopping_on_signals
from konic.finetuning.system.user_code import _warn_once, preserved_state, standard_torch_modes

OPEN = []


def open_inference_mode():
    OPEN.append(torch.inference_mode())
    OPEN[-1].__enter__()


def denormals_are_flushed():
    return float(torch.tensor(torch.finfo(torch.float32).tiny) / 2) == 0.0


def no_attention_kernels():
    for switch in ("flash", "mem_efficient", "math"):
        getattr(torch.backends.cuda, f"enable_{switch}_sdp")(False)


def timers_are_set():
    return [signal.getitimer(timer)[0] > 0 for timer in (signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)]


class Doubling(TorchFunctionMode):
    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is torch.exp else result


class DoublingBelow(TorchDispatchMode):
    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is torch.ops.aten.exp.default else result


def exp_of_zero():
    return torch.exp(torch.zeros(1)).item()


HARMS = {
    "function mode": (lambda: Doubling().__enter__(), exp_of_zero),
    "dispatch mode": (lambda: DoublingBelow().__enter__(), exp_of_zero),
    "gradient mode": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "inference mode": (open_inference_mode, torch.is_inference_mode_enabled),
    "default dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "default device": (lambda: torch.set_default_device("meta"), lambda: torch.ones(1).device),
    "autocast": (lambda: torch.set_autocast_enabled("cpu", True), lambda: torch.is_autocast_enabled("cpu")),
    "threads": (lambda: torch.set_num_threads(torch.get_num_threads() + 1), torch.get_num_threads),
    "determinism": (lambda: torch.use_deterministic_algorithms(True), torch.are_deterministic_algorithms_enabled),
    "precision": (lambda: torch.set_float32_matmul_precision("medium"), torch.get_float32_matmul_precision),
    "fp32 precision": (
        lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        lambda: getattr(torch.backends, "fp32_precision", "tf32"),
    ),
    "denormals": (lambda: torch.set_flush_denormal(True), denormals_are_flushed),
    "anomaly detection": (lambda: torch.autograd.set_detect_anomaly(True), torch.is_anomaly_enabled),
    "cudnn attention": (lambda: torch.backends.cuda.enable_cudnn_sdp(False), torch.backends.cuda.cudnn_sdp_enabled),
    "reduced sums": (
        lambda: setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
        lambda: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    ),
    "onednn": (lambda: setattr(torch.backends.mkldnn, "enabled", False), lambda: torch.backends.mkldnn.enabled),
    "attention": (no_attention_kernels, torch.backends.cuda.math_sdp_enabled),
    "working directory": (lambda: os.chdir("/"), os.getcwd),
    "recursion limit": (lambda: sys.setrecursionlimit(5000), sys.getrecursionlimit),
    "SIGINT": (lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), lambda: signal.getsignal(signal.SIGINT)),
    "SIGPIPE": (lambda: signal.signal(signal.SIGPIPE, signal.SIG_DFL), lambda: signal.getsignal(signal.SIGPIPE)),
    "virtual timer": (lambda: signal.setitimer(signal.ITIMER_VIRTUAL, 99), timers_are_set),
    "profiling timer": (lambda: signal.setitimer(signal.ITIMER_PROF, 99), timers_are_set),
    "blocked signals": (
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}),
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    ),
    "SIGTERM": (lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), lambda: signal.getsignal(signal.SIGTERM)),
}


@pytest.mark.parametrize(
    "name", HARMS if hasattr(torch.backends, "fp32_precision") else set(HARMS) - {"fp32 precision"}
)
def test_what_user_code_changes_is_undone_with_one_warning(name, caplog):
    harm, read = HARMS[name]
    _warn_once.cache_clear()
    before = read()
    for _ in range(2):
        with preserved_state("Reward 'kind'"):
            harm()
            assert read() != before
        assert read() == before
    assert [record.message.startswith("Reward 'kind' left changed: ") for record in caplog.records] == [True]


def test_it_is_undone_after_an_error_and_outside_the_main_thread():
    def fails():
        with contextlib.suppress(ZeroDivisionError), preserved_state("x"):
            torch.set_default_dtype(torch.float64)
            torch.set_grad_enabled(False)
            raise ZeroDivisionError
        states.append((torch.get_default_dtype(), torch.is_grad_enabled()))

    states = []
    fails()
    thread = threading.Thread(target=fails)
    thread.start()
    thread.join()
    assert states == [(torch.float32, True)] * 2


def test_a_call_that_changes_nothing_warns_of_nothing_and_keeps_newer_precision_settings(caplog):
    matmul = torch.backends.cuda.matmul
    before = getattr(matmul, "fp32_precision", None)  # since torch 2.9
    try:
        if before is not None:
            matmul.fp32_precision = "ieee" if before != "ieee" else "tf32"
        with preserved_state("x"):
            pass
    finally:
        if before is not None:
            matmul.fp32_precision = before
    assert not caplog.records


@pytest.mark.parametrize("answer", ["swallow", "another error"])
def test_a_stop_that_user_code_catches_is_raised_after_it(answer):
    def caught():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            if answer != "swallow":
                raise ValueError from None

    with stopping_on_signals():
        with pytest.raises(KeyboardInterrupt), preserved_state("x"):
            caught()
        with preserved_state("x"):  # what runs after it, such as on_train_end, is not stopped again
            pass


def test_a_scripts_modes_are_set_aside_and_come_back(caplog):
    _warn_once.cache_clear()
    with preserved_state("test"):
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        with torch.inference_mode():
            with standard_torch_modes():
                made = torch.ones(1, requires_grad=True) * 2
                assert (made.dtype, made.device.type, made.requires_grad) == (torch.float32, "cpu", True)
            assert torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        assert torch.empty(0).device.type == "meta"
        assert torch.get_default_dtype() == torch.float64
        assert len([record for record in caplog.records if "rewards included" in record.message]) == 2


def test_an_alarm_that_user_code_leaves_behind_does_not_go_off_and_files_stay_readable(caplog):
    _warn_once.cache_clear()
    handler, mask = signal.getsignal(signal.SIGALRM), os.umask(0o022)
    try:
        with preserved_state("Reward 'x'"):
            signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the alarm went off"))
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            os.umask(0o777)
        time.sleep(0.1)
        assert signal.getsignal(signal.SIGALRM) == handler
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(mask)
    for name in ("an alarm that is set", "the handler of SIGALRM", "the umask"):
        assert name in caplog.text
