"""A user's settings -> validated, keyword-only values: all three kinds, to be imported from here. Loads no torch."""

from types import MappingProxyType
from typing import Literal

from pydantic import Field

from konic.finetuning.algorithms import KonicFinetuningMethodType
from konic.finetuning.generation_config import GenerationConfig
from konic.finetuning.settings import Settings
from konic.finetuning.training_config import TrainingConfig

__all__ = ["GenerationConfig", "KonicFinetuningMethodType", "LoraConfig", "TrainingConfig"]


class LoraConfig(Settings):
    """Low-rank adapters, with PEFT's meaning for every field (arXiv 2106.09685)."""

    successors = MappingProxyType(
        {"to_peft_config": "peft.LoraConfig(**config.to_dict()) makes PEFT's."}
        | dict.fromkeys(
            (
                "alpha_pattern", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform",
                "lora_bias", "modules_to_save", "rank_pattern", "target_parameters", "trainable_token_indices",
                "use_dora", "use_rslora",
            ),
            "PEFT's has it: pass peft.LoraConfig(...) as lora_config.",
        )
    )  # fmt: skip

    r: int = Field(default=8, ge=1)
    """Rank of the adapter matrices."""
    lora_alpha: float = Field(default=16, gt=0)
    """The adapter's output is scaled by lora_alpha / r."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Written to the adapter's file. konic applies no dropout, because ratios would then not start at one."""
    target_modules: tuple[str, ...] | str | None = None
    """Names of the layers to adapt, a regular expression, or "all-linear"; None takes what PEFT has for the model."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases train too. Other than "none" needs a frozen copy of the model as the reference."""
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    """The only supported task."""
    fan_in_fan_out: bool | None = None
    """Whether weights are stored transposed, as in GPT-2's Conv1D. konic reads it from the layers and ignores this."""
