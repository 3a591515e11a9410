"""Several processes against one in float32, on SmolLM2-135M and the demo's task: the numbers of the first optimizer
step, against their limits, and the share of sampled tokens that differ in later iterations.

python benchmarks/processes_tokens.py OUTPUT      ends with an error if a number is above its limit
python benchmarks/processes_tokens.py first_step|training ALGORITHM FOLDER SEED [NUMBERS OF ONE PROCESS]
    a run, alone or under torchrun

A response that differs in one token goes its own way after it, because each token is sampled given those before it. So
the first step is that of the first seed with which every process samples the same tokens.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from bench import machine
from conftest import shake_adapter
from curves import agent_of
from first_step import LIMITS, differences, first_step_recorded, sizes
from konic.finetuning import KonicFinetuningCallback, KonicFinetuningEngine

ALGORITHMS = ("ppo", "grpo")
SIZES = (2, 4)
ITERATIONS = 6
SEEDS = 8
"""Seeds that are tried: how many need it depends on how the processor's library rounds products of few rows."""
MOVED_BY = 0.02
"""Standard deviation of the noise on every trained weight, in the run whose first step is recorded."""


def first_step(folder, algorithm, seed, *of_one):
    """A run whose first step is recorded. It evaluates nothing at its end, which would take longer."""
    # the self-checks refuse a first policy that is not its reference
    settings = {"algorithm": algorithm, "max_minutes": None, "self_checks": False}
    agent = agent_of(settings, seed, held_out=0)
    engine = make_engine(agent, folder)
    shake_adapter(engine._session.learner.policy, MOVED_BY)
    with first_step_recorded(numbers(folder, int(os.environ.get("RANK", "0"))), *of_one):
        engine.train(1, save_every=0)


def training(folder, algorithm, seed):
    """A run of the demo with another algorithm."""
    agent = agent_of({"algorithm": algorithm, "max_minutes": None}, seed)
    make_engine(agent, folder).train(ITERATIONS, save_every=0)


def make_engine(agent, folder):
    folder.mkdir(parents=True, exist_ok=True)
    quiet = KonicFinetuningCallback(verbose=False)
    return KonicFinetuningEngine.from_agent(agent, checkpoint_dir=folder / "run", callback=quiet, device="cpu")


def numbers(folder, rank):
    return folder / f"first-step-{rank}.safetensors"


def launch(what, algorithm, folder, size, seed=0, *of_one):
    """Run a function of RUNS in `size` processes; the folder where it left its files."""
    folder = Path(folder) / f"{what}-{algorithm}-{size}-{seed}"
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(size)] if size > 1 else []
    subprocess.run(
        [sys.executable, "-W", "ignore", *torchrun, __file__, what, algorithm, folder, str(seed), *of_one], check=True
    )
    return folder


def tokens(folder, iteration):
    path = folder / "run" / "completions" / f"{iteration:06d}.parquet"
    return pyarrow.parquet.read_table(path)["token_ids"].to_pylist()


def compared(one, two, iteration):
    """Responses that differ, tokens that differ at their place, and all tokens of the one process."""
    pairs = list(zip(tokens(one, iteration), tokens(two, iteration), strict=True))
    different = sum(
        sum(left != right for left, right in zip(a, b, strict=False)) + abs(len(a) - len(b)) for a, b in pairs
    )
    return sum(a != b for a, b in pairs), len(pairs), different, sum(len(a) for a, _ in pairs)


def first_step_of(algorithm, folder, seed):
    """The numbers of one process, and how far those of each other number of processes are from them.

    Raises:
        AssertionError: A sampled token differs.
    """
    one, columns = numbers(launch("first_step", algorithm, folder, 1, seed), 0), {}
    for size in SIZES:
        several = launch("first_step", algorithm, folder, size, seed, one)
        ranks = [differences(one, numbers(several, rank)) for rank in range(size)]
        columns[f"{algorithm}, {size}"] = {name: max(each[name] for each in ranks) for name in ranks[0]}
    return one, columns


def first_steps(folder):
    """The table of the numbers of the first step, a sentence of their sizes, and those above their limits."""
    columns, kls = {}, []
    for algorithm in ALGORITHMS:
        for seed in range(SEEDS):
            try:
                one, found = first_step_of(algorithm, folder, seed)
                break
            except AssertionError:
                print(f"{algorithm}, seed {seed}: a token differs", flush=True)
        else:
            sys.exit(f"{algorithm}: with none of {SEEDS} seeds do all processes sample the same tokens")
        columns |= found
        kls.append(f"{sizes(one)['exact KL']:.2g} ({algorithm}, seed {seed})")
    rows = [f"| | limit | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for name in next(iter(columns.values())):
        limit = f"{LIMITS[name]:.0e}" if name in LIMITS else ""
        rows.append(f"| {name} | {limit} | {' | '.join(f'{found[name]:.1e}' for found in columns.values())} |")
    print(*rows, sep="\n", flush=True)
    above = [
        f"{column}: {name} is {found[name]:.2g}, above its limit of {limit:g}"
        for column, found in columns.items()
        for name, limit in LIMITS.items()
        if not found[name] <= limit
    ]
    return rows, " and ".join(kls), above


def sampled(folder):
    """The rows of the tokens that differ between two processes and one."""
    rows = []
    for algorithm in ALGORITHMS:
        one, two = (launch("training", algorithm, folder, size) for size in (1, 2))
        for iteration in range(1, ITERATIONS + 1):
            changed, count, different, total = compared(one, two, iteration)
            rows.append(f"| {algorithm} | {iteration} | {changed} of {count} | {different / total:.1%} of {total} |")
            print(rows[-1], flush=True)
    return rows


def main(output):
    with tempfile.TemporaryDirectory() as folder:
        steps, kl, above = first_steps(folder)
        rows = sampled(folder)
    lines = [
        "# Several processes against one in float32", "",
        f"Made by `make processes` (`python benchmarks/processes_tokens.py OUTPUT`) on {machine()}; gloo. SmolLM2-135M "
        "with LoRA r=8 on the demo's task, 16 responses an iteration, one thread in each process.", "",
        "## The first optimizer step", "",
        "A column is an algorithm and a number of processes; each number is the largest of any of them. At the start, "
        "noise is", "added to every weight of the adapter and of the value head, so that no gradient is 0, and the KL "
        f"is {kl} nats per token.", "All sampled tokens are equal: the seed is the first one of "
        "which that is true. The policy's log-probs come from the sampler, the reference's from a pass over whole "
        "sequences, as in", "training. The gradient is that of all trained "
        "weights together, summed over the processes, before it is clipped; the limit is for one rollout, so it is "
        "computed with the log-probs of the one process's sampler, and below once more with each one's own. Adam "
        "divides it by its own size, so that rounding shows more in the change of the weights, which has no limit.",
        "The script ends with an error where a number is above its limit.", "",
        *steps, *(["", "Above the limit:", "", *(f"- {line}" for line in above)] if above else []), "",
        "## Sampled tokens", "",
        "Two processes against one, from a new adapter on. After the first token that differs, a response goes its own "
        "way.", "",
        "| algorithm | iteration | responses that differ | tokens that differ |", "|---|---|---|---|", *rows,
    ]  # fmt: skip
    Path(output).write_text("\n".join(lines) + "\n")
    sys.exit("\n".join(above) or None)


RUNS = {"first_step": first_step, "training": training}

if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        RUNS[sys.argv[1]](Path(sys.argv[3]), sys.argv[2], int(sys.argv[4]), *sys.argv[5:])
