"""The lines of the comparison and how they are judged and printed."""

import json
from dataclasses import dataclass

import torch
from safetensors import safe_open

FP64, FP32 = 1e-9, 1e-5
"""Tolerances: where both sides compute in float64, and where one of them computes in float32."""


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    quantity: str
    measure: str
    difference: float
    tolerance: float | None = None
    """None where the two are not expected to agree: the line is for information."""
    at_least: int | None = None
    """For a count of what the comparison is about: without any it would see nothing."""

    @property
    def is_ok(self):
        if self.at_least is not None:
            return self.difference >= self.at_least
        return self.tolerance is None or self.difference <= self.tolerance

    @property
    def expected(self):
        if self.at_least is not None:
            return f"≥ {self.at_least}"
        return "" if self.tolerance is None else f"≤ {self.tolerance:g}"

    @property
    def verdict(self):
        if self.is_ok:
            return "yes" if self.expected else "shown"
        return "NO"


def count(quantity, entries):
    """How many entries of a tensor are True; there must be some."""
    return Line(quantity, "count", int(entries.sum()), at_least=1)


def largest(quantity, theirs, ours, tolerance, mask=None):
    """The largest absolute difference, over a mask if there is one."""
    difference = (theirs.double() - ours.double()).abs()
    counted = difference if mask is None else difference[mask]
    return Line(quantity, "max abs", counted.max().item(), tolerance)


def relative(quantity, theirs, ours, tolerance):
    """‖theirs − ours‖ / ‖theirs‖ over all entries of two tensors, or of two dicts of tensors with the same names."""
    if isinstance(theirs, dict):
        assert theirs.keys() == ours.keys(), theirs.keys() ^ ours.keys()
        theirs, ours = (torch.cat([part[name].flatten().double() for name in theirs]) for part in (theirs, ours))
    distance = (theirs.double() - ours.double()).norm() / theirs.double().norm()
    return Line(quantity, "relative L2", distance.item(), tolerance)


def worst_weight(quantity, theirs, ours, tolerance):
    """The largest relative L2 distance of one weight's gradient."""
    lines = [relative(name, theirs[name], ours[name], tolerance) for name in theirs]
    return Line(quantity, "relative L2", max(line.difference for line in lines), tolerance)


def unequal(quantity, theirs, ours, tolerance=0.0):
    """How many entries of two boolean tensors differ."""
    return Line(quantity, "entries", float((theirs.bool() != ours.bool()).sum()), tolerance)


def table(rows):
    """Markdown of (system, architecture, line) rows."""
    head = ["system", "architecture", "quantity", "measure", "found", "expected", "ok"]
    body = [
        [system, architecture, line.quantity, line.measure, f"{line.difference:.3g}", line.expected, line.verdict]
        for system, architecture, line in rows
    ]
    widths = [max(len(row[column]) for row in [head, *body]) for column in range(len(head))]
    printed = [head, ["-" * width for width in widths], *body]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in printed
    )


@dataclass(frozen=True)
class Recorded:
    """A recorder's file."""

    tensors: dict
    options: dict
    versions: dict

    @classmethod
    def read(cls, path):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = {name: json.loads(value) for name, value in file.metadata().items()}
        return cls(tensors, **metadata)

    def rollout(self, name):
        return self.tensors[f"rollout/{name}"]

    def step(self, step, name):
        """The micro-batches of a step one after another: tensors joined along the rows, numbers in a row."""
        parts, index = [], 0
        while (tensor := self.tensors.get(f"step{step}/micro{index}/{name}")) is not None:
            parts.append(tensor)
            index += 1
        return torch.cat(parts) if parts[0].ndim else torch.stack(parts)

    def of_weights(self, step, kind):
        """The "weights" or "gradients" of a step by name."""
        prefix = f"step{step}/{kind}/"
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
