"""Rollout + Scores + Advantages + UpdateStats -> FinetuningIterationResult: the numbers of one iteration."""

import math
import time
from collections.abc import Sequence

from konic.finetuning.learning.estimators import Advantages
from konic.finetuning.learning.losses import k1, k3
from konic.finetuning.learning.update import UpdateStats
from konic.finetuning.results.evaluation import Evaluation
from konic.finetuning.results.intervals import distinct_n, mean, nanmean, spread
from konic.finetuning.results.iteration import METRICS, FinetuningIterationResult
from konic.finetuning.results.summary import Selection
from konic.finetuning.rewards.scoring import Scores
from konic.finetuning.rollout.rollout import Rollout


class StageClock:
    """Seconds since it was created, in all and for each named stage."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """Count the time since the last lap for this stage."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start


class RunClock:
    """Seconds of a run, including those before a resume, and whether its time is up."""

    def __init__(self, seconds_before: float, max_minutes: float | None) -> None:
        self._start = time.monotonic()
        self._seconds_before = seconds_before
        self._max_minutes = max_minutes

    @property
    def elapsed_seconds(self) -> float:
        """Seconds so far."""
        return self._seconds_before + time.monotonic() - self._start

    @property
    def time_is_up(self) -> bool:
        """True once max_minutes have passed since this clock was created."""
        return self._max_minutes is not None and time.monotonic() - self._start >= 60 * self._max_minutes


def iteration_result(
    iteration: int,
    rollout: Rollout,
    scores: Scores,
    advantages: Advantages,
    stats: UpdateStats,
    selection: Selection,
    penalty: float,
    kl_penalty_weight: float,
    clock: StageClock,
    evaluation: Evaluation | None,
    left_out: Sequence[str | None] = (),
) -> FinetuningIterationResult:
    """The metrics of an iteration. Token averages are over all its response tokens, left out of the loss or not.

    `selection` prices the KL, `penalty` is what the settings take off a reward on average, `kl_penalty_weight` the β of
    this iteration, `left_out` [B] why responses are left out of the loss.
    """
    mask = rollout.response_mask
    lengths = mask.sum(dim=1).tolist()
    rewards, kl_per_response = scores.valid_rewards(), rollout.kl.sum(dim=1).mean().item()
    log_ratios = (rollout.log_probs - rollout.ref_log_probs)[mask]
    from_update = {name: getattr(stats, name) for name, metric in METRICS.items() if metric.source == "update"}
    from_update["num_nonfinite"] += scores.is_dropped
    return FinetuningIterationResult(
        **from_update,
        iteration=iteration,
        reward_mean=mean(rewards),
        reward_std=spread(rewards),
        reward_min=min(rewards, default=math.nan),
        reward_max=max(rewards, default=math.nan),
        reward_breakdown={name: nanmean(values) for name, values in scores.breakdown.items()},
        num_samples=len(scores.rewards),
        num_unscored=len(scores.rewards) - len(rewards),
        num_reward_errors=scores.num_faults,
        kl_divergence=rollout.kl[mask].mean().item(),
        kl_per_response=kl_per_response,
        penalty_mean=penalty,
        objective=selection.priced(mean(rewards) - penalty, kl_per_response),
        kl_k1=k1(log_ratios).mean().item(),
        kl_k3=k3(log_ratios).mean().item(),
        kl_penalty_weight=kl_penalty_weight,
        entropy=rollout.entropy[mask].mean().item(),
        response_length_mean=mean(lengths),
        response_length_std=spread(lengths),
        ended_fraction=rollout.samples.ended.double().mean().item(),
        reference_loss=-rollout.ref_log_probs[mask].mean().item(),
        distinct_2=mean([distinct_n([text]) for text in rollout.texts if len(text.split()) > 1]),
        distinct_fraction=len(set(rollout.texts)) / len(rollout.texts),
        num_in_equal_groups=left_out.count("equal group"),
        num_cut_off=left_out.count("cut off"),
        effective_sample_size=advantages.effective_sample_size,
        no_signal_fraction=advantages.no_signal_fraction,
        generation_time_sec=clock.seconds["generation"],
        reward_compute_time_sec=clock.seconds["reward"],
        update_time_sec=clock.seconds["update"],
        total_time_sec=clock.total,
        eval_reward_mean=evaluation.reward_mean if evaluation else math.nan,
        eval_kl_per_response=mean(evaluation.kl_per_response) if evaluation else math.nan,
    )
