"""Tokens -> last hidden states -> logits: a causal language model split at its last hidden state.

Shapes: B sequences, T tokens of prompt and response, R response tokens, H hidden size, V vocabulary.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from konic.finetuning.errors import ModelError
from konic.finetuning.models.length_groups import cost_of_a_pass
from konic.finetuning.models.positions import distinct_prompts, position_ids
from konic.finetuning.models.prepacked import DecodePlan, Prepacking, Product, is_worth_packing
from konic.finetuning.models.quantised import multiplies_in_16_bits
from konic.finetuning.models.wide_head import WideHead
from konic.finetuning.system.signals import uninterrupted


class LanguageModel:
    """A causal language model split at its last hidden state: :meth:`decode` computes it, :meth:`logits` reads it."""

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        self.causal_lm = causal_lm
        self.body = causal_lm.base_model
        if self.body is causal_lm:  # Llama 4 does not say where its body is
            self.body = getattr(causal_lm, "model", causal_lm)
        parameters = inspect.signature(self.body.forward).parameters
        names = ("cache", "past_key_values", "cache_params")  # the second until transformers 5.23; the third of Mamba
        self._cache_argument = next((name for name in names if name in parameters), "past_key_values")
        self.shares_prompts = True
        """False reads the prompt of every row: in layers that are computed twice, a cache would be filled twice."""
        self.in_step = False
        """True where processes exchange the weights of each layer, so that all have to make the same passes."""
        self.is_graphable = False
        """True if a decode step of its own forward pass can be replayed on a GPU as one graph, with equal results."""
        config = causal_lm.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._prepacked_head: Product | None = None
        self.decode_plan = DecodePlan()
        self.wide_head: WideHead | None = None
        """Computes the logits of a head in bfloat16; None leaves them to the head itself."""
        self.scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)

    @property
    def vocabulary_size(self) -> int:
        """V: the width of the head. It may be larger than the number of tokens in the tokenizer."""
        return self.causal_lm.get_output_embeddings().weight.shape[0]

    @property
    def in_16_bits(self) -> bool:
        """True if the model computes in 16 bits: rounding alone then moves log-probs further than in fp32."""
        return self.causal_lm.dtype.itemsize < 4 or multiplies_in_16_bits(self.causal_lm)

    @property
    def is_plain(self) -> bool:
        """True if the logits are a plain linear layer of the hidden states, without scaling or soft cap."""
        return type(self.causal_lm.get_output_embeddings()) is nn.Linear and self.scale == 1.0 and self.softcap is None

    @property
    def head_learns(self) -> bool:
        """True if the head, which turns hidden states into logits, is trained too."""
        return any(weight.requires_grad for weight in self.causal_lm.get_output_embeddings().parameters())

    def decode(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any = None) -> Tensor:
        """Return the last hidden states [B, T, H] of the given tokens.

        A cache holds the keys and values of the earlier tokens; this call appends those of the given tokens.

        Args:
            ids: [B, T].
            mask: [B, T' ≥ T] True on tokens that count. The tokens in the cache come first.
            positions: [B, T].
            cache: A `transformers` cache, or None.
        """
        if self._cache_argument == "cache_params":  # a model without attention reads the mask of these tokens only
            mask = mask[:, -ids.shape[1] :]
        output = self.body(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions,
            use_cache=cache is not None,
            **{self._cache_argument: cache},
        )
        dtype = self.causal_lm.get_output_embeddings().weight.dtype
        # the body of Mamba gives fp32, also to a head in 16 bits
        return output.last_hidden_state.to(dtype) if dtype.is_floating_point else output.last_hidden_state

    def response_hidden(self, ids: Tensor, mask: Tensor, num_response_tokens: int) -> Tensor:
        """Return the hidden states [B, R, H] from which each of the last R tokens is predicted.

        Columns that are padding in every row are not computed; on the right they are filled with 0. A prompt that
        several rows share is read once if that saves more tokens than one more pass costs (:func:`cost_of_a_pass`).
        """
        columns = mask.any(dim=0).nonzero().squeeze(-1)
        first, last = int(columns[0]), int(columns[-1])  # nothing is predicted from the last token
        length, unused = ids.shape[1] - num_response_tokens - first, ids.shape[1] - last - 1
        ids, mask = ids[:, first:last], mask[:, first:last]
        # padding is read as a token of the prompt: where its embedding is 0, some models have no gradient
        ids = torch.where(mask, ids, ids[:, length - 1 : length])
        positions = position_ids(mask)
        prompts, prompt_mask, prompt_of_row = distinct_prompts(ids[:, :length], mask[:, :length])
        cache = DynamicCache(config=self.causal_lm.config)
        one_pass = self.in_step or not self.shares_prompts
        can_share = not one_pass and all(type(layer) is DynamicLayer for layer in cache.layers)
        if not can_share or (len(ids) - len(prompts)) * length <= cost_of_a_pass(ids.device):
            hidden = self.decode(ids, mask, positions)[:, length - 1 :]
        else:
            hidden = self.decode(prompts, prompt_mask, position_ids(prompt_mask), cache)[:, -1:]
            hidden = hidden.index_select(0, prompt_of_row)
            if ids.shape[1] > length:
                cache.reorder_cache(prompt_of_row)
                after = self.decode(ids[:, length:], mask, positions[:, length:], cache)
                hidden = torch.cat([hidden, after], dim=1)
        return functional.pad(hidden, (0, 0, 0, unused))

    def empty_pass(self) -> Tensor:
        """Return 0 from a pass that this process makes for the others only; its gradient is 0 for every weight."""
        ids = self.probe_ids(1)[None]
        mask = torch.ones_like(ids, dtype=torch.bool)
        return 0.0 * self.logits(self.decode(ids, mask, position_ids(mask))).sum()

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] of hidden states [..., H], in fp32 or better."""
        rows, packed = hidden.reshape(-1, hidden.shape[-1]), self._prepacked_head
        if packed is not None and (self.wide_head is None or len(rows) <= packed.num_rows):
            logits = packed(rows.to(packed.dtype)).view(*hidden.shape[:-1], -1)
        elif self.wide_head is not None:
            logits = self.wide_head(hidden)
        else:
            logits = self.causal_lm.get_output_embeddings()(hidden)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def widen_head(self) -> bool:
        """From now on, form the logits of a plain, frozen head in bfloat16 as fp32 sums; return whether it is one.

        On a CPU that keeps a copy of the head's weights in fp32.
        """
        head = self.causal_lm.get_output_embeddings()
        if type(head) is nn.Linear and head.weight.dtype == torch.bfloat16 and not self.head_learns:
            self.wide_head = WideHead(head)
        return self.wide_head is not None

    @property
    def checkpointed_layers(self) -> list[nn.Module]:
        """The layers that :meth:`checkpointed` computes twice."""
        return [layer for layer in self.causal_lm.modules() if isinstance(layer, GradientCheckpointingLayer)]

    @property
    def outer_layers(self) -> list[nn.Module]:
        """Those of them that stand in no other one, in order."""
        layers = self.checkpointed_layers
        inside = {inner for layer in layers for inner in layer.modules() if inner is not layer}
        return [layer for layer in layers if layer not in inside]

    @contextmanager
    def checkpointed(self) -> Iterator[None]:
        """Keep only the input of each layer for the backward pass, which computes the layer again.

        The switch in `transformers` does the same, but only in train mode, which also enables dropout and the noise of
        routers.
        """
        layers, shares_prompts = self.checkpointed_layers, self.shares_prompts
        try:
            self.shares_prompts = False
            for layer in layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
            yield
        finally:
            with uninterrupted():
                for layer in layers:
                    vars(layer).pop("forward", None)
                self.shares_prompts = shares_prompts

    def prepacking(self, num_rows: int, num_tokens: int) -> Prepacking | None:
        """Return how the weights are packed to sample so many tokens in so many rows; None does not pack them."""
        if self.in_step or self.decode_plan.layout == "plain" or not is_worth_packing(self.causal_lm, num_tokens):
            return None
        return Prepacking(num_rows, self.decode_plan.layout)

    @contextmanager
    def prepacked_head(self, num_rows: int | None) -> Iterator[None]:
        """Make :meth:`logits` use a packed copy of a plain head inside the context; None changes nothing.

        The packed head has no gradient. A head packed for few rows also works for hundreds of rows, where a wide head
        is faster without.
        """
        head = self.causal_lm.get_output_embeddings()
        if num_rows is None or self._prepacked_head is not None or type(head) is not nn.Linear:
            yield
            return
        packing = Prepacking(num_rows)
        wide = self.wide_head
        self._prepacked_head = Product([head.weight], head.bias, packing) if wide is None else wide.packed(packing)
        try:
            yield
        finally:
            self._prepacked_head = None

    def probe_ids(self, count: int) -> Tensor:
        """Return token ids [count] to try the model on, spread evenly over its vocabulary.

        The first tokens of a vocabulary are often special ones that no text has in a row. In 16 bits, models compute
        them with errors as large as the result.
        """
        steps = torch.arange(count, device=self.causal_lm.device)
        return (2 * steps + 1) * self.causal_lm.config.get_text_config().vocab_size // (2 * count)

    def check_logits(self) -> None:
        """Raise ModelError if the model has no cache, or computes its logits differently from :meth:`logits`."""
        ids = self.probe_ids(8)[None]
        mask = torch.ones_like(ids, dtype=torch.bool)
        cache = DynamicCache(config=self.causal_lm.config)
        with torch.no_grad():
            self.decode(ids, mask, position_ids(mask), cache)
            if all(type(layer) is DynamicLayer for layer in cache.layers) and not cache.get_seq_length():
                raise ModelError(
                    f"{type(self.causal_lm).__name__} keeps no cache of the tokens it has read. Sampling needs "
                    "the cache to generate responses token by token. Use a model of another architecture."
                )
            truth = self.causal_lm(input_ids=ids, use_cache=False).logits.to(torch.float32)
            ours = self.logits(self.decode(ids, mask, position_ids(mask))).to(torch.float32)
        if not torch.allclose(ours, truth, atol=1e-2, rtol=1e-2):
            raise ModelError(
                f"{type(self.causal_lm).__name__} transforms its logits in a way that is not supported: they "
                f"differ by up to {(ours - truth).abs().max().item():.2g} from its head's output. Use a model of "
                "another architecture."
            )
