"""KL paid -> the price of KL. Pure functions of plain numbers."""


def adapted_kl_weight(
    kl_penalty_weight: float, kl_per_response: float, target: float, num_responses: int, horizon: int
) -> float:
    """β · (1 + clip(KL / target − 1, ±0.2) · n / horizon): up where KL is above its target (Ziegler et al. 2019, 2.2).

    Args:
        kl_penalty_weight: β ≥ 0 of the batch that was measured.
        kl_per_response: Nats, its mean over the batch.
        target: Nats > 0.
        num_responses: n, in the batch; more than `horizon` count as `horizon`, so that β stays positive.
        horizon: Responses over which β changes by about a fifth at most.
    """
    error = min(0.2, max(-0.2, kl_per_response / target - 1))
    return kl_penalty_weight * (1 + error * min(1.0, num_responses / horizon))
