"""A run's folder -> agents for its base model and for the weights that it saved. Its script is not imported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from konic.finetuning import (
    GenerationConfig,
    KonicFinetuningAgent,
    KonicLLMRewardComposer,
    LoraConfig,
    TrainingConfig,
    llm_reward,
)
from konic.finetuning.errors import OutputError, did_you_mean
from konic.report.run import Run

_SAFE_MODEL_KWARGS = ("dtype", "attn_implementation")
"""What is taken from the run of a stranger; trust_remote_code is not."""


class _Unscored(KonicLLMRewardComposer):
    @llm_reward
    def nothing(self, prompt: str, response: str) -> float:
        return 0.0


def agents_of_run(
    folder: Path, weights: str | None, with_base: bool, generation: Mapping[str, Any], seed: int
) -> dict[str, KonicFinetuningAgent]:
    """Return agents by the names of their weights: `base` if it is wanted, then a folder of the run.

    Args:
        folder: The run's folder.
        weights: The folder inside of it; None takes `final`, or else the newest checkpoint.
        with_base: Also the model that the run started from.
        generation: Settings other than the run's `generation_config`.
        seed: Of the random numbers of the sampler.

    Raises:
        OutputError: It is not the folder of a run, or does not hold these weights.
    """
    run = Run.read(folder)
    settings = run.settings
    chosen = weights or next(reversed(run.checkpoints.values()), None)
    saved = [*run.checkpoints.values(), *(["best"] if (folder / "best").is_dir() else [])]
    if chosen not in saved:
        hint = did_you_mean(chosen, saved) if chosen else ""
        raise OutputError(f"{folder} has no weights {chosen or 'yet'!r}.{hint} It has: {', '.join(saved) or 'none'}.")
    kwargs = {name: value for name, value in _dict(settings, "model_kwargs").items() if name in _SAFE_MODEL_KWARGS}
    revision = _dict(settings, "model_kwargs").get("revision")
    named = {"base": str(settings.get("model_name"))} if with_base else {}
    named[chosen] = str(folder / chosen)
    return {
        name: KonicFinetuningAgent(
            base_model=model,
            reward_composer=_Unscored(),
            lora_config=_smallest_adapter(settings) if name == "base" else None,
            training_config=TrainingConfig(seed=seed),
            generation_config=GenerationConfig(**_dict(settings, "generation_config") | dict(generation)),
            model_kwargs=kwargs | ({"revision": revision} if revision and name == "base" else {}),
        )
        for name, model in named.items()
    }


def _smallest_adapter(settings: Mapping[str, Any]) -> LoraConfig | None:
    """Return an adapter that changes nothing while it is untrained, so that the base needs no frozen copy of itself."""
    targets = _dict(settings, "lora_config").get("target_modules")
    return LoraConfig(r=1, target_modules=targets) if targets else None


def _dict(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = settings.get(name)
    return value if isinstance(value, dict) else {}
