"""Time and memory of models of 0.14, 0.5 and 1.5 billion weights: do they stay on one line?

python benchmarks/larger.py run SIZE...    SIZE is 0.14B, 0.5B or 1.5B; adds its row to benchmarks/results/larger.json
python benchmarks/larger.py show           writes benchmarks/results/larger.md

Random weights in fp32, LoRA r=8 on q_proj and v_proj, 8 responses of 32 tokens after 16, one pass. Three iterations of
sampling, scoring and update; the table has their medians. A size per process, so that its memory is its own.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "speed"))
import torch
from measured import made_up_batch, measured
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from turns import THREADS

from bench import machine, rates
from konic.finetuning.config import GenerationConfig, LoraConfig, TrainingConfig
from konic.finetuning.learning.estimators import Advantages
from konic.finetuning.learning.schedule import Schedule
from konic.finetuning.learning.update import make_optimizer, update
from konic.finetuning.models.decode_probe import choose_plan
from konic.finetuning.models.loading import LoadedModel, load_model
from konic.finetuning.models.policy import Policy
from konic.finetuning.rollout.local_sampler import LocalSampler
from konic.finetuning.rollout.rollout import sample_rollout
from konic.finetuning.rollout.sampler import RandomKey, SpecialTokens

RESULTS = Path(__file__).parent / "results" / "larger.json"
BATCH, RESPONSE, PROMPT, ITERATIONS = 8, 32, 16, 3


def qwen2(hidden_size, intermediate_size, num_hidden_layers, num_attention_heads):
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=hidden_size, intermediate_size=intermediate_size, num_key_value_heads=2,
        num_hidden_layers=num_hidden_layers, num_attention_heads=num_attention_heads, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def smollm2():
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


MODELS = {
    "0.14B": ("SmolLM2-135M", smollm2),
    "0.5B": ("Qwen2.5-0.5B", lambda: qwen2(896, 4864, 24, 14)),
    "1.5B": ("Qwen2.5-1.5B", lambda: qwen2(1536, 8960, 28, 12)),
}


def iteration(policy, response):
    """Seconds of sampling, scoring and update, and the megabytes that sampling with scoring, and the update, add."""
    generation = GenerationConfig(max_new_tokens=response, min_new_tokens=response)
    batch, special, sampling = made_up_batch(BATCH, PROMPT), SpecialTokens((0,), 0), []

    def sampler(*arguments):
        start = time.perf_counter()
        samples = LocalSampler(policy, special)(*arguments)
        sampling.append(time.perf_counter() - start)
        return samples

    with measured() as both:
        rolled = sample_rollout(policy, sampler, batch, generation, special, RandomKey(0, 1))
    config, zeros = TrainingConfig(batch_size=BATCH, ppo_epochs=1), torch.zeros_like(rolled.log_probs)
    advantages = Advantages(
        advantages=torch.randn_like(zeros), returns=zeros, mask=rolled.response_mask, has_signal=True,
        value_loss_weight=0.1, kl_loss_weight=0.0,
    )  # fmt: skip
    with measured() as updating:
        update(policy, make_optimizer(policy, config), rolled, advantages, config, Schedule(0, 1, 0.0))
    return (*sampling, both.seconds - sampling[0], updating.seconds), (both.added_mb, updating.added_mb)


def run(size):
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    bandwidth, flops = rates(3)
    tokenizer = load_model("smollm2-135m", {}, torch.device("cpu")).tokenizer
    loaded = LoadedModel(model=MODELS[size][1]().eval(), tokenizer=tokenizer, name=size, location=size)
    policy = Policy(loaded, LoraConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj")))
    with policy.merged_adapter() as merged:
        policy.decode_plan = choose_plan(merged.causal_lm, BATCH, RESPONSE, "auto")
    iteration(policy, 1)
    turns = [iteration(policy, RESPONSE) for _ in range(ITERATIONS)]
    seconds, added = (
        [statistics.median(values) for values in zip(*part, strict=True)] for part in zip(*turns, strict=True)
    )
    weights = sum(weight.numel() for weight in loaded.model.parameters())
    row = {
        "weights": weights, "head": loaded.model.get_output_embeddings().weight.numel(), "seconds": seconds,
        "added_mb": added, "plan": asdict(policy.decode_plan), "bandwidth": bandwidth, "flops": flops,
        "is_packed": policy.language_model.prepacking(BATCH, RESPONSE) is not None, "machine": machine(),
        "day": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(found | {size: row}, indent=1) + "\n")
    print(size, [f"{value:.1f}" for value in seconds], [f"{value:.0f}" for value in added], row["plan"], flush=True)


def show():
    """The table of all sizes, each relative to what its weights make of the smallest one's figures."""
    found = json.loads(RESULTS.read_text())
    first = found["0.14B"]
    lines = [
        f"{first['machine']}, {first['day']}; `python benchmarks/larger.py`. Random weights in fp32, LoRA r=8, {BATCH} "
        f"responses of {RESPONSE} tokens after {PROMPT}, one pass; medians of {ITERATIONS} iterations. Milliseconds "
        "are per response token; in brackets their ratio to those of the smallest model times that of the weights. "
        "The floor of sampling reads the weights once a step; that of scoring and update multiplies.",
        "",
        "| shape of | weights | head's share | layout | sampling, ms | floor | scoring, ms | update, ms | floor of "
        "both | sampling adds | update adds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size, row in found.items():
        growth, each = row["weights"] / first["weights"], 1000 / (BATCH * RESPONSE)
        cells = [
            f"{value * each:.2f} ({value / before / growth:.2f})"
            for value, before in zip(row["seconds"], first["seconds"], strict=True)
        ]
        reading = each * RESPONSE * 4 * row["weights"] / row["bandwidth"]
        passes = 2 * BATCH * (PROMPT + RESPONSE) * row["weights"] / row["flops"]  # one forward
        layout = row["plan"]["layout"] if row["is_packed"] else "plain: no memory for a copy"
        lines.append(
            f"| {MODELS[size][0]} | {row['weights'] / 1e6:.0f} M | {row['head'] / row['weights']:.0%} | {layout} | "
            f"{cells[0]} | {reading:.2f} | {cells[1]} | {cells[2]} | {3 * passes * each:.2f} | "
            f"{row['added_mb'][0]:.0f} MB | {row['added_mb'][1]:.0f} MB |"
        )
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        for size in sys.argv[2:]:
            run(size)
    show()
