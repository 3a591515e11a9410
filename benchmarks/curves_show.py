"""Points of runs -> the tables and the picture of docs/algorithms.md: what curves.py measured."""

import math
import re
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
BUDGETS = (2, 4, 8, 16)
MOST_KL = 25
"""Nats that the picture shows; a run may pay many more."""
START, END = "<!-- curves: made by make curves -->", "<!-- end of curves -->"


def spread(values):
    """Mean and standard deviation, as text."""
    present = [value for value in values if not math.isnan(value)]
    if not present:
        return "–"
    deviation = f" ± {statistics.stdev(present):.2f}" if len(present) > 1 else ""
    return f"{statistics.mean(present):.2f}{deviation}"


def best_within(points, budget):
    """The highest held-out reward of a run's points that paid at most so many nats per response."""
    return max((point["reward"] for point in points if point["kl"] <= budget), default=math.nan)


def by_system(rows):
    """Points by system and seed: konic's systems first, then the peer's, by name."""
    runs = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: (row["system"].startswith("TRL"), row["system"], row["seed"])):
        runs[row["system"]][row["seed"]].append(row)
    return runs


def final_table(runs):
    lines = [
        "| system | seeds | responses | reward before | after | nats per response | tokens | distinct-2 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, seeds in runs.items():
        first, last = [points[0] for points in seeds.values()], [points[-1] for points in seeds.values()]
        cells = [spread([point["reward"] for point in first])]
        cells += [spread([point[key] for point in last]) for key in ("reward", "kl", "tokens", "distinct_2")]
        samples = statistics.mean(point["samples"] for point in last)
        lines.append(f"| {name} | {len(seeds)} | {samples:.0f} | {' | '.join(cells)} |")
    return lines


def budget_table(runs):
    lines = [
        "| system | " + " | ".join(f"at most {budget} nats" for budget in BUDGETS) + " |",
        "|---|" + "---|" * len(BUDGETS),
    ]
    for name, seeds in runs.items():
        cells = [spread([best_within(points, budget) for points in seeds.values()]) for budget in BUDGETS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def judge_table(runs):
    """What no reward saw, before and after training; only of runs that were judged."""
    names = ("base_loss", "context_loss", "opinion", "distinct_2")
    lines = [
        "| system | seeds | nats per token under the base model | after four real opinions | share of good opinions | "
        "distinct-2 |",
        "|---|---|---|---|---|---|",
    ]
    for system, seeds in runs.items():
        judged = [points for points in seeds.values() if names[0] in points[-1]]
        if judged:
            cells = [
                f"{spread([points[0][name] for points in judged])} → {spread([points[-1][name] for points in judged])}"
                for name in names
            ]
            lines.append(f"| {system} | {len(judged)} | {' | '.join(cells)} |")
    return [*lines, ""] if len(lines) > 2 else []


def picture(runs, path):
    """Reward over KL: a line per run, a colour per system; the peer's are grey to black and dashed."""
    figure, axis = plt.subplots(figsize=(10, 6), layout="constrained")
    peers = [name for name in runs if name.startswith("TRL")]
    for name, seeds in runs.items():
        is_peer = name in peers
        shade = 0.1 + 0.65 * peers.index(name) / max(1, len(peers) - 1) if is_peer else 0
        colour = str(shade) if is_peer else plt.get_cmap("tab20")(list(runs).index(name) % 20)
        for index, points in enumerate(seeds.values()):
            axis.plot(
                [point["kl"] for point in points], [point["reward"] for point in points], color=colour, marker=".",
                linestyle="--" if is_peer else "-", linewidth=1.2, alpha=0.8, label=name if index == 0 else None,
            )  # fmt: skip
    axis.set(xlabel="KL paid (nats per response)", ylabel="held-out reward", xlim=(0, MOST_KL))
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def show(rows):
    """Write the tables between their marks in docs/algorithms.md, and docs/curves.png."""
    runs = by_system(rows)
    machines = sorted({row["machine"] for row in rows})
    tables = [*final_table(runs), "", *budget_table(runs), "", *judge_table(runs)]
    text = "\n".join([START, "", *tables, f"Machine: {'; '.join(machines)}.", "", END])
    document = DOCS / "algorithms.md"
    whole = document.read_text(encoding="utf-8")
    document.write_text(re.sub(f"{START}.*{END}", lambda _: text, whole, flags=re.DOTALL), encoding="utf-8")
    picture(runs, DOCS / "curves.png")
    print(text)
