"""A causal language model taken apart at its last hidden state, and what its tokens are worth.

Shapes: B sequences, T tokens of prompt and response, R response tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from konic.finetuning.errors import ModelError
from konic.finetuning.grouping import COST_OF_A_PASS
from konic.finetuning.losses import entropies, exact_kl, log_softmax_, token_log_probs
from konic.finetuning.packing import Product
from konic.finetuning.prompts import distinct_prompts, position_ids

MAX_LOGITS = 2**23
"""Logits in one tensor when tokens are scored, whatever the batch: 32 MB in fp32, which glibc frees at once."""
MAX_KEPT_LOGITS = 2**26
"""Logits kept for the backward pass where the head learns: 256 MB in fp32; beyond them they are computed twice."""


@dataclass(frozen=True)
class TokenScores:
    """What tokens are worth. Tensors are [B, R], 0 outside the mask."""

    log_probs: Tensor
    entropy: Tensor | None
    """Nats; None unless asked for."""
    kl: Tensor | None
    """Exact KL from the reference, nats; None without one."""


class LanguageModel:
    """A causal language model taken apart at its last hidden state."""

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        self.causal_lm = causal_lm
        config = causal_lm.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._packed_head: Product | None = None
        self.scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)

    @property
    def vocabulary_size(self) -> int:
        """V: the width of the head, which may be above the tokenizer's count."""
        return self.causal_lm.get_output_embeddings().weight.shape[0]

    @property
    def is_plain(self) -> bool:
        """True where logits are a plain layer of the hidden states and nothing more."""
        return type(self.causal_lm.get_output_embeddings()) is nn.Linear and self.scale == 1.0 and self.softcap is None

    @property
    def head_learns(self) -> bool:
        """True where the weights that make logits of hidden states are trained too."""
        return any(weight.requires_grad for weight in self.causal_lm.get_output_embeddings().parameters())

    def decode(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any = None) -> Tensor:
        """Last hidden states [B, T, H] of the given tokens; a cache holds the keys of those before and takes theirs.

        Args:
            ids: [B, T].
            mask: [B, T' ≥ T] True on tokens that count, those in the cache first.
            positions: [B, T].
            cache: A `transformers` cache, or None.
        """
        output = self.causal_lm.base_model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state

    def response_hidden(self, ids: Tensor, mask: Tensor, num_response_tokens: int) -> Tensor:
        """The hidden states [B, R, H] from which each of the last R tokens is predicted.

        What is padding in every row is not computed; on the right it is 0. A prompt of several rows is read once
        where that saves more tokens than one more pass costs.
        """
        columns = mask.any(dim=0).nonzero().squeeze(-1)
        first, last = int(columns[0]), int(columns[-1])  # nothing is predicted from the last token
        length, unused = ids.shape[1] - num_response_tokens - first, ids.shape[1] - last - 1
        ids, mask = ids[:, first:last], mask[:, first:last]
        positions = position_ids(mask)
        prompts, prompt_mask, of_rows = distinct_prompts(ids[:, :length], mask[:, :length])
        cache = DynamicCache(config=self.causal_lm.config)
        can_share = not self.causal_lm.training and all(type(layer) is DynamicLayer for layer in cache.layers)
        if not can_share or (len(ids) - len(prompts)) * length <= COST_OF_A_PASS:
            hidden = self.decode(ids, mask, positions)[:, length - 1 :]
        else:
            hidden = self.decode(prompts, prompt_mask, position_ids(prompt_mask), cache)[:, -1:]
            hidden = hidden.index_select(0, of_rows)
            if ids.shape[1] > length:
                cache.reorder_cache(of_rows)
                after = self.decode(ids[:, length:], mask, positions[:, length:], cache)
                hidden = torch.cat([hidden, after], dim=1)
        return functional.pad(hidden, (0, 0, 0, unused))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., H], in fp32 or better."""
        if self._packed_head is None:
            logits = self.causal_lm.get_output_embeddings()(hidden)
        else:
            logits = self._packed_head(hidden.reshape(-1, hidden.shape[-1])).view(*hidden.shape[:-1], -1)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    @contextmanager
    def head_packed(self, num_rows: int | None) -> Iterator[None]:
        """Within it :meth:`logits` takes a packed copy of a plain head, without gradient; with None it does not.

        One packed for few rows serves hundreds as well.
        """
        head, is_packed = self.causal_lm.get_output_embeddings(), self._packed_head is not None
        if num_rows is None or is_packed or type(head) is not nn.Linear:
            yield
            return
        self._packed_head = Product(head.weight, head.bias, num_rows)
        try:
            yield
        finally:
            self._packed_head = None

    def check_logits(self) -> None:
        """Raise ModelError where a model has no cache, or makes logits in a way :meth:`logits` does not know."""
        ids = torch.arange(8, device=self.causal_lm.device)[None] % self.causal_lm.config.get_text_config().vocab_size
        mask = torch.ones_like(ids, dtype=torch.bool)
        cache = DynamicCache(config=self.causal_lm.config)
        with torch.no_grad():
            self.decode(ids, mask, position_ids(mask), cache)
            if all(type(layer) is DynamicLayer for layer in cache.layers) and not cache.get_seq_length():
                raise ModelError(
                    f"{type(self.causal_lm).__name__} keeps no cache of the tokens it has read, from which responses "
                    "are sampled one token after another. Use a model of another architecture."
                )
            truth = self.causal_lm(input_ids=ids, use_cache=False).logits.to(torch.float32)
            ours = self.logits(self.decode(ids, mask, position_ids(mask))).to(torch.float32)
        if not torch.allclose(ours, truth, atol=1e-2, rtol=1e-2):
            raise ModelError(
                f"{type(self.causal_lm).__name__} transforms its logits in a way that is not supported here: they "
                f"differ by up to {(ours - truth).abs().max().item():.2g} from its head's output."
            )


def score_tokens(
    model: LanguageModel,
    hidden: Tensor,
    tokens: Tensor,
    mask: Tensor,
    temperature: float,
    *,
    needs_entropy: bool,
    reference: tuple[Callable[[Tensor], Tensor], Tensor] | None,
) -> TokenScores:
    """What the tokens that count are worth under a model, and how far it is from a reference there.

    Memory does not grow with B·R·V: every chunk's logits are dropped before the next chunk's are made. Only where the
    head learns are up to 2^26 logits kept for the backward pass.

    Args:
        model: Its head makes the logits.
        hidden: [B, R, H] from which each token is predicted.
        tokens: [B, R] ids.
        mask: [B, R]; only these are computed.
        temperature: > 0.
        needs_entropy: False leaves it out, and lets a plain head's gradients be formed without autograd.
        reference: The reference's function from hidden states to logits, without gradient, and its hidden states
            [B, R, H] at the same tokens; None where no KL is needed.
    """
    tensors_kept = 1 if reference is None else 3  # of the size of the logits
    is_much = model.head_learns and tensors_kept * int(mask.sum()) * model.vocabulary_size > MAX_KEPT_LOGITS

    def score(hidden: Tensor, tokens: Tensor, *ref_hidden: Tensor) -> tuple[Tensor, ...]:
        log_probs, log_softmax = token_log_probs(model.logits(hidden), tokens, temperature)
        found = [log_probs]
        if needs_entropy:
            found.append(entropies(log_softmax))
        if reference is not None:
            found.append(exact_kl(log_softmax, (reference[0](ref_hidden[0]) / temperature).log_softmax(dim=-1)))
        return tuple(found)

    head = model.causal_lm.get_output_embeddings()
    closed_form = not needs_entropy and model.is_plain

    def score_chunk(hidden: Tensor, tokens: Tensor, *ref_hidden: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return score(hidden, tokens, *ref_hidden)
        if model.head_learns:
            inputs = hidden, tokens, *ref_hidden
            return checkpoint(score, *inputs, use_reentrant=False) if is_much else score(*inputs)
        if not closed_form:
            return _PerToken.apply(score, hidden, tokens, *ref_hidden)  # type: ignore[no-untyped-call]
        ref = None if reference is None else log_softmax_(reference[0](ref_hidden[0]), temperature)
        return _LogProbs.apply(hidden, head.weight, head.bias, tokens, temperature, ref)  # type: ignore[no-untyped-call]

    inputs = (hidden, tokens) if reference is None else (hidden, tokens, reference[1])
    log_probs, *rest = map_tokens(score_chunk, mask, model.vocabulary_size, *inputs)
    entropy = rest.pop(0) if needs_entropy else None
    return TokenScores(log_probs, entropy, rest.pop() if rest else None)


class _LogProbs(torch.autograd.Function):
    """log π(token) of hidden states [n, H] under a plain head, and KL(π ‖ π_ref) if asked, with their gradients.

    With logits = hidden Wᵀ + b and π = softmax(logits / T):
    ∂ log π(token) / ∂ hidden = (onehot − π) W / T, and ∂ KL / ∂ hidden = π (log π − log π_ref − KL) W / T, which is
    exactly 0 where π is exactly π_ref.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        ref_log_softmax: Tensor | None,
    ) -> tuple[Tensor, ...]:
        logits = functional.linear(hidden, weight, bias)
        logits = logits if logits.dtype.itemsize >= 4 else logits.float()
        log_softmax = log_softmax_(logits, temperature)
        log_probs = log_softmax.gather(-1, tokens[:, None])
        probabilities = log_softmax.exp() if ref_log_softmax is not None else log_softmax.exp_()
        results, gradients = [log_probs.squeeze(-1)], []
        if ref_log_softmax is not None:
            terms = log_softmax.sub_(ref_log_softmax).mul_(probabilities)
            kl = terms.sum(dim=-1, keepdim=True)
            results.append(kl.squeeze(-1).clamp(min=0.0))
            gradients.append(terms.addcmul_(probabilities, kl, value=-1.0).to(weight.dtype) @ weight)
        minus_gradient = probabilities.scatter_add_(-1, tokens[:, None], torch.full_like(log_probs, -1.0))
        gradients.insert(0, (minus_gradient.to(weight.dtype) @ weight).neg_())
        ctx.save_for_backward(*(gradient.div_(temperature) for gradient in gradients))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> Any:
        return _scaled(scales, ctx.saved_tensors), None, None, None, None, None


class _PerToken(torch.autograd.Function):
    """A function of hidden states [n, H], token by token, that keeps its gradient [n, H] instead of logits [n, V].

    As each result belongs to one token alone, the gradient of a result's sum holds every token's own, which the
    backward pass only scales: nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, ...]], hidden: Tensor, *others: Tensor) -> Any:
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            results = function(leaf, *others)
            gradients = [
                torch.autograd.grad(result.sum(), leaf, retain_graph=index + 1 < len(results))[0]
                for index, result in enumerate(results)
            ]
        ctx.save_for_backward(*gradients)
        return tuple(result.detach() for result in results)

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> Any:
        return None, _scaled(scales, ctx.saved_tensors), *[None] * (len(ctx.needs_input_grad) - 2)


def _scaled(scales: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Σ scale · gradient [n, H] of several results [n]."""
    total = scales[0][:, None] * gradients[0]
    for scale, gradient in zip(scales[1:], gradients[1:], strict=True):
        total = total + scale[:, None] * gradient
    return total.to(gradients[0].dtype)


def map_tokens(
    function: Callable[..., tuple[Tensor, ...]], mask: Tensor, vocabulary: int, *inputs: Tensor
) -> tuple[Tensor, ...]:
    """`function` over the tokens that count, in chunks of at most 2^23 logits; results [B, R] are 0 outside the mask.

    Args:
        function: Takes the chunk's part [n, ...] of every input, returns tensors [n].
        mask: [B, R] with at least one True.
        vocabulary: V, which sets the chunk's length.
        inputs: [B, R, ...] each.
    """
    counted = [tensor.flatten(0, 1) if mask.all() else tensor[mask] for tensor in inputs]
    size = -(-MAX_LOGITS // vocabulary)
    chunks = [
        function(*(tensor[start : start + size] for tensor in counted)) for start in range(0, len(counted[0]), size)
    ]
    results = [torch.cat(parts) for parts in zip(*chunks, strict=True)]
    return tuple(result.new_zeros(mask.shape).masked_scatter(mask, result) for result in results)
