"""Tokens -> hidden states: decodes token by token with a key-value cache.

`GeneralDecoder` serves any model; a fused decoder serves models of the Llama and GPT-2 shapes.

Shapes: B rows, P prompt tokens, T tokens so far, H hidden size, V vocabulary. A mask is True where a token counts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from konic.finetuning.errors import ModelError
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.positions import position_ids
from konic.finetuning.models.prepacked import prepacked_layers, rows_to_prepack
from konic.finetuning.rollout.fused_decoder import FusedDecoder
from konic.finetuning.rollout.fused_transformer import fused_transformer
from konic.finetuning.rollout.graphed_decoder import GraphedDecoder
from konic.finetuning.system.memory import return_freed_memory


class Decoder(Protocol):
    """The interface through which sampling runs a model."""

    def prefill(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read the prompts [B, P], padded on the left; return the last hidden state [B, H] of each."""

    def step(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Read one more token of each row [B], and whether it counts [B]; return the hidden states [B, H].

        If a row's token does not count, the row's hidden states from this step on are meaningless.
        """

    def select(self, rows: Tensor) -> None:
        """Continue with these rows [n] of the current batch, in this order. A row may occur more than once."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [B, V] of hidden states [B, H], in fp32 or better."""


@contextmanager
def open_decoder(model: LanguageModel, num_rows: int, num_tokens: int) -> Iterator[Decoder]:
    """Yield the fastest decoder for a model, for at most `num_tokens` tokens in each of `num_rows` rows.

    While the decoder is open, some layers of the model may be replaced by layers that compute the same.
    """
    prepacked_rows = rows_to_prepack(model.causal_lm, num_rows, num_tokens)
    try:
        with model.prepacked_head(prepacked_rows):
            transformer = fused_transformer(model, prepacked_rows)
            if transformer is not None:
                kind = GraphedDecoder if model.causal_lm.device.type == "cuda" else FusedDecoder
                decoder = kind(model, transformer, num_tokens)
                del transformer
                try:
                    yield decoder
                finally:
                    decoder.close()
            else:
                with prepacked_layers(model.causal_lm, prepacked_rows):
                    yield GeneralDecoder(model)
    finally:
        if prepacked_rows is not None:
            return_freed_memory()


def require_decodable(model: LanguageModel, name: str) -> None:
    """Check that rows can leave the batch while a model decodes.

    Raises:
        ModelError: Some layers keep a running state instead of keys and values. No rows can be taken from it, and
            padding on the left of a prompt would change it.
    """
    layers = DynamicCache(config=model.causal_lm.config).layers
    other = next((type(layer).__name__ for layer in layers if not hasattr(layer, "batch_select_indices")), None)
    if other is not None:
        raise ModelError(
            f"base_model={name!r}: {model.causal_lm.config.model_type} models have layers that keep a running state "
            f"({other}), and konic cannot sample from these in batches. Use a model with attention in every layer, "
            "such as a Llama, Qwen3 or Gemma model."
        )


class GeneralDecoder:
    """Decodes any model with the model's own forward pass and the cache of `transformers`."""

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
