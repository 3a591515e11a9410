"""Golden runs: every number, sample and weight of short runs, by hash, so that a refactor can show that none moved.

    python benchmarks/golden.py record FILE                 the runs of the konic that is imported
    python benchmarks/golden.py compare BEFORE AFTER        which of them differ, and in what
    PYTHONPATH=OTHER/src python benchmarks/golden.py record FILE    the runs of another checkout

It uses the public interface alone, so that one script runs old and new code. Hashes hold for one machine, one set of
libraries and one number of threads.
"""

import argparse
import hashlib
import json
import logging
import math
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pyarrow.parquet
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

import konic
from konic.finetuning import (
    DatasetConfig,
    GenerationConfig,
    KonicFinetuningAgent,
    KonicFinetuningCallback,
    KonicFinetuningEngine,
    KonicLLMRewardComposer,
    LoraConfig,
    TrainingConfig,
    llm_reward,
)

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TARGETS = {"gpt2": ("c_attn", "c_proj"), "llama": ("q_proj", "v_proj"), "mistral": ("q_proj", "v_proj")}
ALGORITHMS = ("ppo", "rloo", "grpo", "dr_grpo", "reinforce++")
TIMES = ("generation_time_sec", "reward_compute_time_sec", "update_time_sec", "total_time_sec")
TOKEN_COLUMNS = ("advantages", "values", "token_kl", "log_probs", "entropy")
"""Lists with a number for each token, hashed apart: the runs of an older konic have none."""
TEXTS = ["the film was", "a", "why do", "good night and", "no", "seven of them", "it is", "what a long prompt this is"]
ROWS = [{"prompt": text, "length": index} for index, text in enumerate([*TEXTS, *(f"again {t}" for t in TEXTS)])]
CHATS = [[{"role": "user", "content": text}] for text in (*TEXTS, *reversed(TEXTS))]


class Rewards(KonicLLMRewardComposer):
    """Rewards of every shape."""

    @llm_reward
    def vowels(self, prompt: str, response: str) -> float:
        return sum(char in "aeiou" for char in response) / max(1, len(response))

    @llm_reward(batch=True, normalize=True)
    def brief(self, prompts: list[str], responses: list[str]) -> list[float]:
        return [-float(len(response)) for response in responses]

    @llm_reward(clip=(-1.0, 1.0))
    def parts(self, prompt: str, response: str) -> dict[str, float | None]:
        return {"digits": float(sum(map(str.isdigit, response))), "first": None if not response else ord(response[0])}

    @llm_reward
    def abstains(self, prompt: str, response: str) -> float | None:
        return 0.5 if "e" in response else None


class Failing(Rewards):
    """Rewards of which one fails now and then."""

    @llm_reward
    def fails(self, prompt: str, response: str) -> float:
        if len(response) % 3 == 0:
            raise ValueError("a length that does not please")
        return 0.1


class Huge(Rewards):
    """A batch with a number that nothing can be learned from."""

    @llm_reward
    def huge(self, prompt: str, response: str) -> float:
        return 1e30 if prompt.startswith("good") else 0.0


class WithColumns(Rewards):
    """A reward that reads a column, and one that reads the chat."""

    @llm_reward
    def near(self, prompt: str, response: str, length: int) -> float:
        return -abs(len(response) - length) / 10


class WithChat(Rewards):
    """A reward that reads the chat."""

    @llm_reward
    def polite(self, prompt: str, response: str, messages: list[dict[str, str]]) -> float:
        return float(len(messages[-1]["content"]) > len(response))


def save_model(architecture: str, folder: Path) -> None:
    """A tiny random model in fp32 with a byte tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<eos>": 0} | {c: i for i, c in enumerate(alphabet, 1)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = None if architecture == "gpt2" else TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(7)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": 257, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}
    if architecture == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_positions=128, n_embd=32, n_layer=2, n_head=4, **ids))
    elif architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, max_position_embeddings=128, **shape, **ids))
    else:  # a window: the general decoder
        config = MistralConfig(num_key_value_heads=2, max_position_embeddings=128, sliding_window=8, **shape, **ids)
        model = MistralForCausalLM(config)
    model.save_pretrained(folder)


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every run by name: options of :func:`run`."""
    for architecture in ("gpt2", "llama"):
        for algorithm in ALGORITHMS:
            for mode in ("lora", "full"):
                options = {"architecture": architecture, "algorithm": algorithm, "lora": mode == "lora"}
                yield f"{architecture}/{algorithm}/{mode}", options
    llama: dict[str, Any] = {"architecture": "llama"}
    yield "llama/resume", llama | {"resume": True}
    yield "gpt2/resume/full", {"architecture": "gpt2", "lora": False, "resume": True, "algorithm": "grpo"}
    skip: dict[str, Any] = llama | {"composer": Failing, "on_reward_error": "skip", "max_error_rate": 1.0}
    yield "llama/skip rewards", skip
    yield "llama/skip rewards/resume", skip | {"resume": True, "algorithm": "rloo"}
    yield "llama/workers", skip | {"reward_workers": 2}
    yield "llama/skip nonfinite", llama | {"composer": Huge, "on_nonfinite": "skip"}
    yield "llama/columns", llama | {"composer": WithColumns, "rows": ROWS}
    yield "llama/chats", llama | {"composer": WithChat, "rows": CHATS}
    yield "llama/chats/workers", llama | {"composer": WithChat, "rows": CHATS, "reward_workers": 1}
    yield "llama/ppo/kl loss", llama | {"kl_placement": "loss", "entropy_coef": 0.01}
    targets = {"kl_target": 0.1, "target_kl": 0.01, "kl_budget": 0.5, "value_warmup_iterations": 1}
    yield "llama/ppo/target", llama | targets
    yield "llama/checkpointing", llama | {"gradient_checkpointing": True, "lr_scheduler": "cosine", "warmup_steps": 3}
    yield "llama/linear", llama | {"lr_scheduler": "linear", "missing_eos_penalty": 0.5, "weight_decay": 0.1}
    yield "llama/bfloat16", llama | {"dtype": "bfloat16"}
    yield "llama/stop", llama | {"generation": {"stop": ("e", "a"), "top_k": 50, "min_new_tokens": 2}}
    yield "gpt2/greedy", {"architecture": "gpt2", "generation": {"do_sample": False, "repetition_penalty": 1.2}}
    yield "mistral/window", {"architecture": "mistral"}
    yield "mistral/window/grpo", {"architecture": "mistral", "algorithm": "grpo"}
    yield "llama/bias", llama | {"bias": "all"}
    yield "llama/from adapter", llama | {"from_adapter": True}


def run(
    folder: Path,
    models_at: Path,
    architecture: str,
    lora: bool = True,
    bias: str = "none",
    composer: type[KonicLLMRewardComposer] = Rewards,
    rows: list[Any] = TEXTS * 2,
    resume: bool = False,
    dtype: str = "float32",
    generation: dict[str, Any] | None = None,
    from_adapter: bool = False,
    **training: Any,
) -> dict[str, str]:
    """Three iterations; the hash of everything that came of them, by name."""
    settings = {"batch_size": 8, "num_minibatches": 2, "gradient_accumulation_steps": 2, "ppo_epochs": 2, "seed": 3}
    settings |= {"learning_rate": 5e-3, "eval_every": 2} | training
    base = models_at / architecture
    adapter = LoraConfig(r=4, target_modules=TARGETS[architecture], bias=bias)
    if from_adapter:
        base = folder / "adapter"
        first = KonicFinetuningAgent(
            base_model=str(models_at / architecture),
            reward_composer=Rewards(),
            lora_config=LoraConfig(r=4, target_modules=TARGETS[architecture]),
            dataset_config=DatasetConfig(prompts=rows),
            training_config=TrainingConfig(batch_size=8, learning_rate=1e-2),
            generation_config=GenerationConfig(max_new_tokens=12, max_prompt_length=24),
        )
        quiet = KonicFinetuningCallback(verbose=False)
        engine = KonicFinetuningEngine.from_agent(first, checkpoint_dir=folder / "first", device="cpu", callback=quiet)
        engine.train(1)
        engine.save_pretrained(base)

    def engine_of() -> KonicFinetuningEngine:
        agent = KonicFinetuningAgent(
            base_model=str(base),
            reward_composer=composer(reward_weights={"vowels": 2.0}),
            lora_config=adapter if lora and not from_adapter else None,
            dataset_config=DatasetConfig(prompts=rows, held_out=4),
            training_config=TrainingConfig(**settings),
            generation_config=GenerationConfig(max_new_tokens=20, max_prompt_length=24, **(generation or {})),
            model_kwargs={"dtype": dtype},
        )
        quiet = KonicFinetuningCallback(verbose=False)
        return KonicFinetuningEngine.from_agent(agent, checkpoint_dir=folder / "run", device="cpu", callback=quiet)

    engine = engine_of()
    if resume:
        engine.train(2)
        engine = engine_of()
    result = engine.train(3, resume_from_checkpoint=True if resume else None)
    found = {"result": [result.best_iteration, _told(result.best_reward), result.get_kl_curve()]}
    gain = result.held_out_gain
    found["gain"] = [_told(value) for value in (gain.mean, gain.low, gain.high)] if gain else None
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
    for kind in ("completions", "evaluations"):
        for path in sorted((folder / "run" / kind).glob("*.parquet")):
            columns = pyarrow.parquet.read_table(path).to_pydict()
            found[f"{kind}/{path.stem}"] = {name: columns[name] for name in columns if not is_of_replay(name)}
            found[f"{kind}/{path.stem}/tokens"] = {name: columns[name] for name in columns if name in TOKEN_COLUMNS}
    hashes = {name: _hash(json.dumps(value, sort_keys=True, default=str).encode()) for name, value in found.items()}
    for path in sorted((folder / "run").rglob("*.safetensors")):
        tensors = load_file(path)
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
        hashes[str(path.relative_to(folder / "run"))] = digest.hexdigest()[:16]
    evaluated = engine.evaluate(rows[:3])
    shown = [evaluated[name] for name in ("responses", "rewards", "kl_per_response", "response_lengths")]
    hashes["evaluate"] = _hash(json.dumps(shown).encode())
    hashes["generate"] = _hash(json.dumps(engine.generate(rows[:3])).encode())
    return hashes


def is_of_replay(name: str) -> bool:
    """True for a column of numbers for each token, and for the times of the rewards, which are hashed nowhere."""
    return name in TOKEN_COLUMNS or name.startswith("seconds/")


def _hash(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def _told(value: float) -> float | None:
    return None if math.isnan(value) else value


def record(output: Path) -> None:
    """Run every case and write its hashes."""
    logging.disable(logging.WARNING)
    runs = {}
    with tempfile.TemporaryDirectory() as scratch:
        for architecture in TARGETS:
            save_model(architecture, Path(scratch, "models", architecture))
        for number, (name, options) in enumerate(cases()):
            folder = Path(scratch, f"run-{number}")
            folder.mkdir()
            runs[name] = run(folder, Path(scratch, "models"), **options)
            print(f"{name}: {len(runs[name])} hashes", flush=True)
    cpu = next((x.partition(":")[2].strip() for x in _cpuinfo() if x.startswith("model name")), platform.machine())
    machine = {"cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__}
    output.write_text(json.dumps({"konic": konic.__file__, "machine": machine, "runs": runs}, indent=1))


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def compare(before: Path, after: Path) -> int:
    """Print which hashes differ; 1 if any does."""
    one, other = (json.loads(path.read_text()) for path in (before, after))
    if one["machine"] != other["machine"]:
        print(f"recorded on different machines: {one['machine']} and {other['machine']}")
    num_equal = num_differing = 0
    for name in dict.fromkeys([*one["runs"], *other["runs"]]):
        old, new = one["runs"].get(name, {}), other["runs"].get(name, {})
        odd = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
        num_equal += len(old.keys() | new.keys()) - len(odd)
        num_differing += len(odd)
        print(f"{name}: {'differs in ' + ', '.join(odd) if odd else f'{len(new)} equal'}")
    print(f"{len(other['runs'])} runs on {other['machine']}: {num_equal} hashes equal, {num_differing} differ")
    return int(num_differing > 0)


def main() -> None:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "record":
        record(arguments.files[0])
    else:
        raise SystemExit(compare(*arguments.files))


if __name__ == "__main__":
    main()
