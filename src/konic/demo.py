"""The demo: a small chat model learns to end movie reviews briefly, kindly and coherently.

This file is also an example script: `konic train` accepts it.
"""

import re
import shlex
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from konic.finetuning import (
    DatasetConfig,
    DatasetSource,
    FinetuningResult,
    GenerationConfig,
    KonicFinetuningAgent,
    KonicFinetuningEngine,
    KonicLLMRewardComposer,
    LoraConfig,
    TrainingConfig,
    llm_reward,
)
from konic.finetuning.results.evaluation import Evaluation
from konic.finetuning.results.intervals import distinct_n, mean, paired_bootstrap
from konic.output import is_terminal, write_line
from konic.report import Run, write_report
from konic.text import printable

KIND_WORDS = frozenset(
    "admirable amazing beautiful beautifully best brilliant brilliantly captivating charming clever compelling "
    "convincing delight delightful elegant engaging enjoy enjoyable enjoyed entertaining excellent exceptional "
    "exquisite fantastic fascinating fine fresh fun funny gem generous gentle glorious good gorgeous graceful great "
    "happy heartwarming honest hopeful impressive incredible inspired inspiring joy joyful kind lovely love loved "
    "magical marvelous masterful masterpiece memorable moving outstanding perfect perfectly pleasant pleasure "
    "poignant powerful rewarding rich satisfying sincere smart splendid strong stunning superb sweet tender "
    "terrific thoughtful thrilling touching triumph warm warmth witty wonderful wonderfully worth".split()
)
UNKIND_WORDS = frozenset(
    "annoying awful bad badly bland boring cheap clumsy confusing cringe dead disappointing disappointment dreadful "
    "dull empty fail failed fails flat forgettable hate hated horrible lack lacks lame lazy mediocre mess messy "
    "miserable painful pointless poor poorly predictable ridiculous sad shallow silly slow stale stiff stupid "
    "terrible tedious thin tired tiresome ugly unconvincing uninspired unpleasant waste wasted weak worse worst "
    "wrong".split()
)
MIN_WORDS = 5


class MovieReviewRewards(KonicLLMRewardComposer):
    """Three rewards, each between −1 and 1. Each of them gives 0 to a response of fewer than five words."""

    @llm_reward
    def brevity(self, prompt: str, response: str) -> float:
        """1 for up to 100 characters, falling to 0 at 300."""
        if len(_words(response)) < MIN_WORDS:
            return 0.0
        return min(1.0, max(0.0, (300 - len(response)) / 200))

    @llm_reward
    def positivity(self, prompt: str, response: str) -> float:
        """A half for each different kind word, less a half for each different unkind one, within ±1."""
        words = _words(response)
        if len(words) < MIN_WORDS:
            return 0.0
        balance = len(KIND_WORDS.intersection(words)) - len(UNKIND_WORDS.intersection(words))
        return max(-1.0, min(1.0, balance / 2))

    @llm_reward
    def coherence(self, prompt: str, response: str) -> float:
        """Half for words that are not repeated, half for closing with a finished sentence."""
        words = _words(response)
        if len(words) < MIN_WORDS:
            return 0.0
        pairs = list(pairwise(words))
        fresh = len(set(pairs)) / len(pairs) * len(set(words)) / len(words)
        is_finished = response.rstrip().endswith((".", "!", "?", '."', '!"', '?"'))
        return 0.5 * fresh + 0.5 * is_finished


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def build_agent(max_minutes: float | None = None, held_out: int = 64) -> KonicFinetuningAgent:
    """The agent that `konic demo` trains."""
    return KonicFinetuningAgent(
        base_model="smollm2-135m",
        reward_composer=MovieReviewRewards(reward_weights={"positivity": 2.0}),
        lora_config=LoraConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj")),
        dataset_config=DatasetConfig(source=DatasetSource.BUNDLED, held_out=held_out),
        training_config=TrainingConfig(
            batch_size=16,
            ppo_epochs=1,
            num_minibatches=2,
            kl_placement="reward",  # this and the constant rate as in the figures of README and docs/algorithms.md
            lr_scheduler="constant",
            max_minutes=max_minutes,
        ),
        generation_config=GenerationConfig(max_new_tokens=48, max_prompt_length=64, temperature=0.7),
    )


@dataclass(frozen=True)
class Length:
    """How long a demo is."""

    iterations: int
    minutes: float
    held_out: int


FULL = Length(iterations=22, minutes=4.75, held_out=64)
QUICK = Length(iterations=5, minutes=0.75, held_out=16)
TOO_SHORT = """\
This was the quick demo: every step of a run, but {iterations} iterations instead of 22. It is too short to show
  - a gain in reward: 16 prompts leave an interval that is wider than what so few iterations can gain;
  - what a longer run trades: reward for KL, until the penalty and the limit of the KL hold the policy;
  - whether a reward is gamed, which responses show late.
`konic demo` shows these in about six minutes."""


def run_demo(length: Length, output: Path | None) -> FinetuningResult:
    """Train, evaluate on the held-out prompts before and after, show what changed, and write the page of the run."""
    agent = build_agent(length.minutes, length.held_out)
    engine = KonicFinetuningEngine.from_agent(agent, checkpoint_dir=output)
    result = engine.train(length.iterations)
    if result.before is not None and result.after is not None:
        print_comparison(result.before, result.after)
    if result.model_path is not None:
        run = Path(result.model_path).parent
        write_report([Run.read(run)], run / "report.html")
        lines = [
            "",
            f"The model is in {result.model_path}; every response it gave is in completions/ next to it.",
            f"The page of this run: {(run / 'report.html').absolute()}",
            f'Talk to it: konic generate {shlex.quote(str(run))} "The film was"',
        ]
        write_line("\n".join(lines), sys.stdout)
        if length.held_out == QUICK.held_out:
            write_line("\n" + TOO_SHORT.format(iterations=result.total_iterations), sys.stdout)
    return result


def print_comparison(before: Evaluation, after: Evaluation) -> None:
    """Print a table that compares before and after on the same prompts, and four responses of each, side by side."""
    gain = paired_bootstrap(before.rewards, after.rewards)
    console = Console(width=None if is_terminal(sys.stdout) else 100, highlight=False)
    table = Table(title=f"Before and after on {len(before.prompts)} held-out prompts", box=box.SIMPLE_HEAD)
    table.add_column("")
    for heading in ("before", "after"):
        table.add_column(heading, justify="right")
    table.add_row("mean reward", f"{before.reward_mean:.3f}", f"{after.reward_mean:.3f}", style="bold")
    for name, value in before.reward_breakdown_mean.items():
        table.add_row(f"  {name}", f"{value:.3f}", f"{after.reward_breakdown_mean[name]:.3f}")
    for label, numbers in (
        ("KL paid per response (nats)", [f"{mean(side.kl_per_response):.2f}" for side in (before, after)]),
        ("response length (tokens)", [f"{mean(side.response_lengths):.1f}" for side in (before, after)]),
        ("distinct-2", [f"{distinct_n(side.responses):.3f}" for side in (before, after)]),
    ):
        table.add_row(label, *numbers)
    console.print()
    console.print(table)
    console.print(f"Gain in mean reward: {gain.mean:+.3f} ({gain.words(3)}, paired bootstrap)")
    for index in range(min(4, len(before.prompts))):
        pair = Table(box=box.SIMPLE_HEAD, title=Text(f"{printable(before.prompts[index])} …"), title_justify="left")
        for side, heading in ((before, "before"), (after, "after")):
            pair.add_column(f"{heading} ({side.rewards[index]:.2f})", ratio=1)
        pair.add_row(*(Text(printable(" ".join(side.responses[index].split()))) for side in (before, after)))
        console.print(pair)
