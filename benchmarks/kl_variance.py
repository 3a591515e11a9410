"""How much the KL estimates vary: per token on fixed prefixes, and per response.

python benchmarks/kl_variance.py RUN_FOLDER [--samples 32]     a run of `konic demo` or of its task, which has final/

Per token: at each prefix of one response to every held-out prompt, the estimate's standard deviation over the policy's
whole next-token distribution, computed exactly. Per response: its standard deviation over many responses to each of 16
prompts, within the prompt. Both are means over prefixes and prompts.
"""

import argparse
from pathlib import Path

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from konic.demo import build_agent
from konic.finetuning.data.prompts import load_prompts
from konic.finetuning.data.tokenization import make_prompt_batch
from konic.finetuning.learning.learner import build_learner
from konic.finetuning.learning.losses import k1, k3
from konic.finetuning.models.token_scores import map_tokens
from konic.finetuning.rollout.rollout import sample_rollout
from konic.finetuning.rollout.sampler import RandomKey

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path)
parser.add_argument("--samples", type=int, default=32)
options = parser.parse_args()

agent = build_agent()
learner, generation = build_learner(agent, torch.device("cpu")), agent.get_generation_config()
policy = learner.policy
set_peft_model_state_dict(policy.model, load_file(options.run / "final" / "adapter_model.safetensors"))
prompts = load_prompts(agent.get_dataset_config()).held_out


def respond(prompts, iteration):
    length = generation.max_prompt_length
    batch = make_prompt_batch(prompts, policy.tokenizer, length, learner.special_tokens.pad, policy.device)
    return sample_rollout(
        policy,
        learner.sampler,
        batch,
        generation,
        learner.special_tokens,
        RandomKey(0, iteration),
    )


def deviations(hidden, ref_hidden):
    """Of each estimate at each prefix, and their means: k1, k3, exact."""
    own = (policy.language_model.logits(hidden) / generation.temperature).double().log_softmax(-1)
    ref = (policy.reference_logits(ref_hidden) / generation.temperature).double().log_softmax(-1)
    probabilities, found = own.exp(), []
    for estimate in (k1(own - ref), k3(own - ref)):
        mean = (probabilities * estimate).sum(-1)
        variance = (probabilities * (estimate - mean[:, None]).square()).sum(-1)
        found += [mean, variance.sqrt()]
    return tuple(found)


with torch.no_grad():
    found = []
    for start in range(0, len(prompts), 16):
        rolled = respond(prompts[start : start + 16], 0)
        count = rolled.response_mask.shape[1]
        hidden = policy.language_model.response_hidden(rolled.ids, rolled.mask, count)
        vocabulary = policy.language_model.vocabulary_size
        parts = map_tokens(deviations, rolled.response_mask, vocabulary, hidden, rolled.states.ref_hidden)
        found.append(torch.stack([part[rolled.response_mask] for part in (*parts, rolled.kl.double())]))
    per_token = torch.cat(found, dim=1).mean(dim=1).tolist()
    sums = []
    for index in range(options.samples):
        rolled = respond(prompts[:16], index + 1)
        mask = rolled.response_mask
        log_ratios = (rolled.log_probs - rolled.ref_log_probs).double() * mask
        estimates = (k1(log_ratios), k3(log_ratios) * mask, rolled.kl.double())
        sums.append(torch.stack([estimate.sum(dim=1) for estimate in estimates]))
    sums = torch.stack(sums)  # [samples, 3 estimates, 16 prompts]

k1_mean, k1_deviation, k3_mean, k3_deviation, exact = per_token
spread = sums.std(dim=0).mean(dim=1).tolist()
means = sums.mean(dim=(0, 2)).tolist()
print(
    "| estimate | mean per token | deviation per token at a fixed prefix | mean per response | deviation per response |"
)
print("|---|---|---|---|---|")
rows = [("k1", k1_mean, k1_deviation), ("k3", k3_mean, k3_deviation), ("exact", exact, 0.0)]
for (name, mean, deviation), total, wide in zip(rows, means, spread, strict=True):
    print(f"| {name} | {mean:.4f} | {deviation:.4f} | {total:.2f} | {wide:.2f} |")
