"""Learning in bfloat16 and in float32 at equal samples: the reward at 2, 4 and 8 nats, and the objective at the end.

python benchmarks/precision_curves.py run [--tasks sums kind] [--precisions float32 bfloat16] [--seeds 0 1 2]
                                          [--results FILE]
python benchmarks/precision_curves.py show

`run` adds a line per run to benchmarks/results/precision_curves.jsonl and leaves out what stands there already, so it
can be stopped and started again; runs beside each other need a FILE each. `show` writes
benchmarks/results/precision_curves.md. A run is as long as its number of responses, so a slow or shared machine changes
nothing. The tasks are those of defaults_tasks.py, with PPO in batches of 8, and a price of KL so low that a run passes
8 nats where it can.

The rule: bfloat16 learns as float32 does where, for each task, the means over the seeds of every number of the table
differ by at most one standard deviation of float32's seeds.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from bench import machine
from defaults import Recorder
from defaults_tasks import agent_of
from konic.finetuning import KonicFinetuningEngine

RESULTS = Path(__file__).parent / "results" / "precision_curves.jsonl"
ITERATIONS = {"sums": 40, "kind": 40}
TOKENS = {"sums": 12, "kind": 24}
TRAINING = {"batch_size": 8, "kl_penalty_weight": 0.01, "kl_limit": None}
NATS = (2, 4, 8)
WINDOW = 6
"""Iterations that a number is a mean of."""


def run(options):
    done = {(row["task"], row["precision"], row["seed"]) for row in read(options.results)}
    for task in options.tasks:
        for seed in options.seeds:
            for precision in options.precisions:
                if (task, precision, seed) in done:
                    continue
                recorder = Recorder(float("inf"))
                agent = agent_of(task, {**TRAINING, "seed": seed, "precision": precision}, dtype=None)
                agent = agent.with_settings({"generation_config": {"max_new_tokens": TOKENS[task]}})
                with tempfile.TemporaryDirectory() as folder:
                    engine = KonicFinetuningEngine.from_agent(agent, checkpoint_dir=folder, callback=recorder)
                    engine.train(ITERATIONS[task])
                row = {"task": task, "precision": precision, "seed": seed, "machine": machine()}
                row |= {"day": time.strftime("%Y-%m-%d"), "iterations": recorder.rows}
                with options.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def read(results=RESULTS):
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def numbers_of(row):
    """The numbers of a run by name; None where it never reached so many nats."""
    iterations = row["iterations"]
    means = [
        {name: statistics.fmean(each[name] for each in iterations[end - WINDOW : end])
         for name in ("reward_mean", "kl_per_response", "objective")}
        for end in range(WINDOW, len(iterations) + 1)
    ]  # fmt: skip
    numbers = {}
    for nats in NATS:
        reached = next((each for each in means if each["kl_per_response"] >= nats), None)
        numbers[f"reward at {nats} nats"] = reached and reached["reward_mean"]
    return numbers | {"reward at the end": means[-1]["reward_mean"], "J at the end": means[-1]["objective"]}


def compare(rows, task):
    """Lines of the table for a task, and whether each number of both precisions agrees."""
    runs = {each: [numbers_of(row) for row in rows if (row["task"], row["precision"]) == (task, each)]
            for each in ("float32", "bfloat16")}  # fmt: skip
    lines, agrees = [], []
    for name in next(iter(runs["float32"]), {}):
        of = {each: [numbers[name] for numbers in found if numbers[name] is not None] for each, found in runs.items()}
        cells = [" ".join(f"{value:.3f}" for value in values) or "not reached" for values in of.values()]
        if min(map(len, of.values())) < 2:
            verdict = "too few runs"
        else:
            difference = statistics.fmean(of["bfloat16"]) - statistics.fmean(of["float32"])
            deviation = statistics.stdev(of["float32"])
            agrees.append(abs(difference) <= deviation)
            cells += [f"{difference:+.3f}", f"{deviation:.3f}"]
            verdict = "yes" if agrees[-1] else "**no**"
        lines.append(f"| {task} | {name} | {' | '.join(cells + [''] * (4 - len(cells)))} | {verdict} |")
    return lines, agrees


def show():
    rows = sorted(read(), key=lambda row: row["seed"])
    lines = [
        "| task | number | float32, by seed | bfloat16, by seed | difference of means | deviation, float32 | within |",
        "|---|---|---|---|---|---|---|",
    ]
    agrees = []
    for task in ITERATIONS:
        of_task, found = compare(rows, task)
        lines, agrees = lines + of_task, agrees + found
    held = sum(agrees)
    text = [
        "# Learning in bfloat16 and in float32", "",
        "`benchmarks/precision_curves.py`: SmolLM2-135M, LoRA r=8 on q_proj and v_proj, PPO with 4 passes, 8 responses "
        "an iteration, "
        + ", ".join(f"{n} iterations of `{task}` ({TOKENS[task]} tokens)" for task, n in ITERATIONS.items())
        + f"; β = {TRAINING['kl_penalty_weight']}. A number is the mean of {WINDOW} iterations.", "",
        *lines, "",
        f"Within one standard deviation of float32's seeds: {held} of {len(agrees)} numbers. Machines: "
        f"{'; '.join(sorted({row['machine'] for row in rows}))}.",
    ]  # fmt: skip
    RESULTS.with_suffix(".md").write_text("\n".join(text) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "show"))
    parser.add_argument("--tasks", nargs="*", default=list(ITERATIONS), choices=ITERATIONS)
    parser.add_argument("--precisions", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.command == "run":
        run(options)
    if options.results == RESULTS:
        show()


if __name__ == "__main__":
    main()
