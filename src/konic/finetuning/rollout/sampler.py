"""PromptBatch -> Samples: the interface of every sampler, for any engine, and the tensors it returns.

Shapes: B sequences, R response tokens, H hidden size. A mask is True where a token counts.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from konic.finetuning.config import GenerationConfig
from konic.finetuning.data.tokenization import PromptBatch, read_text
from konic.finetuning.errors import ConfigError
from konic.finetuning.models.language_model import LanguageModel


@dataclass(frozen=True)
class RandomKey:
    """Determines every random number of a response, together with a dataset row and a sample index."""

    seed: int
    iteration: int
    """From 1 in training; 0 in evaluation."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Sampled responses with their log-probs."""

    response_ids: Tensor
    """[B, R] int64, padded on the right."""
    response_mask: Tensor
    """[B, R] True on response tokens, including the end-of-sequence token."""
    log_probs: Tensor
    """[B, R] log-probs of the tokens under softmax(logits / temperature), before any filter; 0 outside the mask."""
    ended: Tensor
    """[B] True where the response ended by itself: by an end-of-sequence token or a stop string."""
    hidden: Tensor | None = None
    """[B, R, H] the hidden states of the policy from which each token was drawn, 0 outside the mask; None if the
    sampler does not return them. Scoring then runs its own forward pass."""

    def token_ids(self) -> list[list[int]]:
        """Return the tokens of each response [B]."""
        return [ids[counts].tolist() for ids, counts in zip(self.response_ids, self.response_mask, strict=True)]


class Sampler(Protocol):
    """The interface of a sampler, which may use a different engine than training does.

    The weights change between two calls. A sampler that keeps a copy of them must load the current ones when it is
    called. `learning.learner.make_learner` chooses the samplers of a run.
    """

    def __call__(self, batch: PromptBatch, generation: GenerationConfig, rng_key: RandomKey) -> Samples:
        """Return a response to every prompt of a batch.

        Args:
            batch: The prompts.
            generation: Lengths, temperature, filters and stop strings.
            rng_key: Seeds each response, together with the row and the sample index of its prompt.
        """


@dataclass(frozen=True)
class SpecialTokens:
    """The token ids that end a response, and the id used for padding."""

    eos: tuple[int, ...]
    pad: int


def find_special_tokens(
    generation: GenerationConfig, model: LanguageModel, tokenizer: PreTrainedTokenizerBase
) -> SpecialTokens:
    """Return the end and padding ids that the config names, with defaults from the model and the tokenizer.

    Without end ids in the config, all end ids of the model's generation config and of the tokenizer are used.

    Raises:
        ConfigError: An id is outside the vocabulary.
    """
    given = generation.eos_token_id
    if given is None:
        configured = model.causal_lm.generation_config.eos_token_id if model.causal_lm.generation_config else None
        from_model = configured if isinstance(configured, list) else [configured]
        eos = tuple(dict.fromkeys(i for i in (*from_model, tokenizer.eos_token_id) if i is not None))
    else:
        eos = (given,) if isinstance(given, int) else given
    pad = next((i for i in (generation.pad_token_id, tokenizer.pad_token_id, *eos) if i is not None), 0)
    vocabulary = model.vocabulary_size
    for token in (*eos, pad):
        if not 0 <= token < vocabulary:
            raise ConfigError(f"GenerationConfig: token id {token} is outside the model's vocabulary of {vocabulary}.")
    return SpecialTokens(eos, pad)


def decode_responses(
    samples: Samples, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens, generation: GenerationConfig
) -> list[str]:
    """Return the text of each response [B] as it was sampled, without its end token and cut before a stop string."""
    return [_decode_response(ids, tokenizer, special.eos, generation) for ids in samples.token_ids()]


def _decode_response(
    ids: list[int], tokenizer: PreTrainedTokenizerBase, eos: tuple[int, ...], generation: GenerationConfig
) -> str:
    if ids and ids[-1] in eos:
        ids = ids[:-1]
    text = read_text(ids, tokenizer, generation.skip_special_tokens)
    ends = [text.find(string) for string in generation.stop or () if string in text]
    return text[: min(ends)] if ends else text
