"""What one process of tests/test_processes.py runs: a few iterations of every algorithm, in float64.

python processes_job.py MODEL FOLDER CASE ...
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import transformers

from konic.finetuning import (
    DatasetConfig,
    DatasetSource,
    GenerationConfig,
    KonicError,
    KonicFinetuningAgent,
    KonicFinetuningCallback,
    KonicFinetuningEngine,
    KonicLLMRewardComposer,
    LoraConfig,
    TrainingConfig,
    llm_reward,
)
from konic.finetuning.algorithms import ALGORITHMS
from konic.finetuning.models.sharding import gathered

RANK = int(os.environ.get("RANK", "0"))
CASES = {name: {"algorithm": name} for name in ALGORITHMS} | {
    "minibatches": {"num_minibatches": 3, "gradient_accumulation_steps": 2, "ppo_epochs": 2},
    "kl in the loss": {"kl_target": 0.5, "kl_placement": "loss", "mask_truncated": True},
    "full": {"lora_config": None, "learning_rate": 1e-3},
    "uneven": {"batch_size": 5},
    "longer": {"batch_size": 5},
    "skipped": {"on_reward_error": "skip", "max_error_rate": 1.0},
    "normalised": {},
    "whole batch": {"algorithm": "grpo"},
    "other settings": {"learning_rate": 1e-2 * (1 + RANK)},
    "too many": {"batch_size": 1},
    "alone": {"sharding": "fsdp"},
    "error": {},
    "interrupted": {},
    "signalled": {},
    "killed": {},
    "hung": {"process_timeout_seconds": 2},
}
WHOLE = {"sharding": "fsdp", "sharded_sampling": False, "gradient_accumulation_steps": 5}
IN_STEP = {"sharding": "fsdp", "sharded_sampling": True, "gradient_accumulation_steps": 5}
FULL = {"lora_config": None, "learning_rate": 1e-3}
CASES |= {
    "sharded ppo": WHOLE,
    "sharded grpo": IN_STEP | {"algorithm": "grpo", "gradient_checkpointing": True},
    "sharded full": WHOLE | FULL | {"num_minibatches": 3, "gradient_accumulation_steps": 2},
    "sharded full grpo": IN_STEP | FULL | {"algorithm": "grpo", "kl_target": 0.5, "kl_placement": "loss"},
    "sharded ppo in step": IN_STEP,
    "sharded grpo whole": WHOLE | {"algorithm": "grpo", "kl_placement": "loss"},
    "sharded full in step": IN_STEP | FULL | {"gradient_checkpointing": True},
    "sharded full grpo whole": WHOLE | FULL | {"algorithm": "grpo"},
    "sharded uneven": IN_STEP | {"batch_size": 5, "gradient_accumulation_steps": 2},
    "sharded normalised": WHOLE | FULL | {"eval_every": 1},
    "sharded callback": WHOLE,
    "sharded llama": IN_STEP | {"algorithm": "grpo", "num_minibatches": 2},
    "sharded llama full": WHOLE | FULL,
    "sharded value warm-up": IN_STEP | FULL | {"value_warmup_iterations": 2},
    "bfloat16": {"precision": "bfloat16", "gradient_accumulation_steps": 5},
    "sharded bfloat16": WHOLE | {"precision": "bfloat16"},
    "sharded bfloat16 in step": IN_STEP | {"precision": "bfloat16"},
    "sharded not finite": IN_STEP,
    "sharded killed": IN_STEP,
}
QUANTISED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "fp4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
for kind in QUANTISED:
    CASES[f"quantised {kind}"] = {"gradient_accumulation_steps": 5}
    CASES |= {f"sharded quantised {kind}": WHOLE, f"sharded quantised {kind} in step": IN_STEP}
PROMPTS = ["ab", "the film was", "x", "why not", "no", "go on then", "a", "and so it goes"]


class Rewards(KonicLLMRewardComposer):
    def __init__(self, case):
        super().__init__()
        self.case = case

    @llm_reward(normalize=True)
    def vowels(self, prompt: str, response: str) -> float:
        if self.case == "skipped" and len(response) % 3 == 1:
            raise ValueError("not three")
        if RANK == 1 and self.case == "error":
            raise ValueError("no such word")
        if RANK == 1 and self.case == "interrupted":
            self.case = "interrupted once"
            raise KeyboardInterrupt
        if RANK == 1 and self.case == "signalled":
            time.sleep(0.05)  # so that the first process waits for this one nearly always
        if RANK == 1 and self.case in ("killed", "hung"):
            time.sleep(6 if self.case == "hung" else 0)
            os._exit(9)
        return sum(letter in "aeiou" for letter in response) / 4 if len(response) % 5 else 0.0

    @llm_reward
    def low(self, prompt: str, response: str) -> float | None:
        return None if len(response) % 7 == 1 else sum(map(ord, response)) % 11 / 10


class Bare(Rewards):
    @llm_reward
    def vowels(self, prompt: str, response: str) -> float:
        return super().vowels(prompt, response)


class OfWholeBatch(Rewards):
    """Rewards that see all responses, and a total that depends on how often it was asked for."""

    asked = 0

    @llm_reward
    def novelty(self, prompts: list[str], responses: list[str]) -> list[float]:
        return [1 / sum(other[:1] == response[:1] for other in responses) for response in responses]

    def compose_batch(self, prompts, responses, **columns):
        self.asked += 1
        totals, parts = super().compose_batch(prompts, responses, **columns)
        return [total + self.asked * len(text) / 100 for total, text in zip(totals, responses, strict=True)], parts


class Reweighing(KonicFinetuningCallback):
    """Changes a weight between iterations, in the first process, which alone has callbacks."""

    def __init__(self, composer):
        super().__init__(verbose=False)
        self.composer = composer

    def on_iteration_end(self, result):
        self.composer.set_reward_weight("vowels", 1 + result.iteration)


def model_kwargs(case):
    if "quantised" in case:
        kind = next(kind for kind in QUANTISED if f"quantised {kind}" in case)
        return {"quantization_config": transformers.BitsAndBytesConfig(**QUANTISED[kind])}
    return {} if "bfloat16" in case else {"dtype": "float64"}


class Failing(KonicFinetuningCallback):
    """Fails in the first process, which alone has callbacks, just before all gather the weights."""

    def on_generation_begin(self, prompts):
        raise KonicError("the callback has failed")


def disturb(model, case):
    """Let the second process fail in its first pass of an update, for which the first one waits."""
    usual = model.response_hidden

    def response_hidden(*given):
        hidden = usual(*given)
        if case == "sharded killed" and hidden.requires_grad:
            os._exit(9)
        return hidden * float("nan") if hidden.requires_grad else hidden

    model.response_hidden = response_hidden


def train(model, folder, case, iterations=3, **options):
    model, targets = (model, ["c_attn"]) if "llama" not in case else (f"{model}/llama", ["q_proj", "v_proj"])
    changes = {"batch_size": 12, "learning_rate": 2e-2, "lora_config": LoraConfig(r=4, target_modules=targets)}
    changes |= CASES[case]
    if "sharded_sampling" in changes and "WORLD_SIZE" not in os.environ:
        del changes["sharded_sampling"], changes["sharding"]  # one process has nobody to divide its weights with
    composer = (OfWholeBatch if case == "whole batch" else Rewards if "normalised" in case else Bare)(case)
    agent = KonicFinetuningAgent(
        base_model=model,
        reward_composer=composer,
        lora_config=changes.pop("lora_config"),
        dataset_config=DatasetConfig(source=DatasetSource.MEMORY, prompts=PROMPTS, held_out=3),
        training_config=TrainingConfig(**changes),
        generation_config=GenerationConfig(max_new_tokens=8, max_prompt_length=40, eos_token_id=[*range(40)]),
        model_kwargs=model_kwargs(case),
    )
    callback = Failing(verbose=False) if case == "sharded callback" else KonicFinetuningCallback(verbose=False)
    callback = Reweighing(composer) if case == "whole batch" else callback
    run = folder / case.replace(" ", "-")
    engine = KonicFinetuningEngine.from_agent(agent, checkpoint_dir=run, callback=callback, device="cpu")
    if case in ("sharded killed", "sharded not finite"):
        loaded = engine._session.learner  # by both: dividing the weights takes both
        if RANK == 1:
            disturb(loaded.policy.language_model, case)
    result = engine.train(iterations, **options)
    trained = gathered(engine._session.learner.policy.trainable(), keep=True)
    told = {
        "stopped": result.stopped_because,
        "history": [each.to_dict() for each in result.history],
        "weights": {name: weight.flatten().tolist() for name, weight in trained.items()},
        "responses": engine.generate(PROMPTS[:3]),
        "rewards": engine.evaluate(PROMPTS[:5])["rewards"],
    }
    (folder / f"{case}-{RANK}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    model, folder, *cases = sys.argv[1:]
    for case in cases:
        name, *resumed = case.split(":")  # CASE:ITERATIONS goes on to that many
        more = {"iterations": int(resumed[0]), "resume_from_checkpoint": name != "signalled"} if resumed else {}
        try:
            train(model, Path(folder), name, **{"iterations": 5 if name == "longer" else 3} | more)
        except KonicError as error:
            (Path(folder) / f"{name}-{RANK}.json").write_text(json.dumps({"error": [type(error).__name__, str(error)]}))
