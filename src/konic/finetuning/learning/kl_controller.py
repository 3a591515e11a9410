"""Measured KL -> weight β of the KL penalty. Pure functions of plain numbers."""

MAX_FACTOR = 100.0
"""The most that a limit multiplies β by."""
LEAST_WEIGHT = 0.05
"""The β that a limit raises where the user's own is lower."""


def limited_kl_weight(kl_penalty_weight: float, kl_per_response: float, limit: float) -> float:
    """Return β + max(β, 0.05) · (f − 1) with f = (0.3 / (1 − KL / limit))², from 1 to 100: a barrier.

    Up to 70 % of the limit β stays as it is; at 85 % it is four times, at 94 % 25 times as high. It rises from 0 too.

    Args:
        kl_penalty_weight: β ≥ 0.
        kl_per_response: Mean KL per response of the batch that the update uses, in nats.
        limit: Nats per response, > 0.
    """
    room = 1.0 - kl_per_response / limit
    factor = MAX_FACTOR if room <= 0.3 / MAX_FACTOR**0.5 else max(1.0, (0.3 / room) ** 2)
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
