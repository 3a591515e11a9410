"""Metrics, evaluations -> the outcome of a run, in sentences. Numbers alone do not say whether to trust a model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from konic.finetuning.results.intervals import Interval, distinct_n, nanmean, of_standard_error, paired_bootstrap
from konic.report.run import PART, Run

DOMINATES = 0.8
"""Share of the gain that one of several rewards earns alone."""
CHANGED_LENGTH = 1.5
"""Factor between the lengths before and after."""
FEWER_PAIRS = 0.7
"""Share of the first distinct-2 below which responses have become repetitive."""


@dataclass(frozen=True)
class Outcome:
    """What a run changed: the mean reward before and after, and the KL that was paid."""

    where: str
    """What the rewards were measured on."""
    before: float
    after: float
    gain: Interval | None
    """With a 95 % interval; None where the run does not say how much its rewards vary."""
    kl: float
    """Nats per response, after."""
    tokens: tuple[float, float]
    """Mean length of the responses, before and after."""

    @property
    def rose(self) -> bool:
        """True if the reward rose by more than chance, as far as that is known."""
        return self.gain.low > 0 if self.gain else self.after > self.before

    def sentence(self) -> str:
        """The outcome in a sentence."""
        paid = "" if math.isnan(self.kl) else f", for a KL of {self.kl:.2f} nats per response"
        change = f"from {self.before:.3f} to {self.after:.3f}"
        if math.isnan(self.before) or math.isnan(self.after):
            return f"There is no reward to compare {self.where}."
        is_known = self.gain is None or self.gain.leaves_out_zero
        if f"{self.before:.3f}" == f"{self.after:.3f}" and not (self.gain and is_known):
            return f"{self.where}, the mean reward was {self.after:.3f}{paid}."
        verb = "rose" if self.after > self.before else "fell"
        if self.gain is None:
            return f"{self.where}, the mean reward {verb} {change}{paid}."
        interval = f"{self.gain.mean:+.3f} ({self.gain.words(3)})"
        if is_known:
            return f"{self.where}, the mean reward {verb} {change}: {interval}{paid}."
        return f"{self.where}, the mean reward went {change}, which may be chance: {interval}{paid}."


def outcome(run: Run) -> Outcome:
    """Compare the held-out prompts before and after; without them the first and the last tenth of the iterations."""
    if len(run.evaluations) == 2:
        before, after = run.evaluations.values()
        last, done = max(run.evaluations), run.history[-1]["iteration"]
        since = f", after {last} of {done} iterations" if last < done else ""
        if before.prompts == after.prompts:
            return Outcome(
                where=f"On {len(before.prompts)} held-out prompt{'s' * (len(before.prompts) != 1)}{since}",
                before=before.reward_mean,
                after=after.reward_mean,
                gain=paired_bootstrap(before.rewards, after.rewards),
                kl=nanmean(after.kl_per_response),
                tokens=(
                    nanmean([*map(float, before.response_lengths)]),
                    nanmean([*map(float, after.response_lengths)]),
                ),
            )
    count = _tenth(run.history)
    ends = f"the first and the last {count} iterations" if count > 1 else "the first and the last iteration"
    rewards = _at_ends(run.values("reward_mean"))
    return Outcome(
        where=f"Between {ends}" if len(run.history) > 1 else "In the only iteration",
        before=rewards[0],
        after=rewards[1],
        gain=_gain_of_batches(run),
        kl=_at_ends(run.values("kl_per_response"))[1],
        tokens=_at_ends(run.values("response_length_mean")),
    )


def _gain_of_batches(run: Run) -> Interval | None:
    """The gain between the ends of a run, by the standard errors of their mean rewards."""
    if len(run.history) < 2:
        return None
    scored = zip(run.values("num_samples"), run.values("num_unscored"), strict=True)
    counts = [samples - (0.0 if math.isnan(unscored) else unscored) for samples, unscored in scored]
    deviations = zip(run.values("reward_std"), counts, strict=True)
    errors = [deviation / math.sqrt(max(1.0, count)) for deviation, count in deviations]
    means, count = run.values("reward_mean"), _tenth(errors)
    ends = [[*zip(means, errors, strict=True)][part] for part in (slice(count), slice(-count, None))]
    known = [[error for mean, error in end if not math.isnan(mean)] for end in ends]
    error = math.hypot(*(math.hypot(*end) / max(1, len(end)) for end in known))
    before, after = _at_ends(means)
    return None if math.isnan(after - before) or math.isnan(error) else of_standard_error(after - before, error)


def suspicions(run: Run, result: Outcome) -> list[str]:
    """What a reward that rose may hide, a sentence each. Empty where the reward did not rise."""
    if not result.rose:
        return []
    found = [_length(result), _repetition(run), _dominance(run)]
    return [sentence for sentence in found if sentence]


def _length(result: Outcome) -> str | None:
    before, after = result.tokens
    if not before or not after or math.isnan(before + after) or 1 / CHANGED_LENGTH < after / before < CHANGED_LENGTH:
        return None
    verb = "grew" if after > before else "shrank"
    return (
        f"Responses {verb} from {before:.0f} to {after:.0f} tokens while the reward rose. If your rewards do not ask "
        "for that, the policy may have found that length pays."
    )


def _repetition(run: Run) -> str | None:
    if len(run.evaluations) == 2:
        before, after = (distinct_n(evaluation.responses) for evaluation in run.evaluations.values())
    else:
        before, after = _at_ends(run.values("distinct_2"))
    if math.isnan(before + after) or after >= FEWER_PAIRS * before:
        return None
    return (
        f"Responses repeat themselves more: {after:.0%} of their pairs of words are different, {before:.0%} before. "
        "Read the samples below."
    )


def _dominance(run: Run) -> str | None:
    gains = {name: _gain(run, name) * weight for name, weight in run.weights.items()}
    total = sum(gain for gain in gains.values() if gain > 0)
    if len(gains) < 2 or total <= 0:
        return None
    name = max(gains, key=lambda part: gains[part])
    if gains[name] < DOMINATES * total:
        return None
    return (
        f"Of all that the rewards gained, {gains[name] / total:.0%} came from {name}: the others hardly rose, or fell."
    )


def part_means(run: Run, part: str) -> tuple[float, float]:
    """The mean of a reward before its weight, before and after training, where :func:`outcome` looks too."""
    if len(run.evaluations) == 2:
        before, after = (nanmean(evaluation.breakdown.get(part, [])) for evaluation in run.evaluations.values())
        return before, after
    return _at_ends(run.values(f"{PART}{part}"))


def _gain(run: Run, part: str) -> float:
    before, after = part_means(run, part)
    return 0.0 if math.isnan(after - before) else after - before


def _at_ends(values: Sequence[float]) -> tuple[float, float]:
    """The means over the first and the last tenth of the iterations."""
    count = _tenth(values)
    return nanmean(values[:count]), nanmean(values[-count:])


def _tenth(values: Sequence[object]) -> int:
    return max(1, len(values) // 10)


def duration(seconds: float) -> str:
    """Seconds as people say them: `42 s`, `5 min 3 s`, `2 h 5 min`."""
    if math.isnan(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def thinned(count: int, most: int) -> Sequence[range]:
    """`count` iterations as at most `most` groups of neighbours, as equal as possible."""
    groups = min(count, most)
    return [range(count * group // groups, count * (group + 1) // groups) for group in range(groups)]
