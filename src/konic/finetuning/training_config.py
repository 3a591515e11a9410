"""TrainingConfig: how to learn. Loads no torch.

A default comes from a paper or from a measurement, which its docstring names. Derived numbers are properties.
"""

import math
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from konic.finetuning.algorithms import (
    ALGORITHMS,
    LEARNS_FROM_PAIRS,
    Algorithm,
    KLPlacement,
    algorithm_of_method,
)
from konic.finetuning.errors import ConfigError
from konic.finetuning.settings import MAX_PENALTY, MAX_SECONDS, Settings

if TYPE_CHECKING:
    AlgorithmName = str
else:
    AlgorithmName = Literal[tuple(ALGORITHMS)]


def _of_algorithm(name: str) -> Any:
    """Return a default that a field takes from the algorithm's row, or from the first row if the name is wrong."""
    return lambda given: getattr(ALGORITHMS.get(given.get("algorithm"), ALGORITHMS["ppo"]), name)


LRScheduler = Literal["constant", "inverse_sqrt", "linear", "cosine"]

DEFAULT_LORA_LEARNING_RATE = 1e-3
DEFAULT_FULL_LEARNING_RATE = 1e-5
DEFAULT_NUM_MINIBATCHES = 1


def _default_num_minibatches(given: dict[str, Any]) -> int:
    """Return the default, or what divides both it and the batch size, so that every batch size works."""
    return math.gcd(DEFAULT_NUM_MINIBATCHES, given.get("batch_size", DEFAULT_NUM_MINIBATCHES))


def _default_lr_scheduler(given: dict[str, Any]) -> LRScheduler:
    """Return the schedule that was measured with the default rate; a rate of the user's own stays as it is."""
    return "inverse_sqrt" if given.get("learning_rate") is None else "constant"


class TrainingConfig(Settings):
    """How to learn. Sources: N, the 37 details (2023); N+, arXiv 2403.17031; Schulman 2016 (GAE), 2017 (PPO)."""

    successors = MappingProxyType({"samples_per_iteration": "The number of responses per iteration is batch_size."})

    algorithm: AlgorithmName = "ppo"
    """The name of a row in `algorithms.py`. Each row says how its algorithm differs from the others."""
    num_generations: int | None = Field(default=None, ge=1)
    """Responses per prompt; None takes the algorithm's own: 4 where it compares groups, else 1."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak step size of Adam; None takes the measured default of the mode, LoRA or full."""
    batch_size: int = Field(default=16, ge=1)
    """Responses collected per iteration. Fewer are noisier: docs/defaults.md."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches of one optimizer step. More of them need less memory; the result differs by rounding only. They may
    be uneven, and are never more than there are responses."""
    ppo_epochs: int = Field(default=4, ge=1)
    """Passes over each iteration's responses."""
    num_minibatches: int = Field(default_factory=_default_num_minibatches, ge=1)
    """Optimizer steps per pass. It has to divide batch_size; the default gives way where it does not."""
    kl_penalty_weight: float = Field(default_factory=_of_algorithm("kl_penalty_weight"), ge=0, le=MAX_PENALTY)
    """β, the price of one nat of divergence from the reference, in units of reward; with kl_target, its first value.
    Without it the algorithm's own: 0.05, or 0 for DAPO."""
    kl_placement: KLPlacement | None = None
    """Where the KL penalty goes: "reward" subtracts β times the log-ratio of the sampled token from its reward, "loss"
    adds β times the exact KL, with its gradient. None takes the algorithm's own."""
    kl_target: float | None = Field(default=None, gt=0)
    """Nats per response. An adaptive β keeps the KL near it (Ziegler et al. 2019); None keeps β fixed."""
    kl_horizon: int = Field(default=100, ge=1)
    """Responses over which the adaptive β changes by about a fifth at most."""
    kl_limit: float | None = Field(default=10.0, gt=0)
    """Nats per response that the policy may pay: from 60 % of them on, β rises, to ten times at the limit. None sets no
    limit, nor does a run with kl_target have one."""
    kl_budget: float | None = Field(default=None, gt=0)
    """Nats per response that the best weights may cost. A run beyond it warns once and continues."""
    clip_ratio: float = Field(default=0.2, gt=0, lt=1)
    """ε of PPO's clipped objective; the value loss is clipped by the same amount."""
    clip_ratio_low: float | None = Field(default=None, gt=0, le=1)
    """ε below 1; None takes the algorithm's own, else clip_ratio."""
    clip_ratio_high: float | None = Field(default=None, gt=0)
    """ε above 1; None takes the algorithm's own, else clip_ratio. DAPO raises it alone, to 0.28."""
    divergence_limit: float | None = Field(default_factory=_of_algorithm("divergence_limit"), gt=0)
    """δ: tokens whose distribution an update has moved by more lose their gradient if it would move them further
    (DPPO). Without it the algorithm's own."""
    divergence: Literal["total_variation", "kl"] = "total_variation"
    """The measure of `divergence_limit`, over the whole vocabulary: total variation (0 to 1) or KL (nats)."""
    target_kl: float | None = Field(default=None, gt=0)
    """Nats per token that one update may move the policy; beyond it, the remaining steps are skipped."""
    vf_coef: float = Field(default=0.1, ge=0)
    """Weight of the value loss (N)."""
    value_warmup_iterations: int = Field(default=0, ge=0)
    """Number of first iterations in which only the value head learns; for algorithms that learn values."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token (N)."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """λ of generalised advantage estimation (N)."""
    gae_lambda_length: float | None = Field(default=None, gt=0)
    """α: a response of n tokens has λ = 1 − 1/(α·n) instead of gae_lambda, never below 0. VAPO takes 0.05 for responses
    of thousands of tokens (arXiv 2504.05118)."""
    value_gae_lambda: float | None = Field(default=None, ge=0, le=1)
    """λ of the value head's targets; None takes that of the advantages. VAPO takes 1: the return itself."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients with a larger norm are scaled down to it."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the learning rate rises from zero."""
    lr_scheduler: LRScheduler = Field(default_factory=_default_lr_scheduler)
    """The learning rate after warm-up: constant; falling with the steps done, whatever their number ("inverse_sqrt"),
    the default for the default rate; or falling so that the step after the last planned one would have zero.
    docs/defaults.md compares them."""
    missing_eos_penalty: float | None = Field(default=None, ge=0, le=MAX_PENALTY)
    """Subtracted from the score of a response cut off by max_new_tokens (N+)."""
    mask_truncated: bool = False
    """Leave responses cut off by max_new_tokens out of the loss; they still count in the baseline of their group
    (DAPO's overlong filtering, arXiv 2503.14476)."""
    overlong_penalty: float = Field(default_factory=_of_algorithm("overlong_penalty"), ge=0, le=MAX_PENALTY)
    """Subtracted from the score of a response of max_new_tokens; over the last `overlong_share` of them it rises from 0
    (DAPO's soft overlong punishment). Without it the algorithm's own."""
    overlong_share: float = Field(default=0.2, gt=0, le=1)
    """The share of max_new_tokens over which `overlong_penalty` rises."""
    filter_equal_groups: bool = Field(default_factory=_of_algorithm("filter_equal_groups"))
    """Replace groups whose scores are all equal, which teach nothing, by groups of further prompts (DAPO's dynamic
    sampling). Without it the algorithm's own."""
    resampling_budget: int = Field(default=3, ge=0)
    """With filter_equal_groups: the most rounds of further sampling in an iteration. Groups that are still equal after
    the last one are left out of the loss."""
    sampler_correction: Literal["truncate", "mask"] | None = "truncate"
    """Weight tokens by π(token) / π_sampler(token) where another engine or another precision than the trainer's
    samples: "truncate" limits the weights, "mask" drops the tokens beyond the limit."""
    sampler_correction_level: Literal["token", "sequence"] = "token"
    """Whether that ratio is a token's own, or the product over its whole response."""
    sampler_correction_limit: float = Field(default=2.0, gt=1)
    """The highest weight; "mask" also drops weights below its inverse."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: far less memory, for one more forward pass per step."""
    sharding: Literal["fsdp"] | None = None
    """"fsdp" divides the weights among the processes of the run. None lets every process hold the whole model."""
    sharded_sampling: bool | None = None
    """With sharding: True leaves the weights divided in sampling too, which needs the least memory and exchanges every
    layer at every token. False gathers the whole weights once for each rollout. None gathers them where they fit."""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """The numbers in which the frozen base model is kept and computes, in sampling and training. "bfloat16" needs half
    the memory; the adapter, the value head, the optimizer, log-probs, KL and losses stay in float32. "auto" takes it
    for an adapter on a CPU that has instructions for bfloat16, and float32 elsewhere."""
    eval_every: int | None = Field(default=None, ge=1)
    """Iterations between evaluations on the held-out prompts; without it there is one before and one after the run."""
    max_minutes: float | None = Field(default=None, gt=0)
    """Stop after the iteration that passes this many minutes."""
    on_reward_error: Literal["raise", "skip"] = "raise"
    """When a reward fails on a response: "raise" stops the run, "skip" leaves the response out and counts it."""
    max_error_rate: float = Field(default=0.1, ge=0, le=1)
    """With on_reward_error="skip": the share of the last 100 responses that may fail before the run stops."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """At a NaN or infinity: "stop" ends the run before the step, "skip" drops the batch or step and counts it."""
    reward_workers: int = Field(default=0, ge=0)
    """Worker processes that call reward methods and functions; 0 calls them in the process of the run, where reward
    models are always called."""
    reward_timeout_seconds: float | None = Field(default=None, gt=0, le=MAX_SECONDS)
    """Seconds that a worker may take for one response, or for the batch of a batch method, before it is killed."""
    reward_resources: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """What the reward workers of each process of a training on Ray take of the cluster, such as `{"CPU": 4}`: they run
    beside an actor of Ray, on any node. None runs them on the machine of the process."""
    process_timeout_seconds: float = Field(default=1800.0, gt=0, le=MAX_SECONDS)
    """Seconds that each of several processes waits for the others, before the run ends with the name of one that is
    missing."""
    self_checks: bool = True
    """Watch the run for silent faults: a broken invariant stops it, any other finding is reported once."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seeds samples, minibatches and adapter weights. DatasetConfig.shuffle_seed seeds the order of prompts."""

    @field_validator("algorithm", mode="before")
    @classmethod
    def _refuse_pairs(cls, value: Any) -> Any:
        if value in ("dpo", "ipo", "kto", "orpo", "simpo"):
            raise ValueError(f"algorithm={value!r} is not offered: {LEARNS_FROM_PAIRS}")
        return value

    @model_validator(mode="after")
    def _check_divisions(self) -> Self:
        steps, group = self.num_minibatches, self.responses_per_prompt
        unit = math.lcm(steps, group)
        below = self.batch_size // unit * unit
        nearest = "nearest valid batch_size: " + " or ".join(str(n) for n in (below, below + unit) if n)
        if self.batch_size % steps:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be split evenly into num_minibatches={self.num_minibatches}; "
                f"{nearest}"
            )
        if self.batch_size % group:
            raise ValueError(
                f"batch_size={self.batch_size} responses cannot be split into groups of num_generations={group}; "
                f"{nearest}"
            )
        return self

    @model_validator(mode="after")
    def _check_algorithm(self) -> Self:
        if self.algorithm_row.compares_groups and self.responses_per_prompt < 2:
            raise ValueError(
                f"algorithm={self.algorithm!r} compares the responses to one prompt: num_generations must be at least 2"
            )
        if self.filter_equal_groups and self.responses_per_prompt < 2:
            raise ValueError(
                "filter_equal_groups=True looks at the responses to one prompt: set num_generations to at least 2"
            )
        adds_penalty = self.missing_eos_penalty is not None or self.overlong_penalty > 0
        if self.algorithm_row.looks_at_parts and (not self.kl_in_loss or adds_penalty):
            raise ValueError(
                f"algorithm={self.algorithm!r} looks at the parts of the reward and at nothing else: it takes neither "
                "kl_placement='reward' nor missing_eos_penalty nor overlong_penalty"
            )
        divides_by_mean = self.algorithm_row.advantages == "group_mean_normalised"
        if divides_by_mean and (not self.kl_in_loss or adds_penalty):
            raise ValueError(
                f"algorithm={self.algorithm!r} divides by the mean reward of a group, which nothing may lower: it "
                "takes neither kl_placement='reward' nor missing_eos_penalty nor overlong_penalty"
            )
        own_ratios, default = self.algorithm_row.clip_ratios, type(self).model_fields["clip_ratio"].default
        if own_ratios and self.clip_ratio != default and None in (self.clip_ratio_low, self.clip_ratio_high):
            raise ValueError(
                f"clip_ratio={self.clip_ratio:g} would change nothing: algorithm={self.algorithm!r} clips by "
                f"{own_ratios[0]:g} below and {own_ratios[1]:g} above 1. Set clip_ratio_low and clip_ratio_high"
            )
        has_clip = self.clip_ratio != default or self.clip_ratio_low is not None or self.clip_ratio_high is not None
        if has_clip and self.algorithm_row.policy_loss in ("soft_gate", "unclipped"):
            raise ValueError(
                f"algorithm={self.algorithm!r} does not clip: leave clip_ratio, clip_ratio_low and clip_ratio_high out"
            )
        uses_ratios = self.algorithm_row.ratio_level == "token"
        if self.divergence_limit is not None and not uses_ratios:
            raise ValueError(
                f"divergence_limit={self.divergence_limit:g} looks at tokens, and algorithm={self.algorithm!r} at "
                "whole responses: leave it out, or use algorithm='dppo'"
            )
        if self.kl_target is not None and self.kl_budget is not None and self.kl_target > self.kl_budget:
            raise ValueError(f"kl_target={self.kl_target} steers beyond kl_budget={self.kl_budget}; set it below")
        if self.value_warmup_iterations and not (self.algorithm_row.learns_values and self.vf_coef):
            learners = " or ".join(repr(name) for name, row in ALGORITHMS.items() if row.learns_values)
            raise ValueError(
                f"value_warmup_iterations={self.value_warmup_iterations}, but with algorithm={self.algorithm!r} and "
                f"vf_coef={self.vf_coef} no value head learns; use algorithm={learners} and vf_coef above 0"
            )
        if self.sharded_sampling is not None and self.sharding is None:
            raise ValueError(f"sharded_sampling={self.sharded_sampling} needs sharding='fsdp'")
        if self.reward_timeout_seconds is not None and not self.reward_workers:
            raise ValueError(
                f"reward_timeout_seconds={self.reward_timeout_seconds:g} needs reward_workers, such as 2: only a "
                "process of its own can be stopped"
            )
        if self.reward_resources is not None and not self.reward_workers:
            raise ValueError(f"reward_resources={self.reward_resources} needs reward_workers, such as 2")
        return self

    @classmethod
    def fast_debug(cls) -> Self:
        """Return settings to try a script with, as konic 0.1 had them: tiny batches, one pass, no price of KL."""
        return cls(learning_rate=1e-4, batch_size=2, ppo_epochs=1, kl_penalty_weight=0.0)

    @classmethod
    def cpu_optimized(cls) -> Self:
        """Return what konic 0.1 called so. The defaults here were measured on CPUs and learn faster."""
        return cls(learning_rate=5e-5, batch_size=1, gradient_accumulation_steps=8, ppo_epochs=2, max_grad_norm=0.5)

    @classmethod
    def gpu_optimized(cls) -> Self:
        """Return what konic 0.1 called so; see :meth:`cpu_optimized`."""
        return cls(
            learning_rate=1e-5, batch_size=16, gradient_accumulation_steps=2, kl_penalty_weight=0.1, entropy_coef=0.01
        )

    def with_method(self, method: str | None) -> Self:
        """Return settings for a method of konic 0.1, a :class:`KonicFinetuningMethodType`; None changes nothing.

        Where the algorithm compares groups and num_generations is not set, it is the largest of 4, 3 and 2 that divides
        batch_size.

        Raises:
            ConfigError: There is no such method, it is not offered, or `algorithm` is set to another one.
        """
        if method is None:
            return self
        algorithm = algorithm_of_method(method)
        if "algorithm" in self.model_fields_set and self.algorithm != algorithm:
            raise ConfigError(
                f"method={str(method)!r} is algorithm={algorithm!r}, but algorithm={self.algorithm!r} is set."
            )
        sizes = [size for size in (4, 3, 2) if self.batch_size % size == 0]
        adapts = ALGORITHMS[algorithm].compares_groups and self.num_generations is None and sizes
        changes: dict[str, Any] = {} if "algorithm" in self.model_fields_set else {"algorithm": algorithm}
        changes |= {"num_generations": sizes[0]} if adapts else {}
        return self.with_fields(changes) if changes else self

    @property
    def algorithm_row(self) -> Algorithm:
        """The algorithm's row of the table."""
        return ALGORITHMS[self.algorithm]

    @property
    def clip_ratios(self) -> tuple[float, float]:
        """ε below and above 1: those set for one side, else the algorithm's own, else clip_ratio on both sides."""
        low, high = self.algorithm_row.clip_ratios or (self.clip_ratio, self.clip_ratio)
        return self.clip_ratio_low or low, self.clip_ratio_high or high

    @property
    def kl_in_loss(self) -> bool:
        """True where the KL penalty goes into the loss rather than the reward."""
        return (self.kl_placement or self.algorithm_row.kl_placement) == "loss"

    @property
    def responses_per_prompt(self) -> int:
        """n: num_generations, or the algorithm's own."""
        if self.num_generations is not None:
            return self.num_generations
        return self.algorithm_row.group_size

    @property
    def prompts_per_iteration(self) -> int:
        """Different prompts in one batch of responses."""
        return self.batch_size // self.responses_per_prompt

    def peak_learning_rate(self, uses_lora: bool) -> float:
        """The learning rate set, or the measured default of the mode."""
        if self.learning_rate is not None:
            return self.learning_rate
        return DEFAULT_LORA_LEARNING_RATE if uses_lora else DEFAULT_FULL_LEARNING_RATE

    @property
    def micro_batch_size(self) -> int:
        """The most sequences in one forward and backward pass."""
        return -(-self.effective_batch_size // self.gradient_accumulation_steps)

    @property
    def effective_batch_size(self) -> int:
        """Responses that one optimizer step averages over."""
        return self.batch_size // self.num_minibatches

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps in one iteration."""
        return self.ppo_epochs * self.num_minibatches
