"""Reinforcement-learning finetuning of language models with your own rewards: the public names.

In the order in which data flows: `agent` and `config` hold what to train, `algorithms` how algorithms differ; `data`
loads prompts and `models` the policy; then, iteration after iteration, `rollout` samples responses, `rewards` scores
them, and `learning` turns the scores into an optimizer step. `trainer` holds this loop. `run` keeps the folder of the
run, `results` what it reports, and `callbacks` tells the user. `engine` is what a script calls. `reward_models` makes
rewards of feedback; `system` has files, signals and memory.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from konic.finetuning.agent import BaseKonicFinetuningAgent, KonicFinetuningAgent
from konic.finetuning.algorithms import KonicFinetuningMethodType
from konic.finetuning.callbacks.composite import CompositeCallback
from konic.finetuning.callbacks.console import KonicFinetuningCallback
from konic.finetuning.callbacks.hooks import BaseKonicFinetuningCallback
from konic.finetuning.callbacks.mlflow import MLflowCallback
from konic.finetuning.callbacks.tensorboard import TensorBoardCallback
from konic.finetuning.callbacks.trackio import TrackioCallback
from konic.finetuning.callbacks.wandb import WandbCallback
from konic.finetuning.config import GenerationConfig, LoraConfig, TrainingConfig
from konic.finetuning.data.config import DatasetConfig, DatasetSource
from konic.finetuning.errors import (
    ConfigError,
    DatasetError,
    KonicError,
    ModelError,
    OutputError,
    RewardError,
    SamplerError,
    TrainingError,
)
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.results.summary import FinetuningResult
from konic.finetuning.rewards.composer import BaseRewardModel, KonicLLMRewardComposer
from konic.finetuning.rewards.marks import llm_reward
from konic.finetuning.rewards.reducers import BaseRewardReducer, MaxReducer, MeanReducer, WeightedSumReducer
from konic.finetuning.rewards.remote import RemoteRewardModel
from konic.finetuning.successors import name_not_found

if TYPE_CHECKING:
    from konic.finetuning.engine import KonicFinetuningEngine
    from konic.finetuning.reward_models.classifier import HuggingFaceRewardModel

BaseKonicLLMRewardComposer = KonicLLMRewardComposer
"""Its name in konic 0.1 for composers that only have a `compose` of their own."""

__all__ = [
    "BaseKonicFinetuningAgent",
    "BaseKonicFinetuningCallback",
    "BaseKonicLLMRewardComposer",
    "BaseRewardModel",
    "BaseRewardReducer",
    "CompositeCallback",
    "ConfigError",
    "DatasetConfig",
    "DatasetError",
    "DatasetSource",
    "FinetuningIterationResult",
    "FinetuningResult",
    "GenerationConfig",
    "HuggingFaceRewardModel",
    "KonicError",
    "KonicFinetuningAgent",
    "KonicFinetuningCallback",
    "KonicFinetuningEngine",
    "KonicFinetuningMethodType",
    "KonicLLMRewardComposer",
    "LoraConfig",
    "MLflowCallback",
    "MaxReducer",
    "MeanReducer",
    "ModelError",
    "OutputError",
    "RemoteRewardModel",
    "RewardError",
    "SamplerError",
    "TensorBoardCallback",
    "TrackioCallback",
    "TrainingConfig",
    "TrainingError",
    "WandbCallback",
    "WeightedSumReducer",
    "llm_reward",
]

__path__.append(
    f"{__path__[0]}/konic_0_1"
)  # where the modules of konic 0.1 are found, such as konic.finetuning.callback
_LOADS_TORCH = {"HuggingFaceRewardModel": "reward_models.classifier", "KonicFinetuningEngine": "engine"}


def __getattr__(name: str) -> Any:
    """What loads torch is imported when it is first asked for: worker processes never ask."""
    if name not in _LOADS_TORCH:
        raise name_not_found(__name__, name)
    return getattr(import_module(f"{__name__}.{_LOADS_TORCH[name]}"), name)
