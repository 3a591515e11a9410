"""Measured KL -> weight β of the KL penalty. Pure functions of plain numbers."""

LEAST_WEIGHT = 0.05
"""The β that a limit raises where the user's own is lower."""


def limited_kl_weight(kl_penalty_weight: float, kl_per_response: float, limit: float) -> float:
    """Return β + max(β, 0.05) · (f − 1) with f = 10 ^ ((KL / limit − 0.6) / 0.4), from 1 to 100.

    Up to 60 % of the limit β stays as it is; from there on it doubles with every 12 %, to ten times at the limit. It
    rises from 0 too. No steeper: the KL of a batch is noisy, and where one batch near the limit made β a hundred times
    as high, one update took back what thirty had learned (docs/defaults.md).

    Args:
        kl_penalty_weight: β ≥ 0.
        kl_per_response: Mean KL per response of the batch that the update uses, in nats.
        limit: Nats per response, > 0.
    """
    exponent = (kl_per_response / limit - 0.6) / 0.4
    factor = 10.0 ** min(max(0.0, exponent), 2.0)  # 1 where the KL is not a number
    return kl_penalty_weight + max(kl_penalty_weight, LEAST_WEIGHT) * (factor - 1.0)


def adapted_kl_weight(
    kl_penalty_weight: float, kl_per_response: float, target: float, num_responses: int, horizon: int
) -> float:
    """Return β · (1 + clip(KL / target − 1, ±0.2) · n / horizon) (Ziegler et al. 2019, 2.2).

    The weight rises if the KL is above its target, and falls if the KL is below it.

    Args:
        kl_penalty_weight: β ≥ 0 of the batch that was measured.
        kl_per_response: Mean KL per response over the batch, in nats.
        target: The KL to reach, in nats; > 0.
        num_responses: n, the responses in the batch. More than `horizon` count as `horizon`, so that β stays positive.
        horizon: Number of responses over which β changes by at most about a fifth.
    """
    error = min(0.2, max(-0.2, kl_per_response / target - 1))
    return kl_penalty_weight * (1 + error * min(1.0, num_responses / horizon))
