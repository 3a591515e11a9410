"""Measured KL -> weight β of the KL penalty. Pure functions of plain numbers."""


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
