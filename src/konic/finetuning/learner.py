"""Agent -> Learner: the model loaded, with everything around it that learning needs."""

from dataclasses import dataclass

import torch

from konic.finetuning.agent import KonicFinetuningAgent
from konic.finetuning.errors import ConfigError
from konic.finetuning.models import load_model
from konic.finetuning.policy import Policy
from konic.finetuning.sampling import SpecialTokens, special_tokens
from konic.finetuning.update import make_optimizer


@dataclass(frozen=True)
class Learner:
    """What is built once: the policy, what moves it, and where plain `transformers` finds its base model."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    special: SpecialTokens
    location: str


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
    policy = Policy(loaded, agent.get_lora_config(), config.gradient_checkpointing, config.seed)
    special = special_tokens(generation, policy.language_model, policy.tokenizer)
    policy.check_reference()
    return Learner(policy, make_optimizer(policy, config), special, loaded.location)


def pick_device(name: str) -> torch.device:
    """The torch device that a name stands for; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: No such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError):
        raise ConfigError(
            f"device={name!r} is not there. Torch sees {torch.cuda.device_count()} CUDA devices; 'cpu' always works."
        ) from None
    return device
