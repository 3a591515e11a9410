"""Masks -> groups of rows: puts rows of similar length together, so that little padding is computed."""

import numpy as np
import torch
from torch import Tensor

COST_OF_A_PASS = {"cpu": 64, "cuda": 2048}
"""Fixed cost of one more pass through the model, in tokens, by device type. On a CPU small products run slower, and
every layer is entered once more: a product of 64 rows on two cores takes as long as about 100 rows of a large product.
A GPU computes that many tokens while Python launches the kernels of one pass (docs/gpu.md)."""


def cost_of_a_pass(device: torch.device) -> int:
    """Return the cost of one more pass on a device, in tokens."""
    return COST_OF_A_PASS.get(device.type, COST_OF_A_PASS["cpu"])


def group_by_length(prompt_mask: Tensor, response_mask: Tensor, at_most: int | None) -> list[Tensor]:
    """Return the cheapest split of rows into groups of at most `at_most` rows.

    A group is as long as its longest prompt plus its longest response. The function sorts the rows by length and
    compares every way to cut that order into groups. The cost of a group is the number of tokens it computes, padding
    included, plus :func:`cost_of_a_pass`.

    Args:
        prompt_mask: [B, P].
        response_mask: [B, R].
        at_most: Largest number of rows in a group; None means no limit.

    Returns:
        Row numbers [n] of each group, the shortest rows first.
    """
    device = prompt_mask.device
    prompts, responses = (mask.sum(dim=1).cpu().numpy() for mask in (prompt_mask, response_mask))
    at_most, cost_of_one = at_most or len(prompts), cost_of_a_pass(device)
    rows = np.lexsort((np.arange(len(prompts)), prompts + responses))
    prompts, responses = prompts[rows], responses[rows]
    lowest_cost = np.zeros(len(rows) + 1, dtype=np.int64)  # of the first n rows
    last_start = np.zeros(len(rows) + 1, dtype=np.int64)  # where the last group of the first n rows starts
    for end in range(1, len(rows) + 1):
        start = max(0, end - at_most)
        longest = sum(np.maximum.accumulate(lengths[start:end][::-1])[::-1] for lengths in (prompts, responses))
        costs = lowest_cost[start:end] + np.arange(end - start, 0, -1) * longest + cost_of_one
        last_start[end] = start + np.argmin(costs)
        lowest_cost[end] = costs[last_start[end] - start]
    groups: list[Tensor] = []
    end = len(rows)
    while end > 0:
        start = last_start[end]
        groups.insert(0, torch.from_numpy(rows[start:end]).to(device))
        end = start
    return groups
