"""A vLLM server as the sampler against konic's own, on SmolLM2-135M: the gap of log-probs, the times, the reward.

python benchmarks/vllm_check.py PYTHON_WITH_VLLM OUTPUT
"""

import contextlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from konic.demo import MovieReviewRewards
from konic.finetuning import (
    DatasetConfig,
    GenerationConfig,
    KonicFinetuningAgent,
    KonicFinetuningCallback,
    KonicFinetuningEngine,
    LoraConfig,
    TrainingConfig,
)
from konic.finetuning.rollout.local_sampler import LocalSampler
from konic.finetuning.rollout.vllm_sampler import VllmSampler
from konic.finetuning.rollout.vllm_weights import ServedWeights

ITERATIONS, BATCH_SIZE, MAX_NEW_TOKENS = 3, 8, 48
python, output = sys.argv[1:]
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB; without it vLLM takes nearly all memory of the machine
seconds = {}


def timed(owner, name, key):
    """Add the time of each call of a method to `seconds[key]`."""
    original = getattr(owner, name)

    def call(*arguments, **named):
        start = time.perf_counter()
        result = original(*arguments, **named)
        seconds.setdefault(key, []).append(time.perf_counter() - start)
        return result

    setattr(owner, name, call)


def train(lora, **generation):
    """The iterations of a GRPO run, and the times of its parts."""
    seconds.clear()
    agent = KonicFinetuningAgent(
        base_model="smollm2-135m",
        reward_composer=MovieReviewRewards(),
        lora_config=LoraConfig(r=8, target_modules=("q_proj", "v_proj")) if lora else None,
        dataset_config=DatasetConfig(),
        training_config=TrainingConfig(algorithm="grpo", batch_size=BATCH_SIZE, ppo_epochs=2),
        generation_config=GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, max_prompt_length=64, **generation),
    )
    with tempfile.TemporaryDirectory() as run:
        quiet = KonicFinetuningCallback(verbose=False)
        engine = KonicFinetuningEngine.from_agent(agent, checkpoint_dir=run, device="cpu", callback=quiet)
        history = engine.train(ITERATIONS, save_every=0).history
    return history, {name: list(values) for name, values in seconds.items()}


def show(values, digits=2):
    return " ".join(f"{value:.{digits}f}" for value in values)


timed(LocalSampler, "__call__", "sampling")
timed(VllmSampler, "__call__", "sampling")
timed(ServedWeights, "load", "weights")

CASES = {
    "konic, LoRA": (True, {}),
    "vLLM, LoRA": (True, {"engine": "vllm", "vllm_python": python}),
    "vLLM, every weight": (False, {"engine": "vllm", "vllm_python": python}),
}
there = subprocess.run(
    [python, "-c", "from importlib.metadata import version as v, distributions as d\n"
     "name = next(x.name for x in d() if x.name in ('vllm', 'vllm-cpu'))\n"
     "print(name, v(name), ', torch', v('torch'), ', transformers', v('transformers'))"],
    capture_output=True, text=True, check=True,
).stdout.strip().replace(" ,", ",")  # fmt: skip
cpu = platform.machine()
with contextlib.suppress(OSError, StopIteration):
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line for line in lines if "model name" in line).partition(":")[2].strip()
versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "peft"))
heads = [
    "engine", "sampling, s", "tokens per s", "loading the weights, s", "scoring, s", "update, s",
    "gap, nats per token", "effective sample size", "KL, nats per token", "reward",
]  # fmt: skip
rows = []
for name, (lora, generation) in CASES.items():
    history, parts = train(lora, **generation)
    loads = parts.get("weights", [0.0] * ITERATIONS)
    sampling = [whole - load for whole, load in zip(parts["sampling"], loads, strict=True)]
    scoring = [r.generation_time_sec - whole for r, whole in zip(history, parts["sampling"], strict=True)]
    tokens = [r.response_length_mean * r.num_samples for r in history]
    rows.append([
        name, show(sampling), show([n / s for n, s in zip(tokens, sampling, strict=True)], 0), show(loads),
        show(scoring), show([r.update_time_sec for r in history]),
        " ".join(f"{r.sampler_gap:.1e}" for r in history), show([r.effective_sample_size for r in history], 3),
        show([r.kl_divergence for r in history], 4), show([r.reward_mean for r in history]),
    ])  # fmt: skip
    print("|", " | ".join(rows[-1]), "|", flush=True)
    table = [heads, ["---"] * len(heads), *rows]
    Path(output).write_text(
        "# vLLM as a sampler, on a CPU\n\n"
        f"Made by `make vllm` on {torch.get_num_threads()} threads of {cpu}. konic: Python "
        f"{platform.python_version()}, {versions}.\nThe server: {there}.\n\n"
        f"{ITERATIONS} iterations of GRPO on SmolLM2-135M-Instruct in fp32, {BATCH_SIZE} responses of at most "
        f"{MAX_NEW_TOKENS} tokens, LoRA r=8 on q_proj\nand v_proj or every weight, with the same settings and seed; "
        "one number for each iteration.\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in table) + "\n"
    )
