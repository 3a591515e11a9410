"""A composer, tried on responses without training: what each reward does, what moves the total, what could go wrong."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from konic.finetuning.agent import KonicFinetuningAgent
from konic.finetuning.dataset import DatasetConfig, Prompt, load_prompts, make_prompts
from konic.finetuning.errors import DatasetError
from konic.finetuning.evaluation import respond
from konic.finetuning.learner import build_learner
from konic.finetuning.loaders import read_local
from konic.finetuning.models import pick_device
from konic.finetuning.reward_calls import Columns, Fault, Outcome, Reward, call_reward
from konic.finetuning.rewards import (
    KonicLLMRewardComposer,
    breakdown_of,
    merged,
    owners_of,
    rewards_of,
    weighted_parts,
)
from konic.finetuning.scoring import columns_of, first_faults, moments_after, named_if_slow, totals_of

PROBES = {
    "empty": "",
    "very long": "The film goes on and on, and so does this sentence about it. " * 400,
    "not English": "这部电影非常感人。 Der Film ist großartig! Фильм мне не понравился. فيلم رائع",
    "emoji": "😀🎬🔥 👍👍👍 ❤️‍🔥",
}
"""Responses that a policy may stumble upon, or that find bugs."""
COMPANY = 4
"""Responses below which a correlation says nothing, and that a batch reward gets a probe among."""
MOST_OF_THE_VARIANCE = 0.9
LENGTH_CORRELATION = 0.7
SLOW_SECONDS = 0.5
"""Per response; a batch of 16 then waits 8 s for its rewards."""


@dataclass(frozen=True)
class PartTrial:
    """One part of the rewards, over the responses tried. Values are as the reward returned them, before weights."""

    name: str
    reward: str
    """The reward that it came from."""
    mean: float
    std: float
    low: float
    high: float
    share_of_variance: float
    """Covariance of the weighted part with the total, over the total's variance: of a weighted sum they add up to 1."""
    length_correlation: float
    """Pearson's r of its value and the response's characters; NaN where either does not vary."""
    num_none: int
    probes: dict[str, float]
    """Its value on each of :data:`PROBES`; NaN where it abstained or failed."""


@dataclass(frozen=True)
class RewardTrial:
    """One reward: what it costs, and whether it can be relied on."""

    name: str
    milliseconds: float
    """Per response, mean."""
    faults: list[Fault]
    """Over the responses tried."""
    is_deterministic: bool
    """The same values again, with the responses in reverse order."""
    probe_faults: dict[str, Fault]


@dataclass(frozen=True)
class ComposerTrial:
    """What came of trying a composer on N responses."""

    num_responses: int
    total: PartTrial
    parts: list[PartTrial]
    rewards: list[RewardTrial]

    @property
    def warnings(self) -> list[str]:
        """What could go wrong in training, in plain words."""
        return [*self._about_rewards(), *self._about_parts(), *self._about_the_total()]

    def _about_rewards(self) -> list[str]:
        told = []
        for reward in self.rewards:
            name = repr(reward.name)
            if reward.faults:
                first = reward.faults[0]
                told.append(f"{name} failed on {len(reward.faults)} of {self.num_responses} responses: {first.what}")
            for probe, fault in reward.probe_faults.items():
                if not reward.faults:
                    told.append(f"{name} fails on a response that is {probe}: {fault.what}")
            if not reward.is_deterministic:
                told.append(
                    f"{name} gives other values when it is asked again: what is learned from it is partly noise."
                )
            if reward.milliseconds > 1000 * SLOW_SECONDS:
                told.append(
                    f"{name} takes {reward.milliseconds / 1000:.1f} s per response. Score a batch at once "
                    "(@llm_reward(batch=True)), make it async, or set reward_workers."
                )
        return told

    def _about_parts(self) -> list[str]:
        told = []
        for part in self.parts:
            if part.std == 0 and self.num_responses - part.num_none > 1:
                told.append(f"{part.name!r} is constant ({part.mean:g}): nothing can be learned from it.")
        moving = [part for part in self.parts if part.share_of_variance > MOST_OF_THE_VARIANCE]
        if moving and len(self.parts) > 1:
            told.append(
                f"{moving[0].name!r} makes {moving[0].share_of_variance:.0%} of the total's variance: the others "
                "hardly count. Change weights, or normalise."
            )
        return told

    def _about_the_total(self) -> list[str]:
        told = []
        total, correlation = self.total, self.total.length_correlation
        if abs(correlation) > LENGTH_CORRELATION and self.num_responses >= COMPANY:
            what = "longer" if correlation > 0 else "shorter"
            by = [part.name for part in self.parts if abs(part.length_correlation) > LENGTH_CORRELATION]
            told.append(
                f"The total is a length reward in disguise (correlation {correlation:+.2f}"
                + (f", by {', '.join(map(repr, by))}" if by else "")
                + f"): the quickest way to more of it is {what} responses."
            )
        for probe in ("empty", "very long"):
            if total.probes.get(probe, math.nan) > total.high:
                told.append(
                    f"A response that is {probe} gets {total.probes[probe]:.3g}, more than the best of the "
                    f"{self.num_responses} ({total.high:.3g}): expect the policy to find that."
                )
        return told


def try_rewards(
    composer: KonicLLMRewardComposer, prompts: Sequence[Prompt], texts: list[str], responses: list[str]
) -> ComposerTrial:
    """Score responses twice, in order and in reverse, and the probes once; what is normalised, by these responses.

    Args:
        composer: Whose rewards.
        prompts: [N] rows of the dataset, for columns that rewards ask for.
        texts: [N] what rewards get as `prompt`.
        responses: [N].

    Raises:
        RewardError: A reward asks for a column that is not there, or the reducer fails.
    """
    columns = columns_of(prompts)
    tried = [_tried(reward, texts, responses, columns) for reward in rewards_of(composer)]
    outcomes, on_probes = [one.outcomes for one in tried], [one.probed for one in tried]
    samples, probed = merged(outcomes, len(texts)), merged(on_probes, len(PROBES))
    faults, probe_faults = first_faults(outcomes, len(texts)), first_faults(on_probes, len(PROBES))
    moments = moments_after(composer, {}, [parts for parts, fault in zip(samples, faults, strict=True) if not fault])
    totals = totals_of(composer, samples, faults, texts, responses, moments)
    probe_totals = totals_of(composer, probed, probe_faults, texts[:1] * len(PROBES), [*PROBES.values()], moments)
    weighted = [weighted_parts(composer, parts, moments) for parts in samples]
    lengths = [float(len(response)) for response in responses]
    owners = owners_of(composer, breakdown_of(samples))
    parts = []
    for one in tried:
        for name in [part for part, owner in owners.items() if owner.name == one.trial.name] or [one.trial.name]:
            moved = [part.get(name, 0.0) for part in weighted]
            values = [sample.get(name, math.nan) for sample in samples]
            on_probe = {probe: sample.get(name, math.nan) for probe, sample in zip(PROBES, probed, strict=True)}
            parts.append(_part(name, one.trial.name, values, _share(moved, totals), lengths, on_probe))
    total = _part("total", "", totals, 1.0, lengths, dict(zip(PROBES, probe_totals, strict=True)))
    return ComposerTrial(len(responses), total, parts, [one.trial for one in tried])


def read_responses(name: str) -> tuple[list[Prompt], list[str], list[str]]:
    """Rows, prompts and responses of a file with columns `prompt` and `response`; its other columns go to the rewards.

    Raises:
        DatasetError: No such file, no rows, or a row without a response.
    """
    rows = read_local(name, "prompt", "response")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or not isinstance(row.get("response"), str):
            raise DatasetError(f"{name}, row {number}: needs a text in the column 'response'.")
    if not rows:
        raise DatasetError(f"{name}: holds no rows.")
    prompts = make_prompts([{key: row[key] for key in row if key != "response"} for row in rows], DatasetConfig(), name)
    return prompts, [prompt.text for prompt in prompts], [row["response"] for row in rows]


def sample_responses(
    agent: KonicFinetuningAgent, count: int, device: str = "auto"
) -> tuple[list[Prompt], list[str], list[str]]:
    """Rows of the agent's dataset, what the base model read of them, and its responses."""
    learner, dataset = build_learner(agent, pick_device(device)), load_prompts(agent.get_dataset_config())
    generation, seed = agent.get_generation_config(), agent.get_training_config().seed
    size = len(dataset.rows)
    prompts: list[Prompt] = []
    texts: list[str] = []
    responses: list[str] = []
    for again, start in enumerate(range(0, count, size)):  # every pass through the rows with random numbers of its own
        chosen = dataset.batch(start, min(size, count - start))
        for batch, samples in respond(learner.policy, chosen, generation, learner.special, seed + again):
            prompts += batch.prompts
            texts += batch.texts
            responses += samples.texts
    return prompts, texts, responses


@dataclass(frozen=True)
class _Tried:
    trial: RewardTrial
    outcomes: list[Outcome]
    probed: list[Outcome]


def _tried(reward: Reward, texts: list[str], responses: list[str], columns: Columns) -> _Tried:
    started = time.perf_counter()
    with named_if_slow(reward, len(responses)):
        outcomes = list(call_reward(reward, texts, responses, columns))
    milliseconds = 1000 * (time.perf_counter() - started) / len(responses)
    turned = {name: values[::-1] for name, values in columns.items()}
    again = list(call_reward(reward, texts[::-1], responses[::-1], turned))[::-1]
    size = 1 if reward.shape == "sample" else COMPANY  # a batch may need more than one
    company = {name: [*values[:1], *values[: size - 1]] for name, values in columns.items()}
    prompts = [*texts[:1], *texts[: size - 1]]
    probed = [
        next(iter(call_reward(reward, prompts, [probe, *responses[: size - 1]], company))) for probe in PROBES.values()
    ]
    faults = [outcome for outcome in outcomes if isinstance(outcome, Fault)]
    probe_faults = {name: fault for name, fault in zip(PROBES, probed, strict=True) if isinstance(fault, Fault)}
    is_deterministic = all(map(_same, outcomes, again))
    trial = RewardTrial(reward.name, milliseconds, faults, is_deterministic, probe_faults)
    return _Tried(trial, outcomes, probed)


def _same(one: Outcome, other: Outcome) -> bool:
    """True of equal outcomes, but for what rounding does to a model's score in another batch."""
    if isinstance(one, Fault) or isinstance(other, Fault) or one.keys() != other.keys():
        return one == other
    return all(math.isclose(value, other[part], rel_tol=1e-4, abs_tol=1e-6) for part, value in one.items())


def _part(
    name: str, reward: str, values: list[float], share: float, lengths: list[float], probes: dict[str, float]
) -> PartTrial:
    present = [(value, length) for value, length in zip(values, lengths, strict=True) if not math.isnan(value)]
    known = [value for value, _ in present] or [math.nan]
    scale = max(map(abs, known)) or 1.0
    spread = scale * statistics.stdev([value / scale for value in known]) if len(known) > 1 else 0.0 * known[0]
    by_length = correlation(known, [length for _, length in present]) if len(present) > 1 else math.nan
    missing = len(values) - len(present)
    centre = scale * fmean([value / scale for value in known])
    return PartTrial(name, reward, centre, spread, min(known), max(known), share, by_length, missing, probes)


def _share(part: list[float], totals: list[float]) -> float:
    """The covariance of a part and the total over the total's variance; NaN where the total does not vary."""
    present = [(value, total) for value, total in zip(part, totals, strict=True) if not math.isnan(total)]
    if len({total for _, total in present}) < 2:
        return math.nan
    scale = max(max(map(abs, pair)) for pair in present)
    column, whole = zip(*((value / scale, total / scale) for value, total in present), strict=True)
    variance = math.fsum((total - fmean(whole)) ** 2 for total in whole)
    together = math.fsum(
        (value - fmean(column)) * (total - fmean(whole)) for value, total in zip(column, whole, strict=True)
    )
    return together / variance if variance > 0 else math.nan


def correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Pearson's r; NaN where either does not vary."""
    if len(set(left)) < 2 or len(set(right)) < 2:
        return math.nan
    scales = [max(map(abs, values)) for values in (left, right)]
    scaled = [[value / scale for value in values] for values, scale in zip((left, right), scales, strict=True)]
    return statistics.correlation(*scaled)
