"""Masks of left-padded tokens -> position ids, and which prompts are the same."""

import torch
from torch import Tensor


def position_ids(mask: Tensor) -> Tensor:
    """Return positions [B, T] for a left-padded mask [B, T]: how many tokens that count precede each token (N)."""
    return (mask.long().cumsum(dim=1) - mask.long()).clamp(min=0)


def distinct_prompts(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the distinct prompts among left-padded prompts [B, P].

    Returns:
        ids [n, P], masks [n, P], and the index [B] of each row's prompt. If all prompts differ, ids and masks are
        returned unchanged and in their order.
    """
    distinct, prompt_of_row = torch.unique(torch.where(mask, ids, -1), dim=0, return_inverse=True)
    if len(distinct) == len(ids):
        return ids, mask, torch.arange(len(ids), device=ids.device)
    return distinct.clamp(min=0), distinct >= 0, prompt_of_row
