"""Adapter -> plain layers: merged into a copy of one layer, or into a whole model."""

import copy
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def merged_model(adapted: peft.PeftModel) -> PreTrainedModel:
    """Return a copy of a model with its adapter merged in.

    Input embedding and head that share their weights are separated if the adapter changes only one of them.
    """
    return merge_into_base(copy.deepcopy(adapted))


def merge_into_base(adapted: peft.PeftModel) -> PreTrainedModel:
    """Return the base model of an adapter, changed: the adapter is merged in, as :func:`merged_model` says."""
    causal_lm = adapted.base_model.model
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    adapted_ends = [end for end in (embedding, head) if isinstance(end, LoraLayer | AuxiliaryTrainingWrapper)]
    follows_embedding = isinstance(head, TrainableTokensWrapper) and head.token_adapter.tied_adapter is not None
    if adapted_ends and not follows_embedding:
        inner = getattr(head, "original_module", head)
        inner = inner.get_base_layer() if isinstance(inner, LoraLayer) else inner
        inner.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
        for config in (causal_lm.config, causal_lm.config.get_text_config()):
            config.tie_word_embeddings = False
    return adapted.merge_and_unload()


def can_merge(layer: Any) -> bool:
    """Return True for plain layers with floating-point weights.

    Quantised layers keep the adapter unmerged during sampling.
    """
    base = layer.get_base_layer()
    return isinstance(base, nn.Linear | Conv1D | nn.Embedding) and base.weight.is_floating_point()


def merged_layer(layer: Any) -> nn.Module:
    """Return a copy of an adapted layer's base layer with the adapter merged in.

    Only the base layer's weights are copied. A deep copy of the whole layer takes 2 ms, which is much on a GPU.
    """
    base = _shallow_copy(layer.get_base_layer())
    for name, weight in base.named_parameters(recurse=False):
        base._parameters[name] = nn.Parameter(weight.detach().clone(), requires_grad=False)
    layer_copy = _shallow_copy(layer)
    layer_copy.merged_adapters = []
    layer_copy.base_layer = base
    with torch.no_grad():
        layer_copy.merge()
    return base


def _shallow_copy(module: Any) -> Any:
    """Return a copy of a module that shares its parameters and submodules until they are replaced."""
    shallow = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):
            vars(shallow)[name] = value.copy()
    return shallow
