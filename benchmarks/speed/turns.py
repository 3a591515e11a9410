"""What every measured process does: set up, then a step for each line on standard input, and its seconds as the answer.

A process tells its peak memory when its input ends, that of the GPU too if it uses one. Any environment with torch
will do.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

THREADS = 2
ON_GPU = torch.cuda.is_available()


def tell(**values: Any) -> None:
    """One line of JSON to whoever measures; everything else a process prints goes to standard error."""
    sys.__stdout__.write(json.dumps(values) + "\n")
    sys.__stdout__.flush()


def turns() -> Iterator[None]:
    """Yields once per turn; what happens until the next one is asked for is what the turn is timed by."""
    sys.stdout = sys.stderr
    tell(ready=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        yield
        if ON_GPU:
            torch.cuda.synchronize()
        tell(seconds=time.perf_counter() - start)
    tell(peak_mb=peak_mb(), gpu_mb=torch.cuda.max_memory_allocated() / 2**20 if ON_GPU else 0.0)


def peak_mb() -> float:
    """The process's largest resident memory so far (VmHWM; a program started by another one starts at 0)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
