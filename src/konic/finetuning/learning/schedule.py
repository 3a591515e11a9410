"""Optimizer step -> learning rate. Pure functions of plain numbers."""

import math
from dataclasses import dataclass

ENDS_AT_ZERO = ("linear", "cosine")
"""The schedules that depend on the run's planned length."""
TIMESCALE = 32
"""Optimizer steps after which "inverse_sqrt" has fallen to 1/√2 of the peak; after three times as many it is half."""


@dataclass(frozen=True)
class Schedule:
    """The position of an update's optimizer steps in the run."""

    first_step: int
    """Optimizer steps taken before this update."""
    total_steps: int
    """Optimizer steps planned over the whole run."""
    peak: float
    """The learning rate at the end of warm-up."""
    train_policy: bool = True
    """False while only the value head learns."""
    falls_from: int = 0
    """Optimizer steps taken before the rate falls: 0, or what an earlier training of the run took."""


def learning_rate_at(
    step: int, total_steps: int, peak: float, warmup_steps: int, schedule: str, falls_from: int = 0
) -> float:
    """Return the learning rate of an optimizer step.

    Args:
        step: The step about to be taken, counted from 0 over the whole run.
        total_steps: Steps planned over the whole run. Only "linear" and "cosine" use it.
        peak: The learning rate at the end of warm-up.
        warmup_steps: Number of warm-up steps. Step i of them uses peak · (i + 1) / warmup_steps.
        schedule: "constant", "linear" (to 0 at total_steps), "cosine" (half a period, to 0 at total_steps), or
            "inverse_sqrt": peak / √(1 + s / TIMESCALE) at s steps after warm-up, whatever total_steps is.
        falls_from: The first step of the fall of "linear" and "cosine", if it is after warm-up.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "inverse_sqrt":
        return peak / math.sqrt(1 + (step - warmup_steps) / TIMESCALE)
    start = max(warmup_steps, falls_from)
    progress = min(1.0, (step - start) / max(1, total_steps - start))
    return peak * (1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)
