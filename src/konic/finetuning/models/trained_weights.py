"""Weights -> ConfigError, or nothing: whether a model's own weights can be trained in their precision."""

from collections.abc import Mapping

import peft
import torch
from torch import nn
from transformers import PreTrainedModel

from konic.finetuning.errors import ConfigError
from konic.output import get_logger

logger = get_logger(__name__)

_IN_FLOAT32 = "Train in float32, or use LoRA without modules_to_save or bias: its weights stay in float32."


def check_base_weights(causal_lm: PreTrainedModel, adapter: peft.LoraConfig | None) -> None:
    """Raise ConfigError if weights of the model itself are to be trained and cannot be."""
    trained = {name: weight for name, weight in causal_lm.named_parameters() if weight.requires_grad}
    if adapter is None and (not trained or getattr(causal_lm, "is_quantized", False)):
        raise ConfigError(
            f"lora_config=None trains every weight, but those of {type(causal_lm).__name__} are quantised or frozen. "
            "Give a lora_config."
        )
    if adapter is None and _loading_clears_padding(causal_lm):
        raise ConfigError(
            f"lora_config=None trains every weight, but loading a {type(causal_lm).__name__} sets the embedding of its "
            "padding token to 0, so that a saved model would differ from the trained one. Give a lora_config."
        )
    if adapter is not None:
        trained = {name: weight for name, weight in trained.items() if adapter.bias != "none" and name.endswith("bias")}
    _require_no_float16(trained)


def _loading_clears_padding(causal_lm: PreTrainedModel) -> bool:
    """Return True if `transformers` overwrites an embedding's row of padding after it has loaded it from a file."""
    embedding = causal_lm.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is None:
        return False
    probe = nn.Embedding(2, 1, padding_idx=0)
    with torch.no_grad():
        probe.weight.fill_(1.0)
        probe.weight._is_hf_initialized = True  # type: ignore[attr-defined]  # what is loaded is marked so
        causal_lm._init_weights(probe)
    return not bool((probe.weight == 1.0).all())


def _require_no_float16(trained: Mapping[str, nn.Parameter]) -> None:
    """Raise ConfigError for trained weights in float16.

    The squares of most gradients are below the smallest number of float16, so that Adam divides by its ε alone: the
    first step of SmolLM2 was 550 times as long as in float32.
    """
    name = next((name for name, weight in trained.items() if weight.dtype == torch.float16), None)
    if name is not None:
        raise ConfigError(f"{name} would be trained in float16, which Adam's steps do not survive. {_IN_FLOAT32}")


def check_precision(trained: Mapping[str, nn.Parameter]) -> None:
    """Raise ConfigError for trained weights in float16, and warn of those in bfloat16."""
    _require_no_float16(trained)
    name = next((name for name, weight in trained.items() if weight.dtype.itemsize < 4), None)
    if name is not None:
        lost = "steps smaller than its rounding error are lost"
        logger.warning("%s is trained in %s: %s. %s", name, trained[name].dtype, lost, _IN_FLOAT32)
