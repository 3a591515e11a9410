"""A composer's own `compose` or `compose_batch` + the totals of its rewards -> the totals that it makes of them.

The rewards are called first, as always: with the run's error policy, workers and normalising. What the composer's own
method then asks `super()` for is answered with their values, so that no reward is called twice.
"""

import functools
import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from konic.finetuning.data.samples import Sample
from konic.finetuning.rewards.calls import call_reward
from konic.finetuning.rewards.composer import KonicLLMRewardComposer, find_override
from konic.finetuning.rewards.outcomes import (
    Fault,
    NotANumberError,
    Outcome,
    Parts,
    Reward,
    named_by_text,
    number,
    shorten,
)
from konic.finetuning.rewards.totals import AlreadyScored, collect_breakdown, find_owners

Accept = Callable[[Iterator[Outcome], Sequence[Sample]], Iterable[Outcome]]
"""Outcomes and their samples -> the same outcomes; it may raise a fault."""


@dataclass(frozen=True)
class Composed:
    """The rewards of B samples, with what the composer's own method makes of them."""

    totals: list[float]
    """[B]; NaN if a reward or the method failed, or if the sample has no reward."""
    faults: list[Fault | None]
    """[B] the first fault on each sample, or None."""
    breakdown: dict[str, list[float]]
    """Each part's own values [B], and those that the method returns; a normalised reward keeps its own."""


def compose_totals(
    composer: KonicLLMRewardComposer,
    rewards: Sequence[Reward],
    samples: Sequence[Sample],
    parts: Sequence[Parts],
    totals: Sequence[float],
    faults: Sequence[Fault | None],
    accept: Accept = lambda outcomes, _: outcomes,
) -> Composed:
    """Return what the composer's own method makes of the totals [B]; the same totals if it has none.

    A sample on which a reward failed does not reach the method.
    """
    composed = Composed(list(totals), list(faults), collect_breakdown(parts))
    override = find_override(composer)
    rows = [row for row, fault in enumerate(faults) if fault is None]
    if override is None or not rows:
        return composed
    for group in [rows] if override.shape == "batch" else [[row] for row in rows]:
        chosen = [samples[row] for row in group]
        scored = AlreadyScored(rewards, chosen, [parts[row] for row in group], [totals[row] for row in group])
        returned: dict[str, list[float]] = {}
        with KonicLLMRewardComposer.answering(composer, scored):
            call = _checked_call(override, scored.totals, returned)
            outcomes = list(accept(call_reward(replace(override, call=call), chosen), chosen))
        for row, outcome in zip(group, outcomes, strict=True):
            composed.faults[row] = outcome if isinstance(outcome, Fault) else None
            composed.totals[row] = math.nan if isinstance(outcome, Fault) else outcome.get(override.name, math.nan)
        for name, values in returned.items():
            if any(reward.normalize for reward in find_owners(rewards, [name]).values()):
                continue  # evaluations are put on one scale by a reward's own values
            column = composed.breakdown.setdefault(name, [math.nan] * len(samples))
            for row, value in zip(group, values, strict=True):
                column[row] = value
    return composed


def _checked_call(override: Reward, totals: Sequence[float], returned: dict[str, list[float]]) -> Callable[..., Any]:
    """The composer's own method, as a reward: it abstains where the rewards did, and `returned` gets its breakdown."""

    @functools.wraps(override.call)
    def call(*texts: Any, **columns: Any) -> Any:
        value = override.call(*texts, **columns)
        return read_later(value) if inspect.isawaitable(value) else read(value)

    async def read_later(value: Awaitable[Any]) -> Any:
        return read(await value)

    def read(value: Any) -> Any:
        if override.shape == "sample":
            return _rewards([value], totals)[0]
        rewards, breakdown = value if _is_pair(value) else (value, None)
        returned.update(_read_breakdown(breakdown or {}, len(totals)))
        return _rewards(rewards, totals) if hasattr(rewards, "__len__") and len(rewards) == len(totals) else rewards

    return call


def _is_pair(value: Any) -> bool:
    """True for rewards with a breakdown, which may be None; not for the rewards of two responses."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    return isinstance(value[1], Mapping) or (value[1] is None and hasattr(value[0], "__len__"))


def _rewards(values: Iterable[Any], totals: Sequence[float]) -> list[Any]:
    """The values, with None where a value is NaN because the rewards abstained."""
    values = list(values)
    for value in values:
        if isinstance(value, Mapping):
            raise NotANumberError(f"returned {shorten(value)}, not a number.")
    return [
        None if math.isnan(total) and value != value else value for value, total in zip(values, totals, strict=True)
    ]


def _read_breakdown(breakdown: Mapping[Any, Any], count: int) -> dict[str, list[float]]:
    return {name: _read_column(name, values, count) for name, values in named_by_text(breakdown).items()}


def _read_column(name: Any, values: Any, count: int) -> list[float]:
    where = f"{name!r} of its breakdown"
    try:
        values = list(values)
    except TypeError:
        raise NotANumberError(
            f"returned {shorten(values)} as {where}, not a list with a value for each of {count} responses."
        ) from None
    if len(values) != count:
        raise NotANumberError(f"returned {len(values)} values as {where} for {count} responses.")
    try:
        return [math.nan if value is None or value != value else number(value) for value in values]
    except NotANumberError as error:
        raise NotANumberError(f"{str(error).rstrip('.')}, in {where}.") from None
