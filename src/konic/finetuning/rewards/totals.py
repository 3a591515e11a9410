"""Outcomes of all rewards -> one reward per sample: collects, normalises, clips, weights and reduces the parts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from konic.finetuning.data.samples import Sample
from konic.finetuning.errors import RewardError, safe_cause
from konic.finetuning.results.evaluation import Evaluation
from konic.finetuning.rewards.moments import RunningMoments
from konic.finetuning.rewards.named_parts import NamedParts
from konic.finetuning.rewards.outcomes import (
    Fault,
    NotANumberError,
    Outcome,
    Parts,
    Reward,
    number,
    sample_lines,
    shorten,
)
from konic.finetuning.rewards.reducers import takes_weights
from konic.finetuning.system.user_code import preserved_state
from konic.text import describe_error


@dataclass(frozen=True)
class Weighting:
    """Rewards, weights and reducer, which turn a sample's parts into one number."""

    rewards: Sequence[Reward]
    weights: Mapping[str, float]
    """Weight by the name of a part or of its reward; the default is 1."""
    reducer: Any
    """A class or an object with `reduce(dict[str, float]) -> float`; see `BaseRewardReducer`."""


_T = TypeVar("_T")


def named_by_part(rewards: Iterable[Reward], values: Mapping[str, _T]) -> NamedParts[_T]:
    """The values by part, as the metrics list them; the key of a part `reward.key` answers too."""
    return NamedParts(values, _parts_of_keys(rewards, values))


def named_by_key(rewards: Iterable[Reward], values: Mapping[str, _T]) -> NamedParts[_T]:
    """The values by their reward's own keys, where only one part has the key; the part `reward.key` answers too."""
    parts = _parts_of_keys(rewards, values)
    keys = {part: key for key, (part, *more) in parts.items() if not more}
    shared = {key: several for key, several in parts.items() if len(several) > 1}
    own = {keys.get(part, part): value for part, value in values.items()}
    owners = find_owners(rewards, values)
    names = {keys.get(part, part): [part, keys.get(part, part), owner.name] for part, owner in owners.items()}
    return NamedParts(own, shared | {part: [key] for part, key in keys.items()}, names)


def _parts_of_keys(rewards: Iterable[Reward], parts: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for part, key in part_keys(rewards, parts).items():
        if key != part:
            found.setdefault(key, []).append(part)
    return found


@dataclass(frozen=True)
class AlreadyScored:
    """The values of B samples whose rewards have been called."""

    rewards: Sequence[Reward]
    samples: Sequence[Sample]
    parts: Sequence[Parts]
    """[B], before normalising and weights."""
    totals: Sequence[float]
    """[B]; NaN for a sample whose parts all abstained."""

    def find(
        self, prompts: Sequence[str], responses: Sequence[str]
    ) -> tuple[list[float], dict[str, list[float]]] | None:
        """The totals and the breakdown for these texts; None if the values of one of them are not known."""
        wanted = list(zip(prompts, responses, strict=True))
        own = [(sample.prompt, sample.response) for sample in self.samples]
        rows = list(range(len(own))) if wanted == own else [self._row_of(texts, own) for texts in wanted]
        if None in rows:
            return None
        found = [row for row in rows if row is not None]
        return [self.totals[row] for row in found], collect_breakdown([self.parts[row] for row in found])

    def _row_of(self, texts: tuple[str, str], own: Sequence[tuple[str, str]]) -> int | None:
        """A row with these texts; None if there is none, or if such rows have different values."""
        rows = [row for row, candidate in enumerate(own) if candidate == texts]
        alike = rows and all(self.parts[row] == self.parts[rows[0]] for row in rows)
        return rows[0] if alike else None


def compute_totals(
    weighting: Weighting,
    parts: Sequence[Parts],
    faults: Sequence[Fault | None],
    samples: Sequence[Sample],
    moments: Mapping[str, RunningMoments],
) -> list[float]:
    """The reward of each sample [B]; NaN if one of its rewards failed, or if every part abstained.

    Raises:
        RewardError: See :func:`compute_total`.
    """
    return [
        math.nan if fault else compute_total(weighting, own, sample, moments)
        for own, fault, sample in zip(parts, faults, samples, strict=True)
    ]


def compute_total(
    weighting: Weighting, parts: Parts, sample: Sample, moments: Mapping[str, RunningMoments] | None = None
) -> float:
    """The reward of one sample: normalise, clip and weight each part, then reduce the parts; NaN without parts.

    Raises:
        RewardError: The reducer raised an error, or returned something that is not a number.
    """
    if not parts:
        return math.nan
    reducer = weighting.reducer
    who = f"Reducer {(reducer if isinstance(reducer, type) else type(reducer)).__name__!r}"
    where = sample_lines(sample.prompt, sample.response)
    try:
        with preserved_state(who):
            if isinstance(reducer, type) and takes_weights(reducer):
                given = given_weights(weighting, parts)
                weights = {**weighting.weights, **given, **named_by_key(weighting.rewards, given)}
                prepared = prepared_parts(weighting, parts, moments)
                reduced = reducer(weights=weights).reduce(named_by_key(weighting.rewards, prepared))
            else:
                instance = reducer() if isinstance(reducer, type) else reducer
                weighted = weighted_parts(weighting, parts, moments)
                reduced = instance.reduce(named_by_key(weighting.rewards, weighted))
        return number(reduced)
    except NotANumberError as error:
        raise RewardError(f"{who} {error}", *where) from None
    except (KeyboardInterrupt, RewardError):
        raise
    except BaseException as error:  # such as sys.exit()
        known = [f"  parts:    {', '.join(map(shorten, parts))}"] if isinstance(error, KeyError) else []
        raise RewardError(f"{who} raised {describe_error(error, 1000)}", *where, *known) from safe_cause(error)


def weighted_parts(weighting: Weighting, parts: Parts, moments: Mapping[str, RunningMoments] | None = None) -> Parts:
    """What a reducer without weights gets: each part normalised, clipped and multiplied by its weight."""
    weights = part_weights(weighting, parts)
    return {part: weights[part] * value for part, value in prepared_parts(weighting, parts, moments).items()}


def prepared_parts(weighting: Weighting, parts: Parts, moments: Mapping[str, RunningMoments] | None = None) -> Parts:
    """Each part normalised and clipped, before weights."""
    prepared = {}
    for part, reward in find_owners(weighting.rewards, parts).items():
        value = parts[part]
        if reward.normalize:
            value = (moments or {}).get(part, RunningMoments()).normalised(value)
        if reward.clip is not None:
            value = min(max(value, reward.clip[0]), reward.clip[1])
        prepared[part] = value
    return prepared


def part_weights(weighting: Weighting, parts: Iterable[str]) -> dict[str, float]:
    """The weight of each part: the one given, else 1."""
    owners = find_owners(weighting.rewards, parts)
    return dict.fromkeys(owners, 1.0) | given_weights(weighting, owners)


def given_weights(weighting: Weighting, parts: Iterable[str]) -> dict[str, float]:
    """The weights given for parts: for a part itself, or for its key, or for its reward.

    See :func:`part_keys`.

    Raises:
        RewardError: A weight is given for the key of several parts.
    """
    given: dict[str, float] = {}
    keys = part_keys(weighting.rewards, parts)
    for key in {key for key in keys.values() if key in weighting.weights}:
        several = [part for part in keys if keys[part] == key and part not in weighting.weights]
        if len(several) > 1:
            raise RewardError(
                f"reward_weights[{key!r}] is the key of several parts: {', '.join(several)}. Name each part."
            )
    for part, reward in find_owners(weighting.rewards, parts).items():
        names = [part, *([keys[part]] if part in keys else []), reward.name]
        name = next((name for name in names if name in weighting.weights), None)
        if name is not None:
            given[part] = weighting.weights[name]
    return given


def part_keys(rewards: Iterable[Reward], parts: Iterable[str]) -> dict[str, str]:
    """The key of each part `reward.key`, where no other part or reward has that name."""
    rewards = list(rewards)
    owners = find_owners(rewards, parts)
    keys = {part: part.removeprefix(f"{reward.name}.") for part, reward in owners.items()}
    taken = {*owners, *(reward.name for reward in rewards)}
    return {part: key for part, key in keys.items() if key not in taken}


def find_owners(rewards: Iterable[Reward], parts: Iterable[str]) -> dict[str, Reward]:
    """Map each part to its reward, whose name is the part's name or the part's name before `.key`.

    A part without a reward is left out.
    """
    by_name = {reward.name: reward for reward in rewards}
    before_key = {part: [name for name in by_name if part == name or part.startswith(f"{name}.")] for part in parts}
    return {part: by_name[max(names, key=len)] for part, names in before_key.items() if names}


def moments_after(
    rewards: Iterable[Reward], moments: Mapping[str, RunningMoments], parts: Sequence[Parts]
) -> dict[str, RunningMoments]:
    """The running moments of every part that is normalised, after adding the values of a batch."""
    after = dict(moments)
    for part, reward in find_owners(rewards, dict.fromkeys(name for own in parts for name in own)).items():
        if reward.normalize:
            values = [own[part] for own in parts if part in own]
            after[part] = after.get(part, RunningMoments()).after(values)
    return after


def evaluation_moments(rewards: Iterable[Reward], evaluation: Evaluation | None) -> dict[str, RunningMoments]:
    """The moments of an evaluation's values; later evaluations are normalised by them. Empty without an evaluation."""
    if evaluation is None:
        return {}
    parts = [
        {name: values[row] for name, values in evaluation.breakdown.items() if not math.isnan(values[row])}
        for row, reward in enumerate(evaluation.rewards)
        if not math.isnan(reward)
    ]
    return moments_after(rewards, {}, parts)


def require_no_fault(outcomes: Iterable[Outcome], samples: Sequence[Sample]) -> list[Parts]:
    """The parts of each sample, from the outcomes of one reward.

    Raises:
        RewardError: One of the outcomes is a fault; the first one is raised.
    """
    parts: list[Parts] = []
    for outcome, sample in zip(outcomes, samples, strict=True):
        if isinstance(outcome, Fault):
            raise outcome.error(sample.prompt, sample.response)
        parts.append(outcome)
    return parts


def collect_parts(outcomes: Sequence[Sequence[Outcome]], num_samples: int) -> list[Parts]:
    """The parts of each sample from all rewards; a fault has no parts.

    Raises:
        RewardError: Two rewards have a part of the same name.
    """
    parts: list[Parts] = [{} for _ in range(num_samples)]
    for by_one_reward in outcomes:
        for own, outcome in zip(parts, by_one_reward, strict=True):
            if isinstance(outcome, Fault):
                continue
            twice = next((name for name in outcome if name in own), None)
            if twice is not None:
                raise RewardError(f"Two rewards have a part named {twice!r}. Give one of them another name.")
            own.update(outcome)
    return parts


def first_faults(outcomes: Sequence[Sequence[Outcome]], num_samples: int) -> list[Fault | None]:
    """The first fault of each sample over all rewards, or None."""
    return [
        next((fault for by_one in outcomes if isinstance(fault := by_one[index], Fault)), None)
        for index in range(num_samples)
    ]


def collect_breakdown(parts: Sequence[Parts]) -> dict[str, list[float]]:
    """The values of each part over the samples; NaN for a sample that does not have the part."""
    names = dict.fromkeys(name for own in parts for name in own)
    return {name: [own.get(name, math.nan) for own in parts] for name in names}
