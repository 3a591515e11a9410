"""precision="bfloat16": what is exact stays exact, and the rest is as near to fp32 as the rounded base allows."""

import json
from pathlib import Path

import peft
import pytest
import torch

from conftest import LORA_TARGETS, loaded_model, prompt_batch, roll, shake_adapter, tiny_learner
from konic.finetuning import DatasetConfig, KonicFinetuningEngine
from konic.finetuning.agent import KonicFinetuningAgent
from konic.finetuning.config import GenerationConfig, LoraConfig, TrainingConfig
from konic.finetuning.errors import ConfigError, OutputError
from konic.finetuning.learning import learner as learner_module
from konic.finetuning.learning.estimators import compute_advantages
from konic.finetuning.learning.learner import build_learner, make_learner
from konic.finetuning.learning.schedule import Schedule
from konic.finetuning.learning.update import make_optimizer, update
from konic.finetuning.models.policy import Policy
from konic.finetuning.models.prepacked import layouts
from konic.finetuning.rewards.scoring import Scores
from konic.finetuning.rollout import rollout as rollout_module
from konic.finetuning.rollout.rollout import sample_rollout
from konic.finetuning.rollout.sampler import RandomKey, find_special_tokens
from konic.finetuning.system.files import SEAL_FILE, seal
from konic.finetuning.system.processor import has_bfloat16
from test_engine import LetterRewards, Silent, make_engine, same_tensors, weights

GENERATION = GenerationConfig(max_new_tokens=8, max_prompt_length=32, temperature=0.9, eos_token_id=tuple(range(40)))
REWARDS = [0.3, -1.0, 2.0, 0.1, 0.7, -0.2, 1.1, 0.0]
KEY = RandomKey(3, 1)


def learner_of(architecture, config):
    return tiny_learner(architecture, training=config, generation=GENERATION, dtype=torch.bfloat16)


def same_weights_in_float32(learner, architecture, config):
    """A learner whose base has the rounded weights of another one, but computes in fp32; with its adapter."""
    loaded = loaded_model(architecture, torch.bfloat16)
    loaded.model.float()
    adapter = LoraConfig(r=4, target_modules=LORA_TARGETS[architecture])
    policy = Policy(loaded, adapter, config.gradient_checkpointing)
    with torch.no_grad():
        for name, weight in policy.trainable().items():
            weight.copy_(learner.policy.trainable()[name])
    tokens = find_special_tokens(GENERATION, policy.language_model, policy.tokenizer)
    return make_learner(policy, make_optimizer(policy, config), tokens, architecture)


def take_gradient(learner, rolled, config, monkeypatch):
    """The gradient of one optimizer step on given samples, by parameter, instead of the step; and its statistics."""
    taken = {}
    scores = Scores(list(REWARDS), {}, parts={"all": list(REWARDS)}, weights={"all": 1.0})
    advantages = compute_advantages(rolled, scores, config, config.kl_penalty_weight)
    named = learner.policy.trainable()

    def capture(self, closure=None):
        taken.update({name: p.grad.clone() for name, p in named.items() if p.grad is not None})

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", capture)
        stats = update(learner.policy, learner.optimizer, rolled, advantages, config, Schedule(0, 1, 1e-2))
    return taken, stats


def given_samples(samples):
    return lambda batch, generation, rng_key: samples


@pytest.mark.parametrize("checkpointing", [False, True])
def test_ratio_kl_and_gradient_are_near_those_of_fp32_with_the_same_weights(architecture, checkpointing, monkeypatch):
    config = TrainingConfig(
        batch_size=8, ppo_epochs=1, gradient_checkpointing=checkpointing, max_grad_norm=1e9, kl_placement="loss"
    )
    half = learner_of(architecture, config)
    shake_adapter(half.policy)
    batch = prompt_batch(half)
    rolled = roll(half, batch, GENERATION, KEY)
    full = same_weights_in_float32(half, architecture, config)
    sampler = given_samples(rolled.samples)
    truth = sample_rollout(full.policy, sampler, batch, GENERATION, full.special_tokens, KEY)
    mask = rolled.response_mask
    for name, limit in {"log_probs": 0.03, "ref_log_probs": 0.03, "kl": 0.01}.items():
        difference = (getattr(rolled, name) - getattr(truth, name))[mask].abs().mean()
        assert 0 < difference < limit, name
    assert truth.kl[mask].mean() > 0.1  # so that the limit of its error means something

    ours, stats = take_gradient(half, rolled, config, monkeypatch)
    exact, _ = take_gradient(full, truth, config, monkeypatch)
    assert stats.first_log_ratio == 0.0
    assert ours.keys() == exact.keys()
    assert {gradient.dtype for gradient in ours.values()} == {torch.float32}
    ours, exact = (torch.cat([g.flatten() for g in found.values()]) for found in (ours, exact))
    assert torch.nn.functional.cosine_similarity(ours, exact, dim=0) > 0.999
    assert (ours - exact).norm() / exact.norm() < 0.06


def test_a_prompt_that_a_group_shares_is_read_the_same_way_before_the_update_and_in_it(model_folders, tmp_path):
    prompts = DatasetConfig(prompts=[f"a longer prompt than the others, {letter}" * 2 for letter in "abcd"])
    for checkpointing in (False, True):
        engine = run_of(
            model_folders["llama"], tmp_path / str(checkpointing), dataset=prompts, batch_size=8, ppo_epochs=1,
            algorithm="gspo", num_generations=8, gradient_checkpointing=checkpointing,
            generation={"max_new_tokens": 20, "max_prompt_length": 90},
        )  # fmt: skip
        for result in engine.train(2).history:
            assert (result.first_log_ratio, result.clip_fraction) == (0.0, 0.0)


@pytest.mark.parametrize(("dtype", "is_packed"), [(torch.bfloat16, False), (torch.float32, True)])
def test_the_head_that_scores_in_bf16_is_that_of_the_update(dtype, is_packed, monkeypatch):
    learner = tiny_learner("llama", training=TrainingConfig(batch_size=8), dtype=dtype)
    model, packed, exact = learner.policy.language_model, [], rollout_module.score_under_reference

    def noted(*arguments):
        packed.append(model._prepacked_head is not None)
        return exact(*arguments)

    monkeypatch.setattr(rollout_module, "score_under_reference", noted)
    roll(learner, prompt_batch(learner), GenerationConfig(max_new_tokens=20), KEY)
    assert packed == [is_packed]


def test_a_resume_in_another_precision_takes_a_layout_that_it_has(model_folders, tmp_path, caplog):
    generation = {"max_new_tokens": 20, "decode_layout": "mkl"}
    if "mkl" not in layouts(torch.float32):
        pytest.skip("this build of torch has no MKL")
    run_of(model_folders["llama"], tmp_path, precision="float32", generation=generation).train(1)
    generation = {"max_new_tokens": 20}
    engine = run_of(model_folders["llama"], tmp_path, generation=generation)
    engine.train(2, resume_from_checkpoint=True, allow_changes=True)
    assert "decode_plan was {'layout': 'mkl', 'threads': None}, which is not possible here" in caplog.text


def test_gradient_checkpointing_changes_no_bit(architecture, monkeypatch):
    found = []
    for checkpointing in (False, True):
        config = TrainingConfig(batch_size=8, ppo_epochs=1, gradient_checkpointing=checkpointing)
        learner = learner_of(architecture, config)
        shake_adapter(learner.policy)
        rolled = roll(learner, prompt_batch(learner), GENERATION, KEY)
        found.append(take_gradient(learner, rolled, config, monkeypatch)[0])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_stands_in_the_padding_changes_no_bit_and_more_padding_only_rounding(architecture):
    learner = learner_of(architecture, TrainingConfig(batch_size=8))
    model, rolled = learner.policy.language_model, roll(learner, prompt_batch(learner), GENERATION, KEY)
    length = rolled.response_mask.shape[1]
    with torch.no_grad():
        hidden = model.response_hidden(rolled.ids, rolled.mask, length)
        garbage = torch.where(rolled.mask, rolled.ids, 77)
        assert torch.equal(model.response_hidden(garbage, rolled.mask, length)[rolled.response_mask],
                           hidden[rolled.response_mask])  # fmt: skip
        for row in range(len(rolled.ids)):
            alone = model.response_hidden(rolled.ids[row : row + 1], rolled.mask[row : row + 1], length)
            counts = rolled.response_mask[row]
            both = [model.logits(states[counts]).log_softmax(-1) for states in (alone[0], hidden[row])]
            assert (both[0] - both[1]).abs().mean() < 0.05


def run_of(folder, run, architecture="llama", **training):
    options = {"precision": "bfloat16", "batch_size": 4, "ppo_epochs": 2} | training
    return make_engine(folder, run, architecture=architecture, **options)


def test_a_run_starts_exactly_resumes_bitwise_and_says_its_precision(model_folders, tmp_path):
    whole = run_of(model_folders["llama"], tmp_path / "whole").train(4, save_every=2)
    first = whole.history[0]
    assert (first.first_log_ratio, first.kl_divergence, first.kl_per_response) == (0.0, 0.0, 0.0)
    assert all(result.first_log_ratio == 0.0 for result in whole.history)
    assert whole.history[-1].kl_divergence > 0
    assert all(result.sampler_gap > 0 and 0 < result.effective_sample_size < 1 for result in whole.history[1:])

    run_of(model_folders["llama"], tmp_path / "cut").train(2)
    run_of(model_folders["llama"], tmp_path / "cut").train(4, resume_from_checkpoint=True)
    for name in ("final", "best", "checkpoint-4"):
        same_tensors(weights(tmp_path / "whole" / name), weights(tmp_path / "cut" / name))
    saved = weights(tmp_path / "cut" / "final")["adapter_model.safetensors"]
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    record = json.loads((tmp_path / "cut" / "run.json").read_text())
    assert record["settings"]["precision"] == "bfloat16"
    with pytest.raises(OutputError, match="precision was 'bfloat16' and is 'float32'"):
        run_of(model_folders["llama"], tmp_path / "cut", precision="float32").train(5, resume_from_checkpoint=True)


def test_the_adapter_is_merged_into_the_weights_as_they_were_before_rounding(model_folders, tmp_path, architecture):
    from transformers import AutoModelForCausalLM

    engine = run_of(model_folders[architecture], tmp_path / "run", architecture)
    engine.train(1)
    engine.save_pretrained(tmp_path / "merged", merge=True)
    base = AutoModelForCausalLM.from_pretrained(model_folders[architecture])
    expected = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "final").merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in merged.values())


@pytest.mark.parametrize(
    ("has_it", "chosen", "why"),
    [
        (True, "bfloat16", "this processor has instructions for it"),
        (False, "float32", "this processor has no instructions for bfloat16"),
    ],
)
def test_auto_takes_what_suits_the_processor(model_folders, has_it, chosen, why, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(learner_module, "has_bfloat16", lambda: has_it)
    run_of(model_folders["llama"], tmp_path / "run", precision="auto").train(1)
    assert f"precision='auto' takes {chosen}: {why}" in caplog.text
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["precision"] == chosen
    again = run_of(model_folders["llama"], tmp_path / "run", precision="auto")
    assert again.train(2, resume_from_checkpoint=True).total_iterations == 2


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_auto_takes_float32_where_weights_of_the_base_are_trained(model_folders, bias, caplog, monkeypatch):
    monkeypatch.setattr(learner_module, "has_bfloat16", lambda: True)
    agent = agent_of(model_folders["llama"], LoraConfig(r=2, bias=bias), precision="auto")
    chosen = build_learner(agent, torch.device("cpu")).policy.precision
    assert chosen == ("bfloat16" if bias == "none" else "float32")
    assert ("needs a LoraConfig that leaves the base model as it is" in caplog.text) == (bias != "none")


def test_auto_asks_about_the_device_that_trains_and_not_where_weights_are_read(model_folders, monkeypatch):
    monkeypatch.setattr(learner_module, "has_bfloat16", lambda: True)
    agent = agent_of(model_folders["llama"], LoraConfig(r=2), precision="auto")
    cpu = torch.device("cpu")
    for trains_on, dtype in ((cpu, torch.bfloat16), (torch.device("cuda"), torch.float32)):
        assert learner_module._load_base(agent, cpu, trains_on)[0].model.dtype == dtype


def test_a_run_that_auto_began_elsewhere_is_resumed_by_the_name_of_its_precision(model_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(learner_module, "has_bfloat16", lambda: True)
    run_of(model_folders["llama"], tmp_path / "run", precision="auto").train(1)
    monkeypatch.setattr(learner_module, "has_bfloat16", lambda: False)
    with pytest.raises(OutputError, match="precision was 'bfloat16' and is 'float32'"):
        run_of(model_folders["llama"], tmp_path / "run", precision="auto").train(2, resume_from_checkpoint=True)
    named = run_of(model_folders["llama"], tmp_path / "run", precision="bfloat16")
    assert named.train(2, resume_from_checkpoint=True).total_iterations == 2


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the system does not list what its processor has")
def test_the_processor_says_whether_it_has_instructions_for_bfloat16():
    words = Path("/proc/cpuinfo").read_text().split()
    assert has_bfloat16() == ("amx_bf16" in words or "avx512_bf16" in words)


def agent_of(folder, lora=None, dtype=None, **training):
    kwargs = {} if dtype is None else {"dtype": dtype}
    configs = {"training_config": training, "generation_config": GENERATION}
    return KonicFinetuningAgent(folder, LetterRewards(), lora, model_kwargs=kwargs, **configs)


@pytest.mark.parametrize("dtype", ["float32", torch.float16, "auto", {"text_config": "float32"}])
def test_a_dtype_that_contradicts_the_precision_is_one_error(dtype):
    with pytest.raises(ConfigError, match=r"precision='bfloat16'\) and model_kwargs=.*Leave dtype out"):
        agent_of("gpt2", dtype=dtype, precision="bfloat16")
    for contradicting in ("bfloat16", dtype):
        with pytest.raises(ConfigError, match="contradict"):
            agent_of("gpt2", dtype=contradicting, precision="auto")
    assert agent_of("gpt2", dtype=torch.bfloat16, precision="bfloat16")
    assert agent_of("gpt2", dtype=dtype)  # a dtype alone says what it always did


PARTLY_TRAINED = {
    "every weight": None,
    "biases": LoraConfig(r=2, bias="all", target_modules=("c_attn",)),
    "a copy of the head": peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "a start that rewrites the model": peft.LoraConfig(
        r=2, target_modules=["c_attn"], init_lora_weights="pissa", fan_in_fan_out=True
    ),
}


@pytest.mark.parametrize("lora", PARTLY_TRAINED.values(), ids=PARTLY_TRAINED)
def test_weights_that_would_be_trained_rounded_are_refused(lora, model_folders):
    architecture = "llama" if getattr(lora, "modules_to_save", None) else "gpt2"
    agent = agent_of(model_folders[architecture], lora, precision="bfloat16")
    with pytest.raises(ConfigError, match=r"precision='bfloat16'\) rounds .*, or set precision='float32'"):
        build_learner(agent, torch.device("cpu"))


def test_a_run_that_named_only_a_dtype_says_its_precision_and_resumes_as_before(model_folders, tmp_path):
    """Also from a checkpoint that was written before the setting existed."""

    def engine():
        adapter = LoraConfig(r=4, target_modules=("q_proj",))
        agent = agent_of(model_folders["llama"], adapter, torch.bfloat16, batch_size=4, ppo_epochs=1)
        return KonicFinetuningEngine.from_agent(agent, checkpoint_dir=tmp_path / "run", callback=Silent(), device="cpu")

    engine().train(1)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    record = json.loads((checkpoint / "trainer_state.json").read_text())
    assert record["settings"].pop("precision") == "bfloat16"
    (checkpoint / "trainer_state.json").write_text(json.dumps(record))
    (checkpoint / SEAL_FILE).unlink()
    seal(checkpoint)
    assert engine().train(2, resume_from_checkpoint=True).total_iterations == 2
