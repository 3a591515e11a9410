"""Saved weights, prompts, rewards -> Comparison: two sides on the same prompts and random numbers, with intervals.

The unit is the prompt: several responses to it are averaged first, and the bootstrap draws prompts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

from konic.finetuning import ConfigError, KonicLLMRewardComposer, TrainingConfig
from konic.finetuning.data.prompts import Prompt
from konic.finetuning.data.samples import Sample, collect_columns
from konic.finetuning.results.at_k import best_at_k, pass_at_k
from konic.finetuning.results.evaluation import Evaluation
from konic.finetuning.results.intervals import (
    FEWEST_PAIRS,
    Interval,
    bootstrap,
    distinct_n,
    nanmean,
    paired_bootstrap,
    proportion,
)
from konic.finetuning.rewards.listing import list_rewards
from konic.finetuning.rewards.scoring import Scorer
from konic.finetuning.rewards.totals import evaluation_moments
from konic.finetuning.rollout.evaluation import MICRO_BATCH_SIZE, make_evaluation
from konic.finetuning.rollout.rollout import kl_between
from konic.finetuning.system.signals import raising_on_signals
from konic.finetuning.system.user_code import standard_torch_modes
from konic.report.run import PART
from konic.saved.agents import BASE, SavedRun
from konic.saved.weights import Weights

_T = TypeVar("_T")
Groups = list[list[float]]
"""The values of the responses to each prompt."""
_TOTALS = "reward", "mean reward"
"""How the total is called."""


@dataclass(frozen=True)
class Measure:
    """One number of both sides, and by how much it differs, over the same prompts."""

    name: str
    against: Interval
    weights: Interval
    difference: Interval


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Responses of two sides to the same prompts, with their rewards. Each side has N · n of them, prompt by prompt."""

    against: tuple[str, Evaluation]
    weights: tuple[str, Evaluation]
    num_samples: int
    """n responses to each prompt."""
    ks: Sequence[int]

    @property
    def num_prompts(self) -> int:
        """N."""
        return len(self.weights[1].rewards) // self.num_samples

    def measures(self) -> list[Measure]:
        """Mean reward, each part, the best of k, the share that passes, KL, length and variety."""
        sides = self.against[1], self.weights[1]
        reward = sides[0].rewards, sides[1].rewards
        absent = [math.nan] * len(reward[0])  # a part that abstained from all responses of a side
        names = dict.fromkeys(name for side in sides for name in side.breakdown)
        parts = {name: (sides[0].breakdown.get(name, absent), sides[1].breakdown.get(name, absent)) for name in names}
        parts = _beside_total(parts)
        kl = sides[0].kl_per_response, sides[1].kl_per_response
        found = [self._mean_reward(name, both) for name, both in {"mean reward": reward, **parts}.items()]
        found += [self._of_reward(f"best@{k}", reward, partial(_best, k=k)) for k in self.ks]
        for name, both in {"reward": reward, **parts}.items():
            if _only_0_and_1(both):
                found += [self._of_reward(f"pass@{k} {name}", both, partial(_passed, k=k)) for k in self.ks]
        if not any(math.isnan(value) for value in kl[1]):
            found.append(self._measure("KL (nats/response)", kl, nanmean))
        found.append(self._measure("length (tokens)", (sides[0].response_lengths, sides[1].response_lengths), nanmean))
        variety = [distinct_n(side.responses) for side in sides]
        plain = [Interval(value, math.nan, math.nan) for value in (*variety, variety[1] - variety[0])]
        return [*found, Measure("distinct-2", *plain)]

    def _measure(
        self, name: str, both: tuple[Sequence[float], Sequence[float]], of: Callable[[list[float]], float]
    ) -> Measure:
        first, second = ([of(group) for group in self._groups(values)] for values in both)
        return Measure(name, bootstrap(first), bootstrap(second), paired_bootstrap(first, second))

    def _of_reward(
        self, name: str, both: tuple[Sequence[float], Sequence[float]], of: Callable[[list[float]], float]
    ) -> Measure:
        """A measure of a reward. Where that is only 0 and 1, no interval reaches beyond what the measure can be."""
        measure = self._measure(name, both, of)
        if not _only_0_and_1(both):
            return measure
        sides = _within(measure.against, 0.0), _within(measure.weights, 0.0)
        return Measure(name, *sides, _within(measure.difference, -1.0))

    def _mean_reward(self, name: str, both: tuple[Sequence[float], Sequence[float]]) -> Measure:
        """The mean of a reward. Where one response to each prompt got 0 or 1, it is a share, with Wilson's interval."""
        measure = self._of_reward(name, both, nanmean)
        if self.num_samples > 1 or self.num_prompts < FEWEST_PAIRS or not _only_0_and_1(both):
            return measure
        against, weights = ([value for value in values if not math.isnan(value)] for values in both)
        return replace(measure, against=_share(against), weights=_share(weights))

    def _groups(self, values: Sequence[float]) -> Groups:
        size = self.num_samples
        groups = ([float(value) for value in values[start : start + size]] for start in range(0, len(values), size))
        return [[value for value in group if not math.isnan(value)] for group in groups]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the responses, as JSON takes it; a number that is not there is None."""
        measures = {
            measure.name: {
                side: plain_numbers(asdict(getattr(measure, side))) for side in ("against", "weights", "difference")
            }
            for measure in self.measures()
        }
        return {
            "against": self.against[0], "weights": self.weights[0], "num_prompts": self.num_prompts,
            "num_samples": self.num_samples, "k": list(self.ks), "measures": measures,
        }  # fmt: skip

    def responses(self) -> list[dict[str, Any]]:
        """Every response with its numbers, prompt by prompt, a dict for each pair of the two sides."""
        prompts = self.weights[1].prompts
        pairs: list[dict[str, Any]] = [
            {"prompt": text, "sample": n % self.num_samples} for n, text in enumerate(prompts)
        ]
        for side, (_, evaluation) in (("against", self.against), ("weights", self.weights)):
            for index, pair in enumerate(pairs):
                numbers = {"reward": evaluation.rewards[index], "kl": evaluation.kl_per_response[index]}
                pair[side] = {
                    "response": evaluation.responses[index],
                    "length": evaluation.response_lengths[index],
                    **plain_numbers(numbers),
                    "parts": plain_numbers({name: values[index] for name, values in evaluation.breakdown.items()}),
                }
        return pairs


def compare(
    saved: SavedRun,
    weights: str,
    against: str,
    prompts: Sequence[Prompt],
    composer: KonicLLMRewardComposer,
    num_samples: int = 1,
    ks: Sequence[int] = (),
    device: str = "auto",
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Sample and score responses of two saved weights to the same prompts, with the same random numbers.

    The KL is the exact one from the model that the run started from, whichever the sides are.

    Raises:
        KonicError: Both are the same weights, a k is more than the responses, a model cannot be loaded, a reward fails.
    """
    if weights == against:
        raise ConfigError(f"--weights and --against are both {weights!r}: name two different ones.")
    if any(k > num_samples for k in ks):
        raise ConfigError(f"--k {max(ks)} is more than --samples {num_samples}: raise --samples.")
    require_columns(composer, prompts)
    with raising_on_signals(), standard_torch_modes(), Scorer(composer, saved.scoring) as scorer:
        say(f"Loading {BASE} ...")
        base = Weights.load(BASE, saved.agent(BASE), device)
        moments: Any = {}
        sides = []
        for name in (against, weights):
            if name != BASE:
                say(f"Loading {name} ...")
            side = base if name == BASE else Weights.load(name, saved.agent(name), device)
            records, kls = _sample(side, base, prompts, saved.seed, num_samples, scorer, say)
            say(f"{name}: scoring {len(records)} responses ...")
            scores = scorer.score(records, moments)
            scorer.require_fit_evaluation(scores)
            evaluation = make_evaluation(records, kls, scores)
            moments = moments or evaluation_moments(list_rewards(composer), evaluation)
            sides.append((name, evaluation))
    return Comparison(against=sides[0], weights=sides[1], num_samples=num_samples, ks=ks)


def require_columns(composer: KonicLLMRewardComposer, prompts: Sequence[Prompt]) -> None:
    """Raise RewardError if a reward asks for a column that the prompts do not have."""
    names = dict.fromkeys(name for columns in collect_columns(prompts) for name in columns)
    KonicLLMRewardComposer.check_columns(composer, names)


def score_responses(
    composer: KonicLLMRewardComposer, records: Sequence[Sample], scoring: TrainingConfig
) -> list[dict[str, float]]:
    """Return the reward of each response, under `reward`, and each part's own value; NaN where there is none.

    A part that is itself called `reward` is `reward/reward`, as in the files of a run. `scoring` says what happens
    where a reward fails.

    Raises:
        RewardError: A reward failed, or more of them than `scoring` allows.
    """
    with raising_on_signals(), Scorer(composer, scoring) as scorer:
        scores = scorer.score(records)
        scorer.require_error_rate([], scores)
    return [
        {"reward": reward} | _beside_total({name: values[row] for name, values in scores.breakdown.items()})
        for row, reward in enumerate(scores.rewards)
    ]


def _sample(
    side: Weights, base: Weights, prompts: Sequence[Prompt], seed: int, count: int, scorer: Scorer,
    say: Callable[[str], None],
) -> tuple[list[Sample], list[float]]:  # fmt: skip
    """Return the responses of one side, and the KL of each from the base: NaN if the two have other tokens."""
    records: list[Sample] = []
    kls: list[float] = []
    sizes = {weights.policy.language_model.vocabulary_size for weights in (side, base)}
    for batch, samples, new in side.responses(prompts, seed, count):
        if not records:
            scorer.score(new[:1])  # a reward that fails is an error before everything else is sampled
        records += new
        if side is base:
            kls += [0.0] * len(new)
        elif len(sizes) > 1:
            kls += [math.nan] * len(new)
        else:
            temperature = side.generation.temperature
            kl = kl_between(side.policy, base.policy, batch, samples, temperature, MICRO_BATCH_SIZE)
            kls += kl.sum(dim=1).tolist()
        say(f"{side.name}: {len(records)} of {len(prompts) * count} responses")
    return records, kls


def _best(group: list[float], k: int) -> float:
    return best_at_k(group, k) if len(group) >= k else math.nan


def _passed(group: list[float], k: int) -> float:
    return pass_at_k(len(group), round(sum(group)), k) if len(group) >= k else math.nan


def _within(interval: Interval, lowest: float) -> Interval:
    """Return an interval without what lies below `lowest` or above 1."""
    if not interval.is_known:
        return interval
    return replace(interval, low=max(lowest, interval.low), high=min(1.0, interval.high))


def _share(values: list[float]) -> Interval:
    return proportion(values.count(1.0), len(values))


def _only_0_and_1(sides: Sequence[Sequence[float]]) -> bool:
    values = {value for side in sides for value in side if not math.isnan(value)}
    return bool(values) and values <= {0.0, 1.0}


def _beside_total(parts: Mapping[str, _T]) -> dict[str, _T]:
    """Return parts by their names; one with a name of the total begins with `reward/`, as in the files of a run."""
    return {PART + name if name in _TOTALS else name: part for name, part in parts.items()}


def plain_numbers(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """Return numbers as JSON takes them: None for one that is not there."""
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}
