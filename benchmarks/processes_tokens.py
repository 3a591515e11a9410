"""Two processes against one in float32: the share of sampled tokens that differ, on SmolLM2-135M and the demo's task.

python benchmarks/processes_tokens.py OUTPUT
python benchmarks/processes_tokens.py FOLDER ALGORITHM      a run, alone or under torchrun

A response that differs in one token goes its own way after it, because each token is sampled given those before it.
"""

import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet

from curves import agent_of
from konic.finetuning import KonicFinetuningCallback, KonicFinetuningEngine

ITERATIONS = 6


def train(folder, algorithm):
    agent = agent_of({"algorithm": algorithm, "max_minutes": None})
    quiet = KonicFinetuningCallback(verbose=False)
    KonicFinetuningEngine.from_agent(agent, checkpoint_dir=folder, callback=quiet).train(ITERATIONS, save_every=0)


def tokens(folder, iteration):
    return pyarrow.parquet.read_table(folder / "completions" / f"{iteration:06d}.parquet")["token_ids"].to_pylist()


def compared(one, two, iteration):
    """Responses that differ, tokens that differ at their place, and all tokens of the one process."""
    pairs = list(zip(tokens(one, iteration), tokens(two, iteration), strict=True))
    different = sum(
        sum(left != right for left, right in zip(a, b, strict=False)) + abs(len(a) - len(b)) for a, b in pairs
    )
    return sum(a != b for a, b in pairs), len(pairs), different, sum(len(a) for a, _ in pairs)


def main(output):
    rows = []
    with tempfile.TemporaryDirectory() as temp:
        for algorithm in ("ppo", "grpo"):
            one, two = Path(temp) / f"{algorithm}-1", Path(temp) / f"{algorithm}-2"
            torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
            for folder, launcher in ((one, []), (two, torchrun)):
                command = [sys.executable, "-W", "ignore", *launcher, __file__, str(folder), algorithm]
                subprocess.run(command, check=True)
            for iteration in range(1, ITERATIONS + 1):
                changed, count, different, total = compared(one, two, iteration)
                share = f"{different / total:.1%}"
                rows.append(f"| {algorithm} | {iteration} | {changed} of {count} | {share} of {total} |")
                print(rows[-1], flush=True)
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), platform.machine())
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    lines = [
        "# Two processes against one in float32", "",
        f"Made by `make processes` on {cpu.partition(':')[2].strip() or cpu}; Python {platform.python_version()}, "
        f"{versions}; gloo.", "",
        "SmolLM2-135M on the demo's task. After the first token that differs, a response goes its own way.", "",
        "| algorithm | iteration | responses that differ | tokens that differ |", "|---|---|---|---|", *rows,
    ]  # fmt: skip
    Path(output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 2 else train(*sys.argv[1:])
