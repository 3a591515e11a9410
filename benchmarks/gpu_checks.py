"""The checks of gpu.py: what konic computes on a device against float64 on the CPU, and whole runs on it."""

import copy
import hashlib
import importlib.util
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from konic.finetuning import (
    DatasetConfig,
    GenerationConfig,
    KonicFinetuningAgent,
    KonicFinetuningCallback,
    KonicFinetuningEngine,
    KonicLLMRewardComposer,
    LoraConfig,
    TrainingConfig,
    llm_reward,
)
from konic.finetuning.data.prompts import make_prompts
from konic.finetuning.data.tokenization import make_prompt_batch
from konic.finetuning.learning.learner import build_learner
from konic.finetuning.models.token_scores import score_tokens
from konic.finetuning.rollout import decoding
from konic.finetuning.rollout.rollout import sample_rollout
from konic.finetuning.rollout.sampler import RandomKey

TOKENS = 48


def prompts(count):
    """Prompts of 4 to 11 words, all different."""
    return [" ".join(f"w{1 + (7 * row + word) % 500}" for word in range(4 + row % 8)) for row in range(count)]


class DistinctWords(KonicLLMRewardComposer):
    """How many different words a response has."""

    @llm_reward
    def distinct(self, prompt, response):
        """The number of different words."""
        return len(set(response.split()))


def agent_of(folder, model_kwargs=None, **training):
    return KonicFinetuningAgent(
        base_model=str(folder),
        model_kwargs=model_kwargs or {},
        reward_composer=DistinctWords(),
        lora_config=LoraConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj")),
        dataset_config=DatasetConfig(prompts=tuple(prompts(64))),
        training_config=TrainingConfig(batch_size=8, **training),
        generation_config=GenerationConfig(max_new_tokens=TOKENS),
    )


@dataclass(frozen=True)
class Check:
    """A number that has to stay within a limit."""

    name: str
    found: float
    limit: float

    @property
    def holds(self):
        return self.found <= self.limit


def shaken_learner(agent, device):
    """A learner whose adapter has been moved, by the same numbers on every device."""
    learner, generator = build_learner(agent, device), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in learner.policy.trainable().values():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator).to(weight))
    return learner


def roll(learner, agent, iteration=1, rows=8):
    policy, generation = learner.policy, agent.get_generation_config()
    made = make_prompts(prompts(rows), agent.get_dataset_config(), "gpu")
    batch = make_prompt_batch(made, policy.tokenizer, 64, learner.special_tokens.pad, policy.device)
    return sample_rollout(policy, learner.sampler, batch, generation, learner.special_tokens, RandomKey(0, iteration))


def check_rollout(agent, device):
    """Log-probs and KL of a rollout against whole sequences without padding or cache, in float64 on the CPU."""
    learner = shaken_learner(agent, device)
    rollout = roll(learner, agent)
    with eager_decoding():
        plain = roll(learner, agent)
    wide = copy.deepcopy(learner.policy.model).cpu().double()
    errors = {"log-probs": 0.0, "log-probs of the reference": 0.0, "KL": 0.0}
    for row in range(len(rollout.batch)):
        response = rollout.samples.response_ids[row][rollout.response_mask[row]].cpu()
        prompt = rollout.batch.ids[row][rollout.batch.mask[row]].cpu()
        ids = torch.cat([prompt, response])[None]
        with torch.no_grad():
            logits = wide(ids).logits[0, len(prompt) - 1 : -1]
            with wide.disable_adapter():
                reference = wide(ids).logits[0, len(prompt) - 1 : -1]
        policy, reference = logits.log_softmax(-1), reference.log_softmax(-1)
        truth = {
            "log-probs": policy.gather(-1, response[:, None])[:, 0],
            "log-probs of the reference": reference.gather(-1, response[:, None])[:, 0],
            "KL": (policy.exp() * (policy - reference)).sum(-1),
        }
        ours = {"log-probs": rollout.log_probs, "log-probs of the reference": rollout.ref_log_probs, "KL": rollout.kl}
        for name, expected in truth.items():
            found = ours[name][row][rollout.response_mask[row]].cpu().double()
            errors[name] = max(errors[name], (found - expected).abs().max().item())
    same = (rollout.samples.response_ids == plain.samples.response_ids).cumprod(dim=1).bool() & rollout.response_mask
    gap = (rollout.log_probs - plain.log_probs)[same].abs().max().item()
    yield from (Check(f"{name} against float64, nats", error, 1e-4) for name, error in errors.items())
    yield Check("fused decoding against the model's own, nats", gap, 1e-4)
    yield Check(
        "tokens drawn differently by the two, share", 1 - same.sum().item() / rollout.response_mask.sum().item(), 0.05
    )


def check_graph(agent, device):
    """A step of the model's own forward pass, replayed as one graph as for models without a fused decoder."""
    with eager_decoding():
        learner = shaken_learner(agent, device)
        is_graphable = learner.policy.language_model.is_graphable
        learner.policy.allow_graphs(True)
        graphed = roll(learner, agent)
        learner.policy.allow_graphs(False)
        plain = roll(learner, agent)
    same = (graphed.samples.response_ids == plain.samples.response_ids).cumprod(dim=1).bool() & graphed.response_mask
    gap = (graphed.log_probs - plain.log_probs)[same].abs().max().item()
    yield Check("the model's own step replayed as a graph, nats", gap, 1e-4)
    yield Check("its steps are not replayed (0 or 1)", float(not is_graphable), float(device.type == "cpu"))


@contextmanager
def eager_decoding():
    """Decode by the model's own forward pass."""
    before, decoding.can_be_fused = decoding.can_be_fused, lambda _: False
    try:
        yield
    finally:
        decoding.can_be_fused = before


def check_gradient(agent, device):
    """The gradient of log-probs and KL on the device against the CPU's in float64."""
    learner = shaken_learner(agent, device)
    rollout = roll(learner, agent)
    found = gradient(learner.policy, rollout)
    policy = copy.deepcopy(learner.policy)
    policy.model.cpu().double()
    expected = gradient(policy, on_cpu(rollout))
    yield Check(
        "gradient against float64, ‖difference‖ / ‖gradient‖",
        ((found - expected).norm() / expected.norm()).item(),
        1e-4,
    )


def on_cpu(record):
    """A record with its tensors on the CPU, floating-point ones in float64."""

    def moved(value):
        if isinstance(value, Tensor):
            return value.cpu().double() if value.is_floating_point() else value.cpu()
        return on_cpu(value) if hasattr(value, "__dataclass_fields__") else value

    changed = {name: moved(getattr(record, name)) for name in record.__dataclass_fields__}
    return replace(record, **{name: value for name, value in changed.items() if value is not getattr(record, name)})


def gradient(policy, rollout):
    """Gradient of Σ weight · log-prob + Σ KL with respect to the adapter, in float64 on the CPU."""
    mask, model = rollout.response_mask, policy.language_model
    hidden = model.response_hidden(rollout.ids, rollout.mask, mask.shape[1])
    scored = score_tokens(
        model, hidden, rollout.samples.response_ids, mask, rollout.temperature,
        needs_entropy=False, reference=(policy.reference_logits, rollout.states.ref_hidden),
    )  # fmt: skip
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2)).to(scored.log_probs)
    loss = (weights * scored.log_probs).sum() + scored.kl.sum()
    adapter = [weight for name, weight in policy.trainable().items() if "lora" in name]
    return torch.cat([part.flatten().double().cpu() for part in torch.autograd.grad(loss, adapter)])


def check_runs(agent, device, folder):
    """Runs: the first ratio is 1 and the first KL 0; a run and its repetition, whole or resumed, are bitwise equal."""
    first = train(agent, folder / "whole", device, 4)[0]
    yield Check("largest log-ratio before the first step, nats", first.first_log_ratio, 1e-3)
    yield Check("sampler against trainer, nats per token", first.sampler_gap, 1e-4)
    yield Check("KL before the first step, nats", first.kl_divergence, 1e-6)
    yield from check_again(agent, device, folder)


def check_again(agent, device, folder, start=""):
    """The run in folder/whole, made again and resumed."""
    for name, parts in (("again", (4,)), ("resumed", (2, 4))):
        for last in parts:
            train(agent, folder / name, device, last, resume_from_checkpoint=True if last != parts[0] else None)
        same = adapter_hash(folder / "whole") == adapter_hash(folder / name)
        yield Check(f"{start}a run and the same run {name} differ (0 or 1)", float(not same), 0.0)


def train(agent, folder, device, iterations, **options):
    """The results of a run's iterations."""
    callback = KonicFinetuningCallback(verbose=False)
    engine = KonicFinetuningEngine.from_agent(agent, checkpoint_dir=folder, device=str(device), callback=callback)
    return engine.train(iterations, **options).history


def adapter_hash(folder):
    return hashlib.sha256((folder / "final" / "adapter_model.safetensors").read_bytes()).hexdigest()


def check_rounded(agent, device, folder, name, limit):
    """Runs of a model in few bits: what samples is near what trains, and the first KL is 0."""
    first = train(agent, folder / "whole", device, 4)[0]
    yield Check(f"{name}: sampler against trainer, nats per token", first.sampler_gap, limit)
    yield Check(f"{name}: largest log-ratio before the first step, nats", first.first_log_ratio, limit)
    yield Check(f"{name}: KL before the first step, nats", first.kl_divergence, 1e-6)
    yield from check_again(agent, device, folder, f"{name}: ")


def quantised():
    """The kinds of bitsandbytes, if it is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    in_bf16 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return {
        "nf4, bf16 products": BitsAndBytesConfig(load_in_4bit=True, **in_bf16),
        "fp4, fp32 products": BitsAndBytesConfig(load_in_4bit=True),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }


def checks(folder, work, device):
    agent = agent_of(folder)
    yield from check_rollout(agent, device)
    yield from check_graph(agent, device)
    yield from check_gradient(agent, device)
    yield from check_runs(agent, device, work)
    yield from check_rounded(agent_of(folder, {"dtype": "bfloat16"}), device, work / "bf16", "bf16", 0.1)
    precise = agent_of(folder, precision="bfloat16")
    yield from check_rounded(precise, device, work / "precision", "precision='bfloat16'", 0.1)
    for name, config in quantised().items():
        packed = agent_of(folder, {"quantization_config": config})
        yield from check_rounded(packed, device, work / name, name, 0.1 if "bf16" in name else 1e-3)
