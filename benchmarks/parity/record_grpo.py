"""TRL's GRPOTrainer or RLOOTrainer for two optimizer steps on a tiny model, with every tensor it computes written down.

python benchmarks/parity/record_grpo.py MODELS ARCHITECTURE OUTPUT.safetensors --algorithm rloo --prompts unequal

Runs in an environment that has TRL 1.16 and knows nothing of konic. Both steps learn from the same responses, so the
second has ratios away from 1; each is made of two micro-batches.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from recording import (
    CLIP_RATIO,
    KL_WEIGHT,
    MAX_NEW_TOKENS,
    PROMPTS,
    SEED,
    TEMPERATURE,
    Recording,
    call_and_look,
    compute_norms_in_float64,
    load_tokenizer,
)

RESPONSES_PER_PROMPT = 4
OF_A_ROLLOUT = (
    "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "old_per_token_logps", "ref_per_token_logps",
    "rewards_per_func", "rewards", "advantages", "kl",
)  # fmt: skip
OF_A_LOSS = (
    "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "per_token_logps", "entropies", "per_token_kl",
    "per_token_loss1", "per_token_loss2", "per_token_loss", "per_sequence_loss", "is_region_clipped", "loss",
)  # fmt: skip
OF_AN_INPUT = ("old_per_token_logps", "old_logps", "ref_per_token_logps", "advantages")


def recorded(trainer_class):
    """The trainer, with its rollout and its losses written down as it computes them."""

    class Recorded(trainer_class):
        recording = Recording()
        steps_taken = 0
        scored = ()
        """The log-probs of this step's micro-batches, with their place in the graph."""

        def _generate_and_score_completions(self, inputs):
            call = super()._generate_and_score_completions
            result, found = call_and_look(self, "_generate_and_score_completions", lambda: call(inputs))
            self.recording.add("rollout", {name: found.get(name) for name in OF_A_ROLLOUT})
            return result

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            if result[0].requires_grad:
                result[0].retain_grad()
                self.scored = (*self.scored, result[0])
            return result

        def _compute_loss(self, model, inputs):
            if not self.scored:
                self.recording.add_weights(f"step{self.steps_taken}/weights", model)
            call = super()._compute_loss
            result, found = call_and_look(self, "_compute_loss", lambda: call(model, inputs))
            place = f"step{self.steps_taken}/micro{len(self.scored) - 1}"
            self.recording.add(place, {name: found.get(name) for name in OF_A_LOSS})
            self.recording.add(place, {name: inputs.get(name) for name in OF_AN_INPUT})
            return result

    return Recorded


class BeforeTheStep(TrainerCallback):
    """Writes the gradients down once all micro-batches have added theirs; clipping is off."""

    trainer = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trainer, place = self.trainer, f"step{self.trainer.steps_taken}"
        trainer.recording.add_gradients(f"{place}/gradients", model)
        for index, log_probs in enumerate(trainer.scored):
            trainer.recording.add(f"{place}/micro{index}", {"log_prob_gradients": log_probs.grad})
        trainer.scored, trainer.steps_taken = (), trainer.steps_taken + 1


def rewards(prompts, completions, completion_ids, **_):
    """A number from a response's letters; the first prompt's are all equal, and one of the second has none."""
    found = [sum(ids) / 7 / len(ids) + 0.3 * len(ids) for ids in completion_ids]
    found[:RESPONSES_PER_PROMPT] = [0.1] * RESPONSES_PER_PROMPT
    found[RESPONSES_PER_PROMPT] = None
    return found


def second_rewards(prompts, completions, completion_ids, **_):
    """Another number on another scale; the third response of each group has none."""
    found = [100.0 * (ids[0] % 5) for ids in completion_ids]
    found[2::RESPONSES_PER_PROMPT] = [None] * len(found[2::RESPONSES_PER_PROMPT])
    return found


def shared_options(folder):
    return {
        "output_dir": folder, "seed": SEED, "max_steps": 2, "use_cpu": True, "bf16": False, "fp16": False,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_iterations": 2,
        "num_generations": RESPONSES_PER_PROMPT, "max_completion_length": MAX_NEW_TOKENS, "shuffle_dataset": False,
        "temperature": TEMPERATURE, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0,
        "beta": KL_WEIGHT, "epsilon": CLIP_RATIO, "epsilon_high": CLIP_RATIO, "mask_truncated_completions": False,
        "reward_weights": [1.0], "disable_dropout": True, "gradient_checkpointing": False, "sync_ref_model": False,
        "pad_to_multiple_of": None, "learning_rate": 2e-3, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "optim": "adamw_torch", "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-5, "weight_decay": 0.0,
        "max_grad_norm": 0.0, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
        "use_vllm": False,
    }  # fmt: skip


def grpo_options(scale_rewards):
    """GRPO's loss averaged over the tokens of a step, and its KL without the correction by the ratio."""
    return {
        "loss_type": "dapo", "scale_rewards": scale_rewards, "importance_sampling_level": "token", "delta": None,
        "top_entropy_quantile": 1.0, "use_bias_correction_kl": False, "entropy_coef": 0.0,
        "multi_objective_aggregation": "sum_then_normalize", "off_policy_mask_threshold": None,
    }  # fmt: skip


GSPO = {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
GDPO = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [0.5, 2.0]}
ALGORITHMS = {
    "grpo": (GRPOTrainer, GRPOConfig, grpo_options("group")),
    "dr_grpo": (GRPOTrainer, GRPOConfig, grpo_options("none")),
    "gspo": (GRPOTrainer, GRPOConfig, grpo_options("group") | GSPO),
    "dapo": (GRPOTrainer, GRPOConfig, grpo_options("group") | {"epsilon": 0.2, "epsilon_high": 0.28}),
    "gdpo": (GRPOTrainer, GRPOConfig, grpo_options("group") | GDPO),
    "cispo": (GRPOTrainer, GRPOConfig, grpo_options("group") | {"loss_type": "cispo", "epsilon_high": 5.0}),
    "sapo": (GRPOTrainer, GRPOConfig, grpo_options("group") | {"loss_type": "sapo"}),
    "rloo": (RLOOTrainer, RLOOConfig, {"normalize_advantages": False, "reward_clip_range": None}),
}


def load_policy(models, architecture, attention_dropout):
    config = {} if attention_dropout is None else {"attention_dropout": attention_dropout}
    policy = AutoModelForCausalLM.from_pretrained(models / architecture / "policy", dtype=torch.float64, **config)
    policy.config._name_or_path = str(models / architecture / "reference")  # where the trainer looks for its reference
    return policy


def record(models, architecture, policy, algorithm, prompts, folder):
    """What the trainer computed in its two steps, and the options it had."""
    trainer_class, config_class, own_options = ALGORITHMS[algorithm]
    options = shared_options(folder) | own_options
    callback = BeforeTheStep()
    trainer = recorded(trainer_class)(
        model=policy,
        reward_funcs=[rewards, second_rewards] if algorithm == "gdpo" else rewards,
        args=config_class(**options),
        train_dataset=Dataset.from_dict({"prompt": list(PROMPTS[prompts])}),
        processing_class=load_tokenizer(models, pad_token="<eos>" if architecture == "gpt2" else "<pad>"),
        callbacks=[callback],
    )
    callback.trainer = trainer
    trainer.train()
    return trainer.recording, options


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("architecture", choices=("gpt2", "llama"))
    parser.add_argument("output", type=Path)
    parser.add_argument("--algorithm", choices=tuple(ALGORITHMS), required=True)
    parser.add_argument("--prompts", choices=tuple(PROMPTS), required=True)
    parser.add_argument("--attention-dropout", type=float)
    given = parser.parse_args()
    compute_norms_in_float64()
    policy = load_policy(given.models, given.architecture, given.attention_dropout)
    with tempfile.TemporaryDirectory() as folder:
        recording, options = record(given.models, given.architecture, policy, given.algorithm, given.prompts, folder)
    del options["output_dir"]
    recording.save(given.output, options)


if __name__ == "__main__":
    main()
