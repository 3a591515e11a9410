"""Products by oneDNN: the numbers and gradients of PyTorch's own, to rounding."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from konic.finetuning.models import products
from konic.finetuning.models.products import back_through, fast_products

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def counted(monkeypatch):
    """How many products oneDNN has computed, on any processor."""
    count = []
    product = products._product
    monkeypatch.setattr(products, "is_faster", lambda: True)
    monkeypatch.setattr(products, "_product", lambda *given: count.append(1) or product(*given))
    return count


def layer_of(kind):
    layer = Conv1D(512, 160) if kind == "conv1d" else nn.Linear(160, 512, bias=kind == "linear")
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("kind", ["linear", "without bias", "conv1d"])
def test_values_and_gradients_are_those_of_float64(kind, counted):
    torch.manual_seed(0)
    layer = layer_of(kind)
    x, upstream = torch.randn(3, 5, 160, requires_grad=True), torch.randn(3, 5, 512)
    weight, bias = layer.weight.double(), 0.0 if layer.bias is None else layer.bias.double()
    weight = weight.T if kind == "conv1d" else weight  # [out, in]
    with fast_products(layer):
        result = layer(x)
        result.backward(upstream)
    assert len(counted) == 2
    torch.testing.assert_close(result.double(), x.double() @ weight.T + bias, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), upstream.double() @ weight, rtol=1e-5, atol=1e-4)


def test_the_way_back_alone(counted):
    layer, of_result = layer_of("without bias"), torch.randn(7, 512)
    plain = back_through(layer, of_result)
    assert not counted
    with fast_products(layer):
        torch.testing.assert_close(back_through(layer, of_result), plain, rtol=1e-5, atol=1e-5)
    assert counted == [1]


def test_trained_small_and_other_layers_are_left_to_torch(counted):
    half_frozen, small, double = nn.Linear(512, 512), nn.Linear(8, 8), nn.Linear(512, 512).double()
    half_frozen.weight.requires_grad_(False)
    model = nn.ModuleList([nn.Linear(512, 512), half_frozen, small, double])
    small.requires_grad_(False)
    double.requires_grad_(False)
    with fast_products(model):
        for layer in model:
            layer(torch.randn(4, layer.in_features, dtype=layer.weight.dtype)).sum()
    assert not counted


@pytest.mark.parametrize("x", [torch.zeros(0, 160), torch.zeros(160), torch.zeros(2, 0, 160)])
def test_any_shape_of_rows(x, counted):
    layer = layer_of("linear")
    plain = layer(x)
    with fast_products(layer):
        assert layer(x).shape == plain.shape


def test_outside_the_context_nothing_is_changed_also_after_an_error(counted):
    layer = layer_of("linear")
    before = layer(torch.ones(2, 160))
    with pytest.raises(KeyError), fast_products(layer):
        raise KeyError
    assert torch.equal(layer(torch.ones(2, 160)), before)
    assert not counted
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_model_gives_the_same_logits_and_gradients(architecture, is_checkpointed, counted):
    torch.manual_seed(0)
    if architecture == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=2, n_head=4, vocab_size=300))
    else:
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=300,
        ))  # fmt: skip
    model.eval().requires_grad_(False)
    states = torch.randn(2, 7, 256)

    def gradient():
        leaf = states.clone().requires_grad_()

        def run(embedded):
            return model(inputs_embeds=embedded).logits

        logits = checkpoint(run, leaf, use_reentrant=False) if is_checkpointed else run(leaf)
        logits.square().sum().backward()
        return logits.detach(), leaf.grad

    plain = gradient()
    with fast_products(model):
        fast = gradient()
    assert len(counted) >= 16
    for ours, torchs in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4 * torchs.abs().max().item())


@pytest.mark.parametrize(("maker", "is_faster"), [("AuthenticAMD", True), ("GenuineIntel", False), ("", False)])
def test_the_processor_decides(maker, is_faster, monkeypatch):
    monkeypatch.setattr(products, "is_amd", lambda: maker == "AuthenticAMD")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.is_faster.__wrapped__() == is_faster
