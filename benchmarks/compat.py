"""The published konic 0.1.23 -> whether its finetuning scripts run here, unchanged.

The source distribution is fetched into a temporary folder and deleted with it. Its scripts run against a small Hub on
loopback, which serves tiny random models and data under the names they use. Needs PyPI. `make compat` runs it, with
the tests' helpers on its path.
"""

import argparse
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import konic
from conftest import byte_tokenizer
from loopback_hub import LoopbackHub

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = "konic==0.1.23"
LLAMAS = ("meta-llama/Llama-2-7b-hf", "codellama/CodeLlama-7b-hf")
JUDGE = "OpenAssistant/reward-model-deberta-v3-large-v2"
DATASETS = {"imdb": "text", "tatsu-lab/alpaca": "instruction", "sahil2801/CodeAlpaca-20k": "instruction"}
SECONDS = 900
"""A script that takes longer has failed."""


def fetch(folder: Path) -> Path:
    """Return the folder of the published source distribution, fetched by pip."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    command += ["--ignore-requires-python", PUBLISHED, "-d", str(folder)]
    subprocess.run(command, check=True, timeout=600)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return Path(str(archive).removesuffix(".tar.gz"))


def small_llama(folder: Path, kind: type = LlamaForCausalLM, **options: int) -> Path:
    """Return a folder with a random Llama of the kind given."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=1024, bos_token_id=257, eos_token_id=0, pad_token_id=258, **options,
    )  # fmt: skip
    kind(config).save_pretrained(folder)
    byte_tokenizer("llama").save_pretrained(folder)
    return folder


def small_gpt2(folder: Path) -> Path:
    """Return a folder with a random GPT-2."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "n_positions": 1024, "n_embd": 32, "n_layer": 1, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    byte_tokenizer("gpt2").save_pretrained(folder)
    return folder


def serve(hub: LoopbackHub, folder: Path) -> None:
    """Put every model and dataset that the scripts name on the hub."""
    hub.add_model("openai-community/gpt2", small_gpt2(folder / "gpt2"), aliases=["gpt2"])
    for name in LLAMAS:
        hub.add_model(name, small_llama(folder / "llama"))
    hub.add_model(JUDGE, small_llama(folder / "judge", LlamaForSequenceClassification, num_labels=1))
    for name, column in DATASETS.items():
        place = folder / name.replace("/", "-")
        place.mkdir()
        rows = [f"Row {row} says what a text of this kind may say." for row in range(60)]
        table = pyarrow.table({column: rows, "label": [row % 2 for row in range(60)]})
        pyarrow.parquet.write_table(table, place / "train-00000-of-00001.parquet")
        served = f"stanfordnlp/{name}" if "/" not in name else name
        hub.add_dataset(served, place, aliases=[] if served == name else [name])


def scripts(published: Path, work: Path) -> dict[str, list[str]]:
    """Return the command of each script by what the table calls it. A template is filled in as `konic init` does it."""
    examples, templates = published / "examples" / "finetuning", published / "src" / "konic" / "cli" / "boilerplates"
    agents = {}
    for template in ("finetuning_basic", "finetuning_advanced"):
        (source,) = templates.glob(f"{template}/*/agent.py")
        agents[template] = work / template / "agent.py"
        agents[template].parent.mkdir()
        shutil.copy(source, agents[template])
    runner = [str(examples / "run_basic_template.py"), "--device", "cpu", "--iterations", "2"]
    advanced = [str(examples / "instruction_following" / "instruction_following_rlhf.py"), "--max-iterations", "2"]
    mirror = [str(examples / "local_cloud_mirror" / "run_training.py"), "--iterations", "2", "--agent-path"]
    konic = ["-c", "from konic.cli import main; main()", "train", "--max-iterations", "2"]
    return {
        "examples: basic/sentiment_rlhf.py": [str(examples / "basic" / "sentiment_rlhf.py")],
        "examples: trl_basic/trl_basic.py": [str(examples / "trl_basic" / "trl_basic.py")],
        "examples: trl_grpo/grpo_sentiment.py": [str(examples / "trl_grpo" / "grpo_sentiment.py")],
        "examples: run_basic_template.py": runner,
        "examples: run_basic_template.py, again in its folder": runner,
        "examples: run_basic_template.py --batch-size 1": [*runner, "--batch-size", "1"],
        "examples: run_basic_template.py --batch-size 3": [*runner, "--batch-size", "3"],
        "examples: instruction_following_rlhf.py": advanced,
        "examples: instruction_following_rlhf.py --no-hf-reward": [*advanced, "--no-hf-reward"],
        **{f"examples: run_training.py on {name}": [*mirror, str(path)] for name, path in agents.items()},
        **{f"templates: {name}, as a script": [str(path)] for name, path in agents.items()},
        **{f"templates: {name}, by konic train": [*konic, str(path)] for name, path in agents.items()},
    }


def run(command: list[str], work: Path, environment: dict[str, str]) -> tuple[str, float]:
    """Return "runs", or what a script ended with; and its seconds."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=work, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"took longer than {SECONDS} s", time.monotonic() - start
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
    return "runs" if done.returncode == 0 else f"fails: {lines[-1]}", time.monotonic() - start


def main() -> int:
    """Run every script; print the table and write it to --output. Return the number that fail."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "compat.md")
    arguments = parser.parse_args()
    rows, failed = [], 0
    with tempfile.TemporaryDirectory() as name, LoopbackHub() as hub:
        folder, work = Path(name), Path(name) / "work"
        work.mkdir()
        serve(hub, folder)
        published = fetch(folder)
        environment = hub.environment(folder / "cache") | {"PYTHONPATH": str(ROOT / "src")}
        for title, command in scripts(published, work).items():
            verdict, seconds = run(command, work, environment)
            failed += verdict != "runs"
            rows.append(f"| {title} | {verdict} | {seconds:.0f} |")
            print(rows[-1], flush=True)
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "peft", "datasets"))
    arguments.output.write_text(
        f"# Scripts of {PUBLISHED}, unchanged\n\n"
        f"`make compat`: {len(rows) - failed} of {len(rows)} run. Tiny random models and 60 rows of data stand under "
        "the names that the scripts use, so this shows that they run, not what they learn.\n\n"
        "| script | verdict | seconds |\n|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"konic {konic.__version__}, Python {platform.python_version()}, {versions}; {platform.machine()}, "
        f"{torch.get_num_threads()} thread(s).\n"
    )
    return failed


if __name__ == "__main__":
    sys.exit(main())
