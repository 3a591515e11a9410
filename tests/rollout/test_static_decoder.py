"""The decoder whose tensors never move: it computes what the general decoder does, for every family of models.

A GPU replays its step as one graph. `make gpu` compares that; here the same step runs without a graph.
"""

import pytest
import torch

from conftest import tiny_learner
from family_models import FAMILIES, save_base
from konic.finetuning.errors import ModelError
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.rollout import decoding
from konic.finetuning.rollout.decoding import GeneralDecoder, open_decoder, require_decodable
from konic.finetuning.rollout.graphed_decoder import Replayed
from konic.finetuning.rollout.static_decoder import StaticDecoder, static_cache

CPU = torch.device("cpu")
STEPS = 12


@torch.no_grad()
def hidden_states(decoder, ids):
    """After prompts of 10, 10 and 4 tokens and after each later token; the second row leaves after five of them."""
    lengths, rows = torch.tensor([10, 10, 4]), torch.tensor([2, 0])
    found, later = [decoder.prefill(ids[:, :10], torch.arange(10) >= 10 - lengths[:, None])], ids[:, 10:]
    for step in range(STEPS):
        if step == 5:
            decoder.select(rows)
            later = later[rows]
        found.append(decoder.step(later[:, step], torch.ones(len(later), dtype=torch.bool)).clone())
    return torch.cat(found)


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_computes_what_the_general_decoder_does(kind, tmp_path):
    model = LanguageModel(save_base(kind, tmp_path))
    try:
        require_decodable(model, kind)
    except ModelError:
        return  # no decoder may run it
    if not model.causal_lm._can_compile_fullgraph or static_cache(model.causal_lm.config, 1) is None:
        return  # it is never tried
    ids = model.probe_ids(3 * (10 + STEPS)).view(3, -1)  # longer than the windows of 8 tokens
    expected, found = (hidden_states(decoder, ids) for decoder in (GeneralDecoder(model), StaticDecoder(model, STEPS)))
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As if there were one: no model has a fused form, and graphs may be tried."""
    monkeypatch.setattr(decoding, "can_be_fused", lambda _: False)
    monkeypatch.setattr(decoding, "_may_be_graphable", lambda _: True)


def test_it_is_taken_for_a_model_whose_replayed_steps_are_right(on_a_gpu, tmp_path):
    model = LanguageModel(save_base("gemma3_text", tmp_path))
    require_decodable(model, "mine")
    with open_decoder(model, 3, 4) as decoder:
        assert isinstance(decoder, StaticDecoder)


@pytest.mark.parametrize("wrong", ["a position that stands still", "an error", "a step that cannot be recorded"])
def test_a_model_whose_replayed_steps_are_wrong_keeps_the_general_decoder(wrong, on_a_gpu, tmp_path, monkeypatch):
    right = StaticDecoder.step

    def step(self, tokens, counts):
        if wrong == "an error":
            raise RuntimeError("operation not permitted when stream is capturing")
        if wrong == "a step that cannot be recorded":
            self._next.cannot_record = True
        else:
            self._position.sub_(1)
        return right(self, tokens, counts)

    monkeypatch.setattr(StaticDecoder, "step", step)
    model = LanguageModel(save_base("gpt_neox", tmp_path))
    require_decodable(model, "mine")
    with open_decoder(model, 3, 4) as decoder:
        assert isinstance(decoder, GeneralDecoder)


def test_memory_that_runs_out_is_said(on_a_gpu, tmp_path, monkeypatch):
    def step(self, tokens, counts):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StaticDecoder, "step", step)
    with pytest.raises(torch.OutOfMemoryError):
        require_decodable(LanguageModel(save_base("gpt_neox", tmp_path)), "mine")


@pytest.mark.parametrize("lora", [True, False])
def test_policy_and_reference_are_sampled_alike(lora):
    policy = tiny_learner(lora=lora).policy
    policy.allow_graphs(True)
    assert policy.language_model.is_graphable
    with policy.reference() as reference:
        assert reference.is_graphable


def test_a_step_is_run_each_time_where_there_is_no_gpu():
    calls = []
    step = Replayed(lambda: calls.append(1) or torch.ones(1), CPU)
    assert [step().item(), step().item(), len(calls)] == [1, 1, 2]
