"""Memory and open files over 500 iterations of a small model: python benchmarks/long_run.py (`make chaos` runs it).

A checkpoint every 50 iterations, two kept; metrics.jsonl is read whole at each of them, while the run goes on.
Writes benchmarks/results/long_run.md and docs/long_run.png.
"""

import json
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import psutil
import torch

from memory import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import byte_tokenizer, tiny_model
from konic.finetuning import KonicFinetuningCallback
from test_engine import make_engine

HERE = Path(__file__).parent
ITERATIONS = 500
FIRST = 100


class Watching(KonicFinetuningCallback):
    """Notes resident memory, open files and readable lines of metrics after every iteration."""

    def __init__(self, metrics):
        super().__init__(verbose=False)
        self.metrics, self.process = metrics, psutil.Process()
        self.resident_mb, self.open_files = [], []

    def on_iteration_end(self, result):
        self.resident_mb.append(self.process.memory_info().rss / 2**20)
        self.open_files.append(self.process.num_fds())
        if result.iteration % 50 == 0:
            rows = [json.loads(line) for line in self.metrics.read_text().splitlines()]
            assert [row["iteration"] for row in rows] == list(range(1, result.iteration + 1))


def main():
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_model("llama", torch.float32).save_pretrained(folder / "model")
        byte_tokenizer("llama").save_pretrained(folder / "model")
        watching = Watching(folder / "run" / "metrics.jsonl")
        engine = make_engine(str(folder / "model"), folder / "run", callback=watching, eval_every=25)
        engine.train(ITERATIONS, save_every=50, save_total_limit=2)
    memory, files = watching.resident_mb, watching.open_files
    late = memory[FIRST - 1 :]
    growth = max(late) / late[0] - 1
    lines = [f"{machine()}; `make chaos`. A tiny Llama, 8 responses of 8 tokens, a checkpoint every 50 iterations.", ""]
    lines += ["| iteration | resident memory, MB | open files |", "|---|---|---|"]
    lines += [f"| {n} | {memory[n - 1]:.0f} | {files[n - 1]} |" for n in (1, 50, 100, 200, 300, 400, 500)]
    lines += ["", f"From iteration {FIRST} to {ITERATIONS} memory rose by at most {growth:.1%} (allowed: 3 %)."]
    (HERE / "results" / "long_run.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    axes.plot(range(1, ITERATIONS + 1), memory)
    axes.axhspan(late[0], 1.03 * late[0], alpha=0.15, label="3 % above iteration 100")
    axes.set(xlabel="iteration", ylabel="resident memory, MB", ylim=(0, 1.2 * max(memory)))
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE.parent / "docs" / "long_run.png", dpi=150)
    assert growth <= 0.03
    assert max(files[FIRST - 1 :]) <= files[FIRST - 1] + 1


if __name__ == "__main__":
    main()
