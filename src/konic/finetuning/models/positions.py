"""Masks of left-padded tokens -> position ids, and which prompts are the same; how long a row may get."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedConfig


def position_ids(mask: Tensor) -> Tensor:
    """Return positions [B, T] for a left-padded mask [B, T]: how many tokens that count precede each token (N)."""
    return (mask.long().cumsum(dim=1) - mask.long()).clamp(min=0)


def length_limit(config: PreTrainedConfig) -> tuple[float, str]:
    """Return the most tokens that a row can have before its numbers depend on the longest row of its batch.

    With rope_type="longrope", `transformers` chooses the frequencies by the length of the whole batch; Llama 4 scales
    its attention by the position in the padded batch. (rope_type="dynamic" does so only beyond
    `max_position_embeddings`, where no model is run.) Sparse attention reads only the best of the earlier tokens once
    there are more than it may read; which of equally good ones these are depends on the padding.

    Args:
        config: Of the model, or of its text part.

    Returns:
        The limit, infinite for most models, and the setting that sets it.
    """
    limits = [(math.inf, "")]
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in parameters.values() if all(isinstance(part, dict) for part in parameters.values()) else [parameters]:
        if rope.get("rope_type") == "longrope":
            limits.append((rope["original_max_position_embeddings"], "rope_type='longrope'"))
    for setting in ("index_topk", "keep_window_size"):
        if getattr(config, setting, None):
            limits.append((getattr(config, setting), setting))
    if getattr(config, "attn_temperature_tuning", False):
        limits.append((config.floor_scale, "attn_temperature_tuning"))
    return min(limits)


def distinct_prompts(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the distinct prompts among left-padded prompts [B, P].

    Returns:
        ids [n, P], masks [n, P], and the index [B] of each row's prompt. If all prompts differ, ids and masks are
        returned unchanged and in their order.
    """
    distinct, prompt_of_row = torch.unique(torch.where(mask, ids, -1), dim=0, return_inverse=True)
    if len(distinct) == len(ids):
        return ids, mask, torch.arange(len(ids), device=ids.device)
    mask = distinct >= 0
    return torch.where(mask, distinct, distinct[:, -1:]), mask, prompt_of_row
