"""Prompts + responses -> Samples: makes one record for each response, for rewards, files and checks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from konic.finetuning.data.prompts import Prompt

RESERVED = ("self", "prompt", "prompts", "response", "responses", "completions")
"""Parameter names that a dataset column never fills."""
_MESSAGES = "messages"


@dataclass(frozen=True)
class Sample:
    """One response to one prompt."""

    row: int
    """Index of the prompt in the dataset."""
    prompt: str
    """The text that the model read, without chat markup; for a chat, the text of its last message."""
    response: str
    """The text of the response as it was sampled, without its end token and cut before a stop string."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Values that rewards can request by name: the other columns of the row, and `messages` if the batch holds chats.
    All samples of a batch have the same names; a value that the row lacks is None."""
    token_ids: Sequence[int] = ()
    """The tokens of the response, including an end-of-sequence token."""

    @property
    def messages(self) -> list[dict[str, str]] | None:
        """The chat whose last message is the prompt, whole also where the prompt was cut; None for plain text."""
        return self.columns.get(_MESSAGES)

    def with_columns(self, names: Sequence[str]) -> Self:
        """Return the sample for a reward that requests these columns: it has only these, its chat, and no tokens."""
        kept = {name: self.columns[name] for name in (*names, _MESSAGES) if name in self.columns}
        return replace(self, columns=kept, token_ids=())


def make_samples(
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    responses: Sequence[str],
    token_ids: Sequence[Sequence[int]] | None = None,
) -> list[Sample]:
    """Return the samples of a batch.

    Args:
        prompts: [B] rows of the dataset.
        texts: [B] the text of each prompt that the model read.
        responses: [B] the text of each response.
        token_ids: [B] the tokens of each response; None gives samples without tokens.
    """
    records = zip(prompts, texts, responses, collect_columns(prompts), token_ids or [()] * len(prompts), strict=True)
    return [Sample(prompt.row, text, response, columns, ids) for prompt, text, response, columns, ids in records]


def samples_from_texts(
    prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> list[Sample]:
    """Return the samples of texts [B] that do not come from a dataset, with the values [B] of each column."""
    return [
        Sample(row, prompt, response, {name: values[row] for name, values in columns.items()})
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]


def collect_columns(prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Return the columns that rewards can request [B]: each row's other columns, and `messages` if there are chats."""
    taken = (*RESERVED, _MESSAGES)
    names = dict.fromkeys(str(name) for prompt in prompts for name in prompt.columns if name not in taken)
    columns = [{name: prompt.columns.get(name) for name in names} for prompt in prompts]
    if any(prompt.messages is not None or prompt.is_among_chats for prompt in prompts):
        for values, prompt in zip(columns, prompts, strict=True):
            values[_MESSAGES] = prompt.messages
    return columns
