"""Settings on tasks that no default was tuned on: reward − β · KL, the reward and the KL as responses are sampled.

python benchmarks/defaults.py run [--responses 320] [--dtype bfloat16] [--seeds 0 1 2] [--tasks kind ...]
                                  [--settings NAME ...] [--judge FOLDER] [--results FILE] [--seconds N]
python benchmarks/defaults.py show

`run` adds a line per run to benchmarks/results/defaults.jsonl and leaves out what stands there already, so it can be
stopped and started again. A run is as long as its number of responses, not its time: so it learns the same on a slower
or a shared machine. `show` writes the table of docs/defaults.md. The tasks are in defaults_tasks.py. Runs beside each
other need a FILE each. `--seconds` also ends a run after so many seconds of training.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench import machine
from defaults_tasks import TASKS, agent_of
from konic.finetuning import KonicFinetuningCallback, KonicFinetuningEngine
from konic.finetuning.algorithms import ALGORITHMS
from konic.finetuning.results.intervals import mean

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results" / "defaults.jsonl"
DOCS, BEGIN, END = ROOT / "docs" / "defaults.md", "<!-- defaults: made by make defaults -->", "<!-- end of defaults -->"
CONSTANT = {"lr_scheduler": "constant"}
SETTINGS = {
    "defaults": {},
    "constant learning rate": CONSTANT,
    "falling to 0": {"lr_scheduler": "linear"},
    "KL in the reward": {"kl_placement": "reward"} | CONSTANT,
    "batches of 4": {"batch_size": 4} | CONSTANT,
    "no limit": {"kl_limit": None} | CONSTANT,
    "1 pass": {"ppo_epochs": 1} | CONSTANT,
    "learning rate 5e-4": {"learning_rate": 5e-4},
    "learning rate 2e-3": {"learning_rate": 2e-3},
    "batches of 4, 5e-5": {"batch_size": 4, "learning_rate": 5e-5},
    **{name: {"algorithm": name} | CONSTANT for name in ALGORITHMS if name != "ppo"},
}
"""The last ones, and those that name a rate, were measured with a constant one."""
WINDOW = 48
"""Responses that a number of the table is a mean of."""
LOOKS = (64, 320, 960)
"""Numbers of responses at which the table looks."""


class Recorder(KonicFinetuningCallback):
    """Keeps the numbers of every iteration, with the seconds of training so far."""

    def __init__(self, until):
        super().__init__(verbose=False)
        self.seconds, self.rows, self.until = 0.0, [], until

    def should_stop_early(self, result):
        return self.seconds >= self.until

    def on_iteration_end(self, result):
        self.seconds += result.total_time_sec
        names = ("reward_mean", "kl_per_response", "objective", "response_length_mean", "distinct_fraction")
        row = {name: round(getattr(result, name), 4) for name in names}
        self.rows.append({"seconds": round(self.seconds, 1), "checks": list(result.checks)} | row)


def train_judge(folder):
    """A classifier trained on the film opinions of examples/data."""
    command = [str(Path(sys.executable).with_name("konic")), "reward-model", "train"]
    data = str(ROOT / "examples" / "data" / "film_opinions.csv")
    columns = ["--base", "all-minilm-l6-v2", "--text", "text", "--label", "label", "--output", str(folder)]
    subprocess.run([*command, data, *columns], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return str(folder)


def run(options):
    done = {(row["task"], row["settings"], row["seed"]) for row in read(options.results)}
    where = f"{torch.cuda.get_device_name()}; {machine()}" if torch.cuda.is_available() else machine()
    with tempfile.TemporaryDirectory() as name:
        judge = options.judge
        for seed in options.seeds:
            for settings in options.settings:
                for task in options.tasks:
                    if (task, settings, seed) in done:
                        continue
                    if task == "judge" and judge is None:
                        judge = train_judge(Path(name) / "judge")
                    training = {**SETTINGS[settings], "seed": seed}
                    recorder = Recorder(options.seconds)
                    agent = agent_of(task, training, judge, options.dtype)
                    batch_size = agent.get_training_config().batch_size
                    folder = Path(name) / f"{task}-{len(done)}"
                    engine = KonicFinetuningEngine.from_agent(agent, checkpoint_dir=folder, callback=recorder)
                    engine.train(options.responses // batch_size)
                    row = {"task": task, "settings": settings, "seed": seed, "machine": where}
                    row |= {"day": time.strftime("%Y-%m-%d"), "batch_size": batch_size, "dtype": options.dtype}
                    with options.results.open("a") as file:
                        file.write(json.dumps(row | {"iterations": recorder.rows}) + "\n")
                    done.add((task, settings, seed))
                    print(line_of(row | {"iterations": recorder.rows}), flush=True)


def read(results=RESULTS):
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def window(rows, end, size):
    """Means over the last responses up to iteration `end`."""
    part = rows[max(0, end - size) : end]
    return {name: mean([row[name] for row in part]) for name in ("reward_mean", "kl_per_response", "objective")}


def line_of(row):
    rows, size = row["iterations"], max(1, WINDOW // row["batch_size"])
    start = window(rows, min(size, len(rows)), size)
    cells = [f"{start['reward_mean']:.2f}"]
    for responses in LOOKS:
        count = responses // row["batch_size"]
        if count > len(rows):
            cells.append("")
            continue
        found = window(rows, count, size)
        cells.append(
            f"{found['reward_mean']:.2f} at {found['kl_per_response']:.1f} "
            f"({found['objective'] - start['objective']:+.2f})"
        )
    highest = max(entry["kl_per_response"] for entry in rows)
    told = ", ".join(sorted({f"`{name}`" for entry in rows for name in entry["checks"]}))
    cells += [f"{highest:.1f}", f"{rows[-1]['response_length_mean']:.0f}", told, where_of(row)]
    return f"| {row['task']} | {row['settings']} | {row['seed']} | " + " | ".join(cells) + " |"


def where_of(row):
    """The processor and the dtype, short."""
    name = re.sub(r"^\d+ cores of |\(R\)| Processor$", "", row["machine"].partition(";")[0])
    return f"{name}, {row['dtype']}"


def show():
    names = list(SETTINGS)
    rows = sorted(read(), key=lambda row: (TASKS.index(row["task"]), names.index(row["settings"]), row["seed"]))
    looks = " | ".join(f"{responses} responses" for responses in LOOKS)
    lines = [
        f"| task | settings | seed | reward at first | {looks} | highest KL | tokens at last | findings | on |",
        "|---|---|---|---|" + "---|" * len(LOOKS) + "---|---|---|---|",
        *map(line_of, rows),
        "",
        f"Machines: {'; '.join(sorted({row['machine'] for row in rows}))}.",
    ]
    text = DOCS.read_text()
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    DOCS.write_text("\n".join([before + BEGIN, "", *lines, "", after]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "show"))
    parser.add_argument("--responses", type=int, default=320)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--settings", nargs="*", default=["defaults"], choices=SETTINGS)
    parser.add_argument("--judge", help="the folder of a judge that is trained already")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.command == "run":
        run(options)
    if options.results == RESULTS:
        show()


if __name__ == "__main__":
    main()
