"""Agent -> Learner: loads the model and builds everything that learning needs around it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from konic.finetuning.agent import KonicFinetuningAgent
from konic.finetuning.config import GenerationConfig, LoraConfig
from konic.finetuning.errors import ConfigError, ModelError
from konic.finetuning.learning.update import make_optimizer
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.loading import LoadedModel, load_model
from konic.finetuning.models.policy import Policy
from konic.finetuning.models.positions import length_limit
from konic.finetuning.models.quantised import dequantised
from konic.finetuning.rollout.decoding import require_decodable
from konic.finetuning.rollout.local_sampler import LocalSampler
from konic.finetuning.rollout.sampler import Sampler, SpecialTokens, find_special_tokens
from konic.finetuning.system.processor import has_bfloat16
from konic.finetuning.system.world import ALONE, World
from konic.output import get_logger

logger = get_logger(__name__)

_DIVIDED = "The 2 quick foxes don't jump over 12,345 lazy dogs:\n\tnaïve, déjà vu — 日本語 🙂 (a_b) == [C.D]\r\n"
"""Words, numbers, spaces and signs, which tokenizers with the same tokens may still divide differently."""


@dataclass(frozen=True, kw_only=True)
class Learner:
    """The model, and everything around it that is built once."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    special_tokens: SpecialTokens
    """The tokens that end a response, and the one that fills padding."""
    sampler: Sampler
    """Samples from the policy."""
    reference_sampler: Sampler
    """Samples from the reference policy."""
    location: str
    """Where plain `transformers` loads the base model from: a Hub id or a folder."""
    base_sha256: str = ""
    """SHA-256 of a sample of the numbers of every base weight; it identifies the base model."""
    tokenizer_sha256: str = ""
    """SHA-256 of what text becomes for the model: the tokens, the chat template, and how a text is divided."""
    revision: str | None = None
    """The revision of the base model on the Hub; None for the main branch."""


def make_learner(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    special_tokens: SpecialTokens,
    location: str,
    base_sha256: str = "",
    tokenizer_sha256: str = "",
    revision: str | None = None,
) -> Learner:
    """A learner whose responses are sampled by konic itself, from the weights that it trains."""
    return Learner(
        policy=policy,
        optimizer=optimizer,
        special_tokens=special_tokens,
        sampler=LocalSampler(policy, special_tokens),
        reference_sampler=LocalSampler(policy, special_tokens, from_reference=True),
        location=location,
        base_sha256=base_sha256,
        tokenizer_sha256=tokenizer_sha256,
        revision=revision,
    )


def build_learner(agent: KonicFinetuningAgent, device: torch.device, world: World = ALONE) -> Learner:
    """Load the agent's model onto a device and build everything that learning needs around it.

    With sharding, the weights are divided among the processes of `world`, if there are several.

    Raises:
        ConfigError: Prompt and response do not fit into the model's context, the model cannot be divided, or weights
            would be trained rounded.
        ModelError: The tokenizer has more tokens than the model's vocabulary, or rows cannot leave its cache.
    """
    config, generation = agent.get_training_config(), agent.get_generation_config()
    divides = config.sharding is not None and world.size > 1
    # only parts of the weights have room on a GPU
    loaded, load_original = _load_base(agent, torch.device("cpu") if divides else device, device)
    model_config = loaded.model.config.get_text_config()
    _require_length(agent.get_base_model(), model_config, generation)
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    if len(loaded.tokenizer) > vocabulary:
        raise ModelError(
            f"base_model={agent.get_base_model()!r}: its tokenizer has {len(loaded.tokenizer)} tokens, but the "
            f"model's vocabulary has only {vocabulary}. Use the model's own tokenizer, or resize its embeddings."
        )
    hashes = _fingerprint(loaded.model), _tokenizer_fingerprint(loaded.tokenizer)
    base = LanguageModel(loaded.model.eval())
    if not divides:
        require_decodable(base, agent.get_base_model())
    policy = Policy(loaded, agent.get_lora_config(), config.gradient_checkpointing, config.seed, load_original)
    policy.allow_graphs(base.is_graphable)
    if config.precision == "bfloat16":
        _require_frozen_base(policy)
    if config.divergence_limit is not None and policy.language_model.head_learns:
        needs_limit = config.algorithm_row.divergence_limit is not None
        without = "another algorithm, such as 'grpo'" if needs_limit else "leave it out"
        raise ConfigError(
            f"divergence_limit={config.divergence_limit:g} (algorithm={config.algorithm!r}) compares distributions "
            f"under one head, but here the head is trained too. Use LoRA without lm_head, or {without}."
        )
    special = find_special_tokens(generation, policy.language_model, policy.tokenizer)
    if divides:
        policy.shard(world, device, config.sharded_sampling)
        with policy.sharding.rollout():  # and not before: a decoder may copy all weights
            require_decodable(policy.language_model, agent.get_base_model())
    policy.check_reference()
    return make_learner(policy, make_optimizer(policy, config), special, loaded.location, *hashes, loaded.revision)


_NEEDS_ADAPTER = "TrainingConfig(precision='bfloat16') rounds the weights of base_model, so they cannot be trained."
_IN_FP32 = "set precision='float32'."


def _load_base(
    agent: KonicFinetuningAgent, device: torch.device, trains_on: torch.device
) -> tuple[LoadedModel, Callable[[], PreTrainedModel] | None]:
    """Load the base model in the precision of the run; return also what loads it to merge into, if that is another."""
    name, kwargs, precision = agent.get_base_model(), agent.get_model_kwargs(), agent.get_training_config().precision
    if precision == "auto":
        precision, why = _automatic_precision(agent, trains_on)
        logger.warning("precision='auto' takes %s: %s (docs/precision.md).", precision, why)

    def load_original() -> PreTrainedModel:
        return dequantised(load_model(name, kwargs, torch.device("cpu")).model)

    if precision != "bfloat16":
        loaded = load_model(name, kwargs, device)
        return loaded, load_original if getattr(loaded.model, "is_quantized", False) else None
    loaded = load_model(name, {**kwargs, "dtype": torch.bfloat16}, device)
    if loaded.adapter is None and agent.get_lora_config() is None:
        raise ConfigError(f"{_NEEDS_ADAPTER} lora_config=None trains every weight. Give a lora_config, or {_IN_FP32}")
    if kwargs.get("dtype") is not None:
        return loaded, None  # then bfloat16 is what the model itself has
    return loaded, load_original


def _automatic_precision(
    agent: KonicFinetuningAgent, device: torch.device
) -> tuple[Literal["float32", "bfloat16"], str]:
    """Return the precision that learns as well and is faster, and why it is that.

    Where curves and times were measured: an adapter alone on a frozen base, on a CPU. The processor decides, and not a
    measurement, so that a run repeats itself.
    """
    lora = agent.get_lora_config()
    if device.type != "cpu":
        return "float32", "bfloat16 was compared with it on CPUs only"
    if not isinstance(lora, LoraConfig) or lora.bias != "none" or agent.get_model_kwargs().get("quantization_config"):
        return "float32", "bfloat16 needs a LoraConfig that leaves the base model as it is"
    if not has_bfloat16():
        return "float32", "this processor has no instructions for bfloat16"
    return "bfloat16", "this processor has instructions for it"


def _require_frozen_base(policy: Policy) -> None:
    """Raise ConfigError if weights of a rounded model are trained or rewritten, rather than an adapter alone."""
    is_rounded = any(weight.dtype.itemsize < 4 for weight in policy.trainable().values())
    if policy.has_frozen_copy or is_rounded:
        raise ConfigError(
            f"{_NEEDS_ADAPTER} This lora_config trains or rewrites weights of the model itself. Leave out bias, "
            f"modules_to_save and the like, or {_IN_FP32}"
        )


def _require_length(base_model: str, model_config: PreTrainedConfig, generation: GenerationConfig) -> None:
    """Raise ConfigError if a prompt and its response may be longer than the model can read, or reads row by row."""
    length = generation.max_prompt_length + generation.max_new_tokens
    problem = None
    context = getattr(model_config, "max_position_embeddings", None)
    if context is not None and 0 < context < length:  # XLNet says -1
        problem = f"is over the {context} positions of {base_model!r}"
    limit, setting = length_limit(model_config)
    if length > limit:
        problem = (
            f"is over {limit}: beyond that, {setting} of {base_model!r} makes the numbers of a response depend on the "
            "longest row of its batch"
        )
    if problem is not None:
        raise ConfigError(
            f"GenerationConfig: max_prompt_length={generation.max_prompt_length} + max_new_tokens="
            f"{generation.max_new_tokens} {problem}. Lower one."
        )


def _fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 over up to 64 evenly spaced numbers per weight: fast, and different for another model."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        some_numbers = flat[:: max(1, len(flat) // 64)][:64].cpu().contiguous()
        digest.update(name.encode() + some_numbers.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 of the tokens and their numbers, the chat template, and the tokens of a text."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda token: token[1])  # tokens may be bytes
    parts = [tokens, tokenizer.chat_template, tokenizer(_DIVIDED)["input_ids"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()
