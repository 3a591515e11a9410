"""A chat model learns to follow instructions, from a reward model trained on preferences and from a few rules.

    python examples/instruction_following.py

The script runs offline on packaged models, in about ten minutes on two CPU cores: preferences -> reward model -> PPO.
For full scale, change two names: BASE_MODEL to "Qwen/Qwen2.5-7B-Instruct" and REWARD_MODEL to
"Skywork/Skywork-Reward-V2-Qwen3-0.6B".
"""

import math
import re
import sys
from pathlib import Path

from konic.finetuning import *

BASE_MODEL = "smollm2-135m"
REWARD_MODEL = "reward-model-instructions"  # trained on DATA / "preferences.jsonl" if the folder is missing

DATA = Path(__file__).parent / "data"
SMALL_WORDS = frozenset(
    "a an and are as at be by can do does for from give had has have how i if in is it its list make me my name of on "
    "one or our please say should so some tell that the their them then there they this three to two us use was way "
    "we what when where which who why will with without would write you your explain suggest".split()
)


class InstructionRewards(KonicLLMRewardComposer):
    """Rules that a neural reward does not enforce: stay on the subject, come to an end, and stay short."""

    @llm_reward
    def on_topic(self, prompt: str, response: str) -> float:
        """Share of the instruction's own words that also appear in the response."""
        asked = _words(prompt) - SMALL_WORDS
        return len(asked & _words(response)) / len(asked) if asked else 0.0

    @llm_reward
    def finished(self, prompt: str, response: str) -> float:
        """1 for a response that ends with the end of a sentence, else 0."""
        return float(response.rstrip().endswith((".", "!", "?", '."', ".)")))

    @llm_reward
    def measured(self, prompt: str, response: str) -> float:
        """1 for up to 30 words, falling to 0 at 60 words; 0 for fewer than 5 words, which are no answer."""
        count = len(response.split())
        return 0.0 if count < 5 else min(1.0, max(0.0, (60 - count) / 30))


class StopWhenGoodEnough(KonicFinetuningCallback):
    """Stops training when the held-out reward has not risen for `patience` evaluations, or the KL is above `max_kl`."""

    def __init__(self, patience: int, max_kl: float):
        super().__init__()
        self.patience, self.max_kl, self.rewards = patience, max_kl, []

    def should_stop_early(self, result: FinetuningIterationResult) -> bool:
        """Return True to end the run. Its best model on the held-out prompts is in best/ in any case."""
        if not math.isnan(result.eval_reward_mean):  # this iteration was evaluated
            self.rewards.append(result.eval_reward_mean)
        is_stale = len(self.rewards) > self.patience and max(self.rewards) not in self.rewards[-self.patience :]
        return is_stale or result.kl_per_response > self.max_kl


def reward_model() -> HuggingFaceRewardModel:
    """Return the reward model. If its folder is missing, train it on the preferences first."""
    if REWARD_MODEL.startswith("reward-model") and not Path(REWARD_MODEL).is_dir():
        from konic.finetuning.reward_models.feedback import read_preferences
        from konic.finetuning.reward_models.training import RewardTrainingConfig, train_reward_model

        print("Fitting a reward model to examples/data/preferences.jsonl ...", file=sys.stderr)
        pairs = read_preferences(str(DATA / "preferences.jsonl"))
        config = RewardTrainingConfig(epochs=5, batch_size=8)
        report = train_reward_model(pairs, "all-minilm-l6-v2", REWARD_MODEL, config, tell=print)
        share, size = report.accuracy, report.num_held_out
        print(f"Held-out accuracy {share.mean:.3f} ({share.low:.3f} to {share.high:.3f}, n={size})")
    return HuggingFaceRewardModel(REWARD_MODEL, normalize=True, name="helpful")


def build_agent() -> KonicFinetuningAgent:
    """Return the agent; `konic train` and `konic rewards` call this function too."""
    instructions = (DATA / "instructions.txt").read_text(encoding="utf-8").splitlines()
    return KonicFinetuningAgent(
        base_model=BASE_MODEL,
        reward_composer=InstructionRewards(
            reward_models=[reward_model()], reward_weights={"helpful": 1.0, "on_topic": 1.0, "finished": 0.5}
        ),
        lora_config=LoraConfig(r=16, lora_alpha=32),
        dataset_config=DatasetConfig(
            prompts=[[{"role": "user", "content": instruction}] for instruction in instructions], held_out=40
        ),
        training_config=TrainingConfig(
            batch_size=16, ppo_epochs=1, num_minibatches=2, lr_scheduler="constant", eval_every=4, kl_budget=10.0,
            max_minutes=8, on_reward_error="skip", reward_workers=1, reward_timeout_seconds=10,
        ),
        generation_config=GenerationConfig(max_new_tokens=64, max_prompt_length=96, temperature=0.7),
    )  # fmt: skip


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower()))


def main() -> None:
    """Train, and print what changed on held-out instructions."""
    callback = StopWhenGoodEnough(patience=3, max_kl=12.0)
    result = KonicFinetuningEngine.from_agent(build_agent(), callback=callback).train(max_iterations=30)
    if result.before is None or result.after is None:  # Ctrl-C ended the run
        return
    for index in range(3):
        print(f"\n{result.before.prompts[index]}")
        print(f"  before ({result.before.rewards[index]:+.2f}): {' '.join(result.before.responses[index].split())}")
        print(f"  after  ({result.after.rewards[index]:+.2f}): {' '.join(result.after.responses[index].split())}")


if __name__ == "__main__":
    main()
