"""Examples that need weights from the Hub or minutes of a model's time, run on tiny models in their place."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from conftest import byte_tokenizer
from konic.finetuning import GenerationConfig, KonicFinetuningEngine

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_classic_with_a_classifier_runs_on_tiny_models(model_folders, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        pad_token_id=258, num_labels=2, initializer_range=0.2,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    byte_tokenizer("llama").save_pretrained(tmp_path / "classifier")
    reviews = tmp_path / "reviews"
    reviews.mkdir()
    lines = [f"Review number {n} goes on for longer than the two hundred characters it needs. " * 4 for n in range(40)]
    (reviews / "train.csv").write_text("text\n" + "\n".join([*lines, "too short"]))
    command = [sys.executable, EXAMPLES / "gpt2_imdb_classifier.py", "--model", model_folders["gpt2"]]
    command += ["--classifier", tmp_path / "classifier", "--dataset", reviews, "--iterations", "2", "--batch-size", "8"]
    command += ["--prompts", "32", "--held-out", "8"]
    done = subprocess.run([str(part) for part in command], cwd=tmp_path, capture_output=True, text=True, check=True)
    before, after = done.stdout.splitlines()[-2:]
    assert before.startswith("positive logit before: mean ")
    assert after.startswith("positive logit after: mean ")
    assert before.split(":")[1] != after.split(":")[1]


def tiny_reward_model(folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        pad_token_id=258, num_labels=1, initializer_range=0.2,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    byte_tokenizer("llama").save_pretrained(folder)
    return str(folder)


def test_the_advanced_example_runs_by_changing_two_names(model_folders, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("instruction_following", EXAMPLES / "instruction_following.py")
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "instruction_following", example)
    spec.loader.exec_module(example)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example, "BASE_MODEL", model_folders["llama"])
    monkeypatch.setattr(example, "REWARD_MODEL", tiny_reward_model(tmp_path / "judge"))
    short = {"max_new_tokens": 8, "max_prompt_length": 64}
    monkeypatch.setattr(example, "GenerationConfig", lambda **_: GenerationConfig(**short))
    train = KonicFinetuningEngine.train
    monkeypatch.setattr(KonicFinetuningEngine, "train", lambda self, max_iterations: train(self, 2))
    example.main()
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "best" / "adapter_model.safetensors").is_file()
    output = capsys.readouterr().out
    assert output.count("  before (") == output.count("  after  (") == 3


def test_the_hackable_rewards_are_seen_through(tmp_path):
    texts = tmp_path / "texts.csv"
    lines = [f'"The film","{" ".join(str(word) for word in range(count))}"' for count in range(5, 30)]
    texts.write_text("\n".join(["prompt,response", *lines]) + "\n")
    command = [
        sys.executable,
        "-c",
        "from konic.cli import main; main()",
        "rewards",
        EXAMPLES / "hackable_rewards.py",
        "--texts",
        texts,
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    told = " ".join(done.stdout.split())
    for warning in (
        "'judge' returns different values",
        "'variety' fails on a response that is empty",
        "'politeness' is constant",
        "a length reward in disguise",
        "expect the policy to find that",
    ):
        assert warning in told
