from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import PROMPTS, loaded_model, prompt_batch, shake_adapter, tiny_learner
from konic.finetuning.config import GenerationConfig
from konic.finetuning.data.tokenization import PromptBatch, make_prompt_batch
from konic.finetuning.errors import ConfigError, ModelError
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.positions import position_ids
from konic.finetuning.rollout.local_sampler import draw, sample, uniforms
from konic.finetuning.rollout.sampler import RandomKey, Samples, SpecialTokens, decode_responses, find_special_tokens

KEY = RandomKey(seed=3, iteration=1)


def sample_with(learner, generation, batch=None, key=KEY):
    special = find_special_tokens(generation, learner.policy.language_model, learner.policy.tokenizer)
    batch = prompt_batch(learner) if batch is None else batch
    return sample(learner.policy.language_model, learner.policy.tokenizer, batch, generation, special, key)


def rows_of(batch, rows):
    """Some rows of a batch, without the padding that only the others needed."""
    mask = batch.mask[rows]
    start = int(mask.any(dim=0).nonzero()[0])
    prompts, texts = [batch.prompts[row] for row in rows], [batch.texts[row] for row in rows]
    return PromptBatch(
        prompts=prompts, texts=texts, ids=batch.ids[rows, start:], mask=mask[:, start:], sample_indices=[0] * len(rows)
    )


def texts_of(samples, learner, stop=None):
    generation = GenerationConfig(stop=stop)
    return decode_responses(samples, learner.policy.tokenizer, learner.special_tokens, generation)


def tokens_of(samples, row):
    return samples.response_ids[row][samples.response_mask[row]].tolist()


def test_uniforms_depend_on_each_part_of_the_key_and_on_nothing_else():
    base = uniforms(RandomKey(1, 2), 3, 4, 5)
    assert np.array_equal(base, uniforms(RandomKey(1, 2), 3, 4, 5))
    assert np.array_equal(base, uniforms(RandomKey(1, 2), 3, 4, 50)[:5])
    others = [(RandomKey(0, 2), 3, 4), (RandomKey(1, 3), 3, 4), (RandomKey(1, 2), 4, 4), (RandomKey(1, 2), 3, 5)]
    for key, row, index in others:
        assert not np.intersect1d(base, uniforms(key, row, index, 1000)).size


def test_uniforms_are_uniform_in_the_half_open_interval():
    numbers = np.concatenate([uniforms(RandomKey(7, i), row, 0, 100) for i in range(10) for row in range(20)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    observed = np.histogram(numbers, bins=20, range=(0, 1))[0]
    expected = len(numbers) / 20
    assert ((observed - expected) ** 2 / expected).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


def test_draw_inverts_the_distribution_function():
    logits = torch.log(torch.tensor([[0.2, 0.0, 0.5, 0.3]], dtype=torch.float64)).expand(6, 4)
    numbers = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-52], dtype=torch.float64)
    assert draw(logits, numbers).tolist() == [0, 0, 2, 2, 3, 3]


def test_draw_never_takes_a_token_of_probability_zero_at_either_end():
    logits = torch.log(torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float32)).expand(2, 3)
    assert draw(logits, torch.tensor([0.0, 1 - 2**-52], dtype=torch.float64)).tolist() == [1, 1]


def test_samples_follow_the_models_distribution(architecture):
    learner = tiny_learner(architecture)
    batch = prompt_batch(learner, ["ab"] * 500)  # 500 rows of one text
    generation = GenerationConfig(max_new_tokens=1, temperature=0.8)
    samples = torch.cat(
        [sample_with(learner, generation, batch, RandomKey(3, i)).response_ids[:, 0] for i in range(1, 9)]
    )
    model = learner.policy.language_model
    with torch.no_grad():
        hidden = model.decode(batch.ids[:1], batch.mask[:1], position_ids(batch.mask[:1]))
        probabilities = (model.logits(hidden[0, -1]) / 0.8).softmax(-1)
    likely = probabilities > 5 / len(samples)
    observed = torch.bincount(samples, minlength=len(probabilities))[likely]
    expected = probabilities[likely] * len(samples)
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = int(likely.sum())
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_sampled_log_probs_are_those_of_a_whole_pass_without_padding(architecture):
    learner = tiny_learner(architecture)
    samples = sample_with(learner, GenerationConfig(max_new_tokens=8, temperature=1.3))
    batch = prompt_batch(learner)
    model = learner.policy.language_model.causal_lm
    for row in range(len(batch)):
        prompt, response = batch.ids[row][batch.mask[row]], torch.tensor(tokens_of(samples, row))
        with torch.no_grad():
            logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1] / 1.3
        expected = logits.log_softmax(-1)[torch.arange(len(response)), response]
        assert (samples.log_probs[row, : len(response)] - expected).abs().max() < 1e-9


def test_samples_do_not_depend_on_how_prompts_are_batched(architecture):
    learner = tiny_learner(architecture)
    shake_adapter(learner.policy)
    generation = GenerationConfig(max_new_tokens=12)
    batch = prompt_batch(learner)
    together = sample_with(learner, generation, batch)
    for rows in ([0], [1, 2], [7, 3, 0]):
        apart = sample_with(learner, generation, rows_of(batch, rows))
        for position, row in enumerate(rows):
            assert tokens_of(apart, position) == tokens_of(together, row)


def test_one_prompts_samples_differ_by_index_and_iteration():
    learner = tiny_learner("llama")
    batch = prompt_batch(learner, ["same"])
    special = learner.special_tokens
    twice = make_prompt_batch(batch.prompts * 2, learner.policy.tokenizer, 32, special.pad, learner.policy.device)
    generation = GenerationConfig(max_new_tokens=12)
    first, second = (tokens_of(sample_with(learner, generation, twice), row) for row in (0, 1))
    assert first == tokens_of(sample_with(learner, generation, batch), 0)
    assert second != first
    assert tokens_of(sample_with(learner, generation, batch, RandomKey(3, 2)), 0) != first


def eos_everywhere(learner, bias=8.0):
    """Make the model likely to end at once."""
    model = learner.policy.language_model

    class Biased(LanguageModel):
        def logits(self, hidden):
            logits = super().logits(hidden)
            logits[..., learner.special_tokens.eos[0]] += bias
            return logits

    return Biased(model.causal_lm)


def test_eos_is_an_action_and_nothing_after_it_counts(architecture):
    learner = tiny_learner(architecture)
    generation = GenerationConfig(max_new_tokens=12)
    batch = prompt_batch(learner)
    samples = sample(
        eos_everywhere(learner, 5.0), learner.policy.tokenizer, batch, generation, learner.special_tokens, KEY
    )
    if architecture == "gpt2":  # a mask made by comparing ids would drop the EOS
        assert learner.special_tokens.pad == learner.special_tokens.eos[0]
    assert samples.ended.any()
    for row in range(len(batch)):
        tokens = tokens_of(samples, row)
        assert (tokens[-1] == 0) == bool(samples.ended[row])
        assert 0 not in tokens[:-1]
        assert (samples.log_probs[row, : len(tokens)] < 0).all()
        assert samples.log_probs[row, len(tokens) :].abs().sum() == 0
        assert "<eos>" not in texts_of(samples, learner)[row]


def test_an_immediate_eos_is_an_empty_response_of_one_token(architecture):
    learner = tiny_learner(architecture)
    batch = prompt_batch(learner)
    samples = sample(
        eos_everywhere(learner, 100.0), learner.policy.tokenizer, batch, GenerationConfig(), learner.special_tokens, KEY
    )
    assert samples.response_ids.tolist() == [[0]] * len(batch)
    assert texts_of(samples, learner) == [""] * len(batch)
    assert samples.ended.all()


def test_min_new_tokens_counts_the_eos():
    learner = tiny_learner("gpt2")
    generation = GenerationConfig(min_new_tokens=4, max_new_tokens=12)
    samples = sample(
        eos_everywhere(learner, 100.0),
        learner.policy.tokenizer,
        prompt_batch(learner),
        generation,
        learner.special_tokens,
        KEY,
    )
    assert samples.response_mask.sum(1).tolist() == [4] * len(PROMPTS)


def test_max_new_tokens_cuts_off(architecture):
    samples = sample_with(tiny_learner(architecture), GenerationConfig(max_new_tokens=3))
    assert samples.response_mask.sum(1).max() == 3
    assert not samples.ended[samples.response_ids[:, -1] != 0].any()


def test_several_eos_tokens_each_end():
    learner = tiny_learner("llama")
    generation = GenerationConfig(max_new_tokens=30, eos_token_id=tuple(range(130)))
    samples = sample_with(learner, generation)
    for row in range(len(PROMPTS)):
        tokens = tokens_of(samples, row)
        assert all(token >= 130 for token in tokens[:-1])
        assert (tokens[-1] < 130) == bool(samples.ended[row])


def test_stop_strings_end_a_response_and_are_cut_from_its_text():
    learner = tiny_learner("gpt2")
    free = sample_with(learner, GenerationConfig(max_new_tokens=20))
    texts = texts_of(free, learner)
    row = max(range(len(PROMPTS)), key=lambda r: len(texts[r]))
    stop = texts[row][3:5]
    samples = sample_with(learner, GenerationConfig(max_new_tokens=20, stop=[stop, "never there"]))
    assert texts_of(samples, learner, (stop, "never there"))[row] == texts[row][: texts[row].index(stop)]
    assert samples.ended[row]
    tokens = tokens_of(samples, row)
    assert tokens == tokens_of(free, row)[: len(tokens)]
    assert stop in learner.policy.tokenizer.decode(tokens)


def test_greedy_takes_the_likeliest_token():
    learner = tiny_learner("llama")
    samples = sample_with(learner, GenerationConfig(max_new_tokens=1, do_sample=False))
    batch = prompt_batch(learner)
    with torch.no_grad():
        logits = learner.policy.language_model.causal_lm(batch.ids, attention_mask=batch.mask.long()).logits[:, -1]
    assert samples.response_ids[:, 0].tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_tightest_filters_are_greedy(filters):
    learner = tiny_learner("llama")
    greedy = sample_with(learner, GenerationConfig(max_new_tokens=6, do_sample=False))
    assert sample_with(learner, GenerationConfig(max_new_tokens=6, **filters)).response_ids.equal(greedy.response_ids)


def test_recorded_log_probs_are_of_the_unfiltered_distribution():
    learner = tiny_learner("llama")
    filtered = sample_with(learner, GenerationConfig(max_new_tokens=6, top_k=1))
    assert (filtered.log_probs[filtered.response_mask] < -1e-3).all()


def test_repetition_penalty_spares_padding_and_new_tokens():
    learner = tiny_learner("gpt2")
    generation = GenerationConfig(max_new_tokens=10, do_sample=False, repetition_penalty=1e6)
    samples = sample_with(learner, generation)
    batch = prompt_batch(learner)
    for row in range(len(PROMPTS)):
        tokens = tokens_of(samples, row)
        assert len(set(tokens)) == len(tokens)
        assert not set(tokens) & set(batch.ids[row][batch.mask[row]].tolist())
    alone = sample_with(learner, generation, rows_of(batch, [0]))
    assert tokens_of(alone, 0) == tokens_of(samples, 0)  # the others' padding, which is the EOS id, is not penalised


def test_special_tokens_come_from_config_then_model_and_tokenizer():
    loaded = loaded_model("llama")
    model = LanguageModel(loaded.model)
    found = find_special_tokens(GenerationConfig(), model, loaded.tokenizer)
    assert (found.eos, found.pad) == ((0,), 258)
    loaded.model.generation_config.eos_token_id = [7, 0]
    assert find_special_tokens(GenerationConfig(), model, loaded.tokenizer).eos == (7, 0)
    given = find_special_tokens(GenerationConfig(eos_token_id=9, pad_token_id=4), model, loaded.tokenizer)
    assert (given.eos, given.pad) == ((9,), 4)
    with pytest.raises(ConfigError, match="token id 900 is outside the model's vocabulary of 259"):
        find_special_tokens(GenerationConfig(eos_token_id=900), model, loaded.tokenizer)
    for broken in (300, "</s>", -1, 2.0, True, [3]):
        loaded.model.generation_config.eos_token_id = [0, broken]
        with pytest.raises(ModelError) as error:
            find_special_tokens(GenerationConfig(), model, loaded.tokenizer)
        assert f"eos_token_id: the token id {broken!r} of its generation_config.json is outside" in str(error.value)
        assert "Set GenerationConfig(eos_token_id=...)" in str(error.value)
        assert find_special_tokens(GenerationConfig(eos_token_id=7), model, loaded.tokenizer).eos == (7,)


def test_the_padding_token_changes_nothing():
    learner = tiny_learner("gpt2")
    texts = []
    for pad in (0, 77):
        generation = GenerationConfig(max_new_tokens=12, pad_token_id=pad)
        special = find_special_tokens(generation, learner.policy.language_model, learner.policy.tokenizer)
        batch = prompt_batch(learner)
        batch = replace(batch, ids=torch.where(batch.mask, batch.ids, pad))
        model = eos_everywhere(learner, 4.0)
        samples = sample(model, learner.policy.tokenizer, batch, generation, special, KEY)
        texts.append(decode_responses(samples, learner.policy.tokenizer, special, generation))
    assert texts[0] == texts[1]


def test_rewards_and_stop_strings_see_special_tokens_that_were_sampled_unless_told_not_to():
    learner = tiny_learner("llama")
    tokenizer = learner.policy.tokenizer
    bos = tokenizer.bos_token_id
    ids = torch.tensor([[40, bos, 41, 0]])
    samples = Samples(
        response_ids=ids, response_mask=torch.ones_like(ids, dtype=torch.bool), log_probs=torch.zeros(1, 4),
        ended=torch.tensor([True]),
    )  # fmt: skip
    special = SpecialTokens(eos=(0,), pad=0)
    first, last = tokenizer.decode([40]), tokenizer.decode([41])

    def text(**options):
        return decode_responses(samples, tokenizer, special, GenerationConfig(**options))

    assert text() == [f"{first}<bos>{last}"]
    assert text(skip_special_tokens=True) == [first + last]
    assert text(stop="<bos>") == [first]
    assert text(stop="<bos>", skip_special_tokens=True) == [first + last]
