"""Tokens -> hidden states: decodes a model of a known shape, with all keys and values in one tensor.

Why by hand: of the caches in `transformers`, `DynamicCache` copies all keys and values of a layer to append one token,
and with `StaticCache` every step attends to the full length of the cache. Here a step writes its keys and values into
place and attends only to the tokens so far. Together with the joined products of `fused_transformer.py`, a decode step
takes 27 ms instead of 34 ms (docs/speed.md: SmolLM2-135M, 8 rows, two CPU cores).

Shapes: B rows, P prompt tokens, T tokens so far.
"""

import torch
from torch import Tensor

from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.positions import position_ids
from konic.finetuning.rollout.fused_transformer import Transformer


class FusedDecoder:
    """Decodes a model of a known shape, with packed and joined products and with keys and values in one tensor."""

    multiple = 1
    """The cache has room for a multiple of so many tokens."""

    def __init__(self, model: LanguageModel, transformer: Transformer, num_tokens: int) -> None:
        self._model, self._transformer, self._num_tokens = model, transformer, num_tokens

    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        num_rows, length = ids.shape
        total = -(-(length + self._num_tokens) // self.multiple) * self.multiple
        first = position_ids(mask)
        later = first[:, -1:] + torch.arange(1, self._num_tokens + 1, device=ids.device)
        self._positions = torch.cat([first, later], dim=1)
        self._cache = self._transformer.new_cache(num_rows, total)
        self._bias: Tensor | None = None
        causal: Tensor | None = None
        if not mask.all():
            seen = mask[:, None, None, :] & torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
            # a padding token attends to itself, because a softmax over no tokens is NaN
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
        """Release the packed weights and the cache."""
        vars(self).clear()
