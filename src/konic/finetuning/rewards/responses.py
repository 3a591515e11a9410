"""A file of prompts and responses -> samples, on which rewards are tried."""

import string
from collections.abc import Mapping, Sequence
from typing import Any

from konic.finetuning.data.config import DatasetConfig
from konic.finetuning.data.loaders import read_local
from konic.finetuning.data.prompts import make_prompts, with_system_prompt
from konic.finetuning.data.samples import Sample, make_samples
from konic.finetuning.errors import DatasetError, did_you_mean
from konic.output import get_logger

logger = get_logger(__name__)


def read_responses(
    name: str,
    prompt_column: str = "prompt",
    prompt_template: str | None = None,
    system_prompt: str | None = None,
) -> list[Sample]:
    """Read samples from a file with columns `prompt` and `response`; its other columns go to the rewards.

    `prompt_column` is read instead of `prompt` if the file has it, and `prompt_template` makes the prompts, as in
    training, if the file has its columns. `system_prompt` goes first in chats that have no system message. Rows with an
    empty prompt are left out with a warning, as in training.

    Raises:
        DatasetError: The file does not exist or has no rows, or a row has no prompt or response.
    """
    rows = read_local(name)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or not isinstance(row.get("response"), str):
            raise DatasetError(f"{name}, row {number}: needs a text in the column 'response'.")
    if not rows:
        raise DatasetError(f"{name}: holds no rows. Give at least one, with a text in the column 'response'.")
    if prompt_template is not None and _columns_of(prompt_template) <= {name for row in rows for name in row}:
        return _samples(rows, DatasetConfig(prompt_template=prompt_template), name, None)
    column = prompt_column if any(prompt_column in row for row in rows) else "prompt"
    for number, row in enumerate(rows):
        if column not in row:
            wanted = " or ".join(map(repr, dict.fromkeys((prompt_column, column))))
            raise DatasetError(
                f"{name}, row {number}: has no column {wanted}.{did_you_mean(column, map(str, row))} Its columns: "
                f"{', '.join(map(repr, row))}. Rename the column that holds the prompt."
            )
    return _samples(rows, DatasetConfig(prompt_column=column), name, system_prompt)


def _columns_of(template: str) -> set[str]:
    return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}


def _samples(
    rows: Sequence[Mapping[str, Any]], config: DatasetConfig, name: str, system_prompt: str | None
) -> list[Sample]:
    columns = [{key: row[key] for key in row if key != "response"} for row in rows]
    prompts = [
        with_system_prompt(prompt, system_prompt)
        for prompt in make_prompts(columns, config, name, leaves_out_empty=True)
    ]
    if system_prompt is not None and not all(prompt.messages for prompt in prompts):
        logger.warning("%s: prompts of plain text are tried without the system_prompt: only chats can have one.", name)
    responses = [rows[prompt.row]["response"] for prompt in prompts]
    return make_samples(prompts, [prompt.text for prompt in prompts], responses)
