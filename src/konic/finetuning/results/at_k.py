"""Rewards of several responses to one prompt -> what the best of k of them is expected to be. Pure functions."""

from collections.abc import Sequence
from math import comb, fsum


def pass_at_k(num_responses: int, num_passed: int, k: int) -> float:
    """The probability that at least one of k responses passes, without bias: 1 − C(n − c, k) / C(n, k).

    It is the share of all ways to choose k of the n responses that hold one that passed (Chen et al. 2021,
    arXiv 2107.03374). The plain 1 − (1 − c / n)^k is too low.

    Args:
        num_responses: n responses to one prompt.
        num_passed: c of them passed.
        k: At most n.
    """
    return 1 - comb(num_responses - num_passed, k) / comb(num_responses, k)


def best_at_k(rewards: Sequence[float], k: int) -> float:
    """The expected highest reward of k responses, without bias: the mean over all ways to choose k of the n rewards.

    The i-th lowest reward, from 0, is the highest in C(i, k − 1) of the C(n, k) ways. For rewards of 0 and 1 this is
    :func:`pass_at_k`.
    """
    ways = comb(len(rewards), k)
    return fsum(reward * (comb(rank, k - 1) / ways) for rank, reward in enumerate(sorted(rewards)))
