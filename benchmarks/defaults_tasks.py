"""The tasks on which defaults are measured, none of them the demo's: an agent for each, with its own settings.

`kind`     three rewards: short, kind words (weight 2), few repetitions
`details`  one point for every ten different words: length alone earns it
`sums`     0 or 1: the first number of the answer is the sum of two digits
`judge`    the probability that a classifier, trained on labelled film opinions, calls the text a good opinion
`never`    always 0: there is nothing to learn, so the policy should stay where it is
"""

import random
import re
from itertools import pairwise

from konic.finetuning import (
    DatasetConfig,
    DatasetSource,
    GenerationConfig,
    HuggingFaceRewardModel,
    KonicFinetuningAgent,
    KonicLLMRewardComposer,
    LoraConfig,
    llm_reward,
)

KIND = frozenset(
    "admire beautiful best brave bright calm caring charming cheerful delight dear enjoy excellent fine friendly fun "
    "gentle glad good grateful great happy helpful honest joy kind laugh lovely love nice peaceful pleasant sweet "
    "thank tender warm welcome well wise wonderful".split()
)


def words(text):
    return re.findall(r"[a-z']+", text.lower())


class ShortAndKind(KonicLLMRewardComposer):
    """Three rewards between 0 and 1, the second with weight 2."""

    def __init__(self):
        super().__init__(reward_weights={"kindness": 2.0})

    @llm_reward
    def shortness(self, prompt, response):
        """1 for an empty response, falling to 0 at 40 words."""
        return max(0.0, 1.0 - len(words(response)) / 40)

    @llm_reward
    def kindness(self, prompt, response):
        """A third for each different kind word, up to 1."""
        return min(1.0, len(KIND.intersection(words(response))) / 3)

    @llm_reward
    def freshness(self, prompt, response):
        """The share of pairs of words that do not come twice."""
        pairs = list(pairwise(words(response)))
        return len(set(pairs)) / max(1, len(pairs))


class Details(KonicLLMRewardComposer):
    """A reward that pays for length."""

    @llm_reward
    def details(self, prompt, response):
        """A tenth for each different word."""
        return len(set(words(response))) / 10


class Sums(KonicLLMRewardComposer):
    """A reward that can be checked."""

    @llm_reward
    def right(self, prompt, response):
        """1 if the first number of the response is the sum of the prompt's two, else 0."""
        first, second = map(int, re.findall(r"\d+", prompt)[-2:])
        found = re.search(r"\d+", response)
        return float(found is not None and int(found[0]) == first + second)


class Never(KonicLLMRewardComposer):
    """No reward."""

    @llm_reward
    def nothing(self, prompt, response):
        """Always 0."""
        return 0.0


def sums():
    """Every sum of two digits as a question, in a fixed random order."""
    pairs = [(first, second) for first in range(1, 10) for second in range(1, 10)]
    random.Random(0).shuffle(pairs)
    return tuple(f"Question: What is {first} + {second}?\nAnswer:" for first, second in pairs)


TASKS = ("kind", "details", "sums", "judge", "never")


def agent_of(task, training, judge=None, dtype="float32"):
    """The agent of a task; `judge` is the folder of its classifier. Without `dtype`, the precision says it."""
    composers = {"kind": ShortAndKind, "details": Details, "sums": Sums, "never": Never}
    if task == "judge":
        composer = KonicLLMRewardComposer([HuggingFaceRewardModel(judge, output="probability", label_index=1)])
    else:
        composer = composers[task]()
    return KonicFinetuningAgent(
        base_model="smollm2-135m",
        model_kwargs={} if dtype is None else {"dtype": dtype},
        reward_composer=composer,
        lora_config=LoraConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj")),
        dataset_config=DatasetConfig(prompts=sums()) if task == "sums" else DatasetConfig(source=DatasetSource.BUNDLED),
        training_config=training,
        generation_config=GenerationConfig(max_new_tokens=12 if task == "sums" else 48),
    )
