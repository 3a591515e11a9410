"""An iteration in float32 and in bfloat16: seconds, peak memory, and how far the sampler is from the trainer.

python benchmarks/precision.py [ROUNDS]    writes benchmarks/results/precision.md

Both do the work of `make bench` in turn, each in a process of its own: SmolLM2-135M, LoRA r=8 on q_proj and v_proj,
8 responses of 48 tokens. Run it on a machine that does nothing else.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench import PROMPTS, TOKENS, Process, machine, save_model
from konic.finetuning.models.loading import load_model

RESULTS = Path(__file__).parent / "results" / "precision.md"
WORK = {"ppo": ("PPO, 4 epochs", PROMPTS), "grpo": ("GRPO, 1 pass", PROMPTS[:2])}
PRECISIONS = ("float32", "bfloat16")


def compare(what, prompts, model, rounds, folder):
    """A row of the table for each precision."""
    file = folder / "prompts.txt"
    file.write_text("\n".join(prompts))
    outputs = {each: folder / f"{what}-{each}" for each in PRECISIONS}
    processes = {}
    for each, output in outputs.items():
        output.mkdir()
        processes[each] = Process(sys.executable, "ours.py", [model, file, what, TOKENS, output, each], output / "log")
    for process in processes.values():
        process.step()
    pairs = [[process.step() for process in processes.values()] for _ in range(rounds)]
    ratios = [half / full for full, half in pairs]
    for index, (each, process) in enumerate(processes.items()):
        peak = process.end()["peak_mb"]
        lines = (outputs[each] / "run" / "metrics.jsonl").read_text().splitlines()
        measured = [json.loads(line) for line in lines[1 : 1 + rounds]]  # the first warms up
        sampling, update, gap, size = (
            statistics.median(row[name] for row in measured)
            for name in ("generation_time_sec", "update_time_sec", "sampler_gap", "effective_sample_size")
        )
        whole = statistics.median(pair[index] for pair in pairs)
        of_32 = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})" if index else ""
        yield (
            f"| {WORK[what][0]} | {each} | {whole:.2f} s | {of_32} | {sampling:.2f} s | {update:.2f} s | {peak:.0f} MB "
            f"| {gap:.1e} | {size:.3f} |"
        )


def main(rounds=5):
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loaded = load_model("smollm2-135m", {}, torch.device("cpu"))
        model = save_model(loaded.model, loaded.tokenizer, folder / "model")
        for what, (_, prompts) in WORK.items():
            for line in compare(what, prompts, model, rounds, folder):
                print(line, flush=True)
                lines.append(line)
    text = [
        "# float32 and bfloat16", "",
        f"{machine()}, {time.strftime('%Y-%m-%d')}; `python benchmarks/precision.py {rounds}`. SmolLM2-135M, LoRA r=8 "
        f"on q_proj and v_proj, 8 responses of {TOKENS} tokens. Medians of {rounds} turns each, in one run; the ratio "
        "is of turns that follow each other, with its range. Sampling includes scoring. The gap is the mean difference "
        "between the log-probs of sampler and trainer, in nats per token.", "",
        "| work | precision | iteration | of float32 | sampling | update | peak memory | gap | effective sample size |",
        "|---|---|---|---|---|---|---|---|---|",
        *lines,
    ]  # fmt: skip
    RESULTS.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
