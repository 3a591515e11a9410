import os

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from conftest import shake_adapter, tiny_learner, tiny_model
from konic.finetuning.models import prepacked as packing
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.prepacked import (
    PrepackedLinear,
    Prepacking,
    Product,
    is_worth_packing,
    layouts,
    prepacked_layers,
)

PACKED_FOR = 8
HAS_BFLOAT16 = "onednn" in layouts(torch.bfloat16)
needs_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="this processor has no products in bfloat16")
needs_mkldnn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="nothing is packed without oneDNN")
PACKINGS = [Prepacking(PACKED_FOR, layout) for layout in layouts() if layout != "plain"]
packed_or_not = pytest.mark.parametrize("prepacking", [None, *PACKINGS], ids=str)


class OwnLinear(nn.Linear):
    """A layer that may compute anything."""


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(kind):
    layer = Conv1D(40, 24) if kind is Conv1D else nn.Linear(24, 40, bias=kind == "with bias")
    for index, weight in enumerate(layer.parameters()):
        weight.data = random(*weight.shape, seed=index)
    return layer


def modules_of(model):
    return {name: id(module) for name, module in model.named_modules()}


def packed_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, PrepackedLinear)}


def names_of(model, kinds):
    return {name for name, module in model.named_modules() if type(module) in kinds}


@packed_or_not
@pytest.mark.parametrize("num_rows", [1, 3, 8, 100])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_a_product_is_that_of_a_linear_layer(prepacking, num_rows, has_bias, adds):
    weight, x = random(40, 24, seed=1), random(num_rows, 24, seed=2)
    bias = random(40, seed=3) if has_bias else None
    add = random(num_rows, 40, seed=4) if adds else None
    expected = functional.linear(x, weight, bias) + (add if adds else 0.0)
    x_before, add_before = x.clone(), None if add is None else add.clone()
    product = Product([weight], bias, prepacking)
    for _ in range(2):
        assert_close(product(x, add), expected, rtol=1e-5, atol=1e-5)
    assert x.equal(x_before)
    assert add is None or add.equal(add_before)


@packed_or_not
@pytest.mark.parametrize("num_rows", [3, 8, 100])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_of_several_layers_has_their_outputs_side_by_side(prepacking, num_rows, has_bias):
    weights, x = [random(size, 24, seed=size) for size in (40, 8, 16)], random(num_rows, 24)
    bias = random(64, seed=3) if has_bias else None
    expected = torch.cat([x @ weight.T for weight in weights], dim=1) + (bias if has_bias else 0.0)
    assert_close(Product(weights, bias, prepacking)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prepacking", PACKINGS, ids=str)
def test_rows_that_leave_a_packed_product_change_none_of_the_others(prepacking):
    product, x = Product([random(40, 24)], None, prepacking), random(PACKED_FOR, 24, seed=1)
    assert product(x)[:5].equal(product(x[:5]))


@needs_bfloat16
@pytest.mark.parametrize("num_rows", [1, 3, 8, 100])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_a_product_in_bfloat16_is_rounded_once_or_twice_from_the_exact_one(num_rows, has_bias, adds):
    weight, x = random(40, 24, seed=1).bfloat16(), random(num_rows, 24, seed=2).bfloat16()
    bias = random(40, seed=3).bfloat16() if has_bias else None
    add = random(num_rows, 40, seed=4).bfloat16() if adds else None
    exact = x.double() @ weight.double().T + (bias.double() if has_bias else 0) + (add.double() if adds else 0)
    product = Product([weight], bias, Prepacking(PACKED_FOR))
    assert (product.num_rows, product.dtype) == (PACKED_FOR, torch.bfloat16)
    result = product(x, add)
    assert result.dtype == torch.bfloat16
    parts = x.double().abs() @ weight.double().abs().T + (add.double().abs() if adds else 0) + 1
    assert ((result.double() - exact).abs() <= 2**-8 * parts).all()
    assert (result.double() - exact).abs().mean() < 1.1 * (exact.bfloat16().double() - exact).abs().mean()
    assert product(x)[:1].equal(product(x[:1])), "a row does not depend on its neighbours"


@packed_or_not
def test_a_product_takes_a_weight_that_is_a_transposed_view(prepacking):
    weight, x = random(24, 40), random(5, 24)
    assert_close(Product([weight.T], None, prepacking)(x), x @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prepacking", PACKINGS, ids=str)
@pytest.mark.parametrize("kind", ["with bias", "without bias", Conv1D])
@pytest.mark.parametrize("shape", [(3, 24), (2, 5, 24), (1, 1, 24)])
def test_a_packed_layer_computes_what_the_layer_does(prepacking, kind, shape):
    layer, x = layer_of(kind), random(*shape)
    with torch.no_grad():
        result = PrepackedLinear(layer, prepacking)(x)
        assert result.shape == (*shape[:-1], 40)
        assert_close(result, layer(x), rtol=1e-5, atol=1e-5)


@needs_mkldnn
def test_plain_layers_but_the_head_are_packed_and_the_same_objects_come_back(architecture):
    model = tiny_model(architecture, torch.float32)
    before, ids = modules_of(model), torch.arange(12).view(2, 6)
    plain = names_of(model, (nn.Linear, Conv1D)) - {"lm_head"}
    assert len(plain) == {"gpt2": 8, "llama": 14}[architecture]
    with torch.no_grad():
        expected = model(ids).logits
        with prepacked_layers(model, Prepacking(2)):
            assert packed_names(model) == plain
            assert names_of(model, (nn.Linear, Conv1D)) == {"lm_head"}
            assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert modules_of(model) == before


@needs_mkldnn
def test_the_layers_come_back_after_an_exception(architecture):
    model = tiny_model(architecture, torch.float32)
    before = modules_of(model)
    with pytest.raises(KeyError, match="in the body"), prepacked_layers(model, Prepacking(2)):
        raise KeyError("in the body")
    assert modules_of(model) == before


@needs_mkldnn
def test_the_layers_come_back_when_packing_itself_fails(monkeypatch):
    model = tiny_model("llama", torch.float32)
    before, made = modules_of(model), []

    class FailsInTheEnd(PrepackedLinear):
        def __init__(self, layer, prepacking):
            made.append(layer)
            if len(made) == 5:
                raise MemoryError
            super().__init__(layer, prepacking)

    monkeypatch.setattr(packing, "PrepackedLinear", FailsInTheEnd)
    with pytest.raises(MemoryError), prepacked_layers(model, Prepacking(2)):
        pytest.fail("the body ran")
    assert modules_of(model) == before


@needs_mkldnn
def test_a_subclass_of_a_plain_layer_is_left_alone():
    model = tiny_model("llama", torch.float32)
    model.model.layers[1].mlp.up_proj = OwnLinear(32, 64)
    with prepacked_layers(model, Prepacking(2)):
        assert type(model.model.layers[1].mlp.up_proj) is OwnLinear
        assert type(model.model.layers[0].mlp.up_proj) is PrepackedLinear


@needs_mkldnn
def test_an_adapters_layer_stays_and_its_plain_parts_are_packed(architecture):
    learner = tiny_learner(architecture, dtype=torch.float32)
    shake_adapter(learner.policy)
    model, ids = learner.policy.language_model.causal_lm, torch.arange(12).view(2, 6)
    before = modules_of(model)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    plain = {name for name in names_of(model, (nn.Linear, Conv1D)) if not name.endswith("lm_head")}
    assert adapted
    with torch.no_grad():
        expected = model(ids).logits
        with prepacked_layers(model, Prepacking(2)):
            assert packed_names(model) == plain
            now = modules_of(model)
            assert all(now[name] == before[name] for name in adapted)
            assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert modules_of(model) == before


def test_without_a_number_of_rows_nothing_is_packed(architecture):
    model = tiny_model(architecture)
    before = modules_of(model)
    with prepacked_layers(model, None):
        assert modules_of(model) == before


@needs_mkldnn
def test_packing_leaves_weights_as_they_are_and_tied_ones_tied():
    model = tiny_model("gpt2", torch.float32)
    values = {name: weight.clone() for name, weight in model.named_parameters()}
    objects = {name: id(weight) for name, weight in model.named_parameters()}
    assert model.lm_head.weight is model.transformer.wte.weight
    with prepacked_layers(model, Prepacking(2)), torch.no_grad():
        assert model.get_output_embeddings().weight is model.transformer.wte.weight
        assert {name: id(weight) for name, weight in model.named_parameters()} == objects
        model(torch.arange(6)[None])
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {name: id(weight) for name, weight in model.named_parameters()} == objects
    assert all(weight.equal(values[name]) for name, weight in model.named_parameters())


@needs_mkldnn
def test_packing_a_model_in_fp32_is_worth_it_from_a_number_of_tokens_on():
    model = tiny_model("llama", torch.float32)
    assert is_worth_packing(model, packing.MIN_TOKENS)
    assert is_worth_packing(model, 500)


@needs_bfloat16
def test_a_model_in_bfloat16_is_packed_and_computes_the_same(architecture):
    model, ids = tiny_model(architecture, torch.bfloat16), torch.arange(12).view(2, 6)
    with torch.no_grad():
        exact = tiny_model(architecture, torch.bfloat16).float()(ids).logits
        plain = model(ids).logits
        with prepacked_layers(model, Prepacking(2)):
            assert packed_names(model)
            packed = model(ids).logits
    assert is_worth_packing(model, 1000)
    error = (plain - exact).abs().mean()
    assert 0 < error < 0.05
    assert (packed - exact).abs().mean() < 1.1 * error


@needs_bfloat16
@pytest.mark.parametrize("widens", [True, False])
def test_a_packed_head_in_bfloat16_gives_the_logits_of_one_that_is_not(widens):
    """A wide head forms sums in fp32, also packed; with more rows than it is packed for it is not used at all."""
    model = LanguageModel(tiny_model("llama", torch.bfloat16).requires_grad_(False))
    assert not widens or model.widen_head()
    few, many = (random(num_rows, 32, seed=1).bfloat16() for num_rows in (4, 50))
    plain = [model.logits(hidden) for hidden in (few, many)]
    with model.prepacked_head(4):
        packed = [model.logits(hidden[None])[0] for hidden in (few, many)]
    assert {logits.dtype for logits in packed} == {torch.float32}
    assert_close(packed, plain, rtol=0, atol=1e-5 if widens else 2e-2)
    assert not widens or packed[1].equal(plain[1])
    assert model.logits(few).equal(plain[0])


def test_a_processor_without_products_in_bfloat16_packs_none(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert layouts(torch.bfloat16) == ("plain",)
    assert not is_worth_packing(tiny_model("gpt2", torch.bfloat16), 1000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_precisions_are_not_packed(dtype):
    assert not is_worth_packing(tiny_model("gpt2", dtype), 1000)


def test_a_few_tokens_are_not_worth_packing_for():
    assert not is_worth_packing(tiny_model("gpt2", torch.float32), packing.MIN_TOKENS - 1)


def test_another_device_is_not_packed():
    assert not is_worth_packing(tiny_model("gpt2", torch.float32).to("meta"), 1000)


@needs_mkldnn
def test_packing_needs_a_multiple_of_the_weights_memory(monkeypatch):
    model = tiny_model("llama", torch.float32)
    enough = packing.TRAINED_MEMORY_SHARE * 4 * sum(weight.numel() for weight in model.parameters())
    memory = {"SC_PHYS_PAGES": enough, "SC_PAGE_SIZE": 1}
    monkeypatch.setattr(os, "sysconf", lambda name: memory[name])
    assert is_worth_packing(model, 1000)
    memory["SC_PHYS_PAGES"] = enough - 1
    assert not is_worth_packing(model, 1000)
    memory.update(SC_PHYS_PAGES=1 + enough // 4096, SC_PAGE_SIZE=4096)
    assert is_worth_packing(model, 1000)


@needs_mkldnn
@pytest.mark.parametrize(("lora", "share"), [(True, 4), (False, 8)])
def test_weights_that_are_trained_leave_less_room_for_a_packed_copy(lora, share, monkeypatch):
    model = tiny_learner("llama", lora=lora, dtype=torch.float32).policy.language_model
    size = 4 * sum(weight.numel() for weight in model.causal_lm.parameters())
    memory = {"SC_PHYS_PAGES": share * size, "SC_PAGE_SIZE": 1}
    monkeypatch.setattr(os, "sysconf", lambda name: memory[name])
    assert model.prepacking(8, 1000) is not None
    memory["SC_PHYS_PAGES"] -= 1
    assert model.prepacking(8, 1000) is None


def test_a_system_that_does_not_tell_its_memory_is_not_packed_on(monkeypatch):
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert not is_worth_packing(tiny_model("llama", torch.float32), 1000)
