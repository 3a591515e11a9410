"""The rewards, at the place where konic 0.1 had them."""

from konic.finetuning.rewards.composer import KonicLLMRewardComposer
from konic.finetuning.rewards.marks import llm_reward
from konic.finetuning.rewards.reducers import MaxReducer, MeanReducer, WeightedSumReducer

__all__ = ["KonicLLMRewardComposer", "MaxReducer", "MeanReducer", "WeightedSumReducer", "llm_reward"]
