"""Tiny random models with byte tokenizers, made here: no download, and every shape that matters."""

import contextlib
import logging
import os
import re
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models compute longer with more
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["PLANTED_API_KEY"] = PLANTED = "planted4f1c9a07d2"

import psutil
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import warm
from konic.finetuning.config import GenerationConfig, LoraConfig, TrainingConfig
from konic.finetuning.data.config import DatasetConfig
from konic.finetuning.data.prompts import make_prompts
from konic.finetuning.data.tokenization import make_prompt_batch
from konic.finetuning.learning.learner import make_learner
from konic.finetuning.learning.update import make_optimizer
from konic.finetuning.models.loading import LoadedModel
from konic.finetuning.models.policy import Policy
from konic.finetuning.rollout.rollout import sample_rollout
from konic.finetuning.rollout.sampler import find_special_tokens

THREADS = torch.get_num_threads()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with Ctrl-C ignored

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ARCHITECTURES = ("gpt2", "llama")
PROMPTS = ("ab", "the film was", "x", "a longer prompt than the others here", "why", "good night", "no", "seven")


def byte_tokenizer(architecture):
    """One token per byte. GPT-2's has no pad token; Llama's has one, a BOS and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{char: index for index, char in enumerate(alphabet, start=1)}}
    if architecture == "llama":
        vocabulary |= {"<bos>": 257, "<pad>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if architecture == "gpt2":
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 257)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_model(architecture, dtype=torch.float64, seed=0):
    """A random model of a few thousand weights whose logits are spread enough to matter."""
    torch.manual_seed(seed)
    if architecture == "gpt2":
        config = GPT2Config(
            vocab_size=257, n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, initializer_range=0.2,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, bos_token_id=257, eos_token_id=0, pad_token_id=258,
            attention_dropout=0.1, initializer_range=0.2,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def loaded_model(architecture, dtype=torch.float64, seed=0):
    model, tokenizer = tiny_model(architecture, dtype, seed), byte_tokenizer(architecture)
    return LoadedModel(name=architecture, location=architecture, model=model, tokenizer=tokenizer)


LORA_TARGETS = {"gpt2": ("c_attn", "c_proj"), "llama": ("q_proj", "v_proj")}


def tiny_learner(
    architecture="llama",
    *,
    lora=True,
    training=None,
    generation=None,
    dtype=torch.float64,
    dropout=0.0,
    **policy_options,
):
    """A learner of a tiny model; its adapter is a fresh one, or every weight learns."""
    training = training or TrainingConfig(learning_rate=1e-2)
    generation = generation or GenerationConfig(max_new_tokens=8, max_prompt_length=32)
    adapter = LoraConfig(r=4, lora_dropout=dropout, target_modules=LORA_TARGETS[architecture]) if lora else None
    options = {"gradient_checkpointing": training.gradient_checkpointing, "seed": training.seed} | policy_options
    policy = Policy(loaded_model(architecture, dtype), adapter, **options)
    tokens = find_special_tokens(generation, policy.language_model, policy.tokenizer)
    optimizer = make_optimizer(policy, training)
    return make_learner(policy, optimizer, tokens, architecture)


def prompt_batch(learner, texts=PROMPTS, max_length=32):
    prompts = make_prompts(list(texts), DatasetConfig(), "test")
    return make_prompt_batch(
        prompts, learner.policy.tokenizer, max_length, learner.special_tokens.pad, learner.policy.device
    )


def roll(learner, batch, generation, rng_key, micro_batch_size=None):
    """A rollout by the local sampler."""
    return sample_rollout(
        learner.policy, learner.sampler, batch, generation, learner.special_tokens, rng_key, micro_batch_size
    )


def shake_adapter(policy, scale=0.05, seed=1):
    """Move every weight that learns, so that adapter on and off differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.trainable().values():
            weight.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * scale)


LONGEST = (
    "test_processes", "test_docs", "test_ray", "test_ray_rewards", "test_gpu_benchmark", "test_engine", "test_hub",
)  # fmt: skip
"""Files whose tests come first: what starts last should be short, or one core waits for the other."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def _no_test_meets_the_scripts_of_another(tmp_path_factory):
    before, folder = {*sys.modules}, tmp_path_factory.getbasetemp()
    yield
    for name in {*sys.modules} - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(folder):
            del sys.modules[name]


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory):
    """A saved tiny fp32 model of each architecture, as a user would name it."""
    folders = {}
    for name in ARCHITECTURES:
        folder = tmp_path_factory.mktemp("models") / name
        tiny_model(name, torch.float32).save_pretrained(folder)
        byte_tokenizer(name).save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture(autouse=True)
def _threads_are_those_of_the_start():
    torch.set_num_threads(THREADS)  # a test may have left others, with which numbers round differently


@pytest.fixture(autouse=True)
def _quiet_logs():
    logging.getLogger("transformers").setLevel(logging.ERROR)


def files_with(secret, folder):
    """The files below a folder in which a text stands; of big ones, only the beginning is read."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [path for path in files if os.access(path, os.R_OK) and _holds(secret, path)]


def _holds(secret, path):
    with path.open("rb") as file:
        content = file.read(2**17)
    if path.suffix == ".parquet" and content[-4:] == b"PAR1":  # its texts are compressed
        with contextlib.suppress(Exception):  # a test has damaged it
            table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)).read(use_threads=False)
            content += str(table.to_pydict()).encode(errors="replace")
    return secret.encode() in content


@pytest.fixture(scope="session", autouse=True)
def _no_secret_is_written(tmp_path_factory):
    """After the last test, no file that a test left, and no log record, holds the planted secret."""
    folder = tmp_path_factory.getbasetemp()
    log = logging.FileHandler(folder / "konic.log", encoding="utf-8", errors="backslashreplace")
    logging.getLogger("konic").addHandler(log)
    yield
    logging.getLogger("konic").removeHandler(log)
    log.close()
    found = files_with(PLANTED, folder)
    assert not found, f"the planted secret stands in {', '.join(map(str, found))}"


def children_of(process=None, recursive=False):
    """The processes that a run has started.

    Without Python's own helper, the one that renders chat templates, and the server from which tests are forked.
    """
    found = (process or psutil.Process()).children(recursive=recursive)
    found = [child for child in found if child.pid not in warm.server_ids()]
    return [child for child in found if not re.search("resource_tracker|template_process", str(child.cmdline()))]
