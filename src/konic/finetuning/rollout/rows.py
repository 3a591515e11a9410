"""Rollouts -> one Rollout: rounds of sampling joined, and rows of it chosen.

Shapes: B sequences, P prompt tokens, R response tokens.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from konic.finetuning.data.tokenization import PromptBatch
from konic.finetuning.rollout.rollout import Rollout, States
from konic.finetuning.rollout.sampler import Samples
from konic.finetuning.rollout.shares import join_rows

_Rows = TypeVar("_Rows", Rollout, Samples, PromptBatch)


def select_rows(rollout: Rollout, rows: Sequence[int]) -> Rollout:
    """Return the responses in these rows, padded as before; all rows in order give the rollout itself."""
    if list(rows) == [*range(len(rollout.batch))]:
        return rollout
    places = torch.tensor(rows, device=rollout.states.places.device)
    return replace(
        _selected(rollout, rows),
        states=replace(rollout.states, places=rollout.states.places[places]),
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
        states=_joined_states([rollout.states for rollout in rollouts]),
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
        else:
            joined[name] = join_rows(parts, pads_left)
    return replace(values[0], **joined)


def _joined_states(states: Sequence[States]) -> States:
    starts = accumulate((len(part.hidden) for part in states), initial=0)
    places = [
        torch.where(part.places < 0, -1, part.places + start) for part, start in zip(states, starts, strict=False)
    ]
    hidden, ref_hidden = (join_rows([getattr(part, name) for part in states]) for name in ("hidden", "ref_hidden"))
    return States(places=torch.cat(places), hidden=hidden, ref_hidden=ref_hidden)


def _parts(value: Any) -> dict[str, Any]:
    """Return the fields that hold something for each row, and are neither records nor states."""
    named = {field.name: getattr(value, field.name) for field in fields(value) if field.name != "records"}
    return {name: part for name, part in named.items() if isinstance(part, Tensor | Sequence)}
