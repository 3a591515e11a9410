"""Rewards that a policy would game: `konic rewards examples/hackable_rewards.py` says how, before any training.

Needs no GPU and no network: the model is the packaged one.
"""

import random

from konic.finetuning import (
    GenerationConfig,
    KonicFinetuningAgent,
    KonicLLMRewardComposer,
    LoraConfig,
    llm_reward,
)


class HackableRewards(KonicLLMRewardComposer):
    """Every one of them looks sensible."""

    @llm_reward
    def detail(self, prompt: str, response: str) -> float:
        """More words, more detail; or just more words."""
        return len(response.split()) / 10

    @llm_reward
    def politeness(self, prompt: str, response: str) -> float:
        """No response to this task ever contains it."""
        return float("please" in response.lower())

    @llm_reward
    def judge(self, prompt: str, response: str) -> float:
        """A judge that cannot make up its mind."""
        return random.random()  # noqa: S311

    @llm_reward
    def variety(self, prompt: str, response: str) -> float:
        """Different words over all words: no words, no answer."""
        words = response.split()
        return len(set(words)) / len(words)


def build_agent() -> KonicFinetuningAgent:
    """The bundled openings of movie reviews, continued by the packaged model."""
    return KonicFinetuningAgent(
        base_model="smollm2-135m",
        reward_composer=HackableRewards(),
        lora_config=LoraConfig(r=8, lora_alpha=16),
        generation_config=GenerationConfig(max_new_tokens=48, max_prompt_length=64),
    )
