"""The rewards, at the place where konic 0.1 had them."""

from typing import Any

from konic.finetuning.reward_models.classifier import HuggingFaceRewardModel
from konic.finetuning.rewards.composer import BaseRewardModel, KonicLLMRewardComposer
from konic.finetuning.rewards.marks import llm_reward
from konic.finetuning.rewards.reducers import BaseRewardReducer, MaxReducer, MeanReducer, WeightedSumReducer
from konic.finetuning.successors import name_not_found

BaseKonicLLMRewardComposer = KonicLLMRewardComposer

__all__ = [
    "BaseKonicLLMRewardComposer",
    "BaseRewardModel",
    "BaseRewardReducer",
    "HuggingFaceRewardModel",
    "KonicLLMRewardComposer",
    "MaxReducer",
    "MeanReducer",
    "WeightedSumReducer",
    "llm_reward",
]


def __getattr__(name: str) -> Any:
    raise name_not_found(__name__, name)
