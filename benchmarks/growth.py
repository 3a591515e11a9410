"""Time and memory per response token as batches, responses and prompts grow: is there a cliff?

python benchmarks/growth.py writes benchmarks/results/growth.md and docs/growth.png; `draw` the picture alone

SmolLM2-135M with LoRA r=8 on q_proj and v_proj, made-up tokens, one pass; each size by itself, all else small.
"""

import sys
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).parent / "speed"))
from measured import made_up_batch, measured
from turns import THREADS

from bench import machine
from konic.finetuning.config import GenerationConfig, LoraConfig, TrainingConfig
from konic.finetuning.learning.estimators import Advantages
from konic.finetuning.learning.schedule import Schedule
from konic.finetuning.learning.update import make_optimizer, update
from konic.finetuning.models.loading import load_model
from konic.finetuning.models.policy import Policy
from konic.finetuning.rollout.local_sampler import LocalSampler, sample
from konic.finetuning.rollout.rollout import sample_rollout
from konic.finetuning.rollout.sampler import RandomKey, SpecialTokens

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "growth.md"
BATCH, RESPONSE, PROMPT = 8, 32, 16
SIZES = {
    "batch": [(size, RESPONSE, PROMPT) for size in (4, 8, 16, 32, 64)],
    "response tokens": [(BATCH, size, PROMPT) for size in (32, 64, 128, 256, 512)],
    "prompt tokens": [(BATCH, RESPONSE, size) for size in (8, 32, 128, 256, 512)],
}
STAGES = ("sampling", "scoring", "update")


def measure(policy, batch_size, num_tokens, prompt_length, of_one_prompt=False):
    """Seconds of sampling, scoring and update, and megabytes that each adds."""
    generation = GenerationConfig(max_new_tokens=num_tokens, min_new_tokens=num_tokens, temperature=1.0)
    batch, special, key = made_up_batch(batch_size, prompt_length), SpecialTokens((0,), 0), RandomKey(0, 1)
    if of_one_prompt:
        batch.ids[:] = batch.ids[0]
        batch.sample_indices[:] = range(batch_size)
    with measured() as sampling, policy.merged_adapter() as merged:
        sample(merged, policy.tokenizer, batch, generation, special, key)
    with measured() as both:
        rolled = sample_rollout(policy, LocalSampler(policy, special), batch, generation, special, key)
    config = TrainingConfig(batch_size=batch_size, ppo_epochs=1, num_minibatches=1)
    optimizer = make_optimizer(policy, config)
    zeros = torch.zeros_like(rolled.log_probs)
    advantages = Advantages(
        advantages=torch.randn_like(zeros), returns=zeros, mask=rolled.response_mask, has_signal=True,
        value_loss_weight=0.1, kl_loss_weight=0.0,
    )  # fmt: skip
    with measured() as updating:
        update(policy, optimizer, rolled, advantages, config, Schedule(0, 1, 0.0))
    seconds = sampling.seconds, max(0.0, both.seconds - sampling.seconds), updating.seconds
    return seconds, (sampling.added_mb, both.added_mb, updating.added_mb)


def main():
    torch.set_num_threads(THREADS)
    loaded = load_model("smollm2-135m", {}, torch.device("cpu"))
    policy = Policy(loaded, LoraConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj")))
    measure(policy, 4, 8, 8)
    lines = [
        f"SmolLM2-135M in fp32, LoRA r=8, one pass; {machine()}; `python benchmarks/growth.py`. Milliseconds are per "
        "response token, megabytes what is added at the peak.",
        "",
        "| batch | response | prompt | sampling, ms | scoring, ms | update, ms | sampling, MB | update, MB | "
        "update, MB per 1,000 tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    kinds = [(sizes, False) for sizes in SIZES.values()] + [(SIZES["prompt tokens"], True)]
    for sizes, of_one_prompt in kinds:
        for batch_size, num_tokens, prompt_length in sizes:
            seconds, added = measure(policy, batch_size, num_tokens, prompt_length, of_one_prompt)
            cells = [batch_size, num_tokens, f"{prompt_length}, shared by all" if of_one_prompt else prompt_length]
            cells += [f"{1000 * value / (batch_size * num_tokens):.2f}" for value in seconds]
            per_token = 1000 * added[2] / (batch_size * (num_tokens + prompt_length))
            cells += [f"{added[0]:.0f}", f"{added[2]:.0f}", f"{per_token:.0f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
            print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")


def draw():
    """A picture of the table but for its last rows, per token of prompt and response."""
    table = [line.strip("| ").split(" | ") for line in RESULTS.read_text().splitlines()[4:]]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    for axis, (place, (name, sizes)) in zip(axes, enumerate(SIZES.items()), strict=True):
        rows, table = table[: len(sizes)], table[len(sizes) :]
        shares = [int(tokens) / (int(tokens) + int(prompt)) for _, tokens, prompt, *_ in rows]
        drawn = [int(row[place]) for row in rows]
        for column, stage in enumerate(STAGES, start=3):
            values = [float(row[column]) * share for row, share in zip(rows, shares, strict=True)]
            axis.plot(drawn, values, marker="o", label=stage)
        axis.set(xscale="log", yscale="log", xlabel=name, ylim=(0.5, 10))
        axis.set_xticks(drawn, labels=drawn)
        axis.set_yticks([0.5, 1, 2, 5, 10], labels=[0.5, 1, 2, 5, 10])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms per token of prompt and response")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "growth.png", dpi=110)


if __name__ == "__main__":
    if sys.argv[1:] != ["draw"]:
        main()
    draw()
