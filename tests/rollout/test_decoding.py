from contextlib import contextmanager

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from conftest import PROMPTS, byte_tokenizer, prompt_batch, shake_adapter, tiny_learner, tiny_model
from family_models import family_model, save_base
from konic.finetuning import KonicFinetuningAgent, KonicFinetuningEngine, KonicLLMRewardComposer, ModelError
from konic.finetuning.config import GenerationConfig
from konic.finetuning.data.tokenization import PromptBatch, make_prompt_batch
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.prepacked import DecodePlan, PrepackedLinear, Product, layouts
from konic.finetuning.rollout import decoding
from konic.finetuning.rollout import local_sampler as sampling
from konic.finetuning.rollout.decoding import GeneralDecoder, open_decoder
from konic.finetuning.rollout.fused_decoder import FusedDecoder
from konic.finetuning.rollout.fused_transformer import fused_transformer
from konic.finetuning.rollout.graphed_decoder import GraphedDecoder
from konic.finetuning.rollout.local_sampler import sample
from konic.finetuning.rollout.sampler import RandomKey, SpecialTokens, decode_responses, find_special_tokens
from konic.finetuning.rollout.static_decoder import StaticDecoder

LENGTHS = (3, 9, 1, 6)
STEPS = 5
KEY = RandomKey(seed=3, iteration=1)
OFTEN_ENDED = GenerationConfig(max_new_tokens=16, temperature=1.2, eos_token_id=tuple(range(40)))
STATES = ("lfm2", "qwen3_5_text", "mamba")
"""Families of which some layers, or all, keep a running state."""
ROUNDING = {"qwen3_5_text": 2e-5, "mamba": 2e-5}
"""Of hidden states of models that compute a part in fp32, whatever their dtype."""
SELECTIONS = {"subset": [1, 3], "one": [2], "permutation": [2, 0, 3, 1], "repeated": [0, 0, 2, 1, 1, 0]}


def neox_model(dtype=torch.float64):
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).to(dtype).eval()


def model_of(name, dtype=torch.float64):
    if name in STATES:
        return LanguageModel(family_model(name).to(dtype))
    return LanguageModel(neox_model(dtype) if name == "gpt_neox" else tiny_model(name, dtype))


def decoder_of(kind, model, num_tokens=STEPS):
    if kind == "general":
        return GeneralDecoder(model)
    if kind == "static":
        return StaticDecoder(model, num_tokens)
    return (GraphedDecoder if kind == "graphed" else FusedDecoder)(model, fused_transformer(model, None), num_tokens)


def padded_prompts(lengths=LENGTHS):
    ids = torch.randint(1, 257, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return torch.where(mask, ids, 0), mask


def later_tokens(num_rows, count=STEPS):
    return torch.randint(1, 257, (num_rows, count), generator=torch.Generator().manual_seed(2))


def all_count(num_rows):
    return torch.ones(num_rows, dtype=torch.bool)


def modules_of(model):
    return {name: id(module) for name, module in model.causal_lm.named_modules()}


@torch.no_grad()
def of_whole_passes(model, ids, mask, tokens):
    """Hidden states [B, steps + 1, H] after each prompt and each later token, one sequence at a time, unpadded."""
    sequences = [torch.cat([row[keep], later]) for row, keep, later in zip(ids, mask, tokens, strict=True)]
    hidden = [model.causal_lm.base_model(sequence[None]).last_hidden_state[0] for sequence in sequences]
    return torch.stack([states[-tokens.shape[1] - 1 :] for states in hidden])


decoders = pytest.mark.parametrize(
    "kind, name",
    [
        ("general", "gpt2"),
        ("general", "llama"),
        ("general", "gpt_neox"),
        *(("general", name) for name in STATES),
        ("static", "gpt2"),
        ("static", "llama"),
        ("static", "gpt_neox"),
        ("fused", "gpt2"),
        ("fused", "llama"),
        ("graphed", "gpt2"),
        ("graphed", "llama"),
    ],
)


@decoders
@pytest.mark.parametrize("lengths", [LENGTHS, (4, 4, 4)])
@torch.no_grad()
def test_prefill_and_steps_give_the_hidden_states_of_whole_passes(kind, name, lengths):
    model = model_of(name)
    decoder, (ids, mask), tokens = decoder_of(kind, model), padded_prompts(lengths), later_tokens(len(lengths))
    hidden = [decoder.prefill(ids, mask)]
    hidden += [decoder.step(tokens[:, step], all_count(len(lengths))) for step in range(STEPS)]
    expected = of_whole_passes(model, ids, mask, tokens)
    assert (torch.stack(hidden, dim=1) - expected).abs().max() < ROUNDING.get(name, 1e-9)
    assert (decoder.logits(hidden[-1]) - model.logits(expected[:, -1])).abs().max() < ROUNDING.get(name, 1e-9)


@decoders
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("rows", SELECTIONS.values(), ids=SELECTIONS)
@torch.no_grad()
def test_selected_rows_go_on_as_if_they_had_been_the_batch(kind, name, rows, after):
    model, rows = model_of(name), torch.tensor(rows)
    (ids, mask), before, tokens = padded_prompts(), later_tokens(len(LENGTHS), after), later_tokens(len(rows))
    decoder, alone = decoder_of(kind, model, STEPS + after), decoder_of(kind, model, STEPS + after)
    decoder.prefill(ids, mask)
    alone.prefill(ids[rows], mask[rows])
    for step in range(after):
        decoder.step(before[:, step], all_count(len(LENGTHS)))
        alone.step(before[rows, step], all_count(len(rows)))
    decoder.select(rows)
    for step in range(STEPS):
        hidden = decoder.step(tokens[:, step], all_count(len(rows)))
        expected = alone.step(tokens[:, step], all_count(len(rows)))
        assert (hidden - expected).abs().max() < ROUNDING.get(name, 1e-9)
    assert (decoder.logits(hidden) - alone.logits(expected)).abs().max() < ROUNDING.get(name, 1e-9)


@decoders
@torch.no_grad()
def test_rows_may_be_selected_again_and_again(kind, name):
    model = model_of(name)
    decoder, (ids, mask), tokens = decoder_of(kind, model), padded_prompts(), later_tokens(6)
    decoder.prefill(ids, mask)
    rows = torch.tensor([3, 3, 0, 1, 2, 0])
    decoder.select(rows)
    for step, kept in enumerate([[5, 0, 1, 3], [0, 2, 3], [1, 2], [1], [0]]):
        hidden = decoder.step(tokens[:, step], all_count(len(tokens)))
        expected = of_whole_passes(model, ids[rows], mask[rows], tokens[:, : step + 1])[:, -1]
        assert (hidden - expected).abs().max() < ROUNDING.get(name, 1e-9)
        decoder.select(torch.tensor(kept))
        rows, tokens = rows[kept], tokens[kept]


@decoders
@torch.no_grad()
def test_what_a_row_takes_after_its_end_changes_no_other(kind, name):
    model = model_of(name)
    (ids, mask), tokens, counts = padded_prompts(), later_tokens(len(LENGTHS)), all_count(len(LENGTHS))
    decoder = decoder_of(kind, model)
    decoder.prefill(ids, mask)
    expected = of_whole_passes(model, ids, mask, tokens)
    for step in range(STEPS):
        if step == 2:
            counts = torch.tensor([True, False, True, True])
        hidden = decoder.step(torch.where(counts, tokens[:, step], 0), counts)
        assert (hidden - expected[:, step + 1])[counts].abs().max() < ROUNDING.get(name, 1e-9)
        assert hidden.isfinite().all()


@torch.no_grad()
def test_general_and_fused_agree(architecture):
    model = model_of(architecture)
    general, fused = decoder_of("general", model), decoder_of("fused", model)
    (ids, mask), rows = padded_prompts(), torch.tensor([1, 1, 3, 0, 2, 2])
    assert (general.prefill(ids, mask) - fused.prefill(ids, mask)).abs().max() < 1e-9
    tokens = later_tokens(len(rows))
    for decoder in (general, fused):
        decoder.select(rows)
    for step in range(STEPS):
        ours, theirs = (decoder.step(tokens[:, step], all_count(len(rows))) for decoder in (general, fused))
        assert (ours - theirs).abs().max() < 1e-9
        assert (general.logits(ours) - fused.logits(theirs)).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, kind", [("gpt2", FusedDecoder), ("llama", FusedDecoder), ("gpt_neox", GeneralDecoder)])
@torch.no_grad()
def test_known_shapes_are_fused_and_the_layers_stay_the_models_own(name, kind, dtype):
    model = model_of(name, dtype)
    before, weights = modules_of(model), {key: value.clone() for key, value in model.causal_lm.state_dict().items()}
    ids, mask = padded_prompts()
    with open_decoder(model, len(ids), 40) as decoder:
        assert type(decoder) is kind
        hidden = decoder.prefill(ids, mask)
        hidden = decoder.step(later_tokens(len(ids))[:, 0], all_count(len(ids)))
        logits = decoder.logits(hidden)
        assert hidden.dtype == dtype
        assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert modules_of(model) == before
    assert all(value.equal(weights[key]) for key, value in model.causal_lm.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_an_exception_passes_through_and_leaves_the_layers_as_they_were(name, dtype):
    model = model_of(name, dtype)
    before, error = modules_of(model), KeyError("in the body")

    @torch.no_grad()
    def fail_in_the_body():
        with open_decoder(model, 4, 40) as decoder:
            decoder.prefill(*padded_prompts())
            raise error

    with pytest.raises(KeyError) as caught:
        fail_in_the_body()
    assert caught.value is error
    assert modules_of(model) == before


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_decoding_may_end_before_it_began(name):
    with open_decoder(model_of(name), 4, 40):
        pass


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
@torch.no_grad()
def test_decoding_by_any_plan_is_the_models_own_to_rounding(name, layout):
    model, (ids, mask), tokens = model_of(name, torch.float32), padded_prompts(), later_tokens(len(LENGTHS))
    model.decode_plan = DecodePlan(layout, threads=1)
    expected = of_whole_passes(model, ids, mask, tokens)
    with open_decoder(model, len(ids), 40) as decoder:
        is_prepacked = any(isinstance(module, PrepackedLinear) for module in model.causal_lm.modules())
        assert is_prepacked == (name == "gpt_neox" and layout != "plain")
        hidden = [decoder.prefill(ids, mask)]
        hidden += [decoder.step(tokens[:, step], all_count(len(ids))) for step in range(STEPS)]
        logits = decoder.logits(hidden[-1])
    assert (torch.stack(hidden, dim=1) - expected).abs().max() < 1e-4
    assert (logits - model.logits(expected[:, -1])).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_weights_are_packed_into_memory_that_is_given_back_whole(name, monkeypatch):
    """What is packed among other blocks leaves gaps when it is freed: 240 MB at the second sampling, packed by MKL."""
    events, exact = [], Product.__init__

    @contextmanager
    def eager_free(on):
        events.append("packing" if on else "no packing")
        yield
        events.append("packed")

    def noted(product, weights, bias, prepacking):
        events.append("a weight")
        exact(product, weights, bias, prepacking)

    monkeypatch.setattr(decoding, "eager_free", eager_free)
    monkeypatch.setattr(decoding, "return_freed_memory", lambda: events.append("freed"))
    monkeypatch.setattr(Product, "__init__", noted)
    with open_decoder(model_of(name, torch.float32), 4, 40):
        assert events[-1] == "packed", "what sampling frees stays with the process: that is faster"
        assert events[:2] == ["freed", "packing"] and set(events[2:-1]) == {"a weight"} and len(events) > 6
    assert events[-2:] == ["packed", "freed"]
    events.clear()
    with open_decoder(model_of(name, torch.float32), 4, 2):  # too few tokens to pack
        assert events[0] == "no packing"
    assert "freed" not in events


def test_a_plan_changes_the_threads_while_it_decodes():
    model, before = model_of("gpt_neox"), torch.get_num_threads()
    model.decode_plan = DecodePlan(threads=before + 1)
    with open_decoder(model, 4, 40):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def learner_of(architecture):
    learner = tiny_learner(architecture)
    shake_adapter(learner.policy)
    return learner


def sampled(learner, generation, batch=None):
    """Responses of the merged policy: with its adapter apart it would not be fused."""
    batch = prompt_batch(learner) if batch is None else batch
    with learner.policy.merged_adapter() as model:
        special = find_special_tokens(generation, model, learner.policy.tokenizer)
        return sample(model, learner.policy.tokenizer, batch, generation, special, KEY)


def repeated_batch(learner, texts, times):
    once = prompt_batch(learner, texts)
    prompts = [prompt for prompt in once.prompts for _ in range(times)]
    return make_prompt_batch(prompts, learner.policy.tokenizer, 32, learner.special_tokens.pad, learner.policy.device)


def alone(batch, row):
    """One row of a batch, without padding."""
    ids = batch.ids[row][batch.mask[row]][None]
    index = [batch.sample_indices[row]]
    mask = torch.ones_like(ids, dtype=torch.bool)
    prompts, texts = [batch.prompts[row]], [batch.texts[row]]
    return PromptBatch(prompts=prompts, texts=texts, ids=ids, mask=mask, sample_indices=index)


def texts_of(samples, learner, generation):
    special = find_special_tokens(generation, learner.policy.language_model, learner.policy.tokenizer)
    return decode_responses(samples, learner.policy.tokenizer, special, generation)


def tokens_of(samples, row):
    return samples.response_ids[row][samples.response_mask[row]].tolist()


def recorded(monkeypatch):
    """Makes sampling note how many rows it prefills, and how many go on after each selection."""
    prefilled, selected = [], []

    class Recording:
        def __init__(self, decoder):
            self._decoder = decoder
            self.step, self.logits = decoder.step, decoder.logits

        def prefill(self, ids, mask):
            prefilled.append([tuple(row[keep].tolist()) for row, keep in zip(ids, mask, strict=True)])
            return self._decoder.prefill(ids, mask)

        def select(self, rows):
            selected.append(len(rows))
            self._decoder.select(rows)

    @contextmanager
    def recording(*arguments):
        with open_decoder(*arguments) as decoder:
            yield Recording(decoder)

    monkeypatch.setattr(sampling, "open_decoder", recording)
    return prefilled, selected


def assert_same(ours, theirs):
    assert ours.response_ids.equal(theirs.response_ids)
    assert ours.response_mask.equal(theirs.response_mask)
    assert ours.ended.equal(theirs.ended)
    assert (ours.log_probs - theirs.log_probs).abs().max() < 1e-9
    assert (ours.hidden - theirs.hidden).abs().max() < 1e-9


@pytest.mark.parametrize("options", [{}, {"stop": ["e", "Q"]}, {"do_sample": False, "repetition_penalty": 1.7}])
def test_responses_are_the_same_whether_rows_leave_early_or_not(architecture, options, monkeypatch):
    learner = learner_of(architecture)
    generation = OFTEN_ENDED.model_copy(update=options)
    _, selected = recorded(monkeypatch)
    monkeypatch.setattr(sampling, "MAX_SHARE_TO_SHRINK", 0.0)
    kept = sampled(learner, generation)
    assert not selected
    assert len(set(kept.response_mask.sum(dim=1).tolist())) >= 3
    for share in (0.5, 1.0):
        monkeypatch.setattr(sampling, "MAX_SHARE_TO_SHRINK", share)
        left = sampled(learner, generation)
        assert min(selected) < len(PROMPTS)
        assert_same(left, kept)


def test_a_prompt_that_repeats_is_prefilled_once_and_its_samples_are_its_own(architecture, monkeypatch):
    learner = learner_of(architecture)
    batch = repeated_batch(learner, PROMPTS[:3], 3)
    assert batch.sample_indices == [0, 1, 2] * 3
    prefilled, _ = recorded(monkeypatch)
    together = sampled(learner, OFTEN_ENDED, batch)
    assert [len(prompts) for prompts in prefilled] == [3]
    assert set(prefilled[0]) == {tuple(batch.ids[row][batch.mask[row]].tolist()) for row in (0, 3, 6)}
    assert len({tuple(tokens_of(together, row)) for row in range(9)}) == 9
    for row in range(9):
        apart = sampled(learner, OFTEN_ENDED, alone(batch, row))
        length = len(tokens_of(apart, 0))
        assert tokens_of(together, row) == tokens_of(apart, 0)
        assert (together.log_probs[row, :length] - apart.log_probs[0]).abs().max() < 1e-9
        assert (together.hidden[row, :length] - apart.hidden[0]).abs().max() < 1e-9


def test_rows_of_the_same_text_among_others_share_a_prefill_and_keep_their_place(architecture, monkeypatch):
    learner = learner_of(architecture)
    batch = prompt_batch(learner, ["no", "why not", "no", "x", "why not", "no"])
    prefilled, _ = recorded(monkeypatch)
    together = sampled(learner, OFTEN_ENDED, batch)
    assert [len(prompts) for prompts in prefilled] == [3]
    for row in range(len(batch)):
        assert tokens_of(together, row) == tokens_of(sampled(learner, OFTEN_ENDED, alone(batch, row)), 0)


@pytest.mark.parametrize("texts", [PROMPTS, PROMPTS[:2] * 3], ids=["distinct", "repeated"])
def test_the_hidden_states_are_those_of_a_whole_pass_and_0_outside_the_mask(architecture, texts):
    learner = learner_of(architecture)
    batch = prompt_batch(learner, texts)
    samples = sampled(learner, OFTEN_ENDED, batch)
    mask = samples.response_mask
    assert not mask.all()
    with learner.policy.merged_adapter() as model, torch.no_grad():
        ids = torch.cat([batch.ids, samples.response_ids], dim=1)
        whole = model.response_hidden(ids, torch.cat([batch.mask, mask], dim=1), mask.shape[1])
    assert (samples.hidden - whole)[mask].abs().max() < 1e-9
    assert samples.hidden[~mask].eq(0).all()
    assert samples.log_probs[~mask].eq(0).all()


def test_stop_strings_end_the_same_responses_when_rows_leave(architecture, monkeypatch):
    monkeypatch.setattr(sampling, "MAX_SHARE_TO_SHRINK", 1.0)
    learner = learner_of(architecture)
    tokenizer = learner.policy.tokenizer
    generation = GenerationConfig(max_new_tokens=16)
    free = sampled(learner, generation)
    texts = texts_of(free, learner, generation)
    stop = tuple(text[n : n + 2] for text, n in zip(texts[:5], (1, 3, 5, 7, 9), strict=True))
    _, selected = recorded(monkeypatch)
    generation = GenerationConfig(max_new_tokens=16, stop=stop)
    samples = sampled(learner, generation)
    shown = texts_of(samples, learner, generation)
    assert min(selected) <= 3
    for row in range(len(PROMPTS)):
        tokens = tokens_of(free, row)
        texts = [tokenizer.decode(tokens[:end], skip_special_tokens=True) for end in range(1, len(tokens) + 1)]
        ends = [end for end, text in enumerate(texts, start=1) if any(string in text for string in stop)]
        used = ends[0] if ends else len(tokens)
        assert tokens_of(samples, row) == tokens[:used]
        assert samples.ended[row] == (bool(ends) or bool(free.ended[row]))
        text = texts[used - 1]
        assert shown[row] == text[: min((text.find(s) for s in stop if s in text), default=len(text))]


def test_the_repetition_penalty_follows_its_row_when_others_leave(architecture, monkeypatch):
    monkeypatch.setattr(sampling, "MAX_SHARE_TO_SHRINK", 1.0)
    learner = learner_of(architecture)
    generation = GenerationConfig(
        max_new_tokens=20, do_sample=False, repetition_penalty=1e6, eos_token_id=tuple(range(200, 225))
    )
    batch = prompt_batch(learner)
    _, selected = recorded(monkeypatch)
    samples = sampled(learner, generation, batch)
    assert len(set(samples.response_mask.sum(dim=1).tolist())) > 1
    assert min(selected) < len(PROMPTS)
    for row in range(len(PROMPTS)):
        tokens = tokens_of(samples, row)
        assert len(set(tokens)) == len(tokens)
        assert not set(tokens) & set(batch.ids[row][batch.mask[row]].tolist())
        assert tokens == tokens_of(sampled(learner, generation, alone(batch, row)), 0)


@pytest.mark.parametrize("name", ["gpt_neox", *STATES])
def test_a_model_of_another_type_is_sampled_from_alike(name, monkeypatch):
    learner = tiny_learner("gpt2")
    model, tokenizer = model_of(name), byte_tokenizer("gpt2")
    batch = repeated_batch(learner, PROMPTS[:4], 2)
    special = SpecialTokens(eos=tuple(range(40)), pad=0)
    prefilled, _ = recorded(monkeypatch)
    together = sample(model, tokenizer, batch, OFTEN_ENDED, special, KEY)
    assert [len(prompts) for prompts in prefilled] == [4]
    assert len(set(together.response_mask.sum(dim=1).tolist())) >= 3
    for row in range(len(batch)):
        apart = sample(model, tokenizer, alone(batch, row), OFTEN_ENDED, special, KEY)
        length = len(tokens_of(apart, 0))
        assert tokens_of(together, row) == tokens_of(apart, 0)
        assert (together.hidden[row, :length] - apart.hidden[0]).abs().max() < ROUNDING.get(name, 1e-9)


def test_responses_are_the_same_however_seldom_the_ended_rows_are_looked_for(architecture, monkeypatch):
    learner = learner_of(architecture)
    generation = OFTEN_ENDED.model_copy(update={"max_new_tokens": 60})
    often = sampled(learner, generation)
    monkeypatch.setattr(sampling, "LOOK_EVERY", {"cpu": 7})
    monkeypatch.setattr("konic.finetuning.rollout.decoding.FusedDecoder", GraphedDecoder)
    seldom = sampled(learner, generation)
    assert often.response_mask.shape[1] < 60
    assert_same(seldom, often)


@pytest.mark.parametrize("kind", ["recurrent_gemma", "minimax"])
def test_models_that_cannot_be_sampled_in_batches_are_refused_by_name_before_anything_is_sampled(kind, tmp_path):
    save_base(kind, tmp_path)

    def nothing(prompt, response):
        return 0.0

    agent = KonicFinetuningAgent(
        str(tmp_path), KonicLLMRewardComposer(reward_functions=[nothing]), None, {"prompts": ["a", "b"]},
        {"batch_size": 2}, {"max_new_tokens": 4, "max_prompt_length": 16},
    )  # fmt: skip
    for name, value in (("train", 1), ("generate", ["a"]), ("evaluate", ["a"])):
        engine = KonicFinetuningEngine.from_agent(agent, checkpoint_dir=tmp_path / "run", device="cpu")
        with pytest.raises(ModelError, match=rf"{kind} models (compute a row|cannot be run).*Use a model of another"):
            getattr(engine, name)(value)
    assert not (tmp_path / "run").exists()
