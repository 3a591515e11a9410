"""Model, rows and tokens -> the plan that decodes fastest on this machine: measured once, then remembered.

Which layout of the weights multiplies few rows fastest differs from one processor, number of rows and version of torch
to the next. With decode_layout="auto" it is measured, in about a second, on layers of the model itself. What is
measured while other programs compute is wrong later (docs/speed.md), so that a run measures only if asked to.
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from konic.finetuning.errors import ConfigError, KonicError
from konic.finetuning.models.locations import cache_folder, require_own
from konic.finetuning.models.prepacked import (
    DecodePlan,
    Layout,
    Prepacking,
    Product,
    is_worth_packing,
    layouts,
    plain_layers,
    threads_of,
    weight_and_bias,
)
from konic.finetuning.system.files import write_text
from konic.finetuning.system.places import read_regular
from konic.finetuning.system.processor import is_intel, processor_name

SAMPLE_BYTES = 2**29
"""Bytes of the weights that are measured. Fewer stay in the cache of a large processor, which decoding does not allow:
with 128 MB of SmolLM2-135M the plain layout won where with all of its layers it takes half as long again."""
SMALLEST_BYTES = 2**24
"""A model with fewer bytes in its layers is not measured: its products are too short to differ from noise."""
ROUNDS, SECONDS = 8, 0.6
"""Every layout is measured in so many rounds, or as many as the seconds allow; the fastest counts."""
WORTH = 0.9
"""Another plan than the usual one has to take at most this share of its time. On a machine that others use too, times
of the same product differed by more than that within minutes, but seldom for one layout alone."""

_OF_A_BROKEN_FILE = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError)
Timing = tuple[float, float]
"""Seconds of packing the measured layers, and of multiplying with them once."""


def choose_plan(
    causal_lm: PreTrainedModel, num_rows: int, num_tokens: int, layout: Literal["auto"] | Layout | None
) -> DecodePlan:
    """Return the plan to sample `num_tokens` tokens in each of `num_rows` rows.

    None takes the usual one of this processor; "auto" the fastest, packing included. Without a file to remember the
    measurement in, the usual one is taken: a choice that could differ from one run to the next would make them differ.

    Raises:
        ConfigError: This build of PyTorch does not have the layout for the model's weights.
    """
    dtype = causal_lm.dtype
    if layout not in (None, "auto", "onednn", *layouts(dtype)):
        raise ConfigError(
            f"GenerationConfig: decode_layout={layout!r} is not part of this build of torch for "
            f"{str(dtype).removeprefix('torch.')}, which has {', '.join(layouts(dtype))}. Leave it out, or take 'auto' "
            "for the fastest of them."
        )
    usual = DecodePlan(usual_layout(num_rows, dtype))
    if layout != "auto":
        return DecodePlan(layout) if layout else usual
    timings = plan_timings(causal_lm, num_rows) if is_worth_packing(causal_lm, num_tokens) else {}
    return _fastest(timings, num_tokens, usual)


def usual_layout(num_rows: int, dtype: torch.dtype) -> Layout:
    """Return the layout that is fastest as a rule: MKL's on a processor of its maker, but none there for one row.

    The maker decides, and not a measurement, so that a run repeats itself bit for bit (docs/speed.md has the times).
    """
    if not is_intel() or "mkl" not in layouts(dtype):
        return "onednn"
    return "mkl" if num_rows > 1 else "plain"


def plan_timings(causal_lm: PreTrainedModel, num_rows: int) -> Mapping[DecodePlan, Timing]:
    """Return what each plan takes here, from the cache or measured; empty if there is nothing to choose."""
    layers = _sample(causal_lm)
    if not layers:
        return {}
    key = {
        "processor": processor_name(), "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": num_rows,
        "dtype": str(causal_lm.dtype), "layouts": list(layouts(causal_lm.dtype)),
        "shapes": [list(weight_and_bias(layer)[0].shape) for layer in layers],
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    with contextlib.suppress(OSError, KonicError):
        folder = cache_folder()
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        require_own(folder)
        file = folder / f"decode-{digest}.json"
        with contextlib.suppress(OSError, KonicError, *_OF_A_BROKEN_FILE):
            require_own(file)
            return _read(read_regular(file), key, causal_lm.dtype)
        timings = _measure(layers, num_rows)
        plans = [{"plan": vars(plan), "seconds": timing} for plan, timing in timings.items()]
        write_text(file, json.dumps({"of": key, "plans": plans}, indent=1))
        return timings
    return {}


def _read(text: bytes, key: Mapping[str, Any], dtype: torch.dtype) -> Mapping[DecodePlan, Timing]:
    """Return the timings of a file of the cache; another error than OSError says that it is broken."""
    record = json.loads(text)
    timings: dict[DecodePlan, Timing] = {}
    for entry in record["plans"]:
        plan, (pack, step) = plan_from(entry["plan"], dtype), map(float, entry["seconds"])
        if plan is None or not (0 < pack < math.inf and 0 < step < math.inf):
            raise ValueError("no plan of this machine, or no time")
        timings[plan] = pack, step
    if record["of"] != key or not timings:
        raise ValueError("not a measurement of this machine")
    return timings


def plan_from(record: Any, dtype: torch.dtype) -> DecodePlan | None:
    """Return the plan of a checkpoint's record; None if it is none, or impossible here for weights of a dtype."""
    if not isinstance(record, dict) or record.keys() != {"layout", "threads"}:
        return None
    layout, threads = record["layout"], record["threads"]
    is_count = threads is None or (type(threads) is int and 1 <= threads <= torch.get_num_threads())
    return DecodePlan(layout, threads) if layout in layouts(dtype) and is_count else None


def _fastest(timings: Mapping[DecodePlan, Timing], num_tokens: int, usual: DecodePlan) -> DecodePlan:
    """Return the usual plan, or one that is clearly faster."""

    def seconds(plan: DecodePlan) -> float:
        pack, step = timings[plan]
        return (pack + num_tokens * step) * (1.0 if plan == usual else 1.0 / WORTH)

    return min(timings, key=seconds, default=usual)


def _sample(causal_lm: PreTrainedModel) -> list[Any]:
    """Return the first layers of a model, of :data:`SAMPLE_BYTES` or all; none of a small model."""
    layers, size = [], 0
    for _, _, layer in plain_layers(causal_lm):
        if size < SAMPLE_BYTES:
            layers.append(layer)
            size += layer.weight.numel() * layer.weight.element_size()
    return layers if size >= SMALLEST_BYTES else []


@torch.no_grad()
def _measure(layers: list[Any], num_rows: int) -> dict[DecodePlan, Timing]:
    """Return the time of every layout with all threads, and of the fastest with half of them, a quarter, ...

    The layouts are measured in turn, round after round, so that a slow moment of the machine meets all of them.
    """
    packed = {layout: _pack(layers, num_rows, layout) for layout in layouts(layers[0].weight.dtype)}
    rounds: list[dict[DecodePlan, float]] = []
    started = time.perf_counter()
    while len(rounds) <= ROUNDS and (len(rounds) < 3 or time.perf_counter() - started < SECONDS):
        rounds.append({DecodePlan(layout): _multiply(packed[layout][1], DecodePlan(layout)) for layout in packed})
    timed = rounds[1:]  # the first round also plans the products
    timings = {plan: (packed[plan.layout][0], min(each[plan] for each in timed)) for plan in rounds[0]}
    best = min(timings, key=lambda plan: timings[plan][1])
    seconds, products = packed[best.layout]
    for threads in _halves(torch.get_num_threads()):
        plan = replace(best, threads=threads)
        timings[plan] = seconds, min(_multiply(products, plan) for _ in range(2))
        if timings[plan][1] > WORTH * timings[best][1]:
            break
        best = plan
    return timings


def _halves(count: int) -> Iterator[int]:
    while count > 1:
        count //= 2
        yield count


def _pack(layers: list[Any], num_rows: int, layout: Layout) -> tuple[float, list[tuple[Product, torch.Tensor]]]:
    """Return the seconds of packing layers, and each layer's product with rows for it."""
    prepacking = None if layout == "plain" else Prepacking(num_rows, layout)
    started = time.perf_counter()
    products = []
    for layer in layers:
        weight, bias = weight_and_bias(layer)
        rows = torch.ones(num_rows, weight.shape[1], dtype=weight.dtype)
        products.append((Product([weight], bias, prepacking), rows))
    return time.perf_counter() - started, products


def _multiply(products: list[tuple[Product, torch.Tensor]], plan: DecodePlan) -> float:
    """Return the seconds of every product once, with the threads of a plan."""
    with threads_of(plan):
        started = time.perf_counter()
        for product, x in products:
            product(x)
        return time.perf_counter() - started
