"""Rules of a stranger's tokenizer.json: those that could take for ever or fill the memory are refused by name."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from konic.finetuning.errors import ModelError, panics_as_errors
from konic.finetuning.models import tokenizer_rules
from konic.finetuning.models.loading import load_model
from konic.finetuning.models.tokenizer_rules import find_unbounded_rule, repeats_a_repetition

KNOWN = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
    r"|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{Lm}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "deepseek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "groups of digits": r"\d{1,3}(?=(?:\d{3})*\b)",
    "spaces": " {2,}",
}
ENDLESS = [
    "(a+)+$", "(a|a)*b", "(a|aa)+$", "(.*)*x", "(?:a?)+b", "((a)+b?)*", "(a+){20}", "(a+){2,}", "(?>x|y(a*)*)",
    "([ab]+c?)+", "(?i:a|b)+", "(a+){2}+", r"(\w+\s?)+$", "a{1,3}+$", "(?<x>a+)+", "[)](a+)+", r"\((a+)+", "[]](a+)+",
]  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_expressions_of_known_tokenizers_are_taken(name):
    assert not repeats_a_repetition(KNOWN[name])


@pytest.mark.parametrize("expression", ENDLESS)
def test_an_expression_that_repeats_a_repetition_is_found(expression):
    assert repeats_a_repetition(expression)


@pytest.mark.parametrize(
    ("part", "rule", "told"),
    [
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
         r"its expression '\(a\+\)\+\$' repeats a repetition"),
        ("normalizer", {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}, r"a text 1\.1e\+12 times as long"),
        ("decoder", {"type": "Replace", "pattern": {"Regex": "(?:x|y)*z"}, "content": ""}, "repeats a repetition"),
    ],
)  # fmt: skip
def test_a_tokenizer_cannot_take_for_ever_or_fill_the_memory(part, rule, told, model_folders, tmp_path):
    folder = Path(shutil.copytree(model_folders["llama"], tmp_path / "model"))
    rules = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(rules | {part: rule}))
    with pytest.raises(ModelError, match=f"tokenizer.json: .*{told}"):
        load_model(str(folder), {}, torch.device("cpu"))


def split(expression):
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


NO_E = {"id": 300, "content": "e", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
        "special": False}  # fmt: skip
MANY = 20_000
FOUND_BY_A_TRIAL = {
    "an expression that tries in many ways": ({"pre_tokenizer": split("a*a*a*(?<=0)|.")}, "take more than 0.5 s"),
    "a prefix for each piece": (
        {"normalizer": {"type": "Prepend", "prepend": "x" * 500_000}, "added_tokens": [NO_E]},
        r"take more than (256 MB|0\.5 s)",
    ),
    "a template of many tokens, many times": (
        {"post_processor": {
            "type": "TemplateProcessing", "pair": [],
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, *[{"SpecialToken": {"id": "x", "type_id": 0}}] * MANY],
            "special_tokens": {"x": {"id": "x", "ids": [1] * MANY, "tokens": ["x"] * MANY}},
        }},
        r"take more than (256 MB|0\.5 s)",
    ),
    "a template of many tokens": (
        {"post_processor": {
            "type": "TemplateProcessing", "pair": [],
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, *[{"SpecialToken": {"id": "x", "type_id": 0}}] * 1000],
            "special_tokens": {"x": {"id": "x", "ids": [1] * 1000, "tokens": ["x"] * 1000}},
        }},
        "fail: they make 10000[0-9]+ tokens of 300 characters",
    ),
    "a decoder that panics": (
        {"decoder": {"type": "Strip", "content": "e", "start": 0, "stop": 10**18}}, "fail: PanicError: index out of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOUND_BY_A_TRIAL)
def test_rules_that_read_as_usual_are_tried(kind, tmp_path, monkeypatch):
    rules, told = FOUND_BY_A_TRIAL[kind]
    monkeypatch.setattr(tokenizer_rules, "_SECONDS", 0.5 if "0.5" in told.replace("\\", "") else 5.0)
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    assert re.search(told, find_unbounded_rule(tmp_path / "tokenizer.json"))


def test_equal_rules_are_tried_once(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": split("once +")}))
    assert find_unbounded_rule(tmp_path / "tokenizer.json") is None
    monkeypatch.setattr(tokenizer_rules.subprocess, "run", None)
    assert find_unbounded_rule(tmp_path / "tokenizer.json") is None


OTHER_FILES = [
    ("tokenizer_config.json", {"vocab": "SECRET"}), ("tokenizer_config.json", {"init_inputs": ["SECRET"]}),
    ("tokenizer_config.json", {"merges": "SECRET"}), ("tokenizer_config.json", {"gguf_file": "SECRET"}),
    ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}),
    ("special_tokens_map.json", {"vocab": "SECRET"}), ("special_tokens_map.json", {"vocab_file": "SECRET"}),
    ("special_tokens_map.json", {"tokenizer_file": "SECRET"}), ("special_tokens_map.json", {"name_or_path": "a/b"}),
]  # fmt: skip


@pytest.mark.parametrize(("file", "settings"), OTHER_FILES, ids=str)
def test_a_tokenizer_names_no_other_file_to_read(file, settings, model_folders, tmp_path):
    """Its words would stand in what is saved, exported and sent."""
    (tmp_path / "secret").write_text("[UNK]\nmy_password\n")
    folder = Path(shutil.copytree(model_folders["llama"], tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "unk_token": "[UNK]"}')
    old = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    named = json.loads(json.dumps(settings).replace("SECRET", str(tmp_path / "secret")))
    (folder / file).write_text(json.dumps(old | named))
    if {"vocab", "vocab_file", "init_inputs"} & settings.keys():
        assert "my_password" in AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False).get_vocab()
    with pytest.raises(
        ModelError, match=rf"{file}: '?{next(iter(settings))}.* (names another file|is not the name of)"
    ):
        load_model(str(folder), {}, torch.device("cpu"))


PANICS = {
    "when it is read": ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "when it reads": ("post_processor", {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "none", "type_id": 0}}], "pair": [],
        "special_tokens": {},
    }),
}  # fmt: skip


@pytest.mark.parametrize("when", PANICS)
def test_a_tokenizer_that_panics_is_one_error(when, model_folders, tmp_path):
    folder, (part, rule) = Path(shutil.copytree(model_folders["llama"], tmp_path / "model")), PANICS[when]
    rules = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(rules | {part: rule}))
    with pytest.raises(ModelError, match=r"model'.*PanicError: "):
        load_model(str(folder), {}, torch.device("cpu"))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, KeyError])
def test_what_is_no_panic_passes(kind):
    with pytest.raises(kind), panics_as_errors():
        raise kind


def test_a_tokenizer_that_is_no_object_has_no_rules(tmp_path):
    (tmp_path / "tokenizer.json").write_text("[1]")
    assert find_unbounded_rule(tmp_path / "tokenizer.json") is None
