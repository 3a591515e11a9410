"""Memory that the loss needs: over 16,384 response tokens at a vocabulary of 49,152, and for an update of as many.

python benchmarks/memory.py [--tokens 16384] writes benchmarks/results/memory.md
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "speed"))
from measured import made_up_batch, made_up_samples, measured
from turns import THREADS

from bench import machine
from konic.finetuning.config import LoraConfig, TrainingConfig
from konic.finetuning.learning.estimators import Advantages
from konic.finetuning.learning.losses import clipped_policy_loss, log_ratio
from konic.finetuning.learning.schedule import Schedule
from konic.finetuning.learning.update import make_optimizer, update
from konic.finetuning.models.loading import load_model
from konic.finetuning.models.policy import Policy
from konic.finetuning.models.token_scores import score_tokens
from konic.finetuning.rollout.rollout import Rollout, States

RESPONSE = 256
RESULTS = Path(__file__).parent / "results" / "memory.md"


def loss_alone(policy, num_rows):
    """Clipped loss and exact KL, with their gradient, from hidden states that are there."""
    size = policy.language_model.causal_lm.config.hidden_size
    samples = made_up_samples(num_rows, RESPONSE, size)
    ref_hidden, hidden = torch.randn_like(samples.hidden), samples.hidden.requires_grad_()
    mask, advantages = samples.response_mask, torch.randn(samples.response_mask.shape)
    with measured() as found:
        scored = score_tokens(
            policy.language_model, hidden, samples.response_ids, mask, 1.0,
            needs_entropy=False, reference=(policy.reference_logits, ref_hidden),
        )  # fmt: skip
        losses = clipped_policy_loss(
            log_ratio(scored.log_probs, scored.log_probs.detach(), mask), advantages, mask, (0.2, 0.2)
        )
        (losses + 0.05 * scored.kl).sum().backward()
    assert hidden.grad.abs().sum() > 0
    return found


def whole_update(policy, num_rows):
    """One optimizer step of all tokens in micro-batches of 1,024."""
    size = policy.language_model.causal_lm.config.hidden_size
    samples, batch = made_up_samples(num_rows, RESPONSE, size), made_up_batch(num_rows, 1)
    zeros = torch.zeros(samples.response_ids.shape)
    rollout = Rollout(
        batch=batch, samples=samples, records=[], temperature=1.0, max_new_tokens=RESPONSE,
        in_full_precision=True, is_rescored=False, log_probs=zeros, ref_log_probs=zeros, kl=zeros, entropy=zeros,
        values=zeros, states=States.of_all(samples.hidden, torch.randn_like(samples.hidden)),
    )  # fmt: skip
    advantages = Advantages(
        advantages=torch.randn(zeros.shape), returns=zeros, mask=samples.response_mask, has_signal=True,
        value_loss_weight=0.1, kl_loss_weight=0.05,
    )  # fmt: skip
    config = TrainingConfig(
        batch_size=num_rows, ppo_epochs=1, num_minibatches=1, gradient_accumulation_steps=num_rows * RESPONSE // 1024,
        self_checks=False,
    )  # fmt: skip
    optimizer = make_optimizer(policy, config)
    with measured() as found:
        stats = update(policy, optimizer, rollout, advantages, config, Schedule(0, 1, 1e-4))
    assert stats.num_steps == 1
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    loaded = load_model("smollm2-135m", {}, torch.device("cpu"))
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj"))
    policy = Policy(loaded, lora, gradient_checkpointing=True)
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters()) / 2**20
    copy = options.tokens * policy.language_model.vocabulary_size * 4 / 2**20
    rows = [
        ("one fp32 copy of the logits would be", copy, None),
        ("clipped loss and exact KL with their gradient, hidden states given", None, loss_alone),
        ("a whole update in micro-batches of 1,024 tokens, with gradient checkpointing", None, whole_update),
    ]
    lines = [
        f"{options.tokens:,} response tokens, SmolLM2-135M ({weights:.0f} MB of weights), vocabulary "
        f"{policy.language_model.vocabulary_size:,}; {machine()}; `python benchmarks/memory.py`",
        "",
        "| | MB added at the peak | seconds |",
        "|---|---|---|",
    ]
    for name, size, work in rows:
        found = work(policy, options.tokens // RESPONSE) if work else None
        seconds = f"{found.seconds:.1f}" if found else ""
        lines.append(f"| {name} | {found.added_mb if found else size:,.0f} | {seconds} |")
        print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
