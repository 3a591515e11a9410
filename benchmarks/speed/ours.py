"""Ours, a step per turn: python ours.py MODEL PROMPTS WHAT TOKENS OUTPUT [DTYPE]

WHAT is ppo (4 epochs), grpo (1 pass, groups of 4), sample (responses alone, from the policy with its adapter), or
sample-general: the same by the way that any model takes.
"""

import sys
from pathlib import Path

import torch
from turns import ON_GPU, THREADS, turns

from konic.finetuning import (
    DatasetConfig,
    GenerationConfig,
    KonicFinetuningAgent,
    KonicFinetuningCallback,
    KonicFinetuningEngine,
    KonicLLMRewardComposer,
    LoraConfig,
    TrainingConfig,
)
from konic.finetuning.data.prompts import make_prompts
from konic.finetuning.data.tokenization import make_prompt_batch
from konic.finetuning.learning.learner import build_learner
from konic.finetuning.rollout import decoding
from konic.finetuning.rollout.sampler import RandomKey

model, prompts_file, what, tokens, output, *dtype = sys.argv[1:]
torch.set_num_threads(THREADS)
prompts = Path(prompts_file).read_text().splitlines()
turn = turns()


def characters(prompt: str, response: str) -> float:
    return float(len(response))  # it differs between responses: equal rewards would leave nothing to update


class Turns(KonicFinetuningCallback):
    """Waits for its turn before the first iteration and after every one."""

    def __init__(self):
        super().__init__(verbose=False)

    def on_train_begin(self, config):
        next(turn)

    def should_stop_early(self, result):
        assert result.reward_std > 0, "every response got the same reward, so there was no update to measure"
        return next(turn, "over") == "over"


shapes = {"gpt2": ("c_attn",), "pythia": ("query_key_value",)}
targets = shapes.get(Path(model).name, ("q_proj", "v_proj"))
agent = KonicFinetuningAgent(
    base_model=model,
    model_kwargs={"dtype": dtype[0]} if dtype else {},
    reward_composer=KonicLLMRewardComposer().add_reward_function(characters),
    lora_config=LoraConfig(r=8, lora_alpha=16, target_modules=targets),
    dataset_config=DatasetConfig(prompts=tuple(prompts)),
    training_config=TrainingConfig(
        algorithm="grpo" if what == "grpo" else "ppo",
        batch_size=len(prompts) * (4 if what == "grpo" else 1),
        ppo_epochs=4 if what == "ppo" else 1,
        num_minibatches=1,
        learning_rate=1e-4,
        kl_placement="loss" if what == "grpo" else "reward",  # as the peers have it
        num_generations=4 if what == "grpo" else None,
    ),
    generation_config=GenerationConfig(max_new_tokens=int(tokens), min_new_tokens=int(tokens), temperature=1.0),
)
if what == "sample-general":
    decoding.can_be_fused = lambda _: False
if what.startswith("sample"):
    learner = build_learner(agent, torch.device("cuda" if ON_GPU else "cpu"))
    made = make_prompts(prompts, agent.get_dataset_config(), "bench")
    policy, generation = learner.policy, agent.get_generation_config()
    batch = make_prompt_batch(made, policy.tokenizer, 512, learner.special_tokens.pad, policy.device)
    for index, _ in enumerate(turn):
        samples = learner.sampler(batch, generation, RandomKey(0, index))
        assert samples.response_mask.all()
else:
    KonicFinetuningEngine.from_agent(agent, checkpoint_dir=f"{output}/run", callback=Turns()).train(100_000)
