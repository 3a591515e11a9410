"""TRL's GRPO on the demo's task for some responses; run in an environment that has TRL (see curves.py).

python benchmarks/peer_trl.py OUTPUT --loss grpo --learning-rate 1e-3 --num-iterations 4 --seed 0 --responses 136

Same model, adapter, prompts, rewards and sampling as `konic demo`, same price of KL. Leaves an adapter at every fifth
of the responses in OUTPUT/{responses}/, and OUTPUT/steps.json with the seconds of training until then.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from konic.demo import build_agent
from konic.finetuning.data.prompts import load_prompts
from konic.finetuning.models.loading import load_model

LOSSES = {
    "grpo": {},
    "dapo": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.0},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "gspo": {
        "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4,
    },
}  # fmt: skip
"""What differs from GRPOConfig's own, whose loss is averaged over tokens; DAPO has no price of KL."""


class Clock(TrainerCallback):
    """Counts the seconds of steps alone, saves the adapter at each part of the responses and stops after the last."""

    def __init__(self, options):
        self.output, self.seconds, self.used, self.steps = options.output, {0: 0.0}, 0.0, 0
        self.passes, self.batch_size = options.num_iterations, options.batch_size
        self.saves = [options.responses * part / options.saves for part in range(1, options.saves + 1)]

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.used += time.perf_counter() - self.started
        self.steps += 1
        batches, unfinished = divmod(self.steps, self.passes)  # a batch is sampled once for all its passes
        responses = batches * self.batch_size
        if not unfinished and responses >= self.saves[0]:
            model.save_pretrained(self.output / str(responses))
            self.seconds[responses] = self.used
            self.saves = [limit for limit in self.saves if limit > responses]
        control.should_training_stop = control.should_training_stop or not self.saves


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--loss", choices=tuple(LOSSES), default="grpo")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--num-iterations", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--responses", type=int, default=272)
    parser.add_argument("--saves", type=int, default=5)
    options = parser.parse_args()

    demo = build_agent()
    composer, generation, lora = demo.get_reward_composer(), demo.get_generation_config(), demo.get_lora_config()
    prompts = [prompt.text for prompt in load_prompts(demo.get_dataset_config()).rows]
    clock = Clock(options)
    trainer = GRPOTrainer(
        model=load_model(demo.get_base_model(), {}, torch.device("cpu")).location,
        args=GRPOConfig(
            output_dir=str(options.output / "trl"), learning_rate=options.learning_rate, seed=options.seed,
            num_iterations=options.num_iterations, per_device_train_batch_size=options.batch_size, num_generations=4,
            max_completion_length=generation.max_new_tokens, temperature=generation.temperature,
            **({"beta": demo.kl_penalty_weight} | LOSSES[options.loss]),
            lr_scheduler_type="constant", max_steps=100_000, use_cpu=not torch.cuda.is_available(), bf16=False,
            tf32=False, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=10,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        reward_funcs=lambda prompts, completions, **_: composer.compose_batch(prompts, completions)[0],
        peft_config=LoraConfig(
            r=lora.r, lora_alpha=lora.lora_alpha, target_modules=list(lora.target_modules), task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    (options.output / "steps.json").write_text(
        json.dumps({"settings": vars(options), "seconds": clock.seconds}, default=str)
    )


if __name__ == "__main__":
    main()
