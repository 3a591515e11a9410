"""Tiny random models of every family that docs/families.md lists, and how far konic's numbers are from plain ones.

`python tests/families.py docs/families.md` writes the page.
"""

import copy
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from transformers import AutoModelForCausalLM

from conftest import prompt_batch, roll, shake_adapter
from family_models import FAMILIES, save_base
from konic.finetuning import KonicError, KonicFinetuningAgent, KonicLLMRewardComposer, LoraConfig
from konic.finetuning.learning.learner import build_learner
from konic.finetuning.models.policy_files import save_merged, save_model
from konic.finetuning.models.positions import position_ids
from konic.finetuning.rollout.local_sampler import draw, uniforms
from konic.finetuning.rollout.sampler import RandomKey

PROMPTS = ("ab", "the film was", "x", "a longer prompt than the others here")
IDS = torch.tensor([[5, 40, 77, 100, 13, 200, 9, 31, 62, 8]])
TEMPERATURE = 0.8


def learner_of(folder, lora):
    def length(prompt, response):
        return float(len(response))

    agent = KonicFinetuningAgent(
        str(folder), KonicLLMRewardComposer(reward_functions=[length]), lora, {"prompts": ["a"]},
        {"batch_size": 4, "gradient_checkpointing": True},
        {"max_new_tokens": 6, "max_prompt_length": 40, "temperature": TEMPERATURE, "eos_token_id": 271},
    )  # fmt: skip
    return build_learner(agent, torch.device("cpu")), agent.get_generation_config()


@torch.no_grad()
def logits_of(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits.float()


def largest(one, other):
    return (one - other).abs().max().item()


def sampled_difference(learner, generation, plain):
    """How far log-probs are from plain passes over each row alone: the sampler's, the trainer's; and the exact KL.

    The tokens drawn from the plain passes must be those sampled.
    """
    batch, rng_key = prompt_batch(learner, PROMPTS, 40), RandomKey(0, 1)
    rollout = roll(learner, batch, generation, rng_key)
    worst = 0.0
    for row in range(len(batch)):
        tokens = rollout.samples.response_ids[row][rollout.response_mask[row]]
        ids = torch.cat([batch.ids[row][batch.mask[row]], tokens])[None]
        logits = logits_of(plain, ids)[0, -len(tokens) - 1 : -1] / TEMPERATURE
        expected = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        worst = max(worst, largest(expected, rollout.log_probs[row, : len(tokens)]))
        numbers = uniforms(rng_key, batch.prompts[row].row, batch.sample_indices[row], generation.max_new_tokens)
        drawn = draw(logits, torch.from_numpy(np.asarray(numbers[: len(tokens)])))
        assert drawn.tolist() == tokens.tolist(), "a plain forward pass draws other tokens"
    return worst, rollout


def trained_numbers(policy, rollout):
    """The trainer's log-probs, and the gradients of their sum."""
    model, tokens = policy.language_model, rollout.samples.response_ids
    for weight in policy.trainable().values():
        weight.grad = None
    with policy.saving_memory():
        hidden = model.response_hidden(rollout.ids, rollout.mask, tokens.shape[1])
        log_probs = (model.logits(hidden) / TEMPERATURE).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        (log_probs * rollout.response_mask).sum().backward()
    return log_probs.detach(), {name: w.grad.clone() for name, w in policy.trainable().items() if w.grad is not None}


def check_training(policy, rollout):
    """The largest first log-ratio, with and without gradient checkpointing, whose gradients must be the same."""
    checkpointed, gradients = trained_numbers(policy, rollout)
    policy._gradient_checkpointing = False
    plain, expected = trained_numbers(policy, rollout)
    assert expected
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, name
    both = [largest(found * rollout.response_mask, rollout.log_probs) for found in (checkpointed, plain)]
    return max(both)


def differences(base, folder, lora):
    """Name of a check -> the largest difference of log-probs or logits from plain `transformers` and PEFT."""
    learner, generation = learner_of(folder / "base", lora)
    policy, found = learner.policy, {}
    found["sampler"], rollout = sampled_difference(learner, generation, base)
    found["first log-ratio"] = check_training(policy, rollout)
    found["first KL"] = rollout.kl.max().item()
    shake_adapter(policy)
    own = logits_of(policy.model)
    assert largest(own, logits_of(base)) > 0.01
    with policy.reference() as reference, torch.no_grad():
        mask = torch.ones_like(IDS, dtype=torch.bool)
        hidden = reference.decode(IDS, mask, position_ids(mask))
    found["reference"] = largest(policy.reference_logits(hidden), logits_of(base))
    save_merged(policy, folder / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    found["saved"] = largest(logits_of(merged), own)
    found["sampler, trained"], _ = sampled_difference(learner, generation, merged)
    if lora is not None:
        save_model(policy, folder / "adapter")
        plain = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "adapter")
        found["adapter"] = largest(logits_of(plain.eval()), own)
    return found


def examine(kind):
    """The differences of a family by LoRA and full finetuning, or the message with which it is refused."""
    transformers.logging.disable_progress_bar()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = save_base(kind, folder / "base")
        for mode, lora in (("LoRA", LoraConfig(r=4, target_modules="all-linear")), ("full", None)):
            try:
                found |= {f"{mode}: {check}": value for check, value in differences(base, folder, lora).items()}
            except KonicError as error:
                return str(error).replace(f"base_model='{folder}/base'", "base_model")
    return found


PAGE = """# Families of models

Which families of `transformers` konic trains, and which it refuses by name before anything is sampled. Each row is a
tiny random model of the family (fp32, two layers), compared with plain `transformers` and PEFT, for LoRA on all linear
layers and for full finetuning:

- the sampler's log-probs and tokens, in a padded batch with a cache, against a forward pass of each row alone,
- the log-ratio and the KL before the first step, with and without gradient checkpointing, and the gradients of both,
- the reference policy, after the weights have moved, against the model as it was loaded,
- the merged model, the full model and the adapter, saved and loaded again, against the policy.

The number is the largest difference of a log-prob or logit. `make families` measured the table on {machine}. The test
`test_a_family_is_right_or_refused_as_the_page_says` measures it again.

| family | what is special | verdict |
|---|---|---|
{rows}

What `AutoModelForCausalLM` does not load is refused as a kind that it does not load. Tried: T5, mT5, UMT5, T5Gemma,
M2M-100, Mistral 3, LLaVA, Qwen2.5-VL, Qwen3-VL, PaliGemma and SmolVLM.

Models with layers that keep a running state (Mamba, linear attention, short convolutions) sample through the cache of
`transformers`, whose fast kernels are packages of their own: without them, it warns that it takes its plain code.
`target_modules="all-linear"` leaves out the layers `out_proj` and `dt_proj` of Mamba, whose weights its kernels read
without calling the layers. A layer that has the weights of another one too, as in Zamba, is left out as well.

A family that is not listed goes through the same checks when its model is loaded: logits that its head does not give,
or a row that is computed differently beside others is an error that names it. The adapter is checked in the
same way: untrained it must change nothing, it must be possible to switch it off and to merge it without a difference,
and PEFT must find the weights again that it saves.
"""


def verdict(kind):
    """The cell of the table: the largest difference, or what the family is refused for."""
    found = examine(kind)
    return f"refused: {found}" if isinstance(found, str) else f"right, {max(found.values()):.1e}"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    rows = []
    for kind, (special, _) in FAMILIES.items():
        rows.append(f"| `{kind}` | {special} | {verdict(kind)} |")
        print(rows[-1], flush=True)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__} and PEFT {peft.__version__}"
    machine = f"a CPU ({platform.machine()}) with {versions}"
    Path(sys.argv[1]).write_text(PAGE.format(machine=machine, rows="\n".join(rows)), encoding="utf-8")
