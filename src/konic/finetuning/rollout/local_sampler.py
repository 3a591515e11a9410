"""PromptBatch -> Samples: samples token by token with a key-value cache and random numbers keyed by dataset row.

Why the draw is written by hand: `torch.multinomial`, which `transformers` generate uses, takes the random numbers of a
whole batch from one generator, so a response would depend on the other rows of its batch. `draw` inverts the
cumulative distribution at a number that depends only on (seed, iteration, row, sample, token).
Other rows of the batch change a draw only where they change the rounding of its logits.

Shapes: B sequences, P prompt tokens, R response tokens, V vocabulary. A mask is True where a token counts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TopKLogitsWarper, TopPLogitsWarper

from konic.finetuning.config import GenerationConfig
from konic.finetuning.data.decoding import read_response
from konic.finetuning.data.tokenization import PromptBatch
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.policy import Policy
from konic.finetuning.models.positions import distinct_prompts
from konic.finetuning.rollout.decoding import open_decoder
from konic.finetuning.rollout.sampler import RandomKey, Samples, SpecialTokens, require_known_tokens

MAX_SHARE_TO_SHRINK = 0.75
"""Ended rows leave the batch if at most this share of it still runs. Leaving copies the cache of the other rows."""
LOOK_EVERY = {"cpu": 1, "cuda": 16}
"""Tokens between two checks of which rows have ended, by device type. A check makes the host wait for the device."""


def uniforms(rng_key: RandomKey, row: int, sample: int, count: int) -> np.ndarray:
    """Return `count` float64 numbers in [0, 1), of 52 bits each, for the tokens of one response.

    The numbers depend only on (seed, iteration, row, sample, token). The generator is Philox (Salmon et al. 2011): seed
    and iteration are the key, row and sample are in the counter, and the token is the step.
    """
    bits = np.random.Philox(key=[rng_key.seed, rng_key.iteration], counter=[0, 0, sample, row]).random_raw(count)
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token per row [B] of softmax(logits [B, V]), by inverting the cumulative distribution at uniform [B]."""
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
    return tokens.clamp(max=logits.shape[-1] - 1)  # past the end if the product is rounded up or logits are NaN


@dataclass(frozen=True)
class LocalSampler:
    """A :class:`Sampler` that runs the policy's own weights, or those of its reference, and returns hidden states."""

    policy: Policy
    special: SpecialTokens
    from_reference: bool = False
    on_tokens: Callable[[Mapping[int, int]], None] | None = None
    """Called after each step with the new token of every row of the batch that still runs, for those who read along."""

    def __call__(self, batch: PromptBatch, generation: GenerationConfig, rng_key: RandomKey) -> Samples:
        """Return a response to every prompt; see :class:`Sampler`.

        Raises:
            ModelError: A prompt holds a token that the model does not have.
        """
        require_known_tokens(batch, self.policy.language_model.causal_lm)
        with self.policy.merged_adapter(self.from_reference) as model:
            return sample(
                model, self.policy.tokenizer, batch, generation, self.special, rng_key, self.on_tokens,
                self.policy.sharding.most,
            )  # fmt: skip


@torch.no_grad()
def sample(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: PromptBatch,
    generation: GenerationConfig,
    special: SpecialTokens,
    rng_key: RandomKey,
    on_tokens: Callable[[Mapping[int, int]], None] | None = None,
    most_running: Callable[[int], int] = int,
) -> Samples:
    """Return a response to every prompt of a batch.

    Args:
        model: The model to sample from.
        tokenizer: For stop strings.
        batch: The prompts.
        generation: Lengths, temperature and filters.
        special: End and padding tokens.
        rng_key: Determines the random numbers, together with each prompt's row and sample index.
        on_tokens: See :class:`LocalSampler`.
        most_running: From the number of rows that still run here to that of the process in which most run, where all
            have to make the same passes: one that is done goes on with a row that does not count.
    """
    num_rows, device = len(batch), batch.ids.device
    numbers = [
        uniforms(rng_key, prompt.row, index, generation.max_new_tokens)
        for prompt, index in zip(batch.prompts, batch.sample_indices, strict=True)
    ]
    random = torch.from_numpy(np.stack(numbers)).to(device)
    eos = torch.tensor(special.eos, dtype=torch.int64, device=device)
    choose = _chooser(generation, eos, batch)
    with open_decoder(model, num_rows, generation.max_new_tokens) as decoder:
        prompts, prompt_mask, prompt_of_row = distinct_prompts(batch.ids, batch.mask)
        hidden = decoder.prefill(prompts, prompt_mask)
        if len(prompts) < num_rows:
            decoder.select(prompt_of_row)
            hidden = hidden[prompt_of_row]
        responses = _Responses(num_rows, generation.max_new_tokens, hidden, special.pad)
        rows = torch.arange(num_rows, device=device)  # the rows that are still in the decoder
        running = torch.ones(num_rows, dtype=torch.bool, device=device)
        for step in range(generation.max_new_tokens):
            logits = decoder.logits(hidden)
            chosen = torch.where(running, choose(logits, step, random[rows, step], rows), special.pad)
            responses.add(step, rows, running, chosen, logits / generation.temperature, hidden)
            done = torch.isin(chosen, eos)
            if generation.stop:
                done = done | responses.hit_stop(step, rows, tokenizer, generation)
            responses.ended[rows] |= running & done
            if on_tokens is not None:
                on_tokens(dict(zip(rows[running].tolist(), chosen[running].tolist(), strict=True)))
            running = running & ~done
            if step + 1 == generation.max_new_tokens:
                break
            checks_now = (step + 1) % LOOK_EVERY.get(device.type, 1) == 0
            num_running = int(running.sum()) if checks_now else len(rows)
            if most_running(num_running) == 0:
                break
            num_kept = max(num_running, 1)
            if num_kept <= MAX_SHARE_TO_SHRINK * len(rows):
                remaining = running.int().argsort(descending=True, stable=True)[:num_kept]
                decoder.select(remaining)
                rows, chosen, running = rows[remaining], chosen[remaining], running[remaining]
            hidden = decoder.step(chosen, running)
    return responses.samples()


class _Responses:
    """The responses of all rows so far, in tensors of full length."""

    def __init__(self, num_rows: int, num_tokens: int, hidden: Tensor, pad: int) -> None:
        shape, device = (num_rows, num_tokens), hidden.device
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self._ids = torch.full(shape, pad, device=device)
        self._mask = torch.zeros(shape, dtype=torch.bool, device=device)
        self._log_probs = torch.zeros(shape, dtype=wide, device=device)
        self._hidden = hidden.new_zeros(*shape, hidden.shape[-1])
        self.ended = torch.zeros(num_rows, dtype=torch.bool, device=device)

    def add(
        self, step: int, rows: Tensor, running: Tensor, chosen: Tensor, scaled_logits: Tensor, hidden: Tensor
    ) -> None:
        """Write one token for some rows [n], with its log-prob and the hidden state [n, H] it was drawn from."""
        log_prob = scaled_logits.gather(-1, chosen[:, None]).squeeze(-1) - scaled_logits.logsumexp(dim=-1)
        self._ids[rows, step], self._mask[rows, step] = chosen, running
        self._log_probs[rows, step] = torch.where(running, log_prob, 0.0)
        self._hidden[rows, step] = torch.where(running[:, None], hidden, 0.0)

    def hit_stop(
        self, step: int, rows: Tensor, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig
    ) -> Tensor:
        """Return True [n] where the response of a row so far contains a stop string."""
        ids, mask = self._ids[rows, : step + 1], self._mask[rows, : step + 1]
        texts = [
            read_response(row[keep].tolist(), tokenizer, generation.skip_special_tokens)
            for row, keep in zip(ids, mask, strict=True)
        ]
        stop = generation.stop or ()
        return torch.tensor([any(string in text for string in stop) for text in texts], device=ids.device)

    def samples(self) -> Samples:
        """Return all responses, in tensors as long as the longest response."""
        used = int(self._mask.any(dim=0).sum())
        return Samples(
            response_ids=self._ids[:, :used],
            response_mask=self._mask[:, :used],
            log_probs=self._log_probs[:, :used],
            ended=self.ended,
            hidden=self._hidden[:, :used],
        )


def _chooser(
    generation: GenerationConfig, eos: Tensor, batch: PromptBatch
) -> Callable[[Tensor, int, Tensor, Tensor], Tensor]:
    """Return a function (logits [n, V], step, uniform [n], rows [n] of the batch) -> tokens [n].

    The function applies the config's filters in the order of `transformers`.
    """
    top_k = TopKLogitsWarper(generation.top_k) if generation.top_k else None
    top_p = TopPLogitsWarper(generation.top_p) if generation.top_p < 1 else None
    seen: Tensor | None = None

    def choose(logits: Tensor, step: int, uniform: Tensor, rows: Tensor) -> Tensor:
        nonlocal seen
        if generation.repetition_penalty != 1.0:
            if seen is None:
                seen = _prompt_tokens(batch, logits.shape[-1])
            penalty = generation.repetition_penalty
            logits = torch.where(seen[rows], torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if step + 1 < generation.min_new_tokens:
            logits = logits.index_fill(-1, eos, -torch.inf)
        logits = logits / generation.temperature
        for warp in (top_k, top_p):
            logits = logits if warp is None else warp(batch.ids, logits)
        chosen = draw(logits, uniform) if generation.do_sample else logits.argmax(dim=-1)
        if seen is not None:
            seen[rows, chosen] = True
        return chosen

    return choose


def _prompt_tokens(batch: PromptBatch, vocabulary: int) -> Tensor:
    """Return a mask [B, V] that is True on the tokens of each prompt, without padding."""
    counts = torch.zeros(len(batch), vocabulary, dtype=torch.int64, device=batch.ids.device)
    return counts.scatter_add(1, batch.ids, batch.mask.long()) > 0
