"""A run's folder -> agents for its base model and for the weights that it saved. Its script is not imported."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from konic.finetuning import (
    ConfigError,
    GenerationConfig,
    KonicFinetuningAgent,
    KonicLLMRewardComposer,
    LoraConfig,
    TrainingConfig,
    llm_reward,
)
from konic.finetuning.errors import OutputError
from konic.finetuning.models.locations import PACKAGED_MODELS
from konic.finetuning.models.quantised import recorded_quantisation
from konic.report.run import Run

BASE = "base"
"""The name of the model that a run started from."""
_SAFE_MODEL_KWARGS = ("dtype", "attn_implementation")
"""What is taken from the run of a stranger; trust_remote_code is not."""


_MOST_TOKENS = 32_768
"""Of a response, where the user has not given a number."""


class _Unscored(KonicLLMRewardComposer):
    @llm_reward
    def nothing(self, prompt: str, response: str) -> float:
        return 0.0


@dataclass(frozen=True)
class SavedRun:
    """The weights that a run saved, and the settings with which they respond."""

    run: Run
    generation: GenerationConfig
    seed: int
    """Of the random numbers of the sampler."""

    @classmethod
    def read(cls, folder: Path, changes: Mapping[str, Any] | None = None, seed: int = 0) -> "SavedRun":
        """Read the folder of a run. `changes` are settings other than those of its `generation_config`, None left out.

        Raises:
            OutputError: It is not the folder of a run, or its record does not name the base model.
            ConfigError: A setting of generation is invalid.
        """
        run = Run.read(folder)
        if not isinstance(run.settings.get("model_name"), str):
            raise OutputError(f"{folder}/run.json does not name the model that the run started from.", *run.notes)
        given = {name: value for name, value in (changes or {}).items() if value is not None}
        generation = GenerationConfig(**recorded(run, "generation_config") | given)
        if generation.max_new_tokens > _MOST_TOKENS and "max_new_tokens" not in given:
            raise ConfigError(
                f"{folder}: its run let a response have {generation.max_new_tokens} tokens, for which the memory is "
                "taken at once. Give --max-new-tokens."
            )
        return cls(run, generation, seed)

    def name_of(self, weights: str | None) -> str:
        """Return the name of weights that the run has; None takes `final`, or else the newest checkpoint.

        Raises:
            OutputError: It does not have these weights.
        """
        return self.run.find_weights(weights, BASE)

    @property
    def base_model(self) -> str:
        """The model that the run started from."""
        name = str(self.run.settings["model_name"])
        return name if name in PACKAGED_MODELS else recorded_place(self.run, name)

    @property
    def scoring(self) -> TrainingConfig:
        """What the run did where a reward failed, as the settings of training."""
        names = "on_reward_error", "max_error_rate"
        return TrainingConfig(**{name: self.run.settings[name] for name in names if name in self.run.settings})

    def agent(self, name: str) -> KonicFinetuningAgent:
        """Return an agent for weights of the run, by a name that :meth:`name_of` returned."""
        kwargs = recorded(self.run, "model_kwargs")
        is_base = name == BASE
        model = self.base_model if is_base else str(self.run.path / name)
        own = {key: value for key, value in kwargs.items() if key in _SAFE_MODEL_KWARGS}
        revision = {"revision": kwargs["revision"]} if is_base and kwargs.get("revision") else {}
        return KonicFinetuningAgent(
            base_model=model,
            reward_composer=_Unscored(),
            lora_config=None if (Path(model) / "adapter_config.json").exists() else self._smallest_adapter(),
            training_config=TrainingConfig(seed=self.seed, **self._precision(own)),
            generation_config=self.generation,
            model_kwargs=own | revision | recorded_quantisation(kwargs),
        )

    def _precision(self, own_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the precision in which the run's base model computed, if `dtype` does not say it."""
        is_half = self.run.settings.get("precision") == "bfloat16" and "dtype" not in own_kwargs
        return {"precision": "bfloat16"} if is_half else {}

    def _smallest_adapter(self) -> LoraConfig:
        """Return an adapter that changes nothing while it is untrained, so that a model needs no frozen copy."""
        return LoraConfig(r=1, target_modules=recorded(self.run, "lora_config").get("target_modules"))


def recorded_place(run: Run, name: str) -> str:
    """Return a path as the run recorded it; a relative one is in the folder where the run was started."""
    started_in = run.record.get("current_folder")
    there = os.path.join(started_in, name) if isinstance(started_in, str) else name
    return there if os.path.exists(there) else name


def recorded(run: Run, name: str) -> dict[str, Any]:
    """Return a config as the run recorded it; empty if it did not."""
    value = run.settings.get(name)
    return value if isinstance(value, dict) else {}
