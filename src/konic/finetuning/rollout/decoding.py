"""Tokens -> hidden states: decodes token by token with a key-value cache.

`GeneralDecoder` serves any model, and `StaticDecoder` most of them on a GPU; a fused decoder serves models of the Llama
and GPT-2 shapes.

Shapes: B rows, P prompt tokens, T tokens so far, H hidden size, V vocabulary. A mask is True where a token counts.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from konic.finetuning.errors import ModelError, safe_cause
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.positions import position_ids
from konic.finetuning.models.prepacked import prepacked_layers, threads_of
from konic.finetuning.rollout.fused_decoder import FusedDecoder
from konic.finetuning.rollout.fused_transformer import can_be_fused, fused_transformer
from konic.finetuning.rollout.graphed_decoder import GraphedDecoder
from konic.finetuning.rollout.static_decoder import StaticDecoder
from konic.finetuning.system.memory import eager_free, return_freed_memory
from konic.text import describe_error

MAX_DIFFERENCE = 1e-3
"""Largest difference of a row's logits in a batch and alone, relative to their spread; rounding is below 1 % of it."""
MAX_DIFFERENCE_IN_16_BITS = 0.2
"""The same for products in 16 bits, where rounding alone gives some hundredths."""


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


Way = Literal["fused", "replayed", "plain"]
"""How a model decodes: in its fused form, by its own forward pass replayed as one graph, or by that pass as it is."""


def way_to_decode(model: LanguageModel) -> Way:
    """Return the fastest way to decode a model for which :func:`require_decodable` has been called."""
    if not model.in_step and can_be_fused(model):
        return "fused"
    return "replayed" if model.is_graphable else "plain"


@contextmanager
def open_decoder(model: LanguageModel, num_rows: int, num_tokens: int) -> Iterator[Decoder]:
    """Yield the fastest decoder for a model, for at most `num_tokens` tokens in each of `num_rows` rows.

    While the decoder is open, some layers of the model may be replaced by layers that compute the same.
    """
    prepacking, way = model.prepacking(num_rows, num_tokens), way_to_decode(model)
    with threads_of(model.decode_plan), ExitStack() as opened:
        if prepacking is not None:
            return_freed_memory()  # what an update has freed would stand beside the packed weights
            opened.callback(return_freed_memory)
        decoder: GeneralDecoder | FusedDecoder | StaticDecoder
        with eager_free(prepacking is not None):  # a packed weight would leave gaps behind
            opened.enter_context(model.prepacked_head(prepacking.num_rows if prepacking else None))
            if way == "plain":
                opened.enter_context(prepacked_layers(model.causal_lm, prepacking))
                decoder = GeneralDecoder(model)
            elif way == "fused":
                kind = GraphedDecoder if model.causal_lm.device.type == "cuda" else FusedDecoder
                decoder = kind(model, fused_transformer(model, prepacking), num_tokens)
                opened.callback(decoder.close)
            else:
                decoder = StaticDecoder(model, num_tokens)
                opened.callback(decoder.close)
        yield decoder


def require_decodable(model: LanguageModel, name: str) -> None:
    """Check that a row has the same logits in a batch, token by token, as in a forward pass of its own.

    Raises:
        ModelError: The model computes a row differently beside others or token by token, or cannot be run.
    """
    start = f"base_model={name!r}: {model.causal_lm.config.model_type} models"
    is_quantised = getattr(model.causal_lm, "is_quantized", False)
    advice = "Use a model of another architecture, such as a Llama, Qwen3 or Gemma model."
    try:
        if any(_limits_time_steps(module) for module in model.causal_lm.modules()):
            raise ModelError(
                f"{start} limit the time steps of their Mamba layers in a forward pass, and not where they decode "
                f"token by token, so the model that samples would not be the one that is trained. {advice}"
            )
        model.check_logits()
        limit = MAX_DIFFERENCE_IN_16_BITS if model.in_16_bits else MAX_DIFFERENCE
        difference = _difference_in_a_batch(model)
        if difference <= limit and _may_be_graphable(model):
            _try_graph(model, limit)
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(
            f"{start} cannot be run with the cache and the positions that konic passes to them: "
            f"{describe_error(error)}. {advice}"
        ) from safe_cause(error)
    if is_quantised:
        start += " with these quantised weights"
        advice = "Leave quantization_config out of model_kwargs, or use the 4 bits of bitsandbytes."
    if not difference <= limit:
        raise ModelError(
            f"{start} compute a row of a padded batch differently from the row alone: the logits differ by "
            f"{difference:.2g} of their spread. {advice}"
        )


def _limits_time_steps(layer: nn.Module) -> bool:
    """Return True for a layer of Mamba with limits that `transformers` leaves out when it decodes (as of 5.23)."""
    lowest, highest = getattr(layer, "time_step_limit", None) or (0.0, math.inf)
    return lowest > 0 or highest < math.inf


def _may_be_graphable(model: LanguageModel) -> bool:
    """Return True if a graph is worth a try: on a GPU, for a model that `transformers` compiles as one graph."""
    on_gpu, whole = model.causal_lm.device.type == "cuda", getattr(model.causal_lm, "_can_compile_fullgraph", False)
    return on_gpu and whole and not model.in_step and not can_be_fused(model)


def _try_graph(model: LanguageModel, limit: float) -> None:
    """Set `model.is_graphable` if steps replayed as one graph give the logits of a forward pass."""
    model.is_graphable = True
    try:
        is_right = _difference_in_a_batch(model, num_steps=6) <= limit
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # whatever stands against it, the general decoder serves the model too
        is_right = False
    model.is_graphable = model.is_graphable and is_right


@torch.no_grad()
def _difference_in_a_batch(model: LanguageModel, num_steps: int = 1) -> float:
    """Return how far logits after two short texts decoded in one batch are from those of a forward pass of each alone.

    The difference is relative to the spread of the logits. The last `num_steps` tokens are read one by one.
    """
    device, length = model.causal_lm.device, 8
    ids = model.probe_ids(3 * (length + num_steps)).view(3, length + num_steps)
    lengths = torch.tensor([8, 8, 3], device=device)
    mask = torch.arange(length, device=device) >= length - lengths[:, None]
    rows = torch.tensor([2, 0], device=device)  # the second row leaves the batch
    with open_decoder(model, len(ids), num_steps) as decoder:
        decoder.prefill(ids[:, :length], mask)
        decoder.select(rows)
        counts = torch.ones(2, dtype=torch.bool, device=device)
        for step in range(num_steps):
            hidden = decoder.step(ids[rows, length + step], counts)
        ours = decoder.logits(hidden).float()
    alone = [
        model.causal_lm(input_ids=ids[row : row + 1, length - lengths[row] :], use_cache=False).logits for row in rows
    ]
    truth = torch.cat([logits[:, -1] for logits in alone]).float()
    return ((ours - truth).norm() / (truth - truth.mean()).norm()).item()


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
        self._cache.reorder_cache(rows)  # unlike batch_select_indices, it also knows the state of a linear attention
        self._mask, self._position = self._mask[rows], self._position[rows]

    def logits(self, hidden: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        return self._model.logits(hidden)
