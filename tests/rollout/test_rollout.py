from dataclasses import replace

import pytest
import torch

from conftest import prompt_batch, shake_adapter, tiny_learner, tiny_model
from conftest import roll as roll_out
from konic.finetuning.config import GenerationConfig
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.prepacked import DecodePlan
from konic.finetuning.models.value_head import shift_values
from konic.finetuning.rollout.local_sampler import LocalSampler
from konic.finetuning.rollout.rollout import sample_rollout
from konic.finetuning.rollout.sampler import RandomKey

KEY = RandomKey(seed=3, iteration=1)
GENERATION = GenerationConfig(max_new_tokens=8, temperature=0.9)


def roll(learner, batch=None, micro_batch_size=None):
    batch = prompt_batch(learner) if batch is None else batch
    return roll_out(learner, batch, GENERATION, KEY, micro_batch_size)


def unpadded_log_softmax(model, rolled, row):
    """[n, V] log-softmax of every response token's distribution, from one sequence alone."""
    prompt = rolled.batch.ids[row][rolled.batch.mask[row]]
    response = rolled.samples.response_ids[row][rolled.response_mask[row]]
    with torch.no_grad():
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
    return (logits / GENERATION.temperature).log_softmax(-1), response


@pytest.mark.parametrize("lora", [True, False])
def test_every_number_equals_the_unpadded_truth(architecture, lora):
    learner = tiny_learner(architecture, lora=lora)
    shake_adapter(learner.policy)
    rolled = roll(learner)
    model, base = learner.policy.language_model.causal_lm, tiny_model(architecture)
    for row in range(len(rolled.batch)):
        log_softmax, tokens = unpadded_log_softmax(model, rolled, row)
        reference, _ = unpadded_log_softmax(base, rolled, row)
        picked = torch.arange(len(tokens)), tokens
        expected = {
            "log_probs": log_softmax[picked],
            "ref_log_probs": reference[picked],
            "kl": (log_softmax.exp() * (log_softmax - reference)).sum(-1),
            "entropy": -(log_softmax.exp() * log_softmax).sum(-1),
        }
        for name, truth in expected.items():
            ours = getattr(rolled, name)[row]
            assert (ours[: len(tokens)] - truth).abs().max() < 1e-9, name
            assert ours[len(tokens) :].abs().sum() == 0, name
    assert rolled.kl.max() > 1e-3


def test_kl_is_zero_before_the_adapter_has_learned(architecture):
    """Up to the rounding between a cached sequence, which the policy sampled, and a whole one."""
    rolled = roll(tiny_learner(architecture))
    assert rolled.kl.max() < 1e-12
    assert (rolled.log_probs - rolled.ref_log_probs).abs().max() < 1e-9


def test_sampler_and_trainer_agree(architecture):
    learner = tiny_learner(architecture)
    shake_adapter(learner.policy)
    rolled = roll(learner)
    model, num_response_tokens = learner.policy.language_model, rolled.response_mask.shape[1]
    with torch.no_grad():
        logits = model.logits(model.response_hidden(rolled.ids, rolled.mask, num_response_tokens))
    whole = (logits / GENERATION.temperature).log_softmax(-1).gather(-1, rolled.samples.response_ids[..., None])
    for sampled in (rolled.samples.log_probs, rolled.log_probs):
        assert (sampled - whole.squeeze(-1))[rolled.response_mask].abs().max() < 1e-9


def test_numbers_do_not_move_when_batch_mates_get_longer(architecture):
    learner = tiny_learner(architecture)
    shake_adapter(learner.policy)
    with torch.no_grad():
        learner.policy.value_head.weight.add_(0.3)
    together = roll(learner)
    texts = [prompt.text for prompt in together.batch.prompts]
    for row in (0, 2):
        alone = prompt_batch(learner, [texts[row]])
        alone = replace(alone, prompts=[together.batch.prompts[row]])
        rolled = roll(learner, alone)
        length = int(rolled.response_mask.sum())
        for name in ("log_probs", "ref_log_probs", "kl", "entropy", "values"):
            assert (getattr(rolled, name)[0] - getattr(together, name)[row, :length]).abs().max() < 1e-9, name


def test_values_are_the_heads_on_the_hidden_state_before_each_token(architecture):
    learner = tiny_learner(architecture)
    with torch.no_grad():
        learner.policy.value_head.weight.add_(0.3)
    rolled = roll(learner)
    prompt = rolled.batch.ids[0][rolled.batch.mask[0]]
    response = rolled.samples.response_ids[0][rolled.response_mask[0]]
    model = learner.policy.language_model.causal_lm
    with torch.no_grad():
        hidden = model.base_model(torch.cat([prompt, response])[None]).last_hidden_state[0]
    expected = hidden[len(prompt) - 1 : -1].sum(-1) * 0.3
    assert (rolled.values[0][: len(response)] - expected).abs().max() < 1e-9


def test_micro_batches_change_nothing(architecture):
    learner = tiny_learner(architecture)
    shake_adapter(learner.policy)
    whole, parts = roll(learner), roll(learner, micro_batch_size=2)
    for name in ("log_probs", "ref_log_probs", "kl", "entropy"):
        assert (getattr(whole, name) - getattr(parts, name)).abs().max() < 1e-12


def passes(monkeypatch):
    """What is recorded here: the model and the number of rows of every pass over whole sequences."""
    recorded, plain = [], LanguageModel.response_hidden

    def record(self, ids, mask, num_response_tokens):
        recorded.append((self, len(ids)))
        return plain(self, ids, mask, num_response_tokens)

    monkeypatch.setattr(LanguageModel, "response_hidden", record)
    return recorded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_pass_reads_more_rows_than_a_micro_batch_and_the_policy_is_read_again_in_16_bits_only(dtype, monkeypatch):
    learner = tiny_learner("llama", lora=False, dtype=dtype)
    recorded = passes(monkeypatch)
    rolled = roll(learner, micro_batch_size=2)
    rows = {True: 0, False: 0}
    for model, num_rows in recorded:
        rows[model is learner.policy.language_model] += num_rows
        assert num_rows <= 2
    assert rows == {True: 0 if dtype == torch.float32 else len(rolled.batch), False: len(rolled.batch)}


def test_the_output_layer_is_packed_for_the_batch_while_it_samples_and_scores(monkeypatch):
    learner = tiny_learner("llama", dtype=torch.float32)
    generation = GENERATION.model_copy(update={"max_new_tokens": 16})
    batch, prepacked_rows, plain = prompt_batch(learner), [], LanguageModel.prepacked_head

    def record(self, num_rows):
        prepacked_rows.append(num_rows)
        return plain(self, num_rows)

    monkeypatch.setattr(LanguageModel, "prepacked_head", record)
    roll_out(learner, batch, generation, KEY)
    assert prepacked_rows[0] == (len(batch) if torch.backends.mkldnn.is_available() else None)
    learner.policy.decode_plan = DecodePlan("plain")
    prepacked_rows.clear()
    roll_out(learner, batch, generation, KEY)
    assert set(prepacked_rows) == {None}


def test_a_shift_moves_the_values_of_response_tokens_alone():
    rolled = roll(tiny_learner("llama"))
    shifted = shift_values(rolled.values, rolled.response_mask, 1.5)
    assert rolled.values.abs().sum() == 0
    assert torch.equal(shifted, 1.5 * rolled.response_mask)


def test_positions_are_passed_where_gpt2_needs_them(monkeypatch):
    """Without them GPT-2's log-probs under padding move by whole nats: this test can see it."""
    learner = tiny_learner("gpt2")
    rolled = roll(learner)
    decode = LanguageModel.decode

    def forgetful(self, ids, mask, positions, cache=None):
        return decode(self, ids, mask, torch.arange(ids.shape[1]).expand_as(ids), cache)

    monkeypatch.setattr(LanguageModel, "decode", forgetful)
    hidden = learner.policy.language_model.response_hidden(rolled.ids, rolled.mask, rolled.response_mask.shape[1])
    logits = learner.policy.language_model.logits(hidden) / GENERATION.temperature
    wrong = logits.log_softmax(-1).gather(-1, rolled.samples.response_ids[..., None]).squeeze(-1)
    assert (wrong - rolled.log_probs)[rolled.response_mask].abs().max() > 0.1


@pytest.mark.parametrize(("dtype", "is_full"), [(torch.bfloat16, False), (torch.float32, True), (torch.float64, True)])
def test_half_precision_is_told_apart(dtype, is_full):
    learner = tiny_learner("llama", dtype=dtype)
    assert roll(learner).in_full_precision == is_full


class OtherEngine:
    """A sampler that gives tokens and log-probs alone, as another engine would."""

    def __init__(self, learner):
        self._local = LocalSampler(learner.policy, learner.special_tokens)

    def __call__(self, batch, generation, rng_key):
        return replace(self._local(batch, generation, rng_key), hidden=None)


def test_a_sampler_without_hidden_states_gives_the_same_rollout(architecture, monkeypatch):
    learner = tiny_learner(architecture)
    shake_adapter(learner.policy)
    batch, passes, plain = prompt_batch(learner), [], LanguageModel.response_hidden

    def record(self, ids, mask, num_response_tokens):
        passes.append(len(ids))
        return plain(self, ids, mask, num_response_tokens)

    monkeypatch.setattr(LanguageModel, "response_hidden", record)
    with_hidden = roll_out(learner, batch, GENERATION, KEY)
    num_passes = len(passes)
    without = sample_rollout(learner.policy, OtherEngine(learner), batch, GENERATION, learner.special_tokens, KEY)
    assert len(passes) == 3 * num_passes, "the policy makes a pass of its own, beside the reference's"
    assert without.records == with_hidden.records
    assert without.samples.response_ids.equal(with_hidden.samples.response_ids)
    for name in ("log_probs", "ref_log_probs", "kl", "entropy", "values"):
        left, right = getattr(without, name), getattr(with_hidden, name)
        assert (left - right).abs().max() < 1e-9, name
    assert with_hidden.kl.sum() > 0.01


def test_records_hold_each_response_with_its_prompt_and_tokens():
    learner = tiny_learner("llama")
    rolled = roll(learner)
    assert rolled.texts == [record.response for record in rolled.records]
    for row, record in enumerate(rolled.records):
        assert (record.row, record.prompt) == (row, rolled.batch.texts[row])
        assert list(record.token_ids) == rolled.samples.response_ids[row][rolled.response_mask[row]].tolist()


def test_records_are_cut_before_a_stop_string_that_was_sampled():
    learner = tiny_learner("gpt2")
    free = roll(learner)
    row = max(range(len(free.texts)), key=lambda index: len(free.texts[index]))
    stop = free.texts[row][2:4]
    generation = GENERATION.model_copy(update={"stop": (stop,)})
    record = roll_out(learner, prompt_batch(learner), generation, KEY).records[row]
    assert record.response == free.texts[row][: free.texts[row].index(stop)]
    assert stop in learner.policy.tokenizer.decode(record.token_ids)
