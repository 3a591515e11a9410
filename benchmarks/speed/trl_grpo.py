"""TRL 1.16's GRPOTrainer, a step per turn: python trl_grpo.py MODEL PROMPTS PASSES TOKENS OUTPUT [DTYPE]"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from turns import ON_GPU, THREADS, turns

model, prompts_file, passes, tokens, output, *dtype = sys.argv[1:]
torch.set_num_threads(THREADS)
prompts = Path(prompts_file).read_text().splitlines()
turn = turns()


class Turns(TrainerCallback):
    """Waits for its turn after every batch of responses and the passes over it."""

    def on_train_begin(self, args, state, control, **kwargs):
        next(turn)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % int(passes) == 0 and next(turn, "over") == "over":
            sys.exit()


GRPOTrainer(
    model=model,
    args=GRPOConfig(
        output_dir=output, learning_rate=1e-4, num_iterations=int(passes), per_device_train_batch_size=4 * len(prompts),
        num_generations=4, max_completion_length=int(tokens), temperature=1.0, beta=0.05, max_steps=100_000,
        generation_kwargs={"min_new_tokens": int(tokens)}, use_cpu=not ON_GPU,
        model_init_kwargs={"dtype": dtype[0] if dtype else "float32"},
        bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_dict({"prompt": prompts}),
    reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    callbacks=[Turns()],
).train()  # fmt: skip
