"""Agent -> Learner: the model loaded, with everything around it that learning needs."""

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from konic.finetuning.agent import KonicFinetuningAgent
from konic.finetuning.errors import ConfigError, ModelError
from konic.finetuning.learning.update import make_optimizer
from konic.finetuning.models.loading import load_model
from konic.finetuning.models.policy import Policy
from konic.finetuning.rollout.sampler import SpecialTokens, special_tokens


@dataclass(frozen=True)
class Learner:
    """What is built once: the policy, what moves it, and where plain `transformers` finds its base model."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    special: SpecialTokens
    location: str
    base_sha256: str = ""
    """Of some of every base weight's numbers: which model it was."""


def build_learner(agent: KonicFinetuningAgent, device: torch.device) -> Learner:
    """Load the agent's model onto a device and put everything around it that learning needs."""
    config, generation = agent.get_training_config(), agent.get_generation_config()
    loaded = load_model(agent.get_base_model(), agent.get_model_kwargs(), device)
    model_config = loaded.model.config.get_text_config()
    context = getattr(model_config, "max_position_embeddings", None)
    if context is not None and generation.max_prompt_length + generation.max_new_tokens > context:
        raise ConfigError(
            f"GenerationConfig: max_prompt_length={generation.max_prompt_length} + max_new_tokens="
            f"{generation.max_new_tokens} is over the {context} positions of {agent.get_base_model()!r}. Lower either."
        )
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    if len(loaded.tokenizer) > vocabulary:
        raise ModelError(
            f"base_model={agent.get_base_model()!r}: its tokenizer has {len(loaded.tokenizer)} tokens, the model a "
            f"vocabulary of only {vocabulary}. Give the model's own tokenizer, or a model with resized embeddings."
        )
    base_sha256 = _fingerprint(loaded.model)
    policy = Policy(loaded, agent.get_lora_config(), config.gradient_checkpointing, config.seed)
    special = special_tokens(generation, policy.language_model, policy.tokenizer)
    policy.check_reference()
    return Learner(policy, make_optimizer(policy, config), special, loaded.location, base_sha256)


def _fingerprint(model: nn.Module) -> str:
    """SHA-256 of up to 64 numbers of every weight, evenly spaced: another model differs, and it costs no time."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)][:64].cpu().contiguous()
        digest.update(name.encode() + some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
