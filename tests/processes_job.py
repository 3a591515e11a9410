"""What one process of tests/test_processes.py runs: a few iterations of every algorithm, in float64.

python processes_job.py MODEL FOLDER CASE ...
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from first_step import first_step_recorded
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
from konic.finetuning.learning.gradients import StepGradients
from konic.finetuning.models.sharding import gathered

RANK = int(os.environ.get("RANK", "0"))
QUANTISED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "fp4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
PROMPTS = ["ab", "the film was", "x", "why not", "no", "go on then", "a", "and so it goes"]


class Rewards(KonicLLMRewardComposer):
    """Rewards of letters. `trouble` is what goes wrong with them, in the second process."""

    def __init__(self, trouble=""):
        super().__init__()
        self.trouble = trouble

    @llm_reward
    def vowels(self, prompt: str, response: str) -> float:
        if RANK == 1 and self.trouble:
            self.go_wrong()
        return sum(letter in "aeiou" for letter in response) / 4 if len(response) % 5 else 0.0

    @llm_reward
    def low(self, prompt: str, response: str) -> float | None:
        return None if len(response) % 7 == 1 else sum(map(ord, response)) % 11 / 10

    def go_wrong(self):
        if self.trouble == "slow":
            time.sleep(0.05)  # so that the first process waits for this one nearly always
        elif self.trouble == "error":
            raise ValueError("no such word")
        elif self.trouble == "interrupt":
            self.trouble = ""  # once
            raise KeyboardInterrupt
        else:
            time.sleep(6 if self.trouble == "hang" else 0)
            os._exit(9)  # "kill"


class Normalised(Rewards):
    @llm_reward(normalize=True)
    def vowels(self, prompt: str, response: str) -> float:
        return super().vowels(prompt, response)


class PartlyFailing(Rewards):
    """A reward that raises on some responses."""

    @llm_reward
    def vowels(self, prompt: str, response: str) -> float:
        if len(response) % 3 == 1:
            raise ValueError("not three")
        return super().vowels(prompt, response)


class OfFirstHalf(KonicLLMRewardComposer):
    """No score for the second half of a batch: of two processes, the second has no token to learn from."""

    def __init__(self, trouble=""):
        super().__init__()

    @llm_reward
    def letters(self, prompts: list[str], responses: list[str]) -> list[float | None]:
        half = len(responses) // 2
        return [sum(map(ord, response)) % 11 / 10 for response in responses[:half]] + [None] * (len(responses) - half)


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


class Quiet(KonicFinetuningCallback):
    def __init__(self, composer):
        super().__init__(verbose=False)
        self.composer = composer


class Reweighing(Quiet):
    """Changes a weight between iterations, in the first process, which alone has callbacks."""

    def on_iteration_end(self, result):
        self.composer.set_reward_weight("vowels", 1 + result.iteration)


class Failing(Quiet):
    """Fails in the first process, which alone has callbacks, just before all gather the weights."""

    def on_generation_begin(self, prompts):
        raise KonicError("the callback has failed")


@dataclass(frozen=True)
class Case:
    """A run: how it differs from three iterations of PPO with LoRA on GPT-2's shape in float64."""

    training: Mapping[str, Any] = field(default_factory=dict)
    """Settings of TrainingConfig."""
    is_full: bool = False
    """True if every weight learns, and there is no adapter."""
    architecture: str = "gpt2"
    dtype: str | None = "float64"
    """Of the model; None leaves it to `precision` or the quantisation."""
    quantisation: str = ""
    """A name of QUANTISED."""
    iterations: int = 3
    rewards: type[KonicLLMRewardComposer] = Rewards
    callback: type[Quiet] = Quiet
    trouble: str = ""
    """What goes wrong in the rewards of the second process: "slow", "error", "interrupt", "kill" or "hang"."""
    update_trouble: str = ""
    """What goes wrong in its first pass of an update: "not finite" or "kill"."""
    other_device: str = "cpu"
    """The device of the second process."""
    is_moved: bool = False
    """True for an adapter that has changed the model already, whose first step is recorded."""


def settings(*parts, **named):
    """The settings of all parts."""
    return {name: value for part in (*parts, named) for name, value in part.items()}


WHOLE = {"sharding": "fsdp", "sharded_sampling": False, "gradient_accumulation_steps": 5}
IN_STEP = {"sharding": "fsdp", "sharded_sampling": True, "gradient_accumulation_steps": 5}
GRPO = {"algorithm": "grpo"}
SLOWLY = {"learning_rate": 1e-3}
CASES = {name: Case({"algorithm": name}) for name in ALGORITHMS} | {
    "minibatches": Case({"num_minibatches": 3, "gradient_accumulation_steps": 2, "ppo_epochs": 2}),
    "kl in the loss": Case({"kl_target": 0.5, "kl_placement": "loss", "mask_truncated": True}),
    "full": Case(SLOWLY, is_full=True),
    "uneven": Case({"batch_size": 5}),
    "longer": Case({"batch_size": 5}, iterations=5),
    "skipped": Case({"on_reward_error": "skip", "max_error_rate": 1.0}, rewards=PartlyFailing),
    "half": Case({"num_minibatches": 2}, rewards=OfFirstHalf),
    "normalised": Case(rewards=Normalised),
    "whole batch": Case(GRPO, rewards=OfWholeBatch, callback=Reweighing),
    "float32": Case({"num_minibatches": 2}, is_moved=True, dtype="float32", iterations=1),
    "float32 grpo": Case(settings(GRPO, num_minibatches=2), is_moved=True, dtype="float32", iterations=1),
    "other settings": Case({"learning_rate": 1e-2 * (1 + RANK)}),
    "too many": Case({"batch_size": 1}),
    "no device": Case(other_device="cuda:99"),
    "alone": Case({"sharding": "fsdp"}),
    "error": Case(trouble="error"),
    "interrupted": Case(trouble="interrupt"),
    "signalled": Case(trouble="slow"),
    "killed": Case(trouble="kill"),
    "hung": Case({"process_timeout_seconds": 2}, trouble="hang"),
    "sharded ppo": Case(WHOLE),
    "sharded grpo": Case(settings(IN_STEP, GRPO, gradient_checkpointing=True)),
    "sharded full": Case(settings(WHOLE, SLOWLY, num_minibatches=3, gradient_accumulation_steps=2), is_full=True),
    "sharded full grpo": Case(settings(IN_STEP, SLOWLY, GRPO, kl_target=0.5, kl_placement="loss"), is_full=True),
    "sharded ppo in step": Case(IN_STEP),
    "sharded grpo whole": Case(settings(WHOLE, GRPO, kl_placement="loss")),
    "sharded full in step": Case(settings(IN_STEP, SLOWLY, gradient_checkpointing=True), is_full=True),
    "sharded full grpo whole": Case(settings(WHOLE, SLOWLY, GRPO), is_full=True),
    "sharded uneven": Case(settings(IN_STEP, batch_size=5, gradient_accumulation_steps=2)),
    "sharded half": Case(IN_STEP, rewards=OfFirstHalf),
    "sharded normalised": Case(settings(WHOLE, SLOWLY, eval_every=1), is_full=True, rewards=Normalised),
    "sharded callback": Case(WHOLE, callback=Failing),
    "sharded llama": Case(settings(IN_STEP, GRPO, num_minibatches=2), architecture="llama"),
    "sharded llama full": Case(settings(WHOLE, SLOWLY), is_full=True, architecture="llama"),
    "sharded value warm-up": Case(settings(IN_STEP, SLOWLY, value_warmup_iterations=2), is_full=True),
    "bfloat16": Case({"precision": "bfloat16", "gradient_accumulation_steps": 5}, dtype=None),
    "sharded bfloat16": Case(settings(WHOLE, precision="bfloat16"), dtype=None),
    "sharded bfloat16 in step": Case(settings(IN_STEP, precision="bfloat16"), dtype=None),
    "sharded not finite": Case(IN_STEP, update_trouble="not finite"),
    "sharded killed": Case(IN_STEP, update_trouble="kill"),
}
for kind in QUANTISED:
    for name, training in {
        f"quantised {kind}": {"gradient_accumulation_steps": 5},
        f"sharded quantised {kind}": WHOLE,
        f"sharded quantised {kind} in step": IN_STEP,
    }.items():
        CASES[name] = Case(training, dtype=None, quantisation=kind)


def model_kwargs(case):
    if case.quantisation:
        return {"quantization_config": transformers.BitsAndBytesConfig(**QUANTISED[case.quantisation])}
    return {"dtype": case.dtype} if case.dtype else {}


def disturb(model, trouble):
    """Let the second process fail in its first pass of an update, for which the first one waits."""
    usual = model.response_hidden

    def response_hidden(*given):
        hidden = usual(*given)
        if trouble == "kill" and hidden.requires_grad:
            os._exit(9)
        return hidden * float("nan") if hidden.requires_grad else hidden

    model.response_hidden = response_hidden


@contextmanager
def own_tokens(found):
    """Add to a list how many tokens of each optimizer step this process has an advantage for."""
    usual = StepGradients.accumulate

    def accumulate(self, rows, num_tokens):
        own = self._rollout.states.own(torch.from_numpy(rows))
        found.append(int(self._advantages.mask[own].sum()))
        return usual(self, rows, num_tokens)

    StepGradients.accumulate = accumulate
    try:
        yield
    finally:
        StepGradients.accumulate = usual


def train(model, folder, name, iterations=None, **options):
    case = CASES[name]
    targets = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}[case.architecture]
    training = settings({"batch_size": 12, "learning_rate": 2e-2}, case.training)
    if "sharded_sampling" in training and "WORLD_SIZE" not in os.environ:
        del training["sharded_sampling"], training["sharding"]  # one process has nobody to divide its weights with
    if case.is_moved:
        training["self_checks"] = False  # they refuse a first policy that is not its reference
    composer = case.rewards(case.trouble)
    agent = KonicFinetuningAgent(
        base_model=model if case.architecture == "gpt2" else f"{model}/{case.architecture}",
        reward_composer=composer,
        lora_config=None if case.is_full else LoraConfig(r=4, target_modules=targets),
        dataset_config=DatasetConfig(source=DatasetSource.MEMORY, prompts=PROMPTS, held_out=3),
        training_config=TrainingConfig(**training),
        generation_config=GenerationConfig(max_new_tokens=8, max_prompt_length=40, eos_token_id=[*range(40)]),
        model_kwargs=model_kwargs(case),
    )
    run, callback, tokens = folder / name.replace(" ", "-"), case.callback(composer), []
    device = case.other_device if RANK == 1 else "cpu"
    engine = KonicFinetuningEngine.from_agent(agent, checkpoint_dir=run, callback=callback, device=device)
    if case.update_trouble:
        loaded = engine._session.learner  # by both: dividing the weights takes both
        if RANK == 1:
            disturb(loaded.policy.language_model, case.update_trouble)
    record = nullcontext()
    if case.is_moved:
        from conftest import shake_adapter  # loads pytest

        shake_adapter(engine._session.learner.policy)
        record = first_step_recorded(folder / f"{name}-{RANK}.safetensors")
    with own_tokens(tokens), record:
        result = engine.train(iterations or case.iterations, **options)
    trained = gathered(engine._session.learner.policy.trainable(), keep=True)
    told = {
        "stopped": result.stopped_because,
        "history": [each.to_dict() for each in result.history],
        "weights": {name: weight.flatten().tolist() for name, weight in trained.items()},
        "responses": engine.generate(PROMPTS[:3]),
        "rewards": engine.evaluate(PROMPTS[:5])["rewards"],
    }
    (folder / f"{name}-{RANK}.json").write_text(json.dumps(told))
    (folder / f"{name}-{RANK}-tokens.json").write_text(json.dumps(tokens))


if __name__ == "__main__":
    model, folder, *cases = sys.argv[1:]
    for case in cases:
        name, *resumed = case.split(":")  # CASE:ITERATIONS goes on to that many
        more = {"iterations": int(resumed[0]), "resume_from_checkpoint": name != "signalled"} if resumed else {}
        try:
            train(model, Path(folder), name, **more)
        except KonicError as error:
            (Path(folder) / f"{name}-{RANK}.json").write_text(json.dumps({"error": [type(error).__name__, str(error)]}))
