"""The numbers of one iteration. Each field declares its meaning, unit and source; docs/metrics.md shows them."""

import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, get_type_hints

from konic.finetuning.results.metrics import Metric, declared_metrics

PER_TOKEN = "nats per token"  # noqa: S105
PER_RESPONSE = "nats per response"


@dataclass(frozen=True)
class FinetuningIterationResult:
    """One iteration. Reward, KL, entropy and lengths are those of the policy that sampled, before its update."""

    iteration: Annotated[int, Metric("counted from 1", "count", "trainer")]
    reward_mean: Annotated[
        float, Metric("mean over the samples that have a reward; null if none has", "reward", "rewards")
    ]
    reward_std: Annotated[float, Metric("unbiased; 0 for fewer than two rewards", "reward", "rewards")]
    reward_min: Annotated[float, Metric("the lowest of the batch", "reward", "rewards")]
    reward_max: Annotated[float, Metric("the highest of the batch", "reward", "rewards")]
    kl_divergence: Annotated[
        float,
        Metric("exact KL(π ‖ π_ref) at each sampled token, mean over all tokens; never negative", PER_TOKEN, "rollout"),
    ]
    policy_loss: Annotated[float, Metric("the loss of the policy, mean over the optimizer steps", "", "update")]
    value_loss: Annotated[float, Metric("half the clipped squared error of the value head", "reward²", "update")]
    entropy_loss: Annotated[
        float,
        Metric("−entropy: from the update if `entropy_coef` > 0, else from the rollout", PER_TOKEN, "update"),
    ]
    total_loss: Annotated[
        float,
        Metric(
            "policy_loss + vf_coef · value_loss + entropy_coef · entropy_loss + β · kl_loss, only the terms that the "
            "algorithm learns from (where advantages are whitened, β is divided by the same number); the `Loss` of the "
            "printed line",
            "",
            "update",
        ),
    ]
    response_length_mean: Annotated[float, Metric("mean; an end-of-sequence token counts", "tokens", "rollout")]
    response_length_std: Annotated[float, Metric("unbiased; 0 for fewer than two responses", "tokens", "rollout")]
    learning_rate: Annotated[float, Metric("of the last optimizer step", "", "update")]
    clip_fraction: Annotated[
        float,
        Metric(
            "tokens whose ratio was outside the clip range (±0.2 for `sapo`, which does not clip), or for `dppo` those "
            "that lost their gradient, over all optimizer steps",
            "share",
            "update",
        ),
    ]
    approx_kl: Annotated[
        float, Metric("how far the update moved the policy: k3 estimate over all optimizer steps", PER_TOKEN, "update")
    ]
    explained_variance: Annotated[
        float,
        Metric(
            "share of the returns' variance that the value head explains before the update: 1 is perfect, 0 is no "
            "better than a constant; null if the returns do not vary",
            "share",
            "update",
        ),
    ]
    reward_breakdown: Annotated[
        dict[str, float],
        Metric(
            "mean of each reward before its weight, over the samples that have a value", "each reward's own", "rewards"
        ),
    ]
    generation_time_sec: Annotated[
        float, Metric("sampling, and scoring the tokens under the policy and the reference", "seconds", "clock")
    ]
    reward_compute_time_sec: Annotated[float, Metric("your rewards", "seconds", "clock")]
    update_time_sec: Annotated[float, Metric("the optimizer steps", "seconds", "clock")]
    total_time_sec: Annotated[float, Metric("the whole iteration", "seconds", "clock")]
    kl_per_response: Annotated[
        float, Metric("exact KL summed over each response, then averaged", PER_RESPONSE, "rollout")
    ] = 0.0
    objective: Annotated[
        float,
        Metric(
            "what the run maximises: reward_mean − penalty_mean − β · kl_per_response, with the β that you set; with "
            "`kl_target`, only nats above it are paid for; null without a reward",
            "reward",
            "trainer",
        ),
    ] = math.nan
    penalty_mean: Annotated[
        float,
        Metric(
            "mean of what `missing_eos_penalty` and `overlong_penalty` take off, over the samples that have a reward",
            "reward",
            "trainer",
        ),
    ] = 0.0
    kl_k1: Annotated[
        float,
        Metric(
            "mean of log π − log π_ref of the sampled tokens: unbiased, noisy, may be negative", PER_TOKEN, "rollout"
        ),
    ] = 0.0
    kl_k3: Annotated[
        float, Metric("the k3 estimate from the same tokens: unbiased, never negative", PER_TOKEN, "rollout")
    ] = 0.0
    kl_loss: Annotated[
        float,
        Metric(
            "exact KL from the reference during the update; 0 if no penalty is in the loss, as with β = 0",
            PER_TOKEN,
            "update",
        ),
    ] = 0.0
    kl_penalty_weight: Annotated[
        float,
        Metric(
            "β of this iteration; it changes with `kl_target`, and rises as the KL nears `kl_limit`",
            "reward per nat",
            "trainer",
        ),
    ] = 0.0
    entropy: Annotated[float, Metric("mean entropy of the sampling distribution", PER_TOKEN, "rollout")] = 0.0
    sampler_gap: Annotated[
        float,
        Metric(
            "mean difference between the log-probs of the sampler and those of the training forward pass, over the "
            "tokens of the first step, or over all where the trainer has to read the responses again (a server, 16 "
            "bits); with konic's own sampler in fp32, only rounding or a bug makes it differ from 0",
            PER_TOKEN,
            "update",
        ),
    ] = 0.0
    first_log_ratio: Annotated[
        float,
        Metric(
            "largest log-ratio before the first optimizer step; only rounding or a bug makes it differ from 0",
            "nats",
            "update",
        ),
    ] = 0.0
    grad_norm: Annotated[float, Metric("before clipping, mean over the optimizer steps", "", "update")] = 0.0
    num_steps: Annotated[
        int,
        Metric(
            "optimizer steps taken: fewer than planned if `target_kl` stopped the update or the rewards taught nothing",
            "count",
            "update",
        ),
    ] = 0
    distinct_fraction: Annotated[
        float, Metric("different responses among all responses of the batch", "share", "rollout")
    ] = 1.0
    distinct_2: Annotated[
        float,
        Metric(
            "share of the pairs of words in a response that differ, mean over responses: low where phrases repeat; "
            "null where no response has two words",
            "share",
            "rollout",
        ),
    ] = math.nan
    reference_loss: Annotated[
        float,
        Metric(
            "mean of −log π_ref of the sampled tokens: how much the reference is surprised by the text",
            PER_TOKEN,
            "rollout",
        ),
    ] = 0.0
    no_signal_fraction: Annotated[
        float,
        Metric(
            "of the responses in the loss, those whose advantages are all 0: for group methods, the groups whose "
            "penalised rewards are all equal",
            "share",
            "advantages",
        ),
    ] = 0.0
    effective_sample_size: Annotated[
        float,
        Metric(
            "of the tokens in the loss, the share that counts after `sampler_correction`; 1 if konic itself samples in "
            "fp32",
            "share",
            "advantages",
        ),
    ] = 1.0
    num_in_equal_groups: Annotated[
        int,
        Metric("responses left out of the loss by `filter_equal_groups`, replaced or not", "count", "advantages"),
    ] = 0
    num_cut_off: Annotated[int, Metric("responses left out of the loss by `mask_truncated`", "count", "advantages")] = 0
    ended_fraction: Annotated[
        float, Metric("responses that ended by themselves and not at `max_new_tokens`", "share", "rollout")
    ] = 0.0
    num_samples: Annotated[
        int, Metric("responses, those that `filter_equal_groups` replaced among them", "count", "rollout")
    ] = 0
    num_unscored: Annotated[
        int,
        Metric(
            "samples without a reward: every part abstained, or one failed; their advantage is 0", "count", "rewards"
        ),
    ] = 0
    num_reward_errors: Annotated[
        int, Metric('samples on which a reward failed, with `on_reward_error="skip"`', "count", "rewards")
    ] = 0
    num_nonfinite: Annotated[
        int,
        Metric(
            'batches and optimizer steps dropped because a number was not finite, with `on_nonfinite="skip"`',
            "count",
            "update",
        ),
    ] = 0
    eval_reward_mean: Annotated[
        float,
        Metric("mean reward of the same policy on the held-out prompts; null if not evaluated", "reward", "evaluation"),
    ] = math.nan
    eval_kl_per_response: Annotated[
        float,
        Metric("KL of the same policy on the held-out prompts; null if not evaluated", PER_RESPONSE, "evaluation"),
    ] = math.nan
    checks: Annotated[
        tuple[str, ...],
        Metric(
            "self-checks that failed for the first time in this iteration ([Self-checks](checks.md))", "names", "checks"
        ),
    ] = ()
    check_messages: Annotated[
        dict[str, str], Metric("what each of these self-checks means, and what to try", "texts", "checks")
    ] = field(default_factory=dict)

    @property
    def was_dropped(self) -> bool:
        """True if nothing was learned because numbers were not finite (`on_nonfinite="skip"`)."""
        return self.num_nonfinite > 0 and not self.num_steps

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; NaN becomes None."""
        return json_values(asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FinetuningIterationResult":
        """The result whose :meth:`to_dict` gave these values."""
        floats = {name for name, kind in get_type_hints(cls).items() if kind is float}
        filled: dict[str, Any] = {n: math.nan if v is None and n in floats else v for n, v in values.items()}
        filled["checks"] = tuple(values.get("checks", ()))
        filled["reward_breakdown"] = {n: math.nan if v is None else v for n, v in values["reward_breakdown"].items()}
        return cls(**filled)


METRICS = declared_metrics(FinetuningIterationResult)
"""Every metric of an iteration by name, in the order of the fields."""


def json_values(values: dict[str, Any]) -> dict[str, Any]:
    """The values, with None for each number that is not finite, as JSON cannot represent it."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: clean(value) for key, value in values.items()}
