"""Tokens -> hidden states: decodes any model on tensors that never move, so that a GPU can replay a step as one graph.

A small model keeps a GPU waiting for Python, which launches the kernels of each step one by one. A CUDA graph launches
them all at once. The forward pass is the model's own, with the cache of `transformers` that is made for
`torch.compile`. Whether a model can be run so is tried when it is loaded (`decoding.require_decodable`).

Shapes: B rows, P prompt tokens, T tokens of the longest possible row.
"""

from torch import Tensor
from torch.nn import functional
from transformers import Cache, PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.positions import position_ids
from konic.finetuning.rollout.graphed_decoder import Replayed

_KINDS = (StaticLayer, StaticSlidingWindowLayer)


def static_cache(config: PreTrainedConfig, num_tokens: int) -> Cache | None:
    """Return a cache whose layers keep room for all tokens, or None if the model has other kinds of layers.

    Layers that see only a window of tokens keep all of them too, and the mask hides those that are outside: where the
    keys of a full window are moved by one place in every step, no graph of the step could be replayed.
    """
    cache = StaticCache(config=config, max_cache_len=num_tokens)
    if not all(type(layer) in _KINDS for layer in cache.layers):
        return None
    is_sliding = [layer.is_sliding for layer in cache.layers]
    cache.layers = [StaticLayer(max_cache_len=num_tokens) for _ in is_sliding]
    for layer, slides in zip(cache.layers, is_sliding, strict=True):
        layer.is_sliding = slides  # by this, masks find the layers of their kind
    return cache


class StaticDecoder:
    """Decodes with the model's own forward pass; see :class:`konic.finetuning.rollout.decoding.Decoder`."""

    def __init__(self, model: LanguageModel, num_tokens: int) -> None:
        self._model, self._num_tokens = model, num_tokens

    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See :class:`konic.finetuning.rollout.decoding.Decoder`."""
        self._length = ids.shape[1]
        total = self._length + self._num_tokens
        cache = static_cache(self._model.causal_lm.config, total)
        if cache is None:
            raise NotImplementedError("layers of this kind have no cache of a fixed size")
        positions = position_ids(mask)
        self._cache = cache
        self._mask = functional.pad(mask, (0, self._num_tokens))
        self._tokens, self._position = ids[:, -1:].clone(), positions[:, -1:].clone()
        self._next = Replayed(self._run, ids.device)
        return self._model.decode(ids, self._mask, positions, cache)[:, -1]

    def step(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """See :class:`konic.finetuning.rollout.decoding.Decoder`."""
        self._tokens.copy_(tokens[:, None])
        self._position.add_(1)
        self._mask[:, self._length] = counts
        self._length += 1
        hidden = self._next()
        if self._next.cannot_record:
            self._model.is_graphable = False
        return hidden

    def select(self, rows: Tensor) -> None:
        """See :class:`konic.finetuning.rollout.decoding.Decoder`."""
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self._mask, self._position, self._tokens = self._mask[rows], self._position[rows], self._tokens[rows]
        self._next = Replayed(self._run, rows.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """See :class:`konic.finetuning.rollout.decoding.Decoder`."""
        return self._model.logits(hidden)

    def close(self) -> None:
        """Release the cache and the graph."""
        vars(self).clear()

    def _run(self) -> Tensor:
        return self._model.decode(self._tokens, self._mask, self._position, self._cache)[:, -1]
