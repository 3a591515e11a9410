"""`konic export --format gguf`: the file as konic's own reader and plain transformers read it; llama.cpp itself reads
it in `make export-check`."""

import json
import shutil

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from command import konic_here
from conftest import shake_adapter, tiny_model
from konic.export.modelfile import CHATML
from konic.finetuning.config import LoraConfig
from konic.finetuning.models.loading import load_model
from konic.finetuning.models.policy import Policy
from konic.finetuning.models.policy_files import save_model
from test_engine import make_engine

TEXTS = [
    "the film was good",
    "  two  spaces and\ttabs\n\nlines",
    "naïve 日本語 🙂 don't",
    "12345 <|im_end|> x",
    "<eos>a",
]
CHATML_JINJA = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n'"
    " }}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def bpe_tokenizer(size, bos):
    """A byte-level BPE with merges, as GPT-2 has; with `bos`, each text begins with it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<eos>", "<bos>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    tokenizer.train_from_iterator(["the film was good and the music was good", "two spaces don't 123"] * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", additional_special_tokens=["<|im_end|>"]
    )
    fast.chat_template = CHATML_JINJA
    return fast


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A run of each architecture, whose adapter has moved."""
    found = {}
    for kind in ("llama", "gpt2"):
        folder = tmp_path_factory.mktemp(kind)
        model = tiny_model(kind, torch.float32)
        if kind == "gpt2":  # transformers reads no other number of positions from a GGUF file of GPT-2
            sizes = model.config.to_dict() | {"n_positions": 1024}
            model = GPT2LMHeadModel(GPT2Config(**sizes))
        model.resize_token_embeddings(300, mean_resizing=False)  # more than the tokenizer has
        model.save_pretrained(folder / "base")
        config = json.loads((folder / "base" / "config.json").read_text())
        config |= {"eos_token_id": 0, "bos_token_id": 1, "pad_token_id": None}
        (folder / "base" / "config.json").write_text(json.dumps(config))
        tokenizer = bpe_tokenizer(290, kind == "llama")
        tokenizer.save_pretrained(folder / "base")
        run = folder / "run"
        make_engine(str(folder / "base"), run, architecture=kind).train(1)
        targets = {"llama": ["q_proj", "k_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}[kind]
        policy = Policy(
            load_model(str(folder / "base"), {}, torch.device("cpu")), LoraConfig(r=4, target_modules=targets)
        )
        shake_adapter(policy)
        shutil.rmtree(run / "final")
        save_model(policy, run / "final")
        found[kind] = run, policy.language_model.causal_lm, policy.tokenizer
    return found


@torch.no_grad()
def logits(model, ids=((3, 70, 9, 200, 41, 5, 295, 12),)):
    return model(torch.tensor(ids)).logits


def export(run, output, *options):
    done = konic_here("export", run, "--format", "gguf", "--output", output, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("dtype", "file", "tolerance"),
    [("float32", "model-f32.gguf", 1e-4), ("float16", "model-f16.gguf", 2e-2), ("q8_0", "model-q8_0.gguf", 0.3)],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_both_readers_find_the_logits_and_tokens_of_the_policy(
    kind, dtype, file, tolerance, runs, tmp_path, monkeypatch
):
    run, policy, tokenizer = runs[kind]
    monkeypatch.setenv("KONIC_CACHE", str(tmp_path / "cache"))
    export(run, tmp_path / "out", "--dtype", dtype)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {file, "Modelfile", "README.md"}
    wanted = logits(policy)
    ours = load_model(str(tmp_path / "out" / file), {}, torch.device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=file)
    for model in (ours.model, theirs):
        assert (logits(model) - wanted).abs().max() < tolerance
    for other in (ours.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=file)):
        assert [other(text, add_special_tokens=False).input_ids for text in TEXTS] == [
            tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS
        ]


def field(reader, name):
    return reader.get_field(name).contents() if reader.get_field(name) else None


def test_what_llama_cpp_reads_beside_the_weights(runs, tmp_path):
    said = export(runs["llama"][0], tmp_path / "an out")
    reader = gguf.GGUFReader(tmp_path / "an out" / "model-f16.gguf")
    assert field(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert field(reader, "tokenizer.ggml.add_bos_token") is True
    assert (field(reader, "tokenizer.ggml.bos_token_id"), field(reader, "tokenizer.ggml.eos_token_id")) == (1, 0)
    assert field(reader, "tokenizer.ggml.token_type")[:4] == [3, 3, 3, 1]
    assert field(reader, "tokenizer.chat_template") == CHATML_JINJA
    assert (field(reader, "llama.attention.head_count"), field(reader, "llama.attention.head_count_kv")) == (4, 2)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.0.attn_norm.weight"]) == ("F16", "F32")
    text = (tmp_path / "an out" / "Modelfile").read_text()
    assert text.startswith(f'FROM ./model-f16.gguf\nTEMPLATE """{CHATML}"""\n')
    assert 'SYSTEM """Be brief."""' in text and 'PARAMETER stop "<|im_end|>"' in text
    assert "PARAMETER temperature 1.0" in text and "PARAMETER top_k 0" in text
    assert f"llama-cli -m '{tmp_path / 'an out' / 'model-f16.gguf'}'\n" in said
    assert f"-f '{tmp_path / 'an out' / 'Modelfile'}'\n" in said
    assert str(tmp_path) not in (tmp_path / "an out" / "README.md").read_text()


def test_a_model_or_tokenizer_that_llama_cpp_would_compute_otherwise_is_refused_by_name(runs, model_folders, tmp_path):
    def refused(base, told):
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shutil.copytree(runs["gpt2"][0], run)
        shutil.rmtree(run / "final")
        shutil.copytree(base, run / "final")
        done = konic_here("export", run, "--format", "gguf", "--output", tmp_path / "no")
        assert done.returncode == 1 and told in done.stderr and "--format merged" in done.stderr, done.stderr
        assert not (tmp_path / "no").exists()

    def variant(kind, **settings):
        folder = tmp_path / f"{kind}-{'-'.join(settings)}"
        shutil.copytree(runs[kind][0].parent / "base", folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))
        return folder

    refused(model_folders["llama"], "no merges")
    refused(variant("gpt2", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx")
    refused(variant("gpt2", activation_function="relu"), "activation_function")
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    refused(variant("llama", rope_parameters=linear), "rope_type")
    qwen = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=8, eos_token_id=0, bos_token_id=1)
    )  # fmt: skip
    qwen.save_pretrained(tmp_path / "qwen")
    bpe_tokenizer(290, False).save_pretrained(tmp_path / "qwen")
    refused(tmp_path / "qwen", "'qwen3'")
    split = variant("gpt2", eos_token_id=0)
    state = json.loads((split / "tokenizer.json").read_text())
    state["pre_tokenizer"]["add_prefix_space"] = True
    (split / "tokenizer.json").write_text(json.dumps(state))
    refused(split, "cuts text in a way")
