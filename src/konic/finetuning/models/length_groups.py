"""Masks -> groups of rows: puts rows of similar length together, so that little padding is computed."""

import torch
from torch import Tensor

COST_OF_A_PASS = 64
"""Fixed cost of one more pass through the model, in tokens: smaller products run slower, and every layer is entered
once more. Derived from a product of 64 rows on two cores, which takes as long as about 100 rows of a large product."""


def group_by_length(prompt_mask: Tensor, response_mask: Tensor, at_most: int | None) -> list[Tensor]:
    """Return the cheapest split of rows into groups of at most `at_most` rows.

    A group is as long as its longest prompt plus its longest response. The function sorts the rows by length and
    compares every way to cut that order into groups. The cost of a group is the number of tokens it computes, padding
    included, plus :data:`COST_OF_A_PASS`.

    Args:
        prompt_mask: [B, P].
        response_mask: [B, R].
        at_most: Largest number of rows in a group; None means no limit.

    Returns:
        Row numbers [n] of each group, the shortest rows first.
    """
    prompt_lengths, response_lengths = prompt_mask.sum(dim=1).tolist(), response_mask.sum(dim=1).tolist()
    at_most = at_most or len(prompt_lengths)
    rows = sorted(range(len(prompt_lengths)), key=lambda row: (prompt_lengths[row] + response_lengths[row], row))
    best: list[tuple[int, int]] = [(0, 0)]  # for the first n rows: the lowest cost, and where its last group starts
    for end in range(1, len(rows) + 1):
        prompt = response = 0
        options = []
        for start in range(end - 1, max(-1, end - 1 - at_most), -1):
            prompt = max(prompt, prompt_lengths[rows[start]])
            response = max(response, response_lengths[rows[start]])
            cost = (end - start) * (prompt + response) + COST_OF_A_PASS
            options.append((best[start][0] + cost, start))
        best.append(min(options))
    groups: list[Tensor] = []
    end = len(rows)
    while end > 0:
        start = best[end][1]
        groups.insert(0, torch.tensor(rows[start:end], device=prompt_mask.device))
        end = start
    return groups
