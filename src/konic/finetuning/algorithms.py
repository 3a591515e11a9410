"""The algorithms, one row each: everything in which one differs from another. Loads no torch.

A new algorithm is a row here. Where its mathematics is new, it also needs an advantage rule in
`learning/estimators.py` or a policy loss in `learning/losses.py`, each with a test against an oracle. The trainer, the
update and the config read the row and need no change.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from konic.finetuning.errors import ConfigError

AdvantageRule = Literal[
    "gae", "reward_to_go", "leave_one_out", "group_normalised", "group_centred", "group_mean_normalised",
    "parts_normalised",
]  # fmt: skip
"""A key of `learning.estimators.ADVANTAGE_RULES`."""
PolicyLoss = Literal["clipped", "clipped_weight", "soft_gate", "unclipped"]
"""A key of `learning.losses.POLICY_LOSSES`."""
RatioLevel = Literal["token", "sequence"]
Average = Literal["token", "response"]
KLPlacement = Literal["reward", "loss"]

DEFAULT_GROUP_SIZE = 4
"""Responses per prompt of algorithms that compare groups, unless num_generations is set."""


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One row of the table."""

    advantages: AdvantageRule
    """How the rewards of tokens become advantages."""
    policy_loss: PolicyLoss = "clipped"
    """What the policy minimises."""
    ratio_level: RatioLevel = "token"
    """Whether the loss looks at the ratio of each token, or at the geometric mean over the whole response."""
    clip_ratios: tuple[float, float] | None = None
    """ε below and above 1 between which a ratio counts; None takes TrainingConfig.clip_ratio on both sides."""
    divergence_limit: float | None = None
    """δ: a token that has moved its distribution by more, and would move it further, has no gradient."""
    average: Average = "token"
    """Whether every token of an optimizer step counts the same in the loss, or every response."""
    compares_groups: bool = False
    """True where the responses to one prompt are compared with each other."""
    learns_values: bool = False
    """True where a value head learns to predict the rewards to come."""
    kl_placement: KLPlacement = "reward"
    """Where the KL penalty goes, unless TrainingConfig.kl_placement is set."""
    kl_penalty_weight: float = 0.05
    """β, unless TrainingConfig.kl_penalty_weight is set."""
    filter_equal_groups: bool = False
    """Whether groups of equal scores are replaced, unless TrainingConfig.filter_equal_groups is set."""
    overlong_penalty: float = 0.0
    """What a response of full length loses, unless TrainingConfig.overlong_penalty is set."""

    @property
    def looks_at_parts(self) -> bool:
        """True if the advantages come from the parts of the reward, each by itself, rather than from their sum."""
        return self.advantages == "parts_normalised"

    @property
    def discounts(self) -> bool:
        """True if a token's advantage comes from the rewards after it, which gamma discounts."""
        return self.advantages in ("gae", "reward_to_go")

    @property
    def group_size(self) -> int:
        """Responses per prompt, unless num_generations is set."""
        return DEFAULT_GROUP_SIZE if self.compares_groups else 1


ALGORITHMS = {
    "ppo": Algorithm(advantages="gae", learns_values=True, kl_placement="loss"),
    "rloo": Algorithm(advantages="leave_one_out", compares_groups=True),
    "grpo": Algorithm(advantages="group_normalised", compares_groups=True, kl_placement="loss"),
    "dr_grpo": Algorithm(advantages="group_centred", compares_groups=True, kl_placement="loss"),
    "reinforce++": Algorithm(advantages="reward_to_go"),
    "dapo": Algorithm(
        advantages="group_normalised", clip_ratios=(0.2, 0.28), compares_groups=True, kl_placement="loss",
        kl_penalty_weight=0.0, filter_equal_groups=True, overlong_penalty=1.0,
    ),
    "dppo": Algorithm(
        advantages="group_centred", policy_loss="unclipped", divergence_limit=0.15, compares_groups=True,
        kl_placement="loss",
    ),
    "gspo": Algorithm(
        advantages="group_normalised", ratio_level="sequence", clip_ratios=(3e-4, 4e-4), average="response",
        compares_groups=True, kl_placement="loss",
    ),
    "cispo": Algorithm(
        advantages="group_normalised", policy_loss="clipped_weight", clip_ratios=(1.0, 4.0), compares_groups=True,
        kl_placement="loss",
    ),
    "sapo": Algorithm(
        advantages="group_normalised", policy_loss="soft_gate", average="response", compares_groups=True,
        kl_placement="loss",
    ),
    "max_rl": Algorithm(advantages="group_mean_normalised", compares_groups=True, kl_placement="loss"),
    "gdpo": Algorithm(advantages="parts_normalised", compares_groups=True, kl_placement="loss"),
}  # fmt: skip
"""PPO (Schulman et al. 2017), RLOO (arXiv 2402.14740), GRPO (2402.03300), Dr. GRPO (2503.20783), REINFORCE++
(2501.03262), DAPO (2503.14476), DPPO (2602.04879), GSPO (2507.18071), CISPO (2506.13585; weights up to 5 as in
2510.13786), SAPO (2511.20347), MaxRL (2602.02710), GDPO (2601.05242).
"""


class KonicFinetuningMethodType(StrEnum):
    """How konic 0.1 named what `TrainingConfig.algorithm` chooses here."""

    NATIVE_PPO = "NATIVE_PPO"
    """algorithm="ppo"."""
    TRL_GRPO = "TRL_GRPO"
    """algorithm="grpo"."""
    TRL_DPO = "TRL_DPO"
    """Not offered."""


_ALGORITHM_OF_METHOD = {"NATIVE_PPO": "ppo", "TRL_GRPO": "grpo"}


LEARNS_FROM_PAIRS = (
    "it learns from preference pairs, without rewards. Make a reward model of the pairs with "
    "`konic reward-model train`, and train with TrainingConfig(algorithm='ppo')"
)
"""Why DPO and its like are no algorithm here."""


def algorithm_of_method(method: str) -> str:
    """Return the algorithm that a method of konic 0.1 names.

    Raises:
        ConfigError: There is no such method, or it is not offered.
    """
    if method in _ALGORITHM_OF_METHOD:
        return _ALGORITHM_OF_METHOD[method]
    if method == KonicFinetuningMethodType.TRL_DPO:
        raise ConfigError(f"method=TRL_DPO is not offered: {LEARNS_FROM_PAIRS}.")
    if method == "RLHF":
        raise ConfigError("method='RLHF' is PPO: leave it out, or set TrainingConfig(algorithm='ppo').")
    raise ConfigError(
        f"method={method!r} is not known: use {' or '.join(_ALGORITHM_OF_METHOD)}, or leave it out and set "
        f"TrainingConfig(algorithm=...) to one of: {', '.join(ALGORITHMS)}."
    )


def method_of_algorithm(algorithm: str) -> KonicFinetuningMethodType | None:
    """Return the method that konic 0.1 had for an algorithm, or None."""
    methods = {own: method for method, own in _ALGORITHM_OF_METHOD.items()}
    return KonicFinetuningMethodType(methods[algorithm]) if algorithm in methods else None
