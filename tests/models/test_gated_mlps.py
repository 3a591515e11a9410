"""Gated MLPs that keep less for the backward pass: the same numbers and gradients, bit for bit."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from family_models import FAMILIES, family_model
from konic.finetuning.models.gated_mlps import lean_mlps

FAMILIES_WITH_THEM = ("llama", "qwen3", "gemma2", "deepseek_v3", "jamba")
FAMILIES_WITHOUT = ("gpt2", "phi3", "arcee")


def gradients_and_saved(model, ids, is_lean):
    """Logits and every gradient of a model, and the bytes that its backward pass kept."""
    known = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    model.zero_grad()
    lean = lean_mlps(model) if is_lean else nullcontext()
    with lean, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(ids, use_cache=False).logits
    logits.float().log_softmax(-1)[..., 1].sum().backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return {"logits": logits.detach(), **found}, sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FAMILIES_WITH_THEM)
def test_the_same_numbers_and_gradients_from_fewer_bytes(kind, dtype):
    assert kind in FAMILIES
    torch.manual_seed(0)
    model = family_model(kind).to(dtype).eval()
    ids = torch.randint(0, 200, (3, 20))
    plain, plain_bytes = gradients_and_saved(model, ids, is_lean=False)
    lean, lean_bytes = gradients_and_saved(model, ids, is_lean=True)
    assert len(plain) > 3
    assert lean.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(plain[name], lean[name])] == []
    assert lean_bytes < plain_bytes


def test_what_is_kept_for_a_token():
    mlp = LlamaMLP(LlamaConfig(hidden_size=8, num_attention_heads=2, intermediate_size=32)).requires_grad_(False)
    x, kept = torch.randn(5, 8, requires_grad=True), []
    with lean_mlps(mlp), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mlp(x)
    assert [tuple(tensor.shape) for tensor in kept if tensor.shape[0] == 5] == [(5, 32), (5, 32)]


@pytest.mark.parametrize("kind", FAMILIES_WITHOUT)
def test_other_mlps_are_left_alone(kind):
    model = family_model(kind)
    with lean_mlps(model):
        assert not any("forward" in vars(module) for module in model.modules())


def test_an_activation_with_weights_and_a_forward_of_someone_else_are_left_alone():
    model = family_model("llama")
    trained, patched = (layer.mlp for layer in model.model.layers[:2])
    trained.act_fn = nn.PReLU()
    patched.forward = lambda x: x
    with lean_mlps(model):
        assert "forward" not in vars(trained)
        assert patched.forward(3) == 3
    assert patched.forward(3) == 3


def test_outside_the_context_nothing_is_changed_also_after_an_error():
    model = family_model("llama")
    with pytest.raises(KeyError), lean_mlps(model):
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())
