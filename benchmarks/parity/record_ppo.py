"""TRL's PPOTrainer for two optimizer steps on tiny models, with every tensor it computes written down.

python benchmarks/parity/record_ppo.py MODELS ARCHITECTURE OUTPUT.safetensors --kl-estimator k1

Runs in an environment that has TRL 0.26.2, the last with PPO, and knows nothing of konic. Both steps are epochs over
the same responses, so the second has ratios away from 1. The trainer has its steps inside one long method; what it
holds is read there, from where it calls for the backward pass.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import trl.experimental.ppo.ppo_trainer as ppo_module
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed
from trl.experimental.ppo import PPOConfig, PPOTrainer

from recording import (
    CLIP_RATIO,
    KL_WEIGHT,
    MAX_NEW_TOKENS,
    PROMPTS,
    SEED,
    TEMPERATURE,
    Recording,
    compute_norms_in_float64,
    load_tokenizer,
)

NUM_PROMPTS = 16
"""Of one rollout. The data holds twice as many: at its last batch the trainer would not accumulate gradients."""
OF_A_ROLLOUT = (
    "queries", "query_responses", "responses", "logprobs", "ref_logprobs", "values", "scores", "padding_mask",
    "padding_mask_p1", "kl", "rewards", "advantages", "returns",
)  # fmt: skip
OF_A_LOSS = (
    "micro_batch_inds", "new_logprobs", "vpred", "pg_losses", "pg_losses2", "pg_loss_max", "vf_loss_max", "pg_loss",
    "vf_loss", "loss",
)  # fmt: skip


class Watch:
    """Stands in for the trainer's call of the backward pass, and for its whitening, and writes down what they see."""

    def __init__(self, trainer):
        self.trainer, self.recording = trainer, Recording()
        self.backward, self.whiten = trainer.accelerator.backward, ppo_module.masked_whiten
        self.num_steps = self.num_micro_batches = 0
        trainer.accelerator.backward, ppo_module.masked_whiten = self.see_loss, self.see_advantages

    def see_advantages(self, values, mask, **options):
        self.recording.add("rollout", {"advantages_before_whitening": values})
        return self.whiten(values, mask, **options)

    def see_loss(self, loss):
        found, policy = sys._getframe(1).f_locals, self.trainer.model.policy
        place = f"step{self.num_steps}"
        if self.num_steps == self.num_micro_batches == 0:
            self.recording.add("rollout", {name: found[name] for name in OF_A_ROLLOUT})
        if self.num_micro_batches == 0:
            self.recording.add_weights(f"{place}/weights", policy)
        kept = {"log_prob_gradients": found["new_logprobs"], "value_gradients": found["vpred"]}
        for tensor in kept.values():
            tensor.retain_grad()
        self.backward(loss)
        micro = f"{place}/micro{self.num_micro_batches}"
        self.recording.add(micro, {name: found[name] for name in OF_A_LOSS})
        self.recording.add(micro, {name: tensor.grad for name, tensor in kept.items()})
        self.num_micro_batches += 1
        if self.trainer.accelerator.sync_gradients:
            self.recording.add_gradients(f"{place}/gradients", policy)
            self.num_steps, self.num_micro_batches = self.num_steps + 1, 0


def trainer_options(folder, kl_estimator, num_micro_batches):
    return {
        "output_dir": folder, "seed": SEED, "use_cpu": True, "bf16": False, "fp16": False,
        "total_episodes": NUM_PROMPTS, "per_device_train_batch_size": NUM_PROMPTS // num_micro_batches,
        "gradient_accumulation_steps": num_micro_batches, "num_mini_batches": 1, "num_ppo_epochs": 2,
        "local_rollout_forward_batch_size": NUM_PROMPTS, "response_length": MAX_NEW_TOKENS, "stop_token": "eos",
        "temperature": TEMPERATURE, "kl_coef": KL_WEIGHT, "kl_estimator": kl_estimator, "cliprange": CLIP_RATIO,
        "cliprange_value": 0.2, "vf_coef": 0.5, "gamma": 0.97, "lam": 0.9, "whiten_rewards": False,
        "missing_eos_penalty": 1.0, "num_sample_generations": 0, "gradient_checkpointing": False,
        "learning_rate": 2e-3, "lr_scheduler_type": "constant", "warmup_steps": 0, "optim": "adamw_torch",
        "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-5, "weight_decay": 0.0, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


def load(models, architecture, name, kind=AutoModelForSequenceClassification):
    return kind.from_pretrained(models / architecture / name, dtype=torch.float64)


def record(models, architecture, options, pad_token):
    """What the trainer computed in its two steps."""
    set_seed(SEED)  # the trainer does not, and shuffles its epochs with numpy
    tokenizer = load_tokenizer(models, pad_token=pad_token)
    texts = list(PROMPTS["unequal"]) * (2 * NUM_PROMPTS // len(PROMPTS["unequal"]))
    dataset = Dataset.from_dict({"input_ids": tokenizer(texts).input_ids})
    trainer = PPOTrainer(
        args=PPOConfig(**options),
        processing_class=tokenizer,
        model=load(models, architecture, "policy", AutoModelForCausalLM),
        ref_model=load(models, architecture, "reference", AutoModelForCausalLM),
        reward_model=load(models, architecture, "reward"),
        value_model=load(models, architecture, "value"),
        train_dataset=dataset,
        eval_dataset=dataset,
    )
    watch = Watch(trainer)
    trainer.train()
    return watch.recording


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("architecture", choices=("gpt2", "llama"))
    parser.add_argument("output", type=Path)
    parser.add_argument("--kl-estimator", choices=("k1", "k3"), default="k1")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--pad-token", choices=("<pad>", "<eos>"), default="<pad>")
    given = parser.parse_args()
    compute_norms_in_float64()
    with tempfile.TemporaryDirectory() as folder:
        options = trainer_options(folder, given.kl_estimator, given.micro_batches)
        recording = record(given.models, given.architecture, options, given.pad_token)
    del options["output_dir"]
    recording.save(given.output, options)


if __name__ == "__main__":
    main()
