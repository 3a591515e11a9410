"""A job on Ray for benchmarks/cluster.py and tests/test_ray.py: rewards of a tiny model that go wrong when told to.

python ray_job.py MODEL RUN_FOLDER WHAT ITERATIONS     WHAT: nothing, hang, slow, grow, pool, model

With "pool" the rewards are called beside an actor of Ray; with "model" one of them is a reward model in an actor.
"""

import os
import sys
import time
from pathlib import Path

from konic.finetuning import (
    DatasetConfig,
    GenerationConfig,
    KonicFinetuningAgent,
    KonicFinetuningCallback,
    KonicFinetuningEngine,
    KonicLLMRewardComposer,
    LoraConfig,
    RemoteRewardModel,
    TrainingConfig,
    llm_reward,
)

PROMPTS = ["ab", "the film was", "x", "why not", "no", "go on then", "a", "and so it goes"]


class Rewards(KonicLLMRewardComposer):
    """Counts letters. `trouble` is what goes wrong in the second worker; `marker` names a file.

    "killed" and "hang" happen once, and leave the file; "error" writes the time into it. With "grow" and "pool", each
    worker is slow.
    """

    def __init__(self, trouble="nothing", marker=None):
        super().__init__()
        self.trouble, self.marker = trouble, marker

    @llm_reward
    def vowels(self, prompt: str, response: str) -> float:
        if self.trouble in ("grow", "pool") or (os.environ.get("RANK") == "1" and self.trouble != "nothing"):
            self.go_wrong()
        return sum(letter in "aeiou" for letter in response) / 4

    @llm_reward
    def low(self, prompt: str, response: str) -> float:
        return sum(map(ord, response)) % 11 / 10

    def go_wrong(self):
        if self.trouble == "model":
            return
        if self.trouble in ("slow", "grow", "pool"):
            time.sleep(0.2)
            return
        if self.trouble == "error":
            if self.marker:
                Path(self.marker).write_text(str(time.time()))
            raise ValueError("no such word")
        calls, self.calls = getattr(self, "calls", 0), getattr(self, "calls", 0) + 1
        if calls < 15 or Path(self.marker).exists():  # in the third iteration, once
            return
        Path(self.marker).touch()
        if self.trouble == "killed":
            os._exit(9)
        while True:  # "hang"
            time.sleep(1)


class SlowLengths:
    """A reward model: counts characters."""

    def score(self, prompts, responses):
        time.sleep(0.5)
        return [len(response) / 8 for response in responses]


def make_agent(model, rewards, **training):
    return KonicFinetuningAgent(
        base_model=str(model),
        reward_composer=rewards,
        lora_config=LoraConfig(r=4, target_modules=["c_attn"]),
        dataset_config=DatasetConfig(source="memory", prompts=PROMPTS, held_out=2),
        training_config=TrainingConfig(batch_size=12, learning_rate=2e-2, **training),
        generation_config=GenerationConfig(max_new_tokens=8, max_prompt_length=40),
        model_kwargs={"dtype": "float64"},
    )


if __name__ == "__main__":
    from ray.train import ScalingConfig

    model, run, what, iterations = sys.argv[1:]
    rewards = Rewards(what, f"{run}.marker")
    beside = {"reward_workers": 1, "reward_resources": {"CPU": 0}} if what == "pool" else {}
    if what == "model":
        rewards.add_reward_model(RemoteRewardModel("length", SlowLengths))
    agent = make_agent(model, rewards, process_timeout_seconds=5 if what == "hang" else 60, **beside)
    scaling = ScalingConfig(
        num_workers=(1, 2) if what == "grow" else 2,
        resources_per_worker={"CPU": 1},
        elastic_resize_monitor_interval_s=2,
    )
    engine = KonicFinetuningEngine.from_agent(
        agent, checkpoint_dir=run, scaling=scaling, callback=KonicFinetuningCallback()
    )
    result = engine.train(int(iterations), save_every=1)
    print("STOPPED", result.stopped_because)
