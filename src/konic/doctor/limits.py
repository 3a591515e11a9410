"""A job's model on this machine -> how it samples, and what limits it: memory, its bandwidth, or multiplications."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

from konic.doctor.findings import Finding
from konic.finetuning.models.decode_probe import Timing, plan_timings
from konic.finetuning.models.prepacked import DecodePlan, is_worth_packing
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.rollout.decoding import Way, way_to_decode
from konic.finetuning.run.session import Session

_MOST_READ = 2**29
"""Bytes that are read to measure the bandwidth: more than the caches of most processors."""
_SQUARE = 1024
_ON_A_GPU: Mapping[Way, str] = {
    "fused": "joined products and one cache, each step replayed as one graph",
    "replayed": "its own forward pass, each step replayed as one graph",
    "plain": "its own forward pass, each operation launched by itself: its steps cannot be replayed as one "
    "graph, so a small model keeps this GPU waiting",
}


def decoding(session: Session) -> Finding | None:
    """Return how the model samples: by which decoder, on a CPU with which layout; None if another program samples."""
    if session.generation.engine != "local":
        return None
    policy, rows = session.learner.policy, session.training.batch_size
    model, plan = policy.language_model.causal_lm, policy.decode_plan
    fits = is_worth_packing(model, session.generation.max_new_tokens)
    timings: Mapping[DecodePlan, Timing] = {}
    with policy.merged_adapter() as merged:
        way = way_to_decode(merged)
        if fits and session.generation.decode_layout == "auto":
            timings = plan_timings(merged.causal_lm, rows)
    if model.device.type == "cuda":
        return Finding("decoding", "ok", _ON_A_GPU[way], numbers={"way": way})
    if model.device.type != "cpu":
        return None
    if not fits:
        return Finding("decoding", "ok", "plain products: packing the weights would not pay, or not fit")
    steps = {f"{p.layout}, {p.threads or 'all'} threads": step for p, (_, step) in timings.items()}
    shortest = min(steps.values(), default=1.0)
    threads = plan.threads or torch.get_num_threads()
    what = f"{plan.layout} products, {threads} {'thread' if threads == 1 else 'threads'}"
    if steps:
        shares = ", ".join(f"{name}: {step / shortest:.2f}" for name, step in steps.items())
        what = f"{what}; times of a product relative to the fastest: {shares}"
    numbers = {"way": way, "layout": plan.layout, "threads": plan.threads, "seconds": steps}
    return Finding("decoding", "ok", what, numbers=numbers)


@dataclass(frozen=True)
class TokenCosts:
    """The least that one decode step of a whole batch takes on this CPU."""

    num_rows: int
    num_bytes: int
    """Of the weights that are read."""
    reading_seconds: float
    multiplying_seconds: float
    head_share: float
    """Of the head in those weights."""


def token_costs(session: Session) -> TokenCosts | None:
    """Return what a decode step costs at rates that are measured now; None if not on a CPU, or if a server samples."""
    model, rows = session.learner.policy.language_model.causal_lm, session.training.batch_size
    if model.device.type != "cpu" or session.generation.engine != "local":
        return None
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    weights = sum(weight.numel() for weight in model.parameters())
    weights -= 0 if embedding is head else embedding.numel()  # of which a token reads one row
    size = weights * model.dtype.itemsize
    multiplying = 2 * rows * weights / _rate(model.dtype)
    return TokenCosts(rows, size, size / _bandwidth(model), multiplying, head.numel() / weights)


def limits(costs: TokenCosts | None, result: FinetuningIterationResult) -> Finding | None:
    """Return what takes most of an iteration, and what limits its sampling on a CPU."""
    if costs is None:
        return None
    stages = {
        "sampling and scoring": result.generation_time_sec,
        "the rewards": result.reward_compute_time_sec,
        "the update": result.update_time_sec,
    }
    largest = max(stages, key=lambda name: stages[name])
    share = stages[largest] / max(result.total_time_sec, 1e-9)
    reads = costs.reading_seconds > costs.multiplying_seconds
    limit = "memory bandwidth: a larger batch_size costs little more" if reads else "multiplications"
    what = (
        f"{largest} ({share:.0%} of an iteration). A token of {costs.num_rows} responses reads "
        f"{costs.num_bytes / 1e6:.0f} MB of weights, in at least {1000 * costs.reading_seconds:.0f} ms, and multiplies "
        f"for at least {1000 * costs.multiplying_seconds:.0f} ms, so that sampling is limited by {limit}. The "
        f"head has {costs.head_share:.0%} of the weights"
    )
    numbers = {"stage": largest, "share": share, "sampling": "bandwidth" if reads else "multiplications"}
    return Finding("what limits", "ok", what, numbers=numbers | asdict(costs))


def _bandwidth(model: torch.nn.Module) -> float:
    """Return bytes per second of reading weights of the model."""
    read, size = [], 0
    for weight in model.parameters():
        if size < _MOST_READ:
            read.append(weight.detach())
            size += weight.numel() * weight.element_size()
    return size / _seconds(lambda: [weight.sum() for weight in read])


def _rate(dtype: torch.dtype) -> float:
    """Return multiplications and additions per second of a large product."""
    square = torch.ones(_SQUARE, _SQUARE, dtype=dtype)
    return 2 * _SQUARE**3 / _seconds(lambda: square @ square)


def _seconds(work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of a few times."""
    found = []
    for _ in range(4):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found[1:])
