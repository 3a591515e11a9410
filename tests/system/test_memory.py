import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from konic.finetuning.system import memory as allocator
from konic.finetuning.system.memory import eager_free, return_freed_memory


def c_library(monkeypatch, name="posix", **functions):
    monkeypatch.setattr(allocator, "os", SimpleNamespace(name=name))
    monkeypatch.setattr(allocator, "ctypes", SimpleNamespace(CDLL=lambda _: SimpleNamespace(**functions)))


def test_freed_memory_is_returned_where_the_library_can(monkeypatch):
    return_freed_memory()
    calls = []
    c_library(monkeypatch, malloc_trim=calls.append)
    return_freed_memory()
    assert calls == [0]
    c_library(monkeypatch)
    return_freed_memory()
    c_library(monkeypatch, name="nt", malloc_trim=calls.append)
    return_freed_memory()
    assert calls == [0]


def test_the_threshold_is_lowered_within_and_put_back_after_an_error_too(monkeypatch):
    calls = []
    c_library(monkeypatch, malloc_trim=lambda _: calls.append("trim"), mallopt=lambda *option: calls.append(option))
    with pytest.raises(KeyError), eager_free(True):
        {}["within"]
    assert calls == [(-3, 2**20), (-3, 2**25), "trim"]
    calls.clear()
    with eager_free(False):
        pass
    assert calls == []


def test_another_library_with_a_mallopt_of_its_own_is_left_alone(monkeypatch):
    calls = []
    c_library(monkeypatch, mallopt=lambda *option: calls.append(option))
    with eager_free(True):
        pass
    assert calls == []


FREED = """
import os
from pathlib import Path
import torch
from konic.finetuning.system.memory import eager_free

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

with eager_free(True):
    before = resident_mb()
    large_and_small = [(torch.ones(2**20), torch.ones(2**8)) for _ in range(40)]  # 4 MB and 1 kB in turn
    allocated = resident_mb() - before
    kept = [small for _, small in large_and_small]
    del large_and_small
    print(allocated, resident_mb() - before, len(kept))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_freed_tensors_between_kept_ones_go_back_to_the_system():
    """In a process of its own: blocks that another test freed would be taken again, and kept."""
    run = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    allocated, left, kept = map(float, run.stdout.split())
    assert allocated > 150
    assert left < 20
    assert kept == 40
