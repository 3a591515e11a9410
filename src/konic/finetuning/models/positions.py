"""Masks of left-padded tokens -> positions, and which prompts are the same."""

import torch
from torch import Tensor


def position_ids(mask: Tensor) -> Tensor:
    """Positions [B, T] of tokens under a left-padded mask [B, T]: how many that count stand before each (N)."""
    return (mask.long().cumsum(dim=1) - mask.long()).clamp(min=0)


def distinct_prompts(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The different prompts among [B, P], padded on the left: their ids and masks [n, P], and which each row is [B].

    Where no two are the same they stay as they are, in their order.
    """
    distinct, of_rows = torch.unique(torch.where(mask, ids, -1), dim=0, return_inverse=True)
    if len(distinct) == len(ids):
        return ids, mask, torch.arange(len(ids), device=ids.device)
    return distinct.clamp(min=0), distinct >= 0, of_rows
