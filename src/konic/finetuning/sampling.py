"""PromptBatch -> Samples: token by token with a key-value cache, from random numbers keyed by dataset row.

Shapes: B sequences, P prompt tokens, R response tokens, V vocabulary. A mask is True where a token counts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase, TopKLogitsWarper, TopPLogitsWarper

from konic.finetuning.config import GenerationConfig
from konic.finetuning.errors import ConfigError
from konic.finetuning.language_model import LanguageModel
from konic.finetuning.prompts import PromptBatch, position_ids


@dataclass(frozen=True)
class Samples:
    """What was sampled, and with which log-probs."""

    response_ids: Tensor
    """[B, R] int64, padded on the right."""
    response_mask: Tensor
    """[B, R] True on response tokens, the end-of-sequence token among them."""
    log_probs: Tensor
    """[B, R] log-probs of the tokens under softmax(logits / temperature), before any filter; 0 outside the mask."""
    ended: Tensor
    """[B] True where the response ended by itself: by an end-of-sequence token or a stop string."""
    texts: list[str]
    """The responses as text: without special tokens, cut before a stop string."""


@dataclass(frozen=True)
class RandomKey:
    """With a dataset row and a sample's index, determines every random number of a response."""

    seed: int
    iteration: int
    """From 1 in training; 0 is evaluation."""


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that end a response, and the one that fills padding."""

    eos: tuple[int, ...]
    pad: int


def special_tokens(
    generation: GenerationConfig, model: LanguageModel, tokenizer: PreTrainedTokenizerBase
) -> SpecialTokens:
    """The ids a config names, else all that the model's generation config and the tokenizer end with.

    Raises:
        ConfigError: An id outside the vocabulary.
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


def uniforms(key: RandomKey, row: int, sample: int, count: int) -> np.ndarray:
    """`count` float64 numbers in [0, 1) for the tokens of one response, of 52 bits each.

    They depend on (seed, iteration, row, sample, token) alone: Philox with the first two as its key, the row and
    sample in its counter, and the token as the step (Salmon et al. 2011).
    """
    bits = np.random.Philox(key=[key.seed, key.iteration], counter=[0, 0, sample, row]).random_raw(count)
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token per row [B] of softmax(logits [B, V]), by inverting the distribution function at uniform [B]."""
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(-1)


@torch.no_grad()
def sample(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: PromptBatch,
    generation: GenerationConfig,
    special: SpecialTokens,
    key: RandomKey,
) -> Samples:
    """Responses to a batch of prompts.

    Args:
        model: What to sample from.
        tokenizer: For stop strings and texts.
        batch: The prompts.
        generation: Lengths, temperature and filters.
        special: End and padding tokens.
        key: Where the random numbers come from, with each prompt's row and sample index.
    """
    num_rows, device = len(batch), batch.ids.device
    numbers = [
        uniforms(key, prompt.row, index, generation.max_new_tokens)
        for prompt, index in zip(batch.prompts, batch.sample_indices, strict=True)
    ]
    random = torch.from_numpy(np.stack(numbers)).to(device)
    eos = torch.tensor(special.eos, dtype=torch.int64, device=device)
    choose = _chooser(generation, eos, batch)
    cache = DynamicCache(config=model.causal_lm.config)
    mask, positions = batch.mask, position_ids(batch.mask)
    hidden = model.decode(batch.ids, mask, positions, cache)[:, -1]
    running = torch.ones(num_rows, dtype=torch.bool, device=device)
    ended = torch.zeros_like(running)
    tokens, masks, log_probs = [], [], []
    for step in range(generation.max_new_tokens):
        logits = model.logits(hidden)
        chosen = torch.where(running, choose(logits, step, random[:, step]), special.pad)
        scaled = logits / generation.temperature
        log_prob = scaled.gather(-1, chosen[:, None]).squeeze(-1) - scaled.logsumexp(dim=-1)
        tokens.append(chosen)
        masks.append(running)
        log_probs.append(torch.where(running, log_prob, 0.0))
        ended = ended | (running & torch.isin(chosen, eos))
        if generation.stop:
            ended = ended | (running & _hit_stop(tokens, masks, tokenizer, generation.stop))
        running = ~ended
        if not running.any() or step + 1 == generation.max_new_tokens:
            break
        mask = torch.cat([mask, running[:, None]], dim=1)
        positions = positions[:, -1:] + 1
        hidden = model.decode(chosen[:, None], mask, positions, cache)[:, -1]
    response_ids, response_mask = torch.stack(tokens, dim=1), torch.stack(masks, dim=1)
    texts = [
        _text(ids[counted].tolist(), tokenizer, special.eos, generation.stop)
        for ids, counted in zip(response_ids, response_mask, strict=True)
    ]
    return Samples(response_ids, response_mask, torch.stack(log_probs, dim=1), ended, texts)


def _chooser(generation: GenerationConfig, eos: Tensor, batch: PromptBatch) -> Callable[[Tensor, int, Tensor], Tensor]:
    """A function (logits [B, V], step, uniform [B]) -> tokens [B] that applies the config's filters in HF's order."""
    top_k = TopKLogitsWarper(generation.top_k) if generation.top_k else None
    top_p = TopPLogitsWarper(generation.top_p) if generation.top_p < 1 else None
    seen: Tensor | None = None

    def choose(logits: Tensor, step: int, uniform: Tensor) -> Tensor:
        nonlocal seen
        if generation.repetition_penalty != 1.0:
            if seen is None:
                seen = _prompt_tokens(batch, logits.shape[-1])
            penalty = generation.repetition_penalty
            logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if step + 1 < generation.min_new_tokens:
            logits = logits.index_fill(-1, eos, -torch.inf)
        logits = logits / generation.temperature
        for warp in (top_k, top_p):
            logits = logits if warp is None else warp(batch.ids, logits)
        chosen = draw(logits, uniform) if generation.do_sample else logits.argmax(dim=-1)
        if seen is not None:
            seen = seen.scatter(-1, chosen[:, None], True)
        return chosen

    return choose


def _prompt_tokens(batch: PromptBatch, vocabulary: int) -> Tensor:
    """[B, V] True on the tokens of each prompt, padding left out."""
    counts = torch.zeros(len(batch), vocabulary, dtype=torch.int64, device=batch.ids.device)
    return counts.scatter_add(1, batch.ids, batch.mask.long()) > 0


def _hit_stop(
    tokens: list[Tensor], masks: list[Tensor], tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]
) -> Tensor:
    """[B] True where the response so far holds a stop string."""
    ids, counted = torch.stack(tokens, dim=1), torch.stack(masks, dim=1)
    texts = [
        tokenizer.decode(row[keep].tolist(), skip_special_tokens=True) for row, keep in zip(ids, counted, strict=True)
    ]
    return torch.tensor([any(string in text for string in stop) for text in texts], device=ids.device)


def _text(
    ids: list[int], tokenizer: PreTrainedTokenizerBase, eos: tuple[int, ...], stop: tuple[str, ...] | None
) -> str:
    if ids and ids[-1] in eos:
        ids = ids[:-1]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    ends = [text.find(string) for string in stop or () if string in text]
    return text[: min(ends)] if ends else text
