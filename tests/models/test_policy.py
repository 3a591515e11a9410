import peft
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from conftest import LORA_TARGETS, loaded_model, prompt_batch, shake_adapter, tiny_learner, tiny_model
from konic.finetuning.config import LoraConfig
from konic.finetuning.errors import ConfigError, TrainingError
from konic.finetuning.models import language_model
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.loading import load_model
from konic.finetuning.models.policy import Policy
from konic.finetuning.models.positions import position_ids
from konic.finetuning.models.token_scores import score_tokens
from konic.finetuning.rollout.decoding import require_decodable

needs_mkldnn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="nothing is packed without oneDNN")


def logits_of(model, ids):
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        return model.logits(model.decode(ids, mask, position_ids(mask)))


IDS = torch.tensor([[5, 9, 44, 100, 3, 7]])


def test_a_fresh_adapter_changes_nothing_bit_for_bit(architecture):
    base = tiny_model(architecture)
    policy = tiny_learner(architecture).policy
    truth = base(IDS).logits
    assert torch.equal(logits_of(policy.language_model, IDS), truth)
    with policy.reference() as reference:
        assert torch.equal(logits_of(reference, IDS), truth)


def test_the_reference_is_the_loaded_model_however_far_the_adapter_goes(architecture):
    policy = tiny_learner(architecture).policy
    shake_adapter(policy)
    truth = tiny_model(architecture)(IDS).logits
    assert (logits_of(policy.language_model, IDS) - truth).abs().max() > 0.1
    with policy.reference() as reference:
        assert torch.equal(logits_of(reference, IDS), truth)
    policy.check_reference()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "v_proj")])
def test_a_real_model_in_sixteen_bits_passes_every_check_at_the_start(dtype, targets):
    """SmolLM2: rounding on tokens that no text holds, such as reserved ones in a row, is as large as its logits."""
    loaded = load_model("smollm2-135m", {"dtype": dtype}, torch.device("cpu"))
    policy = Policy(loaded, LoraConfig(r=1, target_modules=targets))
    require_decodable(policy.language_model, "smollm2-135m")
    policy.check_reference()


IN_16_BITS = {
    "every weight": None,
    "a copy of the head": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "biases": peft.LoraConfig(target_modules=["c_attn"], bias="all", fan_in_fan_out=True),
}


@pytest.mark.parametrize("lora", IN_16_BITS.values(), ids=IN_16_BITS)
def test_weights_in_sixteen_bits_are_not_trained_without_a_word(lora, caplog):
    architecture = "gpt2" if lora is not None and lora.bias == "all" else "llama"
    with pytest.raises(ConfigError, match=r"\S+ would be trained in float16.* float32, or use LoRA without modules_to"):
        Policy(loaded_model(architecture, torch.float16), lora)
    assert "frozen copy" not in caplog.text  # that is made only of what can be trained
    Policy(loaded_model(architecture, torch.bfloat16), lora)
    assert "is trained in torch.bfloat16: steps smaller than its rounding error are lost" in caplog.text
    caplog.clear()
    Policy(loaded_model(architecture, torch.float32), lora)
    assert "rounding" not in caplog.text


@pytest.mark.parametrize("cause", ["frozen", "quantised"])
def test_a_policy_in_which_no_weight_of_the_model_learns_is_refused(cause, caplog):
    loaded = loaded_model("llama")
    loaded.model.requires_grad_(cause != "frozen")
    loaded.model.is_quantized = cause == "quantised"
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM are quantised or frozen\. Give a lora_config"):
        Policy(loaded, None)
    assert "frozen copy" not in caplog.text
    assert any("lora_A" in name for name in Policy(loaded, LoraConfig(r=2, target_modules=("q_proj",))).trainable())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lora_weights_are_trained_in_float32_whatever_the_model_has(dtype, caplog):
    policy = Policy(loaded_model("llama", dtype), LoraConfig(r=2, target_modules=("q_proj",)))
    assert {weight.dtype for weight in policy.trainable().values()} == {torch.float32}
    assert "rounding" not in caplog.text


def test_full_finetuning_keeps_a_frozen_copy_as_the_reference(architecture):
    policy = tiny_learner(architecture, lora=False).policy
    shake_adapter(policy)
    with policy.reference() as reference:
        assert torch.equal(logits_of(reference, IDS), tiny_model(architecture)(IDS).logits)
        assert not any(weight.requires_grad for weight in reference.causal_lm.parameters())
    policy.check_reference()


@pytest.mark.parametrize(
    ("options", "kind"),
    [({"bias": "all"}, "gpt2"), ({"init_lora_weights": "pissa"}, "gpt2"), ({"init_lora_weights": "olora"}, "llama")],
)
def test_adapters_that_rewrite_the_base_get_a_frozen_copy(options, kind):
    adapter = peft.LoraConfig(r=4, target_modules=list(LORA_TARGETS[kind]), **options)
    policy = Policy(loaded_model(kind, torch.float32), adapter)
    shake_adapter(policy)
    with policy.reference() as reference:
        assert torch.equal(logits_of(reference, IDS), tiny_model(kind, torch.float32)(IDS).logits)


def test_a_reference_that_moved_is_noticed():
    policy = tiny_learner("llama").policy
    with torch.no_grad():
        policy.language_model.causal_lm.get_input_embeddings().weight.add_(0.01)
    with pytest.raises(TrainingError, match="reference policy has moved"):
        policy.check_reference()


def test_merged_layers_sample_what_trains_and_leave_every_weight_as_it_was(architecture):
    policy = tiny_learner(architecture).policy
    shake_adapter(policy)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    truth = logits_of(policy.language_model, IDS)
    with policy.merged_adapter() as merged:
        assert (logits_of(merged, IDS) - truth).abs().max() < 1e-9
        assert not any("lora" in name for name, _ in merged.causal_lm.named_modules())
    after = policy.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits_of(policy.language_model, IDS), truth)


def test_merging_ends_when_sampling_raises():
    policy = tiny_learner("gpt2").policy
    names = [name for name, _ in policy.model.named_modules()]
    with pytest.raises(KeyError), policy.merged_adapter():
        raise KeyError
    assert [name for name, _ in policy.model.named_modules()] == names


@pytest.mark.parametrize("lora", [True, False])
def test_dropout_is_off_in_train_mode_whatever_model_and_adapter_say(architecture, lora):
    policy = tiny_learner(architecture, lora=lora, dropout=0.5).policy
    shake_adapter(policy)
    quiet = logits_of(policy.language_model, IDS)
    policy.model.train()
    assert torch.equal(logits_of(policy.language_model, IDS), quiet)


def test_only_the_adapter_and_the_value_head_learn():
    names = list(tiny_learner("llama").policy.trainable())
    assert all("lora_" in name for name in names[:-2])
    assert names[-2:] == ["value_head.weight", "value_head.bias"]


def test_the_value_head_starts_at_zero():
    policy = tiny_learner("llama").policy
    assert policy.value_head(torch.randn(3, 5, 32, dtype=torch.float64)).abs().max() == 0


def test_adapter_weights_follow_the_seed_and_leave_the_global_generator_alone():
    def weights(seed):
        policy = tiny_learner("llama", seed=seed).policy
        return torch.cat([w.flatten() for name, w in policy.trainable().items() if "lora_A" in name])

    tiny_learner("llama")  # every import done
    state = torch.random.get_rng_state()
    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))
    torch.manual_seed(0)
    tiny_model("llama")  # draws from the global generator, as the fixture's model does
    expected = torch.random.get_rng_state()
    tiny_learner("llama")
    assert torch.equal(torch.random.get_rng_state(), expected)
    torch.random.set_rng_state(state)


def test_conv1d_adapters_need_no_hint_and_draw_no_warning(recwarn):
    for fan_in_fan_out in (None, True, False):
        adapter = LoraConfig(target_modules=("c_attn", "c_proj"), fan_in_fan_out=fan_in_fan_out)
        policy = Policy(loaded_model("gpt2"), adapter)
        assert policy.model.peft_config["default"].fan_in_fan_out is True
    policy = Policy(loaded_model("llama"), LoraConfig(target_modules=("q_proj",), fan_in_fan_out=True))
    assert policy.model.peft_config["default"].fan_in_fan_out is False
    assert not recwarn.list


def test_targets_that_match_nothing_are_named_with_the_candidates():
    with pytest.raises(ConfigError, match=r"'q_porj' matches no layer.*Did you mean 'q_proj'.*down_proj, .*v_proj"):
        Policy(loaded_model("llama"), LoraConfig(target_modules=("q_porj",)))


def test_targets_of_which_some_match_are_one_warning_that_names_the_others(caplog):
    policy = Policy(loaded_model("llama"), LoraConfig(target_modules=("v_proj", "q_porj", "c_attn")))
    (message,) = [record.message for record in caplog.records]
    assert "'c_attn', 'q_porj' match no layer of LlamaForCausalLM. Did you mean 'q_proj'?" in message
    assert message.endswith("Only v_proj is adapted.")
    assert {name.split(".")[-4] for name in policy.trainable() if "lora_" in name} == {"v_proj"}


def test_without_targets_peft_chooses(architecture):
    policy = Policy(loaded_model(architecture), LoraConfig())
    expected = {"gpt2": "c_attn", "llama": "q_proj"}[architecture]
    assert any(expected in name for name in policy.trainable())


def test_a_softcapped_head_is_scored_as_the_model_does():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.5, pad_token_id=0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).to(torch.float64).eval()
    ours = LanguageModel(model)
    ours.check_logits()
    assert (logits_of(ours, IDS) - model(IDS).logits).abs().max() < 1e-9
    ours.softcap = None
    with pytest.raises(Exception, match="transforms its logits"):
        ours.check_logits()


def test_scored_log_probs_are_the_models_own_without_padding(architecture):
    learner = tiny_learner(architecture)
    batch = prompt_batch(learner)
    responses = torch.arange(10, 10 + len(batch) * 4).reshape(len(batch), 4)
    response_mask = torch.ones_like(responses, dtype=torch.bool)
    response_mask[2, 2:] = False
    model = learner.policy.language_model
    hidden = model.response_hidden(
        torch.cat([batch.ids, responses], 1), torch.cat([batch.mask, response_mask], 1), responses.shape[1]
    )
    scored = score_tokens(model, hidden, responses, response_mask, 0.7, needs_entropy=True, reference=None)
    log_probs, entropy = scored.log_probs, scored.entropy
    assert scored.kl is None
    truth_model = tiny_model(architecture)
    for row in range(len(batch)):
        length = int(response_mask[row].sum())
        ids = torch.cat([batch.ids[row][batch.mask[row]], responses[row, :length]])[None]
        with torch.no_grad():
            logits = truth_model(ids).logits[0, -length - 1 : -1] / 0.7
        truth = logits.log_softmax(-1)
        expected = truth[torch.arange(length), responses[row, :length]]
        assert (log_probs[row, :length] - expected).abs().max() < 1e-9
        assert (entropy[row, :length] + (truth.exp() * truth).sum(-1)).abs().max() < 1e-9
        assert log_probs[row, length:].abs().sum() == 0


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("num_response_tokens", [1, 5])
def test_a_prompt_of_several_rows_is_read_once_with_the_values_and_gradients_of_rows_apart(
    architecture, lora, num_response_tokens, monkeypatch
):
    learner = tiny_learner(architecture, lora=lora)
    shake_adapter(learner.policy)
    batch = prompt_batch(learner, ["no", "why not", "no", "a longer one", "why not", "no"])
    responses = torch.arange(10, 10 + 6 * num_response_tokens).reshape(6, -1)
    response_mask = torch.ones_like(responses, dtype=torch.bool)
    response_mask[1, 3:] = response_mask[5, 1:] = False
    ids, mask = torch.cat([batch.ids, responses], 1), torch.cat([batch.mask, response_mask], 1)
    weights = torch.randn(6, num_response_tokens, 32, dtype=torch.float64) * response_mask[..., None]
    monkeypatch.setattr(language_model, "cost_of_a_pass", lambda device: 0)
    decode, read = LanguageModel.decode, []

    def record(self, ids, *others):
        read.append(tuple(ids.shape))
        return decode(self, ids, *others)

    def gradients_of(*rows):
        for parameter in learner.policy.trainable().values():
            parameter.grad = None
        found = [
            learner.policy.language_model.response_hidden(ids[part], mask[part], num_response_tokens) for part in rows
        ]
        (torch.cat(found) * weights).sum().backward()
        named = learner.policy.trainable().items()
        return torch.cat(found).detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}

    apart, expected = gradients_of(*(slice(row, row + 1) for row in range(6)))
    assert expected
    monkeypatch.setattr(LanguageModel, "decode", record)
    together, gradients = gradients_of(slice(None))
    length = batch.ids.shape[1]
    assert read == [(3, length), (6, num_response_tokens - 1)][:num_response_tokens]
    assert ((together - apart) * response_mask[..., None]).abs().max() < 1e-9
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        difference = (gradient - expected[name]).abs().max()
        assert difference <= 1e-6 * expected[name].abs().max(), name  # Llama's norm computes in fp32 whatever the model
    with learner.policy.language_model.checkpointed():  # keeps no cache
        gradients_of(slice(None))
    assert read[-1] == (6, length + num_response_tokens - 1)


@pytest.mark.parametrize("saves", [True, False])
def test_a_prompt_is_read_once_only_where_that_saves_more_than_a_pass_costs(saves, monkeypatch):
    learner = tiny_learner("llama")
    batch = prompt_batch(learner, ["no", "why not", "no"])
    length = batch.ids.shape[1]
    monkeypatch.setattr(language_model, "cost_of_a_pass", lambda device: length - 1 if saves else length)
    assert (learner_reads(learner, batch, monkeypatch)[0][0] == 2) == saves


def test_a_model_whose_layers_forget_reads_every_row_whole(monkeypatch):
    config = MistralConfig(
        vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=3, pad_token_id=0,
    )  # fmt: skip
    learner = tiny_learner("llama")
    monkeypatch.setattr(learner.policy.language_model, "causal_lm", MistralForCausalLM(config).double().eval())
    monkeypatch.setattr(language_model, "cost_of_a_pass", lambda device: 0)
    batch = prompt_batch(learner, ["why not", "why not"])
    assert learner_reads(learner, batch, monkeypatch) == [(2, batch.ids.shape[1] + 3)]


def learner_reads(learner, batch, monkeypatch):
    """The shapes read for responses of 4 tokens."""
    decode, read = LanguageModel.decode, []

    def record(self, ids, *others):
        read.append(tuple(ids.shape))
        return decode(self, ids, *others)

    monkeypatch.setattr(LanguageModel, "decode", record)
    responses = torch.full((len(batch), 4), 7)
    ids, mask = torch.cat([batch.ids, responses], 1), torch.cat([batch.mask, responses > 0], 1)
    with torch.no_grad():
        learner.policy.language_model.response_hidden(ids, mask, 4)
    return read


@needs_mkldnn
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"scale": 0.5}])
def test_a_packed_head_gives_the_plain_ones_logits(architecture, options):
    model = LanguageModel(tiny_model(architecture, torch.float32))
    for name, value in options.items():
        setattr(model, name, value)
    hidden = torch.randn(3, 5, 32)
    with torch.no_grad():
        plain = model.logits(hidden)
        with model.prepacked_head(2):
            packed = model.logits(hidden)
            assert model._prepacked_head is not None
            with model.prepacked_head(8):
                assert model.logits(hidden).equal(packed)
            assert model.logits(hidden).equal(packed)
        torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-5)
        assert model.logits(hidden).equal(plain)
        with pytest.raises(KeyError), model.prepacked_head(2):
            raise KeyError
        assert model._prepacked_head is None


@needs_mkldnn
def test_a_head_that_is_not_plain_is_not_packed():
    adapter = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    model = Policy(loaded_model("llama", torch.float32), adapter).language_model
    with model.prepacked_head(2):
        assert model._prepacked_head is None
    with model.prepacked_head(None):
        assert model._prepacked_head is None


def test_a_scaled_head_is_scored_as_the_model_does():
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=8.0, initializer_range=0.5, pad_token_id=0,
    )  # fmt: skip
    model = GraniteForCausalLM(config).to(torch.float64).eval()
    ours = LanguageModel(model)
    assert (logits_of(ours, IDS) - model(IDS).logits).abs().max() < 1e-9


@pytest.mark.parametrize("targets", ["q_prj", "", (), ("mlp",), ("layers",), ("norm",)])
def test_targets_that_cannot_be_adapted_are_one_error_with_candidates(targets):
    with pytest.raises(ConfigError, match="q_proj"):
        Policy(loaded_model("llama"), LoraConfig(target_modules=targets))
