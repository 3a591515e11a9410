"""The logits of a bfloat16 head as sums in fp32, against float64 products of the same numbers."""

import pytest
import torch
from torch import nn

from conftest import tiny_model
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.token_scores import score_tokens
from konic.finetuning.models.wide_head import WideHead, bfloat16_products

H, V = 64, 500


def head_of(bias):
    torch.manual_seed(0)
    return nn.Linear(H, V, bias=bias).requires_grad_(False).bfloat16()


def hidden_of(*shape):
    return (3 * torch.randn(*shape, H, generator=torch.Generator().manual_seed(1))).bfloat16()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 200)])
def test_logits_are_those_of_float64_and_a_plain_head_rounds_them(bias, shape):
    head, hidden = head_of(bias), hidden_of(*shape)
    exact = hidden.double() @ head.weight.double().T + (head.bias.double() if bias else 0.0)
    assert (WideHead(head)(hidden).double() - exact).abs().max() < 1e-5
    assert (head(hidden).double() - exact).abs().max() > 1e-3


def test_the_gradient_of_a_log_prob_is_that_of_float64():
    head, hidden = head_of(bias=True), hidden_of(5).requires_grad_()
    WideHead(head)(hidden).log_softmax(-1)[:, 3].sum().backward()
    exact = hidden.detach().double().requires_grad_()
    (exact @ head.weight.double().T + head.bias.double()).log_softmax(-1)[:, 3].sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert (hidden.grad - exact.grad).norm() / exact.grad.norm() < 5e-3  # its own rounding, and that of the factors


def test_products_outside_are_fp32_again_also_after_an_error():
    left, right = torch.randn(40, 64), torch.randn(64, 40)
    plain = left @ right
    with pytest.raises(KeyError), bfloat16_products():
        raise KeyError
    assert torch.equal(left @ right, plain)


@pytest.mark.parametrize("needs_entropy", [False, True])
def test_log_probs_entropy_and_kl_are_those_of_float64_for_the_same_hidden_states(needs_entropy):
    """A head in bfloat16 rounds the logits: its log-probs are off by a thousand times as much."""
    model = LanguageModel(tiny_model("llama", torch.bfloat16).requires_grad_(False))
    width = model.causal_lm.config.hidden_size
    states, ref_states = (5 * torch.randn(2, 6, width, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    states, ref_states = states.bfloat16(), ref_states.bfloat16()
    tokens, mask = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.bool)
    weight = model.causal_lm.get_output_embeddings().weight.double()
    log, ref_log = ((hidden.double() @ weight.T / 0.7).log_softmax(-1) for hidden in (states, ref_states))

    def error():
        with torch.enable_grad():
            scored = score_tokens(
                model, states.requires_grad_(), tokens, mask, 0.7,
                needs_entropy=needs_entropy, reference=(model.logits, ref_states),
            )  # fmt: skip
        errors = [(scored.log_probs - log.gather(-1, tokens[..., None]).squeeze(-1)).abs().max()]
        errors.append((scored.kl - (log.exp() * (log - ref_log)).sum(-1)).abs().max())
        if needs_entropy:
            errors.append((scored.entropy + (log.exp() * log).sum(-1)).abs().max())
        return max(errors).item()

    rounded = error()
    assert model.widen_head()
    assert error() < 2e-5
    assert rounded > 1e-3


def test_a_head_that_learns_or_is_not_in_bfloat16_stays_as_it_is():
    for dtype, learns in ((torch.float32, False), (torch.float16, False), (torch.bfloat16, True)):
        model = LanguageModel(tiny_model("gpt2", dtype).requires_grad_(False))
        model.causal_lm.get_output_embeddings().requires_grad_(learns)
        assert not model.widen_head()
        assert model.wide_head is None
