"""A config of `transformers` -> a cache with room: a new token is written into place.

Why by hand: a layer of `DynamicCache` copies the keys and values of all tokens to append one, and a `StaticCache` is
attended to in its full length. Here a layer gives the tokens so far, as views of larger tensors.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64
"""Tokens for which there is room at a time."""


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, [B, K, T, D]; the values are those of a DynamicLayer."""

    def __init__(self, *options: Any, **named: Any) -> None:
        super().__init__(*options, **named)
        self._whole: list[Tensor] = []
        self._given: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens; return those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, new = self.get_seq_length(), (key_states, value_states)
        length = start + key_states.shape[-2]
        is_ours = bool(self._given) and self.keys is self._given[0] and self.values is self._given[1]
        if not is_ours or length > self._whole[0].shape[-2]:  # at first, and once other rows were selected
            self._whole = [part.new_empty(*part.shape[:2], length + ROOM, part.shape[-1]) for part in new]
            if start:
                for whole, before in zip(self._whole, (self.keys, self.values), strict=True):
                    whole[:, :, :start] = before
        for whole, part in zip(self._whole, new, strict=True):
            whole[:, :, start:length] = part
        self.keys, self.values = self._given = self._whole[0][:, :, :length], self._whole[1][:, :, :length]
        return self._given[0], self._given[1]


def roomy_cache(config: Any) -> DynamicCache:
    """Return a cache for a model; layers of another kind than DynamicLayer, such as those with a window, stay."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
