"""Rewards that a policy would game: `konic rewards examples/hackable_rewards.py` shows how, before any training.

The script needs no GPU and no network, because it uses the packaged model.
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
    """Four rewards. Each looks sensible, and each has a flaw."""

    @llm_reward
    def detail(self, prompt: str, response: str) -> float:
        """Meant to reward detail. In fact it rewards more words."""
        return len(response.split()) / 10

    @llm_reward
    def politeness(self, prompt: str, response: str) -> float:
        """1 for a response with "please". No response to this task contains that word."""
        return float("please" in response.lower())

    @llm_reward
    def judge(self, prompt: str, response: str) -> float:
        """A judge that gives a different score at every call."""
        return random.random()  # noqa: S311

    @llm_reward
    def variety(self, prompt: str, response: str) -> float:
        """Share of different words. It raises ZeroDivisionError on an empty response."""
        words = response.split()
        return len(set(words)) / len(words)


def build_agent() -> KonicFinetuningAgent:
    """Return an agent with which the packaged model continues the bundled openings of movie reviews."""
    return KonicFinetuningAgent(
        base_model="smollm2-135m",
        reward_composer=HackableRewards(),
        lora_config=LoraConfig(r=8, lora_alpha=16),
        generation_config=GenerationConfig(max_new_tokens=48, max_prompt_length=64),
    )
