"""An agent of a saved run -> its model in memory, which responds to prompts: at once, or token by token."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

from konic.finetuning import GenerationConfig, KonicFinetuningAgent
from konic.finetuning.data.prompts import Prompt
from konic.finetuning.data.samples import Sample
from konic.finetuning.data.tokenization import PromptBatch, make_prompt_batch
from konic.finetuning.learning.learner import build_learner
from konic.finetuning.models.loading import pick_device
from konic.finetuning.models.policy import Policy
from konic.finetuning.rollout.evaluation import BATCH_SIZE
from konic.finetuning.rollout.local_sampler import LocalSampler
from konic.finetuning.rollout.rollout import make_records
from konic.finetuning.rollout.sampler import RandomKey, Samples, SpecialTokens
from konic.finetuning.rollout.streaming import TextStream


@dataclass(frozen=True)
class Weights:
    """A model in memory, under the name of its weights in the run. The same seed and rows give the same responses."""

    name: str
    policy: Policy
    sampler: LocalSampler
    special: SpecialTokens
    generation: GenerationConfig

    @classmethod
    def load(cls, name: str, agent: KonicFinetuningAgent, device: str = "auto") -> Self:
        """Load the model of an agent.

        Raises:
            KonicError: It cannot be loaded.
        """
        learner = build_learner(agent, pick_device(device))
        policy, special = learner.policy, learner.special_tokens
        return cls(name, policy, LocalSampler(policy, special), special, agent.get_generation_config())

    def responses(
        self, prompts: Sequence[Prompt], seed: int, count: int = 1
    ) -> Iterator[tuple[PromptBatch, Samples, list[Sample]]]:
        """Yield `count` responses to each prompt, one prompt after the other, in batches."""
        repeated = [prompt for prompt in prompts for _ in range(count)]
        for start in range(0, len(repeated), BATCH_SIZE):
            part, before = repeated[start : start + BATCH_SIZE], repeated[max(0, start - count) : start]
            batch = make_prompt_batch(
                part, self.policy.tokenizer, self.generation.max_prompt_length, self.special.pad, self.policy.device,
                before,
            )  # fmt: skip
            samples = self.sampler(batch, self.generation, RandomKey(seed, iteration=0))
            yield batch, samples, make_records(batch, samples, self.policy, self.generation, self.special)

    def respond(self, prompts: Sequence[Prompt], seed: int) -> list[Sample]:
        """Return a response to each prompt."""
        return [record for _, _, records in self.responses(prompts, seed) for record in records]

    def stream(self, prompt: Prompt, seed: int, show: Callable[[str], None]) -> Sample:
        """Return the response to a prompt, and show its text so far again and again; the last text is the whole."""
        text = TextStream(self.policy.tokenizer, self.special, self.generation, show)
        reader = replace(self, sampler=replace(self.sampler, on_tokens=text))
        (sample,) = reader.respond([prompt], seed)
        text.update(sample.response)
        return sample
