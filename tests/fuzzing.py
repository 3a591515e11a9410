"""Damaged input for every reader: each example ends well or with one KonicError, in time, in bounds, in its folder.

`make fuzz` runs each target for its share of FUZZ_SECONDS and writes a table; `test_fuzzing.py` runs a few examples of
each. An input that once failed belongs into `tests/fuzz_corpus/TARGET/`, where both replay it.
"""

import contextlib
import copy
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import gguf
import numpy
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from transformers import LlamaForSequenceClassification

from conftest import CHAT_TEMPLATE, byte_tokenizer, tiny_model
from konic.cli.documents import Document
from konic.export.card import export_card
from konic.export.modelfile import modelfile
from konic.export.saved import SavedModel
from konic.finetuning import (
    DatasetConfig,
    GenerationConfig,
    HuggingFaceRewardModel,
    KonicError,
    KonicFinetuningAgent,
    KonicFinetuningEngine,
    KonicLLMRewardComposer,
    LoraConfig,
    TrainingConfig,
    llm_reward,
)
from konic.finetuning.callbacks.trackers import FOLDER, _read_runs
from konic.finetuning.data.prompts import load_prompts, make_prompts
from konic.finetuning.data.tokenization import encode_prompt, make_prompt_batch
from konic.finetuning.learning.update import make_optimizer
from konic.finetuning.models.loading import load_model
from konic.finetuning.models.policy import Policy
from konic.finetuning.reward_models.feedback import read_labelled, read_preferences
from konic.finetuning.rollout.sampler import RandomKey, SpecialTokens
from konic.finetuning.rollout.vllm_client import VllmClient
from konic.finetuning.rollout.vllm_sampler import VllmSampler
from konic.finetuning.run.checkpoint import load_checkpoint, read_record
from konic.finetuning.run.folder import RunFolder
from konic.finetuning.run.resume import checkpoint_to_resume, require_same_run
from konic.finetuning.system.group import _read, _read_error, _write
from konic.finetuning.system.processor import processor_name
from konic.report.page import render
from konic.report.replay import replays
from konic.report.run import Run
from konic.saved.agents import BASE, SavedRun
from konic.saved.prompts import given_prompts, held_out_prompts, read_prompts
from konic.saved.rewards import recorded_script

CPU = torch.device("cpu")
CORPUS = Path(__file__).parent / "fuzz_corpus"
MAX_SECONDS = 10
"""For one example; the issue is input that never ends, so it is far above what any needs."""
MAX_GROWTH_BYTES = 500 * 2**20
"""By which one example may raise the memory of the process, at its peak."""
INTEGERS = (-(2**63), -1, 0, 1, 255, 2**31 - 1, 2**32, 2**40, 2**63 - 1, 2**64 - 1)
VALUES = (
    None, True, "", "x", "\x1b[2J", "../../outside", "(a+)+$", 0, -1, 2**31, 2**63, 1e308, float("nan"), [], {}, [[]],
    {"a": None}, ["x"] * 3, "9" * 5000, "{% for a in range(3) %}{{ a }}{% endfor %}",
)  # fmt: skip
"""What stands in JSON in place of what belongs there. The numbers are of no size that a reader must allocate."""


VERSIONS = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "pyarrow", "gguf", "peft", "pyyaml")


class TooSlow(BaseException):
    """An example took more than :data:`MAX_SECONDS`; no reader may catch it."""


class Brief(KonicLLMRewardComposer):
    @llm_reward
    def brief(self, prompt, response):
        return -len(response) / 80


# ------------------------------------------------------------------------------------------------ damage


@st.composite
def damaged_bytes(draw, content: bytes) -> bytes:
    """The content with one to three places cut out, repeated, replaced by other bytes or by an extreme integer."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from((0, 1, 2, 4, 8, 64))))
        kind = draw(st.sampled_from(("cut", "truncate", "repeat", "integer", "bytes")))
        if kind == "cut":
            content = content[:start] + content[end:]
        elif kind == "truncate":
            content = content[:start]
        elif kind == "repeat":
            content = content[:end] + content[start:end] * draw(st.integers(1, 3)) + content[end:]
        elif kind == "integer":
            number = draw(st.sampled_from(INTEGERS)) % 2**64
            size = draw(st.sampled_from((4, 8)))
            content = content[:start] + (number % 2 ** (8 * size)).to_bytes(size, "little") + content[start + size :]
        else:
            content = content[:start] + draw(st.binary(max_size=8)) + content[end:]
    return content


@st.composite
def damaged_json(draw, content: bytes) -> bytes:
    """The JSON with one or two of its values replaced, removed or put one level deeper; sometimes its bytes damaged."""
    if draw(st.integers(0, 4)) == 0:
        return draw(damaged_bytes(content))
    tree = [json.loads(content)]
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(tree))
        holder, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "nest")))
        if kind == "remove" and holder is not tree:
            del holder[key]
        elif kind == "nest":
            holder[key] = [holder[key]]
        else:
            holder[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    return json.dumps(tree[0]).encode()


def _places(tree: Any):
    """Each (holder, key) at most six levels deep, the first few of a long list only."""
    pairs = (
        list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree[:4])) if isinstance(tree, list) else []
    )
    for key, value in pairs:
        yield tree, key
        yield from _places(value)


@st.composite
def damaged_lines(draw, content: bytes) -> bytes:
    """JSON lines, one of them damaged."""
    lines = content.splitlines(keepends=True)
    index = draw(st.integers(0, len(lines) - 1))
    lines[index] = draw(damaged_json(lines[index])) + b"\n"
    return b"".join(lines)


def damaged(name: str, content: bytes):
    """The strategy for a file by its name."""
    if name.endswith(".json"):
        return damaged_json(content)
    return damaged_lines(content) if name.endswith(".jsonl") else damaged_bytes(content)


# ------------------------------------------------------------------------------------------------ whole inputs


def write_gguf(path: Path) -> None:
    """A Llama of one tiny layer with a vocabulary of three tokens."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "<eos>"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    writer.add_tensor("token_embd.weight", numpy.zeros((3, 32), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_data(folder: Path) -> None:
    """The same few rows in every format."""
    folder.mkdir()
    rows = [{"prompt": "ab", "label": "1"}, {"prompt": "two\nlines", "label": "2"}, {"prompt": "ü", "label": "3"}]
    table = pyarrow.Table.from_pylist(rows)
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chats.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "hi"}]}) + "\n")
    (folder / "rows.csv").write_text('prompt,label\nab,1\n"two\nlines",2\nü,3\n')
    (folder / "rows.tsv").write_text("prompt\tlabel\nab\t1\nü\t3\n")
    (folder / "rows.txt").write_text("ab\nü\n")
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    with pyarrow.ipc.new_file(folder / "rows.arrow", table.schema) as file:
        file.write_table(table)
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_file(folder / "packed.arrow", table.schema, options=options) as file:
        file.write_table(table)
    with pyarrow.CompressedOutputStream(str(folder / "packed.csv.gz"), "gzip") as file:
        file.write((folder / "rows.csv").read_bytes())


def write_classifier(folder: Path, tokenizer: Any) -> None:
    """A classifier of one tiny layer with one label, as a reward model is saved."""
    config = tiny_model("llama", torch.float32).config
    config.num_labels, config.pad_token_id = 1, 256
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_saved_dataset(folder: Path) -> None:
    """A folder of `save_to_disk`."""
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"prompt": ["ab", "x"], "label": [1, 2]}).save_to_disk(folder)
    datasets.enable_progress_bars()


def write_feedback(folder: Path) -> None:
    """Preferences as texts and as chats, and labelled texts."""
    folder.mkdir()
    chats = {name: [{"role": "user", "content": "p"}, {"role": "assistant", "content": name}] for name in ("a", "b")}
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"chosen": chats["a"], "rejected": chats["b"]}]
    for number, row in enumerate(rows):
        (folder / f"{number}.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "labelled.csv").write_text("text,label\nab,1\nx,2\n")


@dataclass
class Inputs:
    """Folders of whole inputs, made once, and the place where each example works."""

    root: Path
    tokenizer: Any = field(default_factory=lambda: byte_tokenizer("llama"))

    def __post_init__(self) -> None:
        os.environ["KONIC_CACHE"] = str(self.root / "case" / "cache")
        tiny_model("llama", torch.float32).save_pretrained(self.root / "model")
        self.tokenizer.save_pretrained(self.root / "model")
        write_data(self.root / "data")
        (self.root / "model" / "special_tokens_map.json").write_text('{"pad_token": "<pad>"}')
        write_classifier(self.root / "classifier", self.tokenizer)
        write_saved_dataset(self.root / "saved")
        write_feedback(self.root / "feedback")
        write_gguf(self.root / "tiny.gguf")
        (self.root / "documents").mkdir()
        (self.root / "documents" / "job.yaml").write_bytes(JOB)
        with contextlib.redirect_stdout(None):
            self.engine(self.root / "run").train(1, save_every=1)
        (self.root / "case").mkdir()
        self.canary = sorted(str(path) for path in self.root.iterdir())

    def engine(self, run: Path) -> KonicFinetuningEngine:
        """An engine on the tiny model with one reward."""
        agent = KonicFinetuningAgent(
            base_model=str(self.root / "model"), reward_composer=Brief(), lora_config=LoraConfig(r=2),
            dataset_config=DatasetConfig(prompts=["ab", "x", "why", "no"], held_out=1),
            training_config=TrainingConfig(batch_size=2, ppo_epochs=1),
            generation_config=GenerationConfig(max_new_tokens=2, max_prompt_length=16),
        )  # fmt: skip
        return KonicFinetuningEngine.from_agent(agent, checkpoint_dir=run, device="cpu")

    def fresh(self, name: str) -> Path:
        """A copy of a whole input in an empty folder for one example."""
        shutil.rmtree(self.root / "case")
        (self.root / "case").mkdir()
        source, copied = self.root / name, self.root / "case" / Path(name).name
        shutil.copytree(source, copied) if source.is_dir() else shutil.copyfile(source, copied)
        return copied

    def names(self, folder: str) -> list[str]:
        """The files of a whole input that are read, not only shown."""
        files = sorted(path for path in (self.root / folder).rglob("*") if path.is_file())
        return [str(file.relative_to(self.root / folder)) for file in files if file.name not in ("README.md", ".lock")]


# ------------------------------------------------------------------------------------------------ the readers


def read_data(inputs: Inputs, name: str, content: bytes) -> None:
    file = inputs.fresh(f"data/{name}")
    file.write_bytes(content)
    load_prompts(DatasetConfig(name=str(file), max_samples=2))


def read_model(inputs: Inputs, name: str, content: bytes) -> None:
    folder = inputs.fresh("model")
    (folder / name).write_bytes(content)
    loaded = load_model(str(folder), {}, CPU)
    Policy(loaded, LoraConfig(r=2))
    encode_prompt(*_chat(), loaded.tokenizer, 16)


def read_gguf(inputs: Inputs, name: str, content: bytes) -> None:
    file = inputs.fresh(name)
    file.write_bytes(content)
    load_model(str(file), {}, CPU)


def read_adapter(inputs: Inputs, name: str, content: bytes) -> None:
    folder = inputs.fresh("run/final")
    (folder / name).write_bytes(content)
    Policy(load_model(str(folder), {}, CPU), None)


def read_checkpoint(inputs: Inputs, name: str, content: bytes) -> None:
    folder = inputs.fresh("run/checkpoint-1")
    (folder / name).write_bytes(content)
    with contextlib.suppress(KonicError):
        checkpoint_to_resume(str(folder), None)
    record = read_record(folder)  # as if the seal were whole, which a stranger can write too
    whole = read_record(inputs.root / "run" / "checkpoint-1")
    with contextlib.suppress(KonicError):
        require_same_run(folder, record, whole.settings, CPU, allow_changes=True)
    policy = Policy(load_model(str(inputs.root / "model"), {}, CPU), LoraConfig(r=2))
    load_checkpoint(folder, policy, make_optimizer(policy, TrainingConfig()))


def read_run(inputs: Inputs, name: str, content: bytes) -> None:
    folder = inputs.fresh("run")
    (folder / name).write_bytes(content)
    run = RunFolder(folder)
    with run.locked(), contextlib.suppress(KonicError), RunFolder(folder).locked():
        pass
    run.read_evaluation(1)
    run.go_back_to(read_record(inputs.root / "run" / "checkpoint-1").state.history)


def read_record_of_run(inputs: Inputs, name: str, content: bytes) -> None:
    """What `report`, `inspect`, `generate`, `eval`, `chat` and `export` read of a run, but for the models."""
    folder = inputs.fresh("run")
    (folder / name).write_bytes(content)
    run = Run.read(folder)
    with contextlib.suppress(KonicError):
        render([run], folder)
    with contextlib.suppress(KonicError):
        [one.as_json() for one in replays(run, run.history[-1]["iteration"])]
    with contextlib.suppress(KonicError):
        saved = SavedModel.find(folder, None)
        export_card(saved, is_adapter=saved.is_adapter)
        modelfile("model.gguf", inputs.tokenizer, saved.setting("generation_config"))
    with contextlib.suppress(KonicError):
        saved_run = SavedRun.read(folder, {"max_new_tokens": 2})
        [saved_run.agent(weights) for weights in (BASE, saved_run.name_of(None))]
    for read in (
        held_out_prompts, recorded_script, lambda run: given_prompts(["a"], run, as_chats=True),
        lambda run: read_prompts(str(inputs.root / "data" / "rows.csv"), run, None, None, 1, as_chats=False),
    ):  # fmt: skip
        with contextlib.suppress(KonicError):
            read(run)


def read_document(inputs: Inputs, name: str, content: bytes) -> None:
    file = inputs.fresh(f"documents/{name}")
    file.write_bytes(content)
    Document(file)


def read_tracker(inputs: Inputs, name: str, content: bytes) -> None:
    folder = inputs.fresh("run") / FOLDER
    folder.mkdir()
    (folder / name).write_bytes(content)
    _read_runs(folder)


def read_other_process(inputs: Inputs, name: str, content: bytes) -> None:
    message = _read(content)
    if "error" in message:
        raise _read_error(message["error"], 1, 2)


def read_saved_dataset(inputs: Inputs, name: str, content: bytes) -> None:
    folder = inputs.fresh("saved")
    (folder / name).write_bytes(content)
    load_prompts(DatasetConfig(name=str(folder)))


def read_feedback(inputs: Inputs, name: str, content: bytes) -> None:
    file = inputs.fresh(f"feedback/{name}")
    file.write_bytes(content)
    for read in (read_preferences, lambda data: read_labelled(data, "text", "label")):
        with contextlib.suppress(KonicError):
            read(str(file))


def read_reward_model(inputs: Inputs, name: str, content: bytes) -> None:
    folder = inputs.fresh("classifier")
    (folder / name).write_bytes(content)
    HuggingFaceRewardModel(str(folder), device="cpu").score(["a", "b"], ["c", "d"])


def read_answer_of_vllm(inputs: Inputs, name: str, content: bytes) -> None:
    client = VllmClient("http://127.0.0.1:1", 1.0)
    for status in (200, 400):
        answer = partial(client._read, "/v1/completions", status, content)
        server: Any = SimpleNamespace(name=client.name, post_all=lambda path, bodies, answer=answer: [answer()])
        policy: Any = SimpleNamespace(
            tokenizer=inputs.tokenizer, language_model=SimpleNamespace(vocabulary_size=len(inputs.tokenizer))
        )
        special = SpecialTokens(eos=(258,), pad=256)
        sampler = VllmSampler(policy, special, server, SimpleNamespace(load=lambda iteration: "konic"))  # type: ignore[arg-type]
        batch = make_prompt_batch(make_prompts(["a"], DatasetConfig(), "test"), inputs.tokenizer, 8, 256, CPU)
        with contextlib.suppress(KonicError):
            sampler(batch, GenerationConfig(max_new_tokens=2), RandomKey(0, iteration=0))


def read_template(inputs: Inputs, name: str, content: bytes) -> None:
    inputs.tokenizer.chat_template = content.decode("utf-8", "replace")
    encode_prompt(*_chat(), inputs.tokenizer, 16)


def read_settings(inputs: Inputs, name: str, content: bytes) -> None:
    kind = {config.__name__: config for config in (TrainingConfig, GenerationConfig, LoraConfig, DatasetConfig)}[name]
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return  # no reader of konic's: settings come as Python values
    kind.from_value(values)


def _chat():
    return make_prompts([[{"role": "user", "content": "hi there"}]], DatasetConfig(), "test")


JOB = b"""# a job
base_model: smollm2-135m
reward_composer:
  path: rewards.py:Mine
  arguments: {reward_weights: {brief: 2.0, "kind": .5}}
lora_config: &lora
  r: 8
  target_modules: [q_proj, 'v_proj']
dataset_config: {name: rows.csv, held_out: 0, system_prompt: |
    two
    lines
  }
training_config: {learning_rate: 1e-3, seed: 0x1, also: *lora}
"""
ANSWER = json.dumps({"model": "konic", "choices": [{
    "token_ids": [97, 258], "prompt_token_ids": [257, 97], "logprobs": {"token_logprobs": [-1.0, -0.5]},
    "finish_reason": "stop", "stop_reason": 258, "text": "a",
}]}).encode()  # fmt: skip
RECORDS = ("run.json", "metrics", "evaluations", "completions")
TEMPLATES = (CHAT_TEMPLATE, "{{ messages | tojson }}", "{% if x %}{{ raise_exception('no\nError: yes') }}{% endif %}a")
TARGETS = {
    "data": (read_data, lambda inputs: {name: inputs.root / "data" / name for name in inputs.names("data")}),
    "model": (read_model, lambda inputs: {name: inputs.root / "model" / name for name in inputs.names("model")}),
    "gguf": (read_gguf, lambda inputs: {"tiny.gguf": inputs.root / "tiny.gguf"}),
    "adapter": (read_adapter, lambda inputs: _some(inputs, "run/final", ("adapter_config", "adapter_model"))),
    "checkpoint": (
        read_checkpoint,
        lambda inputs: _some(inputs, "run/checkpoint-1", ("trainer_state", "complete", "optimizer", "adapter_model")),
    ),
    "run": (read_run, lambda inputs: _some(inputs, "run", RECORDS)),
    "record": (
        read_record_of_run,
        lambda inputs: _some(inputs, "run", (*RECORDS, "final/adapter_config", "final/tokenizer")),
    ),
    "document": (read_document, lambda inputs: {"job.yaml": JOB}),
    "tracker": (read_tracker, lambda inputs: {"runs.json": b'{"wandb": "abc12345", "mlflow": "0123456789abcdef"}'}),
    "process": (
        read_other_process,
        lambda inputs: {
            "tensors": _write({"numbers": torch.ones(2), "texts": ["a", None]}),
            "error": _write({"error": {"kind": "RewardError", "lines": ["it failed"], "host": "one"}}),
        },
    ),
    "saved": (
        read_saved_dataset, lambda inputs: {name: inputs.root / "saved" / name for name in inputs.names("saved")},
    ),
    "feedback": (
        read_feedback, lambda inputs: {name: inputs.root / "feedback" / name for name in inputs.names("feedback")},
    ),
    "classifier": (
        read_reward_model,
        lambda inputs: {name: inputs.root / "classifier" / name for name in inputs.names("classifier")},
    ),
    "vllm": (read_answer_of_vllm, lambda inputs: {"answer.json": ANSWER}),
    "template": (read_template, lambda inputs: {str(i): text.encode() for i, text in enumerate(TEMPLATES)}),
    "settings": (
        read_settings,
        lambda inputs: {
            config.__name__: json.dumps(values).encode()
            for config, values in (
                (TrainingConfig, TrainingConfig().to_dict()), (GenerationConfig, GenerationConfig().to_dict()),
                (LoraConfig, LoraConfig().to_dict()), (DatasetConfig, DatasetConfig(prompts=["a"]).to_dict()),
            )
        },
    ),
}  # fmt: skip
"""By name: the reader, and the whole inputs whose damage it reads, by file name."""


def _some(inputs: Inputs, folder: str, starts: tuple[str, ...]) -> dict[str, Path]:
    return {name: inputs.root / folder / name for name in inputs.names(folder) if name.startswith(starts)}


# ------------------------------------------------------------------------------------------------ one example


def try_example(inputs: Inputs, target: str, name: str, content: bytes) -> int:
    """Read one damaged input; return by how many bytes the memory of the process grew at its peak.

    Raises:
        AssertionError: It wrote outside its folder or grew past the bound.
        Exception: Whatever the reader raised that is not a KonicError.
        TooSlow: It did not end in time.
    """

    def too_slow(*_):
        raise TooSlow(f"more than {MAX_SECONDS} seconds")

    reader, before = TARGETS[target][0], _forget_peak()
    previous = signal.signal(signal.SIGALRM, too_slow)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        with contextlib.suppress(KonicError):
            reader(inputs, name, content)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    growth = _memory("VmHWM") - before
    assert growth <= MAX_GROWTH_BYTES, f"it took {growth / 2**20:.0f} MiB"
    assert sorted(str(path) for path in inputs.root.iterdir()) == inputs.canary, "it wrote outside its folder"
    return growth


def _memory(line: str) -> int:
    """Bytes of this process by /proc; 0 on a system without it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(text.split()[1]) * 1024 for text in lines if text.startswith(f"{line}:")), 0)


def _forget_peak() -> int:
    """Let the peak start anew at what is used now, and return that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def corpus(target: str) -> list[tuple[str, bytes]]:
    """The committed inputs of a target: (name of the file whose place it takes, content)."""
    files = sorted(path for path in (CORPUS / target).glob("*/*") if path.is_file())
    return [(path.parent.name.replace("__", "/"), path.read_bytes()) for path in files]


def fuzz(inputs: Inputs, target: str, number: int, max_examples: int) -> list[int]:
    """Try `max_examples` damaged inputs that follow from `number`; return the growth of each."""
    wholes = {
        name: source if isinstance(source, bytes) else source.read_bytes()
        for name, source in TARGETS[target][1](inputs).items()
    }
    growths = []

    @seed(number)
    @settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(sorted(wholes)).flatmap(lambda name: st.tuples(st.just(name), damaged(name, wholes[name]))))
    def example(drawn):
        growths.append(try_example(inputs, target, *drawn))

    example()
    return growths


def main(seconds: float, output: Path) -> bool:
    """Fuzz every target for its share of the time and write the table; False if one failed."""
    rows, all_passed = [], True
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(Path(folder))
        for target in TARGETS:
            start, number, growths, failures = time.monotonic(), 0, [], {}
            while time.monotonic() - start < seconds / len(TARGETS):
                number += 1
                try:
                    growths += fuzz(inputs, target, number, 100)
                except BaseException as error:  # TooSlow too
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    kind = f"{type(error).__name__} in {Path(where.filename).name}, {where.name}"
                    if kind not in failures:
                        traceback.print_exception(error)
                    failures[kind] = failures.get(kind, 0) + 1
            largest = max(growths, default=0) / 2**20
            rows.append(f"| {target} | {len(growths)} | {largest:.0f} | {'; '.join(failures) or 'none'} |")
            print(rows[-1], flush=True)
            all_passed &= not failures
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    head = f"""# Damaged input

`make fuzz FUZZ_SECONDS={seconds:.0f}`, {time.strftime("%d %B %Y")}: each example must end well or with one KonicError,
in {MAX_SECONDS} seconds, with {MAX_GROWTH_BYTES // 2**20} MiB more memory at most, and without a file outside its
folder. On {os.cpu_count()} cores of {processor_name()}, Python {sys.version.split()[0]}, {versions}.

| reader of | examples | most MiB | failures |
|---|---|---|---|
"""
    output.write_text(head + "\n".join(rows) + "\n")
    return all_passed


if __name__ == "__main__":
    sys.exit(not main(float(sys.argv[1]), Path(sys.argv[2])))
