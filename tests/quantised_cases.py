"""A base in 4 or 8 bits: what samples, trains and is saved is one model, that of plain layers with the same weights.

models/test_quantised.py runs these cases where bitsandbytes is.
"""

import json
import os
import subprocess
import sys

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from command import konic_here
from conftest import LORA_TARGETS, shake_adapter
from konic.finetuning.config import LoraConfig
from konic.finetuning.errors import ConfigError
from konic.finetuning.models.loading import load_model
from konic.finetuning.models.policy import Policy
from konic.finetuning.models.policy_files import save_adapter
from konic.finetuning.rollout.decoding import require_decodable
from konic.saved.agents import SavedRun
from processes_job import QUANTISED as KINDS
from test_engine import completions, make_engine, metrics, same_tensors, weights
from test_processes import difference, run, save_models, told

IDS = torch.tensor([[3, 70, 9, 200, 41, 5, 256, 12], [8, 8, 1, 90, 33, 7, 2, 100]])
CPU = torch.device("cpu")


@pytest.fixture(params=KINDS)
def config(request):
    return BitsAndBytesConfig(**KINDS[request.param])


def policy_of(folder, architecture, config):
    adapter = LoraConfig(r=4, target_modules=LORA_TARGETS[architecture])
    return Policy(load_model(folder, {"quantization_config": config}, CPU), adapter)


def plain_model(folder, config):
    """The same weights in plain layers, unpacked by `transformers`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
    return model.dequantize().eval()


def spread(ours, truth):
    return ((ours - truth).norm() / (truth - truth.mean()).norm()).item()


def test_its_logits_are_those_of_plain_layers_with_the_same_weights(model_folders, architecture, config):
    policy = policy_of(model_folders[architecture], architecture, config)
    truth = plain_model(model_folders[architecture], config)(IDS).logits
    rounded = spread(truth, AutoModelForCausalLM.from_pretrained(model_folders[architecture]).eval()(IDS).logits)
    assert rounded > 0.004  # the weights are rounded
    with policy.reference() as reference, torch.no_grad():
        assert spread(reference.causal_lm(IDS).logits, truth) < 1e-6
    assert spread(policy.language_model.causal_lm(IDS).logits, truth) < 1e-6
    require_decodable(policy.language_model, "a model")


def test_a_folder_of_quantised_weights_is_the_model_that_was_saved(model_folders, architecture, config, tmp_path):
    folder = model_folders[architecture]
    saved = load_model(folder, {"quantization_config": config}, CPU)
    saved.model.save_pretrained(tmp_path / "model")
    saved.tokenizer.save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), {}, CPU).model
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, saved.model(IDS).logits)
    engine = make_engine(str(tmp_path / "model"), tmp_path / "run", architecture=architecture)
    result = engine.train(2)
    engine.save_pretrained(tmp_path / "merged", merge=True)
    trained = peft.PeftModel.from_pretrained(plain_model(folder, config), result.model_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert spread(merged(IDS).logits, trained(IDS).logits) < 1e-5


def test_gradients_are_those_of_plain_layers_with_the_same_weights(model_folders, architecture, config, tmp_path):
    policy = policy_of(model_folders[architecture], architecture, config)
    shake_adapter(policy)
    save_adapter(policy, tmp_path)
    plain = peft.PeftModel.from_pretrained(
        plain_model(model_folders[architecture], config), tmp_path, is_trainable=True
    )
    for model in (policy.adapted, plain):
        with torch.no_grad():
            model(IDS[:1])  # a pass without gradients changes nothing
        model(IDS).logits.logsumexp(-1).sum().backward()
    truth = {name: weight.grad for name, weight in plain.named_parameters() if weight.grad is not None}
    ours = {name: weight.grad for name, weight in policy.adapted.named_parameters() if weight.grad is not None}
    assert ours.keys() == truth.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, truth[name], rtol=1e-4, atol=1e-5)


def test_what_samples_is_what_trains(model_folders, architecture, config):
    policy = policy_of(model_folders[architecture], architecture, config)
    shake_adapter(policy)
    with torch.no_grad():
        truth = policy.language_model.causal_lm(IDS).logits
        with policy.merged_adapter() as model:
            assert spread(model.causal_lm(IDS).logits, truth) < 1e-6


def test_a_run_learns_resumes_bit_for_bit_and_leaves_a_plain_model(model_folders, architecture, config, tmp_path):
    folder, settings = model_folders[architecture], {"batch_size": 8, "learning_rate": 3e-2}
    options = {"architecture": architecture, "model_kwargs": {"quantization_config": config}} | settings
    whole = make_engine(folder, tmp_path / "whole", **options)
    result = whole.train(4)
    assert result.get_kl_curve()[0] < 1e-7 < result.get_kl_curve()[-1]
    make_engine(folder, tmp_path / "parts", **options).train(2, save_every=1)
    make_engine(folder, tmp_path / "parts", **options).train(4, resume_from_checkpoint=True)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert completions(tmp_path / "parts") == completions(tmp_path / "whole")
    same_tensors(weights(tmp_path / "parts/final"), weights(tmp_path / "whole/final"))

    whole.save_pretrained(tmp_path / "merged", merge=True)
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    trained = peft.PeftModel.from_pretrained(plain_model(folder, config), result.model_path)
    truth = trained(IDS).logits
    assert konic_here("export", tmp_path / "whole", "--output", tmp_path / "exported").returncode == 0
    agent = SavedRun.read(tmp_path / "whole").agent("final")
    assert BitsAndBytesConfig.from_dict(agent.get_model_kwargs()["quantization_config"]).to_dict() == config.to_dict()
    for folder in ("merged", "exported"):
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32).eval()
        assert spread(merged(IDS).logits, truth) < 1e-5


def test_with_products_in_16_bits_the_policy_starts_at_its_reference(
    model_folders, architecture, config, tmp_path, monkeypatch
):
    """As on a GPU, where products are in `bnb_4bit_compute_dtype`."""
    monkeypatch.setattr("konic.finetuning.models.quantised._product_dtype", lambda layer: torch.bfloat16)
    options = {"architecture": architecture, "model_kwargs": {"quantization_config": config}, "batch_size": 8}
    first = make_engine(model_folders[architecture], tmp_path / "whole", **options).train(3).history[0]
    assert first.kl_divergence == 0.0
    assert first.first_log_ratio < 1e-6
    assert first.sampler_gap < 0.02
    make_engine(model_folders[architecture], tmp_path / "parts", **options).train(2, save_every=1)
    make_engine(model_folders[architecture], tmp_path / "parts", **options).train(3, resume_from_checkpoint=True)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_divided_among_processes_it_is_the_model_of_one(tmp_path):
    save_models(tmp_path / "model")
    ways = "{}", "sharded {}", "sharded {} in step"
    cases = {kind: [way.format(f"quantised {kind}") for way in ways] for kind in KINDS}
    codes, errors = run(tmp_path / "model", tmp_path / "two", 2, *[case for each in cases.values() for case in each])
    assert codes == [0, 0], errors
    for each in cases.values():
        whole, divided, in_step = (told(tmp_path / "two", case) for case in each)
        assert difference(whole, divided) == (0.0, "")
        assert difference(whole["history"][0], in_step["history"][0]) < (1e-4,)


def test_every_weight_of_a_quantised_model_cannot_be_trained(model_folders, config, tmp_path):
    options = {"model_kwargs": {"quantization_config": config}, "lora": False}
    with pytest.raises(ConfigError, match=r"are quantised or frozen\. Give a lora_config"):
        make_engine(model_folders["llama"], tmp_path, **options).train(1)


@pytest.mark.parametrize(("given", "fetches"), [({}, False), ({"USE_HUB_KERNELS": "YES"}, True)], ids=["unset", "yes"])
def test_bitsandbytes_fetches_no_native_code_and_says_nothing_of_it(given, fetches, tmp_path):
    (tmp_path / "kernels.py").write_text(
        "import os, sys\n"
        "def get_kernel(name, version):\n"
        "    here = dict(entry.split('=') for entry in os.environ.get('LOCAL_KERNELS', '').split(':') if entry)\n"
        "    print('FETCHES' if name not in here else f'LOOKS IN {here[name]}')\n"
        "    raise OSError('there is no such kernel')\n"
    )
    code = "import konic, bitsandbytes"
    command = [sys.executable, "-c", code]
    inherited = {name: value for name, value in os.environ.items() if name not in ("USE_HUB_KERNELS", "LOCAL_KERNELS")}
    environment = inherited | given
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    if done.stdout:  # else there are none for this processor
        assert ("FETCHES" in done.stdout) == fetches
        assert ("Failed to load" in done.stderr) == fetches
