"""A model of how long an iteration takes on more processes than were measured. It is a model, not a measurement.

python benchmarks/scale_model.py            checks it against scale.json, and writes benchmarks/results/scale_model.md
python benchmarks/scale_model.py --lengths RUN_FOLDER      with the lengths of a real run's responses

The functions are pure: lengths of responses and times of one process in, seconds out. Bandwidths are in bytes per
second, latencies in seconds.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
TOKENS = 48
BYTES_OF_A_TOKEN, BYTES_OF_A_RESPONSE, BYTES_OF_A_STEP = 36, 55, 1063
"""Of a process's messages, as measured: in sampling for each token, in scoring for each response, in each optimizer
step."""


@dataclass(frozen=True)
class Line:
    """Seconds by an amount of work: straight between the measured points, and straight on beyond them."""

    points: tuple[tuple[float, float], ...]

    def __call__(self, amount: float) -> float:
        if len(self.points) == 1:
            return self.points[0][1]
        segments = list(pairwise(self.points))
        (x, y), (next_x, next_y) = next((pair for pair in segments if amount <= pair[1][0]), segments[-1])
        return max(0.0, y + (next_y - y) * (amount - x) / (next_x - x))


@dataclass(frozen=True)
class Worker:
    """What one process needs by itself."""

    decode_step: Line
    """By the number of responses that still grow: a step of sampling, with its share of reading prompts and scoring."""
    optimizer_step: Line
    """By response tokens: forward and backward pass, and the step."""
    rest: Line
    """By the response tokens of all processes: what each process does for the whole batch, such as advantages."""
    steps: int
    """Optimizer steps in an iteration."""
    gradient_bytes: float
    """Of an optimizer step: the adapter's."""


@dataclass(frozen=True)
class Link:
    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Cluster:
    nodes: int
    per_node: int
    inside: Link
    """Gradients between the processes of a node."""
    between: Link
    """Gradients between nodes."""
    talk: Link
    """Messages, which go through CPUs (gloo)."""
    read_seconds: float = 0.0
    """What a process needs to read the message of one other."""

    @property
    def size(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Times:
    """Seconds of an iteration."""

    sampling: float
    update: float
    """Both of the process of average load."""
    waiting: float
    """For the process whose share takes longest, in sampling and in every optimizer step."""
    gradients: float
    messages: float
    rest: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def shares(lengths: Sequence[int], size: int) -> list[Sequence[int]]:
    """The responses of each process: parts in order, as equal as they can be."""
    ends = [len(lengths) * rank // size for rank in range(size + 1)]
    return [lengths[start:end] for start, end in pairwise(ends)]


def sampling_seconds(lengths: Sequence[int], decode_step: Line) -> float:
    """Of a process: every step costs by the responses that still grow, until the longest has ended."""
    growing = [sum(length > step for length in lengths) for step in range(max(lengths, default=0))]
    return sum(map(decode_step, growing))


def ring_seconds(num_bytes: float, size: int, link: Link) -> float:
    """Of a sum over a ring: 2(n - 1) messages in a row, each an n-th of the bytes."""
    return 2 * (size - 1) * (link.latency + num_bytes / size / link.bandwidth)


def sum_seconds(num_bytes: float, cluster: Cluster) -> float:
    """Of a sum over all processes: a ring inside each node, then one of the nodes."""
    inside = ring_seconds(num_bytes, cluster.per_node, cluster.inside)
    return inside + ring_seconds(num_bytes, cluster.nodes, cluster.between)


def message_seconds(num_bytes: float, cluster: Cluster) -> float:
    """Of one message of every process to all others: a barrier in which the first process hears and answers every other
    one in turn, a ring of their sizes, a ring of the messages, and the reading.
    """
    others, talk = cluster.size - 1, cluster.talk
    return others * (4 * talk.latency + num_bytes / talk.bandwidth + cluster.read_seconds)


def iteration(lengths: Sequence[int], worker: Worker, cluster: Cluster) -> Times:
    parts = shares(lengths, cluster.size)
    tokens = [sum(part) for part in parts]
    sampling = [sampling_seconds(part, worker.decode_step) for part in parts]
    update = [worker.optimizer_step(number) if number else 0.0 for number in tokens]
    mean_sampling, mean_update = float(np.mean(sampling)), float(np.mean(update))
    longest = max(map(len, parts)) * max(lengths)
    messages = message_seconds(BYTES_OF_A_TOKEN * longest, cluster)
    messages += message_seconds(BYTES_OF_A_RESPONSE * max(map(len, parts)), cluster)
    messages += worker.steps * message_seconds(BYTES_OF_A_STEP, cluster) + message_seconds(0, cluster)
    return Times(
        sampling=mean_sampling,
        update=worker.steps * mean_update,
        waiting=max(sampling) - mean_sampling + worker.steps * (max(update) - mean_update),
        gradients=worker.steps * sum_seconds(worker.gradient_bytes, cluster),
        messages=messages,
        rest=worker.rest(sum(tokens)),
    )


def stops_scaling(total: Callable[[int], float], most: int, enough: float = 1.25) -> int:
    """The number of processes from which twice as many no longer make an iteration `enough` times faster."""
    size = 1
    while 2 * size <= most and total(size) >= enough * total(2 * size):
        size *= 2
    return size


def drawn_lengths(count: int, mean: float, limit: int, seed: int = 0) -> list[int]:
    """Lengths of responses that end at every token with the same probability, and at the limit."""
    return np.minimum(np.random.default_rng(seed).geometric(1 / mean, count), limit).tolist()


def lengths_of_run(folder: Path) -> list[int]:
    """The lengths of all responses of a run, in order."""
    import pyarrow.parquet

    files = sorted((folder / "completions").glob("[0-9]*.parquet"))
    if not files:
        sys.exit(f"{folder}: it has no completions/, so it is not the folder of a run.")
    tables = [pyarrow.parquet.read_table(file, columns=["token_ids"]) for file in files]
    return [len(ids) for table in tables for ids in table["token_ids"].to_pylist()]


SIZES = ((1, 1), (1, 2), (1, 8), (4, 8), (64, 8))
"""Nodes, and processes on each."""
ADAPTER_BYTES = 1_845_508
"""Of the gradients of SmolLM2-135M with LoRA r=8 on q_proj and v_proj, and its value head, in fp32."""
GPU = {8: (0.194, 0.314), 64: (0.229, 0.397), 256: (0.356, 0.976)}
"""By responses of 48 tokens: seconds of sampling, and of a GRPO iteration with one step, on an H200 (gpu.md)."""


def worker_of(times: dict[int, tuple[float, float]], steps: int, rest: Line) -> Worker:
    """A process from the seconds of sampling and of all optimizer steps, by the number of responses of 48 tokens."""
    return Worker(
        decode_step=Line(tuple((rows, sampling / TOKENS) for rows, (sampling, _) in times.items())),
        optimizer_step=Line(tuple((rows * TOKENS, update / steps) for rows, (_, update) in times.items())),
        rest=rest,
        steps=steps,
        gradient_bytes=ADAPTER_BYTES,
    )


def gpu_worker() -> Worker:
    times = {rows: (sampling, iteration - sampling) for rows, (sampling, iteration) in GPU.items()}
    return worker_of(times, steps=1, rest=Line(((0, 0.0),)))


def cpu_worker(found: dict) -> Worker:
    """One core, from the processor seconds of one process with 4 and with 16 responses."""
    cases = {case["batch"]: case for case in found["cases"] if (case["processes"], case["threads"]) == (1, 1)}
    times = {rows: (cases[rows]["processor"]["sampling"], cases[rows]["processor"]["update"]) for rows in (4, 16)}
    rest = Line(((0, cases[16]["total"] - sum(cases[16]["seconds"].values())),))
    return worker_of(times, found["steps"], rest)


def local_link(found: dict, case: dict) -> Cluster:
    """The two processes of a case, with the link as it was measured there without anything else to do."""
    link = case["link"]
    latency = link["small sum"] / 2
    both = Link(latency, link["large bytes"] / (link["large sum"] - link["small sum"]))
    return Cluster(1, 2, both, both, Link(link["message"] / 4, both.bandwidth), found["read"])


def check(found: dict) -> list[str]:
    """Lines of a table: predicted beside measured, for all that the model was not made from."""
    worker = cpu_worker(found)
    lines = ["| processes | responses | part | predicted | measured | error |", "|---|---|---|---|---|---|"]
    alone = Cluster(1, 1, *[Link(0.0, 1.0)] * 3)
    for case in found["cases"]:
        if case["threads"] > 1 or (case["processes"] == 1 and case["batch"] in (4, 16)):
            continue
        cluster = local_link(found, case) if case["link"] else alone
        times = iteration([TOKENS] * case["batch"], worker, cluster)
        rows = [("sampling", times.sampling, case["processor"]), ("update", times.update, case["processor"])]
        if case["link"]:
            rows += [("gradients", times.gradients, case["seconds"]), ("messages", times.messages, case["seconds"])]
        for part, predicted, measured in rows:
            error = predicted / measured[part] - 1
            lines.append(
                f"| {case['processes']} | {case['batch']} | {part} | {predicted:.3g} s | {measured[part]:.3g} s "
                f"| {error:+.0%} |"
            )
    return lines


def table(worker: Worker, links: Sequence[Link], lengths: Callable[[int], Sequence[int]], read: float) -> list[str]:
    """Lines of a table: an iteration on each size of cluster; `lengths` gives the responses for so many processes."""
    lines = [
        "| processes | responses | iteration | responses/s | sampling | update | waiting | gradients | messages |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for nodes, per_node in SIZES:
        cluster = Cluster(nodes, per_node, *links, read)
        times = iteration(responses := lengths(cluster.size), worker, cluster)
        parts = (times.sampling, times.update, times.waiting, times.gradients, times.messages)
        size = f"{nodes}x{per_node}" if nodes > 1 else str(per_node)
        shown = " | ".join(f"{part:.3g} s" for part in (times.total, *parts))
        total, *more = shown.split(" | ")
        lines.append(f"| {size} | {len(responses):,} | {total} | {float(f'{len(responses) / times.total:.3g}'):,g} | "
                     + " | ".join(more) + " |")  # fmt: skip
    return lines


def report(found: dict, options: argparse.Namespace) -> list[str]:
    def lengths(count: int) -> list[int]:
        if options.lengths is None:
            return drawn_lengths(count, mean=32, limit=TOKENS)
        known = lengths_of_run(options.lengths)
        return [known[index % len(known)] for index in range(count)]

    talk = Link(options.talk_latency, options.talk_bandwidth)
    inside, between = Link(options.inside_latency, options.inside_bandwidth), Link(
        options.between_latency, options.between_bandwidth
    )  # fmt: skip
    drawn = "ended at each token with probability 1/32" if options.lengths is None else "those of a run"
    lines = [
        "# A model of scaling", "",
        f"A model, not a measurement. `python benchmarks/scale_model.py`; lengths: {drawn}, at most {TOKENS} tokens. "
        f"CPU: one core of {found['machine'].partition(' of ')[2]}. GPU: an H200 (gpu.md).", "",
        "## Check against one and two processes", "",
        "Made from one process with 4 and 16 responses. Sampling and update are processor seconds of a process, "
        "gradients and messages are seconds of the clock.", "", *check(found),
    ]  # fmt: skip
    workers = (("CPUs", cpu_worker(found), (talk, talk, talk), 8), ("GPUs", gpu_worker(), (inside, between, talk), 64))
    for name, worker, links, per_process in workers:

        def total(size: int, worker: Worker = worker, links: Sequence[Link] = links) -> float:
            cluster = Cluster(-(-size // 8), min(size, 8), *links, found["read"])
            return iteration(lengths(1024), worker, cluster).total

        stop = stops_scaling(total, 512)
        lines += ["", f"## {name}, 1,024 responses in all", "",
                  f"From {stop} processes on, twice as many make an iteration less than 1.25 times as fast.", "",
                  *table(worker, links, lambda _: lengths(1024), found["read"]),
                  "", f"## {name}, {per_process} responses for each process", "",
                  *table(worker, links, lambda size: lengths(size * per_process), found["read"])]  # noqa: B023  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=Path, help="a run's folder; without it, lengths are drawn")
    for name, latency, bandwidth in (("talk", 1e-4, 1.25e9), ("inside", 1e-5, 3e11), ("between", 2e-5, 2.5e10)):
        parser.add_argument(f"--{name}-latency", type=float, default=latency)
        parser.add_argument(f"--{name}-bandwidth", type=float, default=bandwidth)
    lines = report(json.loads((RESULTS / "scale.json").read_text()), parser.parse_args())
    (RESULTS / "scale_model.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
