"""The formulas of scale_model.py: lengths of responses, times of one process and links in; seconds out.

All but those that read files are pure. Lengths and tokens are counts, times are seconds, sizes bytes; bandwidths are in
bytes per second.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import numpy as np

BYTES_OF_A_TOKEN, BYTES_OF_A_RESPONSE, BYTES_OF_A_STEP = 36, 55, 1063
"""Of a process's messages, as measured: in sampling for each token, in scoring for each response, in each optimizer
step."""
BYTES_OF_A_SCORE = 66
"""Of the first process's message with the scores of all responses: for each, three numbers of all digits, and JSON."""


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

    prompts: Line
    """By the number of responses: seconds until the first token, for packing the weights and reading prompts."""
    decode_step: Line
    """By the number of responses that still grow: a step of sampling, with its share of scoring."""
    optimizer_step: Line
    """By response tokens: forward and backward pass, and the step."""
    rest: Line
    """By the response tokens of all processes: what each process does for all responses, such as texts, advantages and
    metrics. More processes do not make it shorter."""
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
    """Messages, which go through CPUs (gloo): seconds for each other process, and bytes per second."""

    @property
    def size(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Network:
    """What a cluster of any size is made of; see Cluster."""

    inside: Link
    between: Link
    talk: Link

    def cluster(self, nodes: int, per_node: int) -> Cluster:
        return Cluster(nodes, per_node, self.inside, self.between, self.talk)


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
    """What each process does for all responses."""

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def shares(lengths: Sequence[int], size: int) -> list[Sequence[int]]:
    """The responses of each process: parts in order, as equal as they can be."""
    ends = [len(lengths) * rank // size for rank in range(size + 1)]
    return [lengths[start:end] for start, end in pairwise(ends)]


def most_uneven(lengths: Sequence[int], count: int) -> Sequence[int]:
    """The block of so many lengths in a row whose two halves differ most in their sum."""
    blocks = [lengths[start : start + count] for start in range(0, len(lengths) - count + 1, count)]
    return max(blocks, key=lambda block: abs(sum(block[: count // 2]) - sum(block[count // 2 :])))


def sampling_seconds(lengths: Sequence[int], prompts: Line, decode_step: Line) -> float:
    """Of a process: the prompts, and steps that cost by the responses that still grow, until the longest has ended."""
    if not lengths:
        return 0.0
    ended = np.bincount(lengths).cumsum()[:-1]  # responses of at most so many tokens
    return prompts(len(lengths)) + sum(decode_step(len(lengths) - int(count)) for count in ended)


def ring_seconds(num_bytes: float, size: int, link: Link) -> float:
    """Of a sum over a ring: 2(n - 1) messages in a row, each an n-th of the bytes."""
    return 2 * (size - 1) * (link.latency + num_bytes / size / link.bandwidth)


def sum_seconds(num_bytes: float, cluster: Cluster) -> float:
    """Of a sum over all processes: a ring inside each node, then one of the nodes."""
    inside = ring_seconds(num_bytes, cluster.per_node, cluster.inside)
    return inside + ring_seconds(num_bytes, cluster.nodes, cluster.between)


def message_seconds(num_bytes: float, cluster: Cluster) -> float:
    """Of one message of every process to all others, by the bytes of the longest, to which all are filled up.

    A barrier in which the first process hears and answers every other one in turn, a ring of the sizes, a ring of the
    messages, and the reading.
    """
    return (cluster.size - 1) * (cluster.talk.latency + num_bytes / cluster.talk.bandwidth)


def iteration(lengths: Sequence[int], worker: Worker, cluster: Cluster) -> Times:
    parts = shares(lengths, cluster.size)
    tokens = [sum(part) for part in parts]
    sampling = [sampling_seconds(part, worker.prompts, worker.decode_step) for part in parts]
    update = [worker.optimizer_step(number) if number else 0.0 for number in tokens]
    mean_sampling, mean_update = float(np.mean(sampling)), float(np.mean(update))
    rows = max(map(len, parts))
    messages = [BYTES_OF_A_TOKEN * rows * max(lengths), BYTES_OF_A_RESPONSE * rows, BYTES_OF_A_SCORE * len(lengths)]
    messages += [BYTES_OF_A_STEP] * worker.steps + [0]  # the last one says whether the run goes on
    return Times(
        sampling=mean_sampling,
        update=worker.steps * mean_update,
        waiting=max(sampling) - mean_sampling + worker.steps * (max(update) - mean_update),
        gradients=worker.steps * sum_seconds(worker.gradient_bytes, cluster),
        messages=sum(message_seconds(num_bytes, cluster) for num_bytes in messages),
        rest=worker.rest(sum(tokens)),
    )


def total_seconds(lengths: Sequence[int], worker: Worker, network: Network, size: int) -> float:
    """Of an iteration of so many processes, up to 8 on a node."""
    return iteration(lengths, worker, network.cluster(-(-size // 8), min(size, 8))).total


def stops_scaling(total: Callable[[int], float], most: int, enough: float = 1.25) -> int:
    """The number of processes from which twice as many no longer make an iteration `enough` times faster."""
    size = 1
    while 2 * size <= most and total(size) >= enough * total(2 * size):
        size *= 2
    return size


def drawn_lengths(known: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """So many of the known lengths, each drawn from all of them."""
    return np.random.default_rng(seed).choice(known, count).tolist()


def read_lengths(source: Path, limit: int) -> list[int]:
    """The lengths of all responses of a file like lengths.json or of a run's folder, in order, cut at a limit."""
    lengths = lengths_of_run(source) if source.is_dir() else json.loads(source.read_text())["lengths"]
    return [min(length, limit) for length in lengths]


def lengths_of_run(folder: Path) -> list[int]:
    """The lengths of all responses of a run, in order."""
    import pyarrow.parquet

    files = sorted((folder / "completions").glob("[0-9]*.parquet"))
    if not files:
        sys.exit(f"{folder}: it has no completions/, so it is not the folder of a run.")
    tables = [pyarrow.parquet.read_table(file, columns=["token_ids"]) for file in files]
    return [len(ids) for table in tables for ids in table["token_ids"].to_pylist()]
