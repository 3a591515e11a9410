"""Prompts + responses -> Samples: one record for each response, which rewards, files and checks read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from konic.finetuning.data.prompts import Prompt

RESERVED = ("self", "prompt", "prompts", "response", "responses", "completions")
"""Names of parameters that no column of a dataset fills."""
_MESSAGES = "messages"


@dataclass(frozen=True)
class Sample:
    """One response to one prompt."""

    row: int
    """Index of the prompt in the dataset."""
    prompt: str
    """The text that the model read, without chat markup; of a chat, its last message."""
    response: str
    """The text of the response: without special tokens, cut before a stop string."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What rewards may ask for by name: the other columns of the row, and `messages` where the batch holds chats. All
    samples of a batch have the same names; a value that a row does not have is None."""
    token_ids: Sequence[int] = ()
    """The tokens of the response, an end-of-sequence token counted."""

    @property
    def messages(self) -> list[dict[str, str]] | None:
        """The chat that the prompt is the last message of; None for plain text."""
        return self.columns.get(_MESSAGES)

    def with_columns(self, names: Sequence[str]) -> Self:
        """The sample for a reward that asks for these columns only, with its chat and without its tokens."""
        kept = {name: self.columns[name] for name in (*names, _MESSAGES) if name in self.columns}
        return replace(self, columns=kept, token_ids=())


def make_samples(
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    responses: Sequence[str],
    token_ids: Sequence[Sequence[int]] | None = None,
) -> list[Sample]:
    """The samples of a batch.

    Args:
        prompts: [B] rows of the dataset.
        texts: [B] what the model read of them.
        responses: [B].
        token_ids: [B] the tokens of each response; none if None.
    """
    every = zip(prompts, texts, responses, collect_columns(prompts), token_ids or [()] * len(prompts), strict=True)
    return [Sample(prompt.row, text, response, columns, ids) for prompt, text, response, columns, ids in every]


def samples_from_texts(
    prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> list[Sample]:
    """The samples of texts [B] that come from no dataset, with the values [B] of each column."""
    return [
        Sample(row, prompt, response, {name: values[row] for name, values in columns.items()})
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]


def collect_columns(prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """What rewards may ask for [B]: the other columns of each row, and its chat as `messages` where there are chats."""
    taken = (*RESERVED, _MESSAGES)
    names = dict.fromkeys(str(name) for prompt in prompts for name in prompt.columns if name not in taken)
    columns = [{name: prompt.columns.get(name) for name in names} for prompt in prompts]
    if any(prompt.messages is not None for prompt in prompts):
        for values, prompt in zip(columns, prompts, strict=True):
            values[_MESSAGES] = prompt.messages
    return columns
