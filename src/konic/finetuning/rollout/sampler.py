"""PromptBatch -> Samples: the interface of every sampler, for any engine, and the tensors it returns.

Shapes: B sequences, R response tokens, H hidden size. A mask is True where a token counts.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from konic.finetuning.config import GenerationConfig
from konic.finetuning.data.decoding import read_response
from konic.finetuning.data.tokenization import PromptBatch
from konic.finetuning.errors import ConfigError, ModelError
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
    called. `learning.learner.make_learner` chooses the samplers of a run, and `Session.sampler` that of its training.
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
        ConfigError: An id of the config is outside the vocabulary.
        ModelError: One of the model or its tokenizer is.
    """
    given, of_model = generation.eos_token_id, model.causal_lm.generation_config
    ends: list[tuple[Any, str]]
    if given is not None:
        ends = [(token, "") for token in ((given,) if isinstance(given, int) else given)]
    else:
        configured = of_model.eos_token_id if of_model else None
        from_model = configured if isinstance(configured, list) else [configured]
        ends = [*((token, "generation_config.json") for token in from_model), (tokenizer.eos_token_id, "tokenizer")]
    pads = [(generation.pad_token_id, ""), (tokenizer.pad_token_id, "tokenizer")]
    ends, pads = ([(token, file) for token, file in found if token is not None] for found in (ends, pads))
    for name, found in (("eos_token_id", ends), ("pad_token_id", pads[:1])):
        for token, file in found:
            _require_in_vocabulary(name, token, file, model.vocabulary_size)
    eos = tuple(dict.fromkeys(token for token, _ in ends))
    return SpecialTokens(eos, pads[0][0] if pads else next(iter(eos), 0))


def _require_in_vocabulary(name: str, token: Any, file: str, vocabulary: int) -> None:
    """Raise an error for a token id that the model does not have; it comes from a file of the model, or the config."""
    if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocabulary:
        return
    outside = f"is outside the model's vocabulary of {vocabulary}"
    if not file:
        raise ConfigError(f"GenerationConfig: {name}: token id {token!r} {outside}.")
    raise ModelError(
        f"base_model: {name}: the token id {token!r} of its {file} {outside}. Set GenerationConfig({name}=...)."
    )


def require_known_tokens(batch: PromptBatch, causal_lm: Any) -> None:
    """Raise ModelError if the tokenizer made a token of a prompt that the model does not have."""
    largest, vocabulary = int(batch.ids.max()), causal_lm.get_input_embeddings().weight.shape[0]
    if largest >= vocabulary:
        row = batch.prompts[int(batch.ids.max(dim=1).values.argmax())].row
        raise ModelError(
            f"base_model: its tokenizer makes the token id {largest} of dataset row {row}, outside the model's "
            f"vocabulary of {vocabulary}. Use the model with its own tokenizer."
        )


def decode_responses(
    samples: Samples, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens, generation: GenerationConfig
) -> list[str]:
    """Return the text of each response [B] as it was sampled, without its end token and cut before a stop string."""
    return [decode_response(ids, tokenizer, special, generation) for ids in samples.token_ids()]


def decode_response(
    ids: list[int], tokenizer: PreTrainedTokenizerBase, special: SpecialTokens, generation: GenerationConfig
) -> str:
    """Return the text of the tokens of one response, without its end token and cut before a stop string."""
    if ids and ids[-1] in special.eos:
        ids = ids[:-1]
    text = read_response(ids, tokenizer, generation.skip_special_tokens)
    ends = [text.find(string) for string in generation.stop or () if string in text]
    return text[: min(ends)] if ends else text
