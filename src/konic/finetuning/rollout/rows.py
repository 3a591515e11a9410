"""Rollouts -> one Rollout: rounds of sampling joined, and rows of it chosen.

Shapes: B sequences, P prompt tokens, R response tokens.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from konic.finetuning.data.tokenization import PromptBatch
from konic.finetuning.rollout.rollout import Rollout
from konic.finetuning.rollout.sampler import Samples

_Rows = TypeVar("_Rows", Rollout, Samples, PromptBatch)


def select_rows(rollout: Rollout, rows: Sequence[int]) -> Rollout:
    """Return the responses in these rows, padded as before; all rows in order give the rollout itself."""
    if list(rows) == [*range(len(rollout.batch))]:
        return rollout
    numbers = _selected(rollout, rows)
    return replace(
        numbers,
        batch=_selected(rollout.batch, rows),
        samples=_selected(rollout.samples, rows),
        records=[rollout.records[row] for row in rows],
    )


def join_rollouts(rollouts: Sequence[Rollout]) -> Rollout:
    """Return the responses of several rollouts of one policy, padded to common lengths; those of one as they are."""
    if len(rollouts) == 1:
        return rollouts[0]
    return replace(
        _joined(rollouts, pads_left=False),
        batch=_joined([rollout.batch for rollout in rollouts], pads_left=True),
        samples=_joined([rollout.samples for rollout in rollouts], pads_left=False),
        records=[record for rollout in rollouts for record in rollout.records],
    )


def _selected(value: _Rows, rows: Sequence[int]) -> _Rows:
    """Return the rows of every tensor and list."""
    chosen: dict[str, Any] = {}
    for name, part in _parts(value).items():
        is_tensor = isinstance(part, Tensor)
        chosen[name] = part[torch.tensor(rows, device=part.device)] if is_tensor else [part[row] for row in rows]
    return replace(value, **chosen)


def _joined(values: Sequence[_Rows], pads_left: bool) -> _Rows:
    """Return the rows of all values: tensors [B, length, ...] padded with 0 to the longest, lists one after another."""
    joined: dict[str, Any] = {}
    for name, first in _parts(values[0]).items():
        parts = [getattr(value, name) for value in values]
        if not isinstance(first, Tensor):
            joined[name] = [item for part in parts for item in part]
        elif first.ndim == 1:
            joined[name] = torch.cat(parts)
        else:
            length = max(part.shape[1] for part in parts)
            joined[name] = torch.cat([_padded(part, length, pads_left) for part in parts])
    return replace(values[0], **joined)


def _padded(tensor: Tensor, length: int, on_left: bool) -> Tensor:
    missing = length - tensor.shape[1]
    ends = (missing, 0) if on_left else (0, missing)
    return functional.pad(tensor, (*(0, 0) * (tensor.ndim - 2), *ends))


def _parts(value: Any) -> dict[str, Any]:
    """Return the fields that hold something for each row, and are not rows themselves."""
    named = {field.name: getattr(value, field.name) for field in fields(value) if field.name != "records"}
    return {name: part for name, part in named.items() if isinstance(part, Tensor | Sequence)}
