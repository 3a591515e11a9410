"""Examples that need weights from the Hub, run on tiny models in their place."""

import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from conftest import byte_tokenizer

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
