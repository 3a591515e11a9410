"""A composer and responses -> a trial without training: each reward's values, what moves the total, and warnings."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from konic.finetuning.data.samples import Sample
from konic.finetuning.errors import RewardError
from konic.finetuning.rewards.calls import call_reward
from konic.finetuning.rewards.composer import KonicLLMRewardComposer, describe_weighting, find_override
from konic.finetuning.rewards.listing import list_rewards
from konic.finetuning.rewards.moments import RunningMoments
from konic.finetuning.rewards.outcomes import Fault, Outcome, Parts, Reward
from konic.finetuning.rewards.overrides import compose_totals
from konic.finetuning.rewards.scoring import warn_if_slow
from konic.finetuning.rewards.totals import (
    Weighting,
    collect_breakdown,
    collect_parts,
    compute_totals,
    find_owners,
    first_faults,
    moments_after,
    weighted_parts,
)
from konic.finetuning.system.signals import raising_on_signals

PROBES = {
    "empty": "",
    "very long": "The film goes on and on, and so does this sentence about it. " * 400,
    "not English": "这部电影非常感人。 Der Film ist großartig! Фильм мне не понравился. فيلم رائع",
    "emoji": "😀🎬🔥 👍👍👍 ❤️‍🔥",
}
"""Responses that a policy may find by chance, or that reveal bugs in rewards."""
MIN_BATCH = 4
"""With fewer responses a correlation means nothing. A batch reward gets each probe in a batch of at most this size."""
MOST_OF_THE_VARIANCE = 0.9
LENGTH_CORRELATION = 0.7
SLOW_SECONDS = 0.5
"""Per response: a batch of 16 then waits 8 s for its rewards."""


@dataclass(frozen=True, kw_only=True)
class PartTrial:
    """Statistics of one part over the responses tried. Values are as the reward returned them, before weights."""

    name: str
    reward: str
    """Name of the reward that the part comes from; for the total, the composer's own method, or ""."""
    mean: float
    std: float
    low: float
    high: float
    share_of_variance: float
    """Covariance of the weighted part with the total, divided by the total's variance.

    If the total is a weighted sum, the shares of its parts add up to 1.
    """
    length_correlation: float
    """Pearson's r of the value and the response's number of characters; NaN if either does not vary."""
    num_none: int
    probes: dict[str, float]
    """The part's value on each of :data:`PROBES`; NaN if it abstained or failed."""


@dataclass(frozen=True, kw_only=True)
class RewardTrial:
    """One reward over the responses tried: its time, its faults, and whether its values are reproducible."""

    name: str
    milliseconds: float
    """Mean time per response."""
    faults: list[Fault]
    """Faults on the responses tried."""
    is_deterministic: bool
    """True if a second call, with the responses in reverse order, gave the same values."""
    probe_faults: dict[str, Fault]
    always_fails: bool
    """True if it failed on every response tried."""
    is_silent: bool
    """True if it returned None for every response tried and every probe."""


@dataclass(frozen=True, kw_only=True)
class ComposerTrial:
    """Result of trying a composer on N responses."""

    num_responses: int
    total: PartTrial
    parts: list[PartTrial]
    rewards: list[RewardTrial]
    """The composer's own `compose` or `compose_batch` is the last, if it has one and any response reached it."""
    probe_faults: dict[str, Fault]
    """By probe, how the reducer failed on it."""

    @property
    def warnings(self) -> list[str]:
        """Messages about what could go wrong in training."""
        return [*self._about_rewards(), *self._about_parts(), *self._about_the_total()]

    def _about_rewards(self) -> list[str]:
        messages = []
        for reward in self.rewards:
            name = repr(reward.name)
            if reward.faults:
                first = reward.faults[0]
                messages.append(
                    f"{name} failed on {len(reward.faults)} of {self.num_responses} responses: {first.what}"
                )
            for probe, fault in reward.probe_faults.items():
                if not reward.faults:
                    messages.append(f"{name} fails on a response that is {probe}: {fault.what}")
            if reward.is_silent:
                messages.append(f"{name} returned None for every response. Is a `return` missing?")
            if not reward.is_deterministic:
                messages.append(
                    f"{name} returns different values for the same responses: the policy learns partly from noise."
                )
            if reward.milliseconds > 1000 * SLOW_SECONDS:
                messages.append(
                    f"{name} takes {reward.milliseconds / 1000:.1f} s per response. Score a batch at once "
                    "(@llm_reward(batch=True)), make it async, or set reward_workers."
                )
        return messages

    def _about_parts(self) -> list[str]:
        messages = []
        for part in self.parts:
            if part.std == 0 and self.num_responses - part.num_none > 1:
                messages.append(f"{part.name!r} is constant ({part.mean:g}): the policy cannot learn from it.")
        moving = [part for part in self.parts if part.share_of_variance > MOST_OF_THE_VARIANCE]
        if moving and len(self.parts) > 1:
            messages.append(
                f"{moving[0].name!r} makes up {moving[0].share_of_variance:.0%} of the total's variance: the other "
                "parts hardly count. Change the weights, or normalise."
            )
        return messages

    def _about_the_total(self) -> list[str]:
        messages = []
        total, correlation = self.total, self.total.length_correlation
        for probe, fault in self.probe_faults.items():
            messages.append(f"A response that is {probe} has no total: {fault.what}")
        if abs(correlation) > LENGTH_CORRELATION and self.num_responses >= MIN_BATCH:
            what = "longer" if correlation > 0 else "shorter"
            by = [part.name for part in self.parts if abs(part.length_correlation) > LENGTH_CORRELATION]
            messages.append(
                f"The total is a length reward in disguise (correlation {correlation:+.2f}"
                + (f", by {', '.join(map(repr, by))}" if by else "")
                + f"): {what} responses are the quickest way to raise it."
            )
        for probe in ("empty", "very long"):
            if total.probes.get(probe, math.nan) > total.high:
                messages.append(
                    f"A response that is {probe} gets {total.probes[probe]:.3g}, more than the best of the "
                    f"{self.num_responses} ({total.high:.3g}): expect the policy to find that."
                )
        return messages


@raising_on_signals()
def try_rewards(composer: KonicLLMRewardComposer, samples: Sequence[Sample]) -> ComposerTrial:
    """Score responses twice, in order and in reverse, and the probes once.

    Parts that are normalised use the moments of these responses.

    Args:
        composer: The composer whose rewards are tried.
        samples: [N], with the columns that the rewards ask for.

    Raises:
        RewardError: A reward asks for a column that the samples do not have, or the reducer fails on one of them.
    """
    weighting = describe_weighting(composer)
    probes = [replace(samples[0], response=probe) for probe in PROBES.values()]
    tried = [_try_reward(reward, samples) for reward in weighting.rewards]
    outcomes, on_probes = [one.outcomes for one in tried], [one.probed for one in tried]
    parts, probed = collect_parts(outcomes, len(samples)), collect_parts(on_probes, len(PROBES))
    faults, probe_faults = first_faults(outcomes, len(samples)), first_faults(on_probes, len(PROBES))
    valid = [own for own, fault in zip(parts, faults, strict=True) if not fault]
    moments = moments_after(weighting.rewards, {}, valid)
    totals = compute_totals(weighting, parts, faults, samples, moments)
    reduced = [_total_of_probe(weighting, *each, moments) for each in zip(probed, probe_faults, probes, strict=True)]
    by_reducer = {name: total for name, total in zip(PROBES, reduced, strict=True) if isinstance(total, Fault)}
    probe_totals = [math.nan if isinstance(total, Fault) else total for total in reduced]
    probe_faults = [fault or by_reducer.get(name) for name, fault in zip(PROBES, probe_faults, strict=True)]
    composed, totals, probe_totals = _try_override(
        composer, (samples, parts, totals, faults), (probes, probed, probe_totals, probe_faults)
    )
    weighted = [weighted_parts(weighting, own, moments) for own in parts]
    lengths = [float(len(sample.response)) for sample in samples]
    owners = find_owners(weighting.rewards, collect_breakdown(parts))
    trials = []
    for one in tried:
        for name in [part for part, owner in owners.items() if owner.name == one.trial.name] or [one.trial.name]:
            moved = [own.get(name, 0.0) for own in weighted]
            values = [own.get(name, math.nan) for own in parts]
            on_probe = {probe: own.get(name, math.nan) for probe, own in zip(PROBES, probed, strict=True)}
            trials.append(_part(name, one.trial.name, values, _share(moved, totals), lengths, on_probe))
    name = "total" if all(part.name != "total" for part in trials) else "total of all"
    maker = composed[0].name if composed else ""
    total = _part(name, maker, totals, 1.0, lengths, dict(zip(PROBES, probe_totals, strict=True)))
    rewards = [*(one.trial for one in tried), *composed]
    return ComposerTrial(
        num_responses=len(samples), total=total, parts=trials, rewards=rewards, probe_faults=by_reducer
    )


@dataclass(frozen=True)
class _Tried:
    trial: RewardTrial
    outcomes: list[Outcome]
    probed: list[Outcome]


def _try_reward(reward: Reward, samples: Sequence[Sample]) -> _Tried:
    started = time.perf_counter()
    with warn_if_slow(reward, len(samples)):
        outcomes = list(call_reward(reward, samples))
    milliseconds = 1000 * (time.perf_counter() - started) / len(samples)
    again = list(call_reward(reward, samples[::-1]))[::-1]
    others = [] if reward.shape == "sample" else list(samples[: MIN_BATCH - 1])  # a batch reward may need several
    probed = [
        next(iter(call_reward(reward, [replace(samples[0], response=probe), *others]))) for probe in PROBES.values()
    ]
    faults = [outcome for outcome in outcomes if isinstance(outcome, Fault)]
    probe_faults = {name: fault for name, fault in zip(PROBES, probed, strict=True) if isinstance(fault, Fault)}
    is_deterministic = all(map(_same, outcomes, again))
    trial = RewardTrial(
        name=reward.name,
        milliseconds=milliseconds,
        faults=faults,
        is_deterministic=is_deterministic,
        probe_faults=probe_faults,
        always_fails=len(faults) == len(samples),
        is_silent=not any([*outcomes, *probed]),
    )
    return _Tried(trial, outcomes, probed)


_Reduced = tuple[Sequence[Sample], Sequence[Parts], Sequence[float], Sequence[Fault | None]]
"""Samples with their parts, their totals and their first faults."""


def _try_override(
    composer: KonicLLMRewardComposer, tried: _Reduced, probes: _Reduced
) -> tuple[list[RewardTrial], list[float], list[float]]:
    """Try the composer's own `compose` or `compose_batch`; return the totals of the samples and of the probes too."""
    override, rewards, (samples, *_, faults) = find_override(composer), list_rewards(composer), tried
    if override is None or all(faults):
        return [], list(tried[2]), list(probes[2])
    started = time.perf_counter()
    made = compose_totals(composer, rewards, *tried)
    milliseconds = 1000 * (time.perf_counter() - started) / len(samples)
    again = compose_totals(composer, rewards, *(each[::-1] for each in tried)).totals[::-1]  # type: ignore[arg-type]
    num_others = 0 if override.shape == "sample" else MIN_BATCH - 1
    probed = []
    for place, before in enumerate(probes[3]):
        batch = ([own[place], *others[:num_others]] for own, others in zip(probes, tried, strict=True))
        composed = compose_totals(composer, rewards, *batch)  # type: ignore[arg-type]
        probed.append((composed.totals[0], None if before else composed.faults[0]))
    own_faults = [fault for fault, before in zip(made.faults, faults, strict=True) if fault and not before]
    trial = RewardTrial(
        name=override.name,
        milliseconds=milliseconds,
        faults=own_faults,
        is_deterministic=all(map(_same, _as_outcomes(made.totals), _as_outcomes(again))),
        probe_faults={name: fault for name, (_, fault) in zip(PROBES, probed, strict=True) if fault},
        always_fails=len(own_faults) == sum(fault is None for fault in faults),
        is_silent=False,
    )
    return [trial], made.totals, [total for total, _ in probed]


def _as_outcomes(totals: Sequence[float]) -> list[Outcome]:
    return [{} if math.isnan(total) else {"total": total} for total in totals]


def _total_of_probe(
    weighting: Weighting, parts: Parts, fault: Fault | None, probe: Sample, moments: Mapping[str, RunningMoments]
) -> float | Fault:
    """The total of a probe, or how the reducer failed on it."""
    try:
        return compute_totals(weighting, [parts], [fault], [probe], moments)[0]
    except RewardError as error:
        return Fault("Reducer", error.args[0])


def _same(one: Outcome, other: Outcome) -> bool:
    """True if outcomes are equal, up to the rounding of a model's score in a different batch."""
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
    return PartTrial(
        name=name,
        reward=reward,
        mean=centre,
        std=spread,
        low=min(known),
        high=max(known),
        share_of_variance=share,
        length_correlation=by_length,
        num_none=missing,
        probes=probes,
    )


def _share(part: list[float], totals: list[float]) -> float:
    """The covariance of a part and the total, divided by the total's variance; NaN if the total does not vary."""
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
    """Pearson's r; NaN if either does not vary."""
    if len(set(left)) < 2 or len(set(right)) < 2:
        return math.nan
    scales = [max(map(abs, values)) for values in (left, right)]
    scaled = [[value / scale for value in values] for values, scale in zip((left, right), scales, strict=True)]
    return statistics.correlation(*scaled)
