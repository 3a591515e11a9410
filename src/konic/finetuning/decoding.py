"""One token after another from a key-value cache: the general way for any model, a fused one for two shapes.

Shapes: B rows, P prompt tokens, T tokens so far, H hidden size, V vocabulary. A mask is True where a token counts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from konic.finetuning.allocator import return_freed_memory
from konic.finetuning.fused import Transformer, fused_transformer
from konic.finetuning.language_model import LanguageModel
from konic.finetuning.packing import packed_layers, rows_to_pack_for
from konic.finetuning.prompts import position_ids


class Decoder(Protocol):
    """What sampling asks of a model."""

    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Take the prompts [B, P], padded on the left; the last hidden state [B, H] of each."""

    def step(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Take one more token of each row [B], and whether it counts [B]; the hidden states [B, H].

        Those of a row whose token does not count mean nothing, nor do any that follow.
        """

    def select(self, rows: Tensor) -> None:
        """Go on with these rows [n] of the ones so far, in this order; a row may be named more than once."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, V] of hidden states [B, H], in fp32 or better."""


@contextmanager
def decoding(model: LanguageModel, num_rows: int, num_tokens: int) -> Iterator[Decoder]:
    """The fastest decoder there is for a model, for at most `num_tokens` tokens of `num_rows` rows.

    While it is open the model's layers may be others that compute the same.
    """
    packed_for = rows_to_pack_for(model.causal_lm, num_rows, num_tokens)
    try:
        with model.head_packed(packed_for):
            transformer = fused_transformer(model, packed_for)
            if transformer is not None:
                kind = GraphedDecoder if model.causal_lm.device.type == "cuda" else FusedDecoder
                decoder = kind(model, transformer, num_tokens)
                del transformer
                try:
                    yield decoder
                finally:
                    decoder.close()
            else:
                with packed_layers(model.causal_lm, packed_for):
                    yield GeneralDecoder(model)
    finally:
        if packed_for is not None:
            return_freed_memory()


class GeneralDecoder:
    """Any model: its own forward pass, and the cache of `transformers`."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.causal_lm.config)

    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        self._mask, positions = mask, position_ids(mask)
        self._position = positions[:, -1:]
        return self._model.decode(ids, mask, positions, self._cache)[:, -1]

    def step(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        self._mask = torch.cat([self._mask, counts[:, None]], dim=1)
        self._position = self._position + 1
        return self._model.decode(tokens[:, None], self._mask, self._position, self._cache)[:, -1]

    def select(self, rows: Tensor) -> None:
        """See :class:`Decoder`."""
        self._cache.batch_select_indices(rows)
        self._mask, self._position = self._mask[rows], self._position[rows]

    def logits(self, hidden: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        return self._model.logits(hidden)


class FusedDecoder:
    """A model of a known shape: its products packed and joined, its keys and values in one tensor."""

    def __init__(self, model: LanguageModel, transformer: Transformer, num_tokens: int) -> None:
        self._model, self._transformer, self._num_tokens = model, transformer, num_tokens

    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        num_rows, length = ids.shape
        total = length + self._num_tokens
        first = position_ids(mask)
        later = first[:, -1:] + torch.arange(1, self._num_tokens + 1, device=ids.device)
        self._positions = torch.cat([first, later], dim=1)
        self._cache = self._transformer.new_cache(num_rows, total)
        self._bias: Tensor | None = None
        causal: Tensor | None = None
        if not mask.all():
            seen = mask[:, None, None, :] & torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
            # a padding token sees itself: of nothing at all the softmax is not a number
            causal = seen | torch.eye(length, dtype=torch.bool, device=ids.device)
            self._bias = torch.zeros(num_rows, 1, 1, total, dtype=self._cache.dtype, device=ids.device)
            self._bias[:, 0, 0, :length].masked_fill_(~mask, -torch.inf)
        self._length = length
        return self._transformer(ids, self._positions[:, :length], self._cache, length, causal)[:, -1]

    def step(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        self._length = length = self._length + 1
        bias = None if self._bias is None else self._bias[..., :length]
        positions = self._positions[:, length - 1 : length]
        return self._transformer(tokens[:, None], positions, self._cache, length, bias)[:, -1]

    def select(self, rows: Tensor) -> None:
        """See :class:`Decoder`."""
        kept = self._transformer.new_cache(len(rows), self._cache.shape[-2])
        kept[..., : self._length, :] = self._cache[:, :, rows, :, : self._length]
        self._cache, self._positions = kept, self._positions[rows]
        self._bias = None if self._bias is None else self._bias[rows]

    def logits(self, hidden: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        return self._model.logits(hidden)

    def close(self) -> None:
        """Let go of the packed weights and the cache."""
        vars(self).clear()


class GraphedDecoder(FusedDecoder):
    """The fused step over tensors that never move, which a GPU replays as one graph instead of launching each kernel.

    Attention reads the whole cache; what is not written yet is hidden by the bias. Elsewhere than on a GPU the same
    step runs without a graph.
    """

    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        hidden = super().prefill(ids, mask)
        self._cache[..., self._length :, :] = 0.0  # what is hidden has to be a number
        self._is_set_up = False
        return hidden

    def step(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        self._length += 1
        if not self._is_set_up:
            self._set_up(tokens)
        else:
            self._tokens.copy_(tokens[:, None])
            self._position.add_(1)
            self._slot.add_(1)
            self._shown.index_fill_(-1, self._slot, 0.0)
        if self._graph is None:
            return self._run()
        self._graph.replay()
        return self._output

    def select(self, rows: Tensor) -> None:
        """See :class:`Decoder`."""
        super().select(rows)
        self._cache[..., self._length :, :] = 0.0
        self._is_set_up = False

    def _set_up(self, tokens: Tensor) -> None:
        """The tensors of a step, at the token to come, and its graph."""
        total, last = self._cache.shape[-2], self._length - 1
        self._tokens, self._position = tokens[:, None].clone(), self._positions[:, last : last + 1].clone()
        self._slot = torch.tensor([last], device=tokens.device)
        self._shown = self._cache.new_zeros(len(tokens), 1, 1, total)
        if self._bias is not None:
            self._shown.copy_(self._bias)
        self._shown[..., self._length :] = -torch.inf
        self._is_set_up = True
        self._graph: torch.cuda.CUDAGraph | None = None
        if tokens.device.type == "cuda":
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._run()  # what kernels prepare at their first launch must not be recorded
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = self._run()

    def _run(self) -> Tensor:
        total = self._cache.shape[-2]
        return self._transformer(self._tokens, self._position, self._cache, total, self._shown, self._slot)[:, -1]
