"""TRL 0.26.2's PPOTrainer, an iteration per turn: python trl_ppo.py MODEL PROMPTS EPOCHS TOKENS OUTPUT [DTYPE]

Policy with LoRA, its reference the adapter switched off; value and reward models as TRL's own example has them: the
same architecture with a head, the value model trained in full.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer
from turns import ON_GPU, THREADS, turns

model, prompts_file, epochs, tokens, output, *dtype = sys.argv[1:]
kind = getattr(torch, dtype[0] if dtype else "float32")
torch.set_num_threads(THREADS)
prompts = Path(prompts_file).read_text().splitlines()
tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
policy = AutoModelForCausalLM.from_pretrained(model, dtype=kind)
value, reward = (AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=kind) for _ in range(2))
for head in (value, reward):
    head.config.pad_token_id = tokenizer.pad_token_id
turn = turns()


class Turns(TrainerCallback):
    """Waits for its turn after every iteration: the first turn is the set-up of training and its first iteration."""

    def on_train_begin(self, args, state, control, **kwargs):
        next(turn)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = next(turn, "over") == "over"
        if control.should_training_stop:
            sys.exit()


trainer = PPOTrainer(
    args=PPOConfig(
        output_dir=output, per_device_train_batch_size=len(prompts), gradient_accumulation_steps=1, num_mini_batches=1,
        num_ppo_epochs=int(epochs), response_length=int(tokens), local_rollout_forward_batch_size=len(prompts),
        total_episodes=100_000, learning_rate=1e-4, temperature=1.0, kl_coef=0.05, use_cpu=not ON_GPU, bf16=False,
        report_to="none", save_strategy="no", num_sample_generations=0, logging_steps=1, disable_tqdm=True,
        gradient_checkpointing=False,
    ),
    processing_class=tokenizer,
    model=policy,
    ref_model=None,
    reward_model=reward,
    value_model=value,
    train_dataset=Dataset.from_list([{"input_ids": tokenizer(text).input_ids} for text in prompts]),
    eval_dataset=Dataset.from_list([{"input_ids": tokenizer(text).input_ids} for text in prompts]),
    data_collator=DataCollatorWithPadding(tokenizer),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    callbacks=[Turns()],
)  # fmt: skip
trainer.train()
