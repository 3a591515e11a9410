from konic.finetuning import *


class Cheerful(KonicLLMRewardComposer):
    @llm_reward
    def brief(self, prompt: str, response: str) -> float:
        return max(0.0, 1.0 - len(response) / 300)

    @llm_reward
    def cheerful(self, prompt: str, response: str) -> float:
        return min(1.0, sum(word in response.lower() for word in ("great", "love", "wonderful", "fun")) / 2)


agent = KonicFinetuningAgent(
    base_model="smollm2-135m",
    reward_composer=Cheerful(),
    lora_config=LoraConfig(r=8, lora_alpha=16),
    dataset_config=DatasetConfig(source=DatasetSource.BUNDLED),
    training_config=TrainingConfig(batch_size=8),
)

if __name__ == "__main__":
    KonicFinetuningEngine.from_agent(agent).train(max_iterations=50)
