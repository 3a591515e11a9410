"""A model of how long an iteration takes on more processes than were measured. It is a model, not a measurement.

python benchmarks/scale_model.py            checks it against scale.json, and writes benchmarks/results/scale_model.md
python benchmarks/scale_model.py --lengths RUN_FOLDER      with the lengths of a run's responses, not of lengths.json

The formulas are in scale_formulas.py; here are the times that go in, from scale.json and gpu.md, and the tables.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from scale_formulas import (
    Line,
    Link,
    Network,
    Worker,
    drawn_lengths,
    iteration,
    read_lengths,
    stops_scaling,
    total_seconds,
)

RESULTS = Path(__file__).parent / "results"
LENGTHS = RESULTS / "lengths.json"
LIMIT = 128
"""The most tokens of a response: longer ones of a run are cut, as `max_new_tokens` would."""
TOKENS = 48
"""Of each response, where the times of one process were measured."""
SIZES = ((1, 1), (1, 2), (1, 8), (4, 8), (64, 8))
"""Nodes, and processes on each."""
ADAPTER_BYTES = 1_845_508
"""Of the gradients of SmolLM2-135M with LoRA r=8 on q_proj and v_proj, and its value head, in fp32."""
GPU = {8: (0.194, 0.314), 64: (0.229, 0.397), 256: (0.356, 0.976)}
"""By responses of 48 tokens: seconds of sampling, and of a GRPO iteration with one step, on an H200 (gpu.md)."""
ASSUMPTIONS = """\
- Responses: each length is drawn by itself, so the responses to one prompt do not resemble each other.
- Sampling: the prompts once, then steps by the number of responses that still grow; an ended one leaves its batch
  at once, and a late step costs as much as one of the first 48. On the H200, the prompts are inside of the steps.
- An optimizer step: by response tokens, with prompts and padding in proportion.
- All these on straight lines through the measured points and beyond them: on a core through 4 and 16 responses, on the
  H200 through 8, 64 and 256.
- What each process does for all responses (texts, advantages, metrics, files): by response tokens, measured on one core
  up to 49,152 tokens and straight on beyond, and no smaller with more processes. On GPUs it takes as long as on that
  core: the H200's update is its iteration less sampling, less that.
- Messages, low: each of the four rounds of an exchange takes 100 us for each other process, at 1.25 GB/s, and reading
  nothing. High: what each other process cost eight processes here that share two cores. No network was measured.
- Gradients: a ring inside each node, then one of the nodes. Between CPUs, low and high as for messages. Between GPUs
  10 us and 300 GB/s inside a node, 20 us and 25 GB/s between nodes: not measured.
- One network for every size of cluster; nobody else uses it.
- One reward, which costs nothing; no evaluation and no checkpoint in the iteration.
- No process slows another one down, and all are equally fast: waiting comes from unequal shares only."""


def worker_of(times: dict[int, tuple[float, float, float]], steps: int, rest: Line) -> Worker:
    """A process, from the seconds of prompts, of all sampling and of all optimizer steps, by responses of 48 tokens."""
    return Worker(
        prompts=Line(tuple((rows, prompts) for rows, (prompts, _, _) in times.items())),
        decode_step=Line(
            tuple((rows, (sampling - prompts) / TOKENS) for rows, (prompts, sampling, _) in times.items())
        ),
        optimizer_step=Line(tuple((rows * TOKENS, update / steps) for rows, (_, _, update) in times.items())),
        rest=rest,
        steps=steps,
        gradient_bytes=ADAPTER_BYTES,
    )


def rest_line(found: dict) -> Line:
    return Line(tuple((each["tokens"], each["seconds"]) for each in found["whole"]))


def gpu_worker(found: dict) -> Worker:
    rest = rest_line(found)
    times = {rows: (0.0, sampling, max(0.0, total - sampling - rest(rows * TOKENS)))
             for rows, (sampling, total) in GPU.items()}  # fmt: skip
    return worker_of(times, steps=1, rest=rest)


def cpu_worker(found: dict) -> Worker:
    """One core, from the processor seconds of one process with 4 and with 16 responses."""
    cases = {case["batch"]: case["processor"] for case in found["cases"] if is_source(case)}
    times = {rows: (cases[rows]["prompts"], cases[rows]["sampling"], cases[rows]["update"]) for rows in (4, 16)}
    return worker_of(times, found["steps"], rest_line(found))


def is_source(case: dict) -> bool:
    """True for the cases that the model of a core is made from."""
    return (case["processes"], case["threads"]) == (1, 1) and case["batch"] in (4, 16)


def measured_network(found: dict, size: int) -> Network:
    """What so many processes on this machine exchanged, each time after other work."""
    each = next(each for each in found["exchanges"] if each["processes"] == size)
    others, (small, large) = size - 1, found["message bytes"].values()
    by_bytes = max(each["large message"] - each["small message"], 1e-9)
    talk_bandwidth = others * (large - small) / by_bytes
    talk = Link(each["small message"] / others - small / talk_bandwidth, talk_bandwidth)
    by_bytes = max(each["large sum"] - each["small sum"], 1e-9)
    ring = Link(each["small sum"] / (2 * others), 2 * others * ADAPTER_BYTES / size / by_bytes)
    return Network(ring, ring, talk)


def check(found: dict) -> list[str]:
    """Lines of a table: predicted beside measured, for all that the model was not made from."""
    worker, network = cpu_worker(found), measured_network(found, 2)
    lines = [
        "| processes | responses | tokens of each | part | predicted | measured | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in found["cases"]:
        if case["threads"] > 1 or is_source(case):
            continue
        times = iteration(case["lengths"], worker, network.cluster(1, case["processes"]))
        rows = [(part, getattr(times, part), case["processor"][part]) for part in ("sampling", "update")]
        if case["processes"] > 1:
            rows += [
                (part, getattr(times, part), case["seconds"][part]) for part in ("waiting", "gradients", "messages")
            ]
        rows += [("rest", times.rest, case["rest"])]
        lowest, highest = min(case["lengths"]), max(case["lengths"])
        tokens = f"{lowest} to {highest}" if lowest < highest else highest
        for part, predicted, measured in [*rows, ("iteration", times.total, case["total"])]:
            lines.append(
                f"| {case['processes']} | {case['batch']} | {tokens} | {part} | {predicted:.3g} s | {measured:.3g} s "
                f"| {predicted / measured - 1:+.0%} |"
            )
    return lines


def span(low: float, high: float, unit: str = "") -> str:
    """Both ends of a range with three digits, or one number where they are the same."""
    first, last = (f"{float(f'{value:.3g}'):,g}" for value in (low, high))
    return (first if first == last else f"{first} to {last}") + unit


def table(worker: Worker, low: Network, high: Network, lengths: Callable[[int], Sequence[int]]) -> list[str]:
    """Lines of a table: an iteration on each size of cluster; `lengths` gives the responses for so many processes."""
    lines = [
        "| processes | responses | iteration | responses/s | sampling | update | waiting | gradients | messages "
        "| work on all responses |",
        "|" + "---|" * 10,
    ]
    names = ("total", "sampling", "update", "waiting", "gradients", "messages", "rest")
    for nodes, per_node in SIZES:
        responses = lengths(nodes * per_node)
        ends = [iteration(responses, worker, network.cluster(nodes, per_node)) for network in (low, high)]
        total, *parts = (span(*(getattr(times, name) for times in ends), " s") for name in names)
        rate = span(*(len(responses) / times.total for times in reversed(ends)))
        size = f"{nodes}x{per_node}" if nodes > 1 else str(per_node)
        lines.append(f"| {size} | {len(responses):,} | {total} | {rate} | " + " | ".join(parts) + " |")
    return lines


def report(found: dict, options: argparse.Namespace) -> list[str]:
    known = read_lengths(options.lengths, options.limit)
    talk = Link(4 * options.talk_latency, options.talk_bandwidth)
    ring = Link(options.talk_latency, options.talk_bandwidth)
    inside = Link(options.inside_latency, options.inside_bandwidth)
    between = Link(options.between_latency, options.between_bandwidth)
    here = measured_network(found, 8)
    lines = [
        "# A model of scaling", "",
        f"A model, not a measurement. `python benchmarks/scale_model.py`; lengths drawn from the {len(known)} of "
        f"{options.lengths.name}, cut at {options.limit} tokens: mean {np.mean(known):.0f}, quartiles "
        f"{', '.join(f'{value:.0f}' for value in np.percentile(known, (25, 50, 75)))}. CPU: one core of "
        f"{found['machine'].partition(' of ')[2]}. GPU: an H200 (gpu.md).", "",
        "## Check against one and two processes", "",
        f"Made from one process with 4 and 16 responses of {TOKENS} tokens, from exchanges of two processes that do "
        "little else, and from the work on all responses. Sampling and update are processor seconds of a process, the "
        "others seconds of the clock; of two processes the mean. Rest is the work on all responses as far as it is "
        "outside of the stages that were measured.", "", *check(found),
    ]  # fmt: skip
    workers = (
        ("CPUs", cpu_worker(found), Network(ring, ring, talk), here, 8),
        ("GPUs", gpu_worker(found), Network(inside, between, talk), Network(inside, between, here.talk), 64),
    )
    for name, worker, low, high, per_process in workers:
        in_all, of_each = drawn_lengths(known, 1024), partial(drawn_lengths, known)
        stops = [stops_scaling(partial(total_seconds, in_all, worker, network), 512) for network in (low, high)]
        lines += ["", f"## {name}, 1,024 responses in all", "",
                  f"From {span(*sorted(stops))} processes on, twice as many make an iteration less than 1.25 times as "
                  "fast. Two numbers are the low and the high end of what messages take.", "",
                  *table(worker, low, high, lambda _: in_all),  # noqa: B023
                  "", f"## {name}, {per_process} responses for each process", "",
                  *table(worker, low, high, lambda size: of_each(size * per_process))]  # noqa: B023  # fmt: skip
    return [*lines, "", "## Assumptions", "", *ASSUMPTIONS.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=Path, default=LENGTHS, help="a file like lengths.json, or a run's folder")
    parser.add_argument("--limit", type=int, default=LIMIT, help="the most tokens of a response")
    for name, latency, bandwidth in (("talk", 1e-4, 1.25e9), ("inside", 1e-5, 3e11), ("between", 2e-5, 2.5e10)):
        parser.add_argument(f"--{name}-latency", type=float, default=latency)
        parser.add_argument(f"--{name}-bandwidth", type=float, default=bandwidth)
    lines = report(json.loads((RESULTS / "scale.json").read_text()), parser.parse_args())
    (RESULTS / "scale_model.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
