"""GPT-2 learns to continue movie reviews kindly, briefly and without repeating itself.

python sentiment_rlhf.py

The script needs the Hugging Face Hub for `gpt2` and `imdb`. Without the Hub, use base_model="smollm2-135m" with
target_modules=["q_proj", "v_proj"], and DatasetConfig(source=DatasetSource.BUNDLED).
"""

from konic.finetuning import (
    DatasetConfig,
    DatasetSource,
    KonicFinetuningAgent,
    KonicFinetuningEngine,
    KonicLLMRewardComposer,
    LoraConfig,
    TrainingConfig,
    llm_reward,
)

POSITIVE_WORDS = {
    "amazing",
    "beautiful",
    "enjoy",
    "excellent",
    "fantastic",
    "fun",
    "good",
    "great",
    "love",
    "wonderful",
}


class SentimentRewardComposer(KonicLLMRewardComposer):
    @llm_reward
    def brevity_bonus(self, prompt: str, response: str) -> float:
        """From 1 for an empty response down to 0 at 300 characters."""
        return max(0.0, 1.0 - len(response) / 300)

    @llm_reward
    def positivity_reward(self, prompt: str, response: str) -> float:
        """A quarter for each positive word, up to 1."""
        words = [word.strip(".,!?;:\"'()").lower() for word in response.split()]
        return min(1.0, sum(word in POSITIVE_WORDS for word in words) / 4)

    @llm_reward
    def coherence_penalty(self, prompt: str, response: str) -> float:
        """Minus the share of words that repeat an earlier word; −1 for an empty response."""
        words = response.lower().split()
        return len(set(words)) / len(words) - 1.0 if words else -1.0


agent = KonicFinetuningAgent(
    base_model="gpt2",
    reward_composer=SentimentRewardComposer(
        reward_weights={"brevity_bonus": 1.0, "positivity_reward": 2.0, "coherence_penalty": 0.5}
    ),
    lora_config=LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj"]),
    dataset_config=DatasetConfig(
        source=DatasetSource.HUGGINGFACE, name="imdb", prompt_column="text", split="train", max_samples=500
    ),
    training_config=TrainingConfig(batch_size=4, ppo_epochs=4, kl_penalty_weight=0.05),
)

if __name__ == "__main__":
    result = KonicFinetuningEngine.from_agent(agent).train(max_iterations=50)
    curve = result.get_reward_curve()
    print(f"Reward went from {curve[0]:.3f} to {result.final_reward_mean:.3f}; the model is in {result.model_path}")
