"""Rollout, scores, advantages; evaluations <-> columns of the tables in a run's folder.

Shapes: B sequences, R response tokens.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow
from torch import Tensor

from konic.finetuning.learning.estimators import Advantages
from konic.finetuning.results.evaluation import Evaluation
from konic.finetuning.rewards.scoring import Scores
from konic.finetuning.rollout.rollout import Rollout

PART = "reward/"
"""Begins the name of a column that holds one part of the reward."""
SECONDS = "seconds/"
"""Begins the name of a column that holds the time of one reward."""


def completion_columns(
    iteration: int,
    rollout: Rollout,
    scores: Scores,
    left_out: list[str | None],
    advantages: Advantages,
    learned_rows: Sequence[int],
) -> dict[str, Any]:
    """Return the columns of `completions/`: a row for each response, with a list of numbers for its tokens.

    Args:
        iteration: Its number.
        rollout: [B] the responses.
        scores: [B] their rewards.
        left_out: [B] why responses are left out of the loss, or None.
        advantages: Those of the responses that were given to the update.
        learned_rows: The rows of these responses in the rollout.
    """
    records, mask = rollout.records, rollout.response_mask
    signal, learned = rollout.values.new_zeros(mask.shape), mask.new_zeros(len(mask))
    signal[learned_rows] = advantages.advantages.to(signal.dtype)
    learned[learned_rows] = advantages.mask.any(dim=1)
    columns: dict[str, Any] = {
        "iteration": [iteration] * len(records),
        "row": [record.row for record in records],
        "prompt": [record.prompt for record in records],
        "response": [record.response for record in records],
        "reward": _nulls(scores.rewards),
        "kl": rollout.kl.sum(dim=1).tolist(),
        "ended": rollout.samples.ended.tolist(),
        "error": pyarrow.array(scores.errors, pyarrow.string()),
        "left_out": pyarrow.array(left_out, pyarrow.string()),
        "token_ids": [list(record.token_ids) for record in records],
    }
    columns |= {f"{PART}{name}": _nulls(values) for name, values in scores.breakdown.items()}
    columns |= {
        f"{SECONDS}{name}": pyarrow.array(_nulls(values), pyarrow.float32()) for name, values in scores.seconds.items()
    }
    columns["advantages"] = _token_lists(signal, mask, learned)
    if advantages.value_loss_weight:
        columns["values"] = _token_lists(rollout.values, mask)
    columns["token_kl"] = _token_lists(rollout.kl, mask)
    columns["log_probs"] = _token_lists(rollout.log_probs, mask)
    columns["entropy"] = _token_lists(rollout.entropy, mask)
    return columns


def _token_lists(numbers: Tensor, mask: Tensor, rows: Tensor | None = None) -> pyarrow.Array:
    """Return numbers [B, R] as a list of float32 for each row, of its tokens in the mask; null outside of `rows`."""
    if rows is not None:
        mask = mask & rows[:, None]
    ends = np.concatenate([[0], mask.sum(dim=1).cumsum(dim=0).cpu().numpy()])
    is_null = np.concatenate([~rows.cpu().numpy(), [False]]) if rows is not None else None
    offsets = pyarrow.array(ends, pyarrow.int32(), mask=is_null)
    return pyarrow.ListArray.from_arrays(offsets, pyarrow.array(numbers[mask].float().cpu().numpy()))


def evaluation_columns(evaluation: Evaluation) -> dict[str, Any]:
    """Return the columns of `evaluations/`: a row for each held-out prompt."""
    columns: dict[str, Any] = {
        "prompt": evaluation.prompts,
        "response": evaluation.responses,
        "reward": _nulls(evaluation.rewards),
        "kl": evaluation.kl_per_response,
        "length": evaluation.response_lengths,
        "error": pyarrow.array(evaluation.errors or [None] * len(evaluation.prompts), pyarrow.string()),
    }
    return columns | {f"{PART}{name}": _nulls(values) for name, values in evaluation.breakdown.items()}


def evaluation_of(columns: dict[str, Any]) -> Evaluation:
    """Return the evaluation of which :func:`evaluation_columns` made these columns.

    Raises:
        KeyError: A column is missing.
    """
    return Evaluation(
        prompts=columns["prompt"],
        responses=columns["response"],
        rewards=_nans(columns["reward"]),
        breakdown={name.removeprefix(PART): _nans(columns[name]) for name in columns if name.startswith(PART)},
        kl_per_response=columns["kl"],
        response_lengths=columns["length"],
        errors=columns["error"],
    )


def _nulls(values: list[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def _nans(values: list[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
