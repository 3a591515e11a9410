"""Where one PPO iteration's time goes: seconds of its stages, and of the operations that take most.

python benchmarks/profile_iteration.py   (with PYTHONPATH at another checkout's src, that one's)

SmolLM2-135M in fp32, LoRA r=8 on q_proj and v_proj, 8 responses of 48 tokens, 4 epochs, as in `make bench`.
"""

import statistics
import time
from itertools import pairwise

import torch
from torch.profiler import ProfilerActivity, profile

from bench import PROMPTS
from konic.finetuning.config import GenerationConfig, LoraConfig, TrainingConfig
from konic.finetuning.data.config import DatasetConfig
from konic.finetuning.data.prompts import make_prompts
from konic.finetuning.data.tokenization import make_prompt_batch
from konic.finetuning.learning.estimators import Advantages
from konic.finetuning.learning.schedule import Schedule
from konic.finetuning.learning.update import make_optimizer, update
from konic.finetuning.models.loading import load_model
from konic.finetuning.models.policy import Policy
from konic.finetuning.rollout.local_sampler import LocalSampler, sample
from konic.finetuning.rollout.rollout import sample_rollout
from konic.finetuning.rollout.sampler import RandomKey, SpecialTokens

torch.set_num_threads(2)
generation = GenerationConfig(max_new_tokens=48, min_new_tokens=48, temperature=1.0)
config = TrainingConfig(batch_size=8, ppo_epochs=4, num_minibatches=1)
lora = LoraConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj"))
policy = Policy(load_model("smollm2-135m", {}, torch.device("cpu")), lora)
special, key = SpecialTokens((0,), 0), RandomKey(0, 1)
prompts = make_prompts(list(PROMPTS), DatasetConfig(), "profile")
batch = make_prompt_batch(prompts, policy.tokenizer, 64, special.pad, policy.device)


def sampled():
    with policy.merged_adapter() as model:
        sample(model, policy.tokenizer, batch, generation, special, key)


def updated(rolled, optimizer):
    zeros = torch.zeros_like(rolled.log_probs)
    advantages = Advantages(
        advantages=torch.randn_like(zeros), returns=zeros, mask=rolled.response_mask, has_signal=True,
        value_loss_weight=0.1, kl_loss_weight=0.0,
    )  # fmt: skip
    update(policy, optimizer, rolled, advantages, config, Schedule(0, 4, 0.0))


def iteration():
    clock = [time.perf_counter()]
    sampled()
    clock.append(time.perf_counter())
    rolled = sample_rollout(policy, LocalSampler(policy, special), batch, generation, special, key)
    clock.append(time.perf_counter())
    updated(rolled, make_optimizer(policy, config))
    clock.append(time.perf_counter())
    sampling, both, updating = (end - start for start, end in pairwise(clock))
    return sampling, both - sampling, updating


iteration()
stages = [statistics.median(values) for values in zip(*(iteration() for _ in range(5)), strict=True)]
print(", ".join(f"{name} {value:.2f} s" for name, value in zip(("sampling", "scoring", "update"), stages, strict=True)))
with profile(activities=[ProfilerActivity.CPU]) as profiled:
    rolled = sample_rollout(policy, LocalSampler(policy, special), batch, generation, special, key)
    updated(rolled, make_optimizer(policy, config))
operations = sorted(profiled.key_averages(), key=lambda entry: -entry.self_cpu_time_total)
total = sum(entry.self_cpu_time_total for entry in operations)
for entry in operations[:8]:
    share = entry.self_cpu_time_total / total
    print(f"| `{entry.key}` | {entry.self_cpu_time_total / 1e6:.2f} s | {share:.0%} | {entry.count:,} |")
