"""Reward models fitted to toy preferences, against plain Python and plain transformers; `konic reward-model`."""

import csv
import json
import logging
import math
import re
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_classifier import VOCABULARY, WORDS, bert, bert_config, close, plain_logits, save, word_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from conftest import byte_tokenizer
from konic.cli import main
from konic.finetuning import ConfigError, DatasetError, HuggingFaceRewardModel, ModelError, OutputError, TrainingError
from konic.finetuning.results.intervals import proportion
from konic.finetuning.reward_models import training
from konic.finetuning.reward_models.feedback import Labelled, Preference, read_labelled, read_preferences
from konic.finetuning.reward_models.training import RewardTrainingConfig, train_reward_model

FILMS = Path(__file__).parents[2] / "examples" / "data" / "film_opinions.csv"
FILLERS = [word for word in WORDS if word not in ("good", "bad")]


def words(random, *marks):
    """Two to five words, the marks somewhere among them."""
    text = random.choices(FILLERS, k=random.randint(2, 5))
    for mark in marks:
        text.insert(random.randint(0, len(text)), mark)
    return " ".join(text)


def toy_pairs(count, seed=0):
    """Responses with "good" are preferred."""
    random = Random(seed)
    return [Preference(words(random), words(random, "good"), words(random)) for _ in range(count)]


def toy_texts(count, seed=0):
    """Three labels, each told by a word or its absence."""
    random = Random(seed)
    marks = {"liked": ("good",), "loathed": ("bad",), "neither": ()}
    return [Labelled(words(random, *marks[label]), label) for label in random.choices(list(marks), k=count)]


def word_chat_tokenizer():
    """One token per word, a chat template, an EOS, no pad token and no special tokens around a text."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY | {"user": 24, "assistant": 25}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    return fast


BASE = {"initializer_range": 0.1, "hidden_size": 32, "intermediate_size": 64}


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Folders of tiny models without a classification head."""
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=26, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64, bos_token_id=None,
        eos_token_id=3, pad_token_id=None, **BASE,
    )  # fmt: skip
    gpt2 = GPT2Config(vocab_size=257, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    return {
        "bert": save(root / "bert", BertModel(bert_config(**BASE)), word_tokenizer()),
        "llama": save(root / "llama", LlamaForCausalLM(llama), word_chat_tokenizer()),
        "gpt2": save(root / "gpt2", GPT2LMHeadModel(gpt2), byte_tokenizer("gpt2")),
    }


LEARNS = {"epochs": 8, "learning_rate": 1e-2, "max_length": 32}
BRIEF = {"epochs": 2, "learning_rate": 1e-2, "batch_size": 4, "max_length": 32}


def fit(examples, base, folder, told=None, test=(), **options):
    tell = (told if told is not None else []).append
    return train_reward_model(examples, base, folder, RewardTrainingConfig(**options), test, "cpu", tell)


@pytest.fixture(scope="session")
def judges(bases, tmp_path_factory):
    """Reward models fitted to the toys: their reports and what was told, by name."""
    root = tmp_path_factory.mktemp("judges")
    made = {}
    for name, base, options in (
        ("bert", "bert", {}), ("llama", "llama", {}), ("bert-lora", "bert", {"lora_r": 8, "learning_rate": 2e-2})
    ):  # fmt: skip
        told = []
        report = fit(
            toy_pairs(200), bases[base], root / name, told, toy_pairs(50, seed=1), **LEARNS | {"seed": 3} | options
        )
        made[name] = report, told
    told = []
    report = fit(toy_texts(240), bases["bert"], root / "texts", told, **LEARNS)
    return made | {"texts": (report, told)}


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same_weights(left, right):
    left, right = weights(left), weights(right)
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def card(folder):
    return (Path(folder) / "README.md").read_text()


# --- loss and accuracy on given logits ---


class Lookup(BertForSequenceClassification):
    """A classifier of which the logits of a text are those of its one word."""

    def __init__(self, logits):
        super().__init__(bert_config())
        self.table = {VOCABULARY[word]: values for word, values in logits.items()}

    def forward(self, input_ids, **_):
        rows = [next(self.table[token] for token in row if token in self.table) for row in input_ids.tolist()]
        return SimpleNamespace(logits=torch.tensor(rows))


SCORES = {"good": 2.0, "fine": 0.5, "dull": 0.5, "bad": -1.5, "why": math.nan}


@pytest.mark.parametrize(
    ("pairs", "right"),
    [
        ([("good", "bad"), ("fine", "bad"), ("bad", "good")], 2),
        ([("fine", "dull"), ("fine", "fine")], 0),  # a tie is not right
        ([("good", "fine")] * 70 + [("bad", "fine")] * 30, 70),
    ],
)
def test_pairs_have_the_loss_and_accuracy_of_bradley_and_terry(pairs, right):
    task = training._Task(word_tokenizer(), "response", 16, None)
    examples = [Preference("ignored", *pair) for pair in pairs]
    model = Lookup({word: [score] for word, score in SCORES.items()}).train()
    log_probabilities = task.scores(model, [task.encoded(example) for example in examples])
    gaps = [SCORES[chosen] - SCORES[rejected] for chosen, rejected in pairs]
    assert log_probabilities[:, 0].tolist() == pytest.approx([-math.log(1 + math.exp(-gap)) for gap in gaps])
    assert log_probabilities[:, 1].tolist() == pytest.approx([-math.log(1 + math.exp(gap)) for gap in gaps])
    share = task.accuracy(model, examples)
    assert share == proportion(right, len(pairs))
    assert share.mean == right / len(pairs)
    assert model.training


def test_a_score_that_is_not_a_number_is_never_right():
    task = training._Task(word_tokenizer(), "response", 16, None)
    model = Lookup({word: [score] for word, score in SCORES.items()})
    pairs = [Preference("", "why", "bad"), Preference("", "good", "why"), Preference("", "good", "bad")]
    assert task.accuracy(model, pairs).mean == pytest.approx(1 / 3)


def test_labelled_texts_have_the_loss_and_accuracy_of_a_softmax():
    task = training._Task(word_tokenizer(), "response", 16, ["liked", "loathed", "neither"])
    logits = {"good": [2.0, -1.0, 0.0], "bad": [0.0, 3.0, 1.0], "so": [1.0, 1.0, 0.0]}
    texts = [("good", "liked"), ("bad", "neither"), ("bad", "loathed"), ("so", "liked"), ("so", "neither")]
    examples = [Labelled(*pair) for pair in texts]
    batch = [task.encoded(example) for example in examples]
    assert [label for _, label in batch] == [0, 2, 1, 0, 2]
    for row, (text, _) in zip(task.scores(Lookup(logits), batch).tolist(), texts, strict=True):
        total = sum(math.exp(logit) for logit in logits[text])
        assert row == pytest.approx([math.log(math.exp(logit) / total) for logit in logits[text]])
    assert task.accuracy(Lookup(logits), examples).mean == 2 / 5  # the tie of "so" is not right


def undecided(labels, folder):
    """A base that is a classifier with as many labels already, so that its head is kept, and no dropout."""
    return save(folder, bert(labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), word_tokenizer())


def test_the_loss_told_is_bradley_terrys_of_all_pairs(tmp_path):
    base, told, pairs = undecided(1, tmp_path / "base"), [], toy_pairs(21)
    options = {"learning_rate": 1e-12, "held_out": 0, "epochs": 2, "batch_size": 4}
    report = fit(pairs, base, tmp_path / "judge", told, test=toy_pairs(30, seed=1), **options)

    def gap(pair):
        return plain_logits(base, pair.prompt, pair.chosen)[0] - plain_logits(base, pair.prompt, pair.rejected)[0]

    loss = sum(math.log(1 + math.exp(-gap(pair))) for pair in pairs) / 21
    assert [float(re.fullmatch(r"Epoch \d/2: loss ([\d.]+)", line)[1]) for line in told] == pytest.approx(
        [loss, loss], abs=1e-4
    )
    right = sum(gap(pair) > 0 for pair in toy_pairs(30, seed=1))
    assert (report.num_examples, report.num_held_out, report.num_test) == (21, 0, 30)
    assert report.test_accuracy.mean == right / 30
    assert math.isnan(report.accuracy.mean)
    assert "held out" not in card(tmp_path / "judge")


def test_the_loss_told_is_the_cross_entropy_of_all_texts(tmp_path):
    base, told, texts = undecided(3, tmp_path / "base"), [], toy_texts(19)
    names = ["liked", "loathed", "neither"]
    options = {"learning_rate": 1e-12, "held_out": 0, "epochs": 1, "batch_size": 4}
    report = fit(texts, base, tmp_path / "judge", told, test=texts, **options)
    loss = right = 0
    for example in texts:
        logits = plain_logits(base, example.text)
        own = logits[names.index(example.label)]
        loss -= math.log(math.exp(own) / sum(math.exp(logit) for logit in logits)) / 19
        right += own == max(logits)
    assert float(told[0].removeprefix("Epoch 1/1: loss ")) == pytest.approx(loss, abs=1e-4)
    assert report.test_accuracy.mean == right / 19


# --- what is learned and written ---


@pytest.mark.parametrize("name", ["bert", "llama", "bert-lora"])
def test_a_toy_preference_is_learned_and_the_folder_scores_the_same_everywhere(judges, name):
    report, told = judges[name]
    assert (report.num_examples, report.num_held_out, report.num_test) == (160, 40, 50)
    assert report.accuracy.mean >= 0.9 and report.test_accuracy.mean >= 0.9
    assert report.accuracy == proportion(round(report.accuracy.mean * 40), 40)
    losses = [float(re.match(rf"Epoch {n}/8: loss ([\d.]+), held-out ", line)[1]) for n, line in enumerate(told, 1)]
    assert len(losses) == 8 and losses[-1] < 0.5 * losses[0]
    assert told[-1].endswith(f"held-out accuracy {report.accuracy.mean:.3f}")

    folder, fresh = str(report.folder), toy_pairs(50, seed=1)
    reward = HuggingFaceRewardModel(folder, device="cpu")
    prompts = [pair.prompt for pair in fresh]
    chosen = reward.score(prompts, [pair.chosen for pair in fresh])
    rejected = reward.score(prompts, [pair.rejected for pair in fresh])
    above = sum(high > low for high, low in zip(chosen, rejected, strict=True)) / 50
    assert above == report.test_accuracy.mean
    for pair, high, low in zip(fresh, chosen, rejected, strict=True):
        for response, score in ((pair.chosen, high), (pair.rejected, low)):
            alone = (
                plain_logits(folder, f"user {pair.prompt} assistant {response}")
                if name == "llama"
                else plain_logits(folder, pair.prompt, response)
            )
            assert alone == close([score])


def test_toy_labels_are_learned_and_the_folder_scores_the_same_everywhere(judges):
    report, _ = judges["texts"]
    assert (report.num_examples, report.num_held_out) == (192, 48)
    assert report.accuracy.mean >= 0.9
    assert report.test_accuracy is None
    folder, fresh, names = str(report.folder), toy_texts(40, seed=1), ["liked", "loathed", "neither"]
    scores = {
        name: HuggingFaceRewardModel(folder, device="cpu", label_index=name).score(
            ["ignored"] * 40, [example.text for example in fresh]
        )
        for name in names
    }
    right = 0
    for row, example in enumerate(fresh):
        logits = [scores[name][row] for name in names]
        assert plain_logits(folder, example.text) == close(logits)
        right += names[logits.index(max(logits))] == example.label
    assert right >= 36


@pytest.mark.parametrize(
    ("name", "text_format", "labels"),
    [
        ("bert", "pair", ["reward"]),
        ("bert-lora", "pair", ["reward"]),
        ("llama", "chat", ["reward"]),
        ("texts", "response", ["liked", "loathed", "neither"]),
    ],
)
def test_a_folder_knows_what_it_reads_and_its_labels(judges, name, text_format, labels):
    folder = judges[name][0].folder
    config = json.loads((folder / "config.json").read_text())
    assert config["konic_text_format"] == text_format
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == dict(enumerate(labels))
    assert model.config.label2id == {label: index for index, label in enumerate(labels)}
    assert model.dtype == torch.float32
    assert HuggingFaceRewardModel(str(folder), device="cpu", label_index=0).text_format == text_format


@pytest.mark.parametrize(("asked", "read"), [(24, 24), (256, 48)])
def test_a_folder_knows_how_much_it_reads(bases, tmp_path, asked, read):
    folder = str(fit(toy_pairs(8), bases["bert"], tmp_path / "judge", **BRIEF | {"max_length": asked}).folder)
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.konic_max_length == read
    reward, long = HuggingFaceRewardModel(folder, device="cpu"), " ".join(FILLERS * 4)
    assert reward.max_length == read
    whole = HuggingFaceRewardModel(folder, device="cpu", max_length=48)
    assert (reward.score(["why"], [long]) == whole.score(["why"], [long])) is (read == 48)


@pytest.mark.parametrize("name", ["bert", "bert-lora", "llama"])
def test_a_folder_is_a_plain_whole_model(judges, bases, name):
    folder = judges[name][0].folder
    assert {file.name for file in folder.iterdir()} - {"chat_template.jinja", "special_tokens_map.json"} == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [
        "LlamaForSequenceClassification" if name == "llama" else "BertForSequenceClassification"
    ]
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert weights(folder).keys() == model.state_dict().keys()
    before = {key.removeprefix("model."): value for key, value in weights(bases[name.partition("-")[0]]).items()}
    after = {re.sub(r"^(bert|model)\.", "", key): value for key, value in weights(folder).items()}
    moved = {key for key in before.keys() & after.keys() if not torch.equal(before[key], after[key])}
    assert any("attention.self.query.weight" in key or "q_proj.weight" in key for key in moved)
    assert ("norm.weight" in moved or "embeddings.word_embeddings.weight" in moved) is (name != "bert-lora")


def test_a_base_without_a_pad_token_gets_its_end_of_text(judges):
    folder = judges["llama"][0].folder
    assert AutoTokenizer.from_pretrained(folder).pad_token == "[SEP]"
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.pad_token_id == VOCABULARY["[SEP]"]


def test_a_card_tells_what_it_was_fitted_to_and_its_accuracy(judges, bases):
    report, _ = judges["bert"]
    text = card(report.folder)
    held_out, test = report.accuracy, report.test_accuracy
    assert "Fitted to 160 preference pairs; it reads texts as 'pair'." in text
    assert (
        f"accuracy, held out (40 examples): {held_out.mean:.3f} (95 % interval {held_out.low:.3f} to "
        f"{held_out.high:.3f})" in text
    )
    assert f"accuracy, test (50 examples): {test.mean:.3f} (95 % interval {test.low:.3f} to {test.high:.3f})" in text
    header = ModelCard(text).data
    assert (header.base_model, header.library_name) == (bases["bert"], "transformers")
    assert header.pipeline_tag == "text-classification"
    other = card(judges["texts"][0].folder)
    assert "Fitted to 192 texts labelled liked, loathed, neither; it reads texts as 'response'." in other
    assert "(48 examples)" in other and "accuracy, test" not in other


def test_the_folders_other_files_stay_and_nothing_is_left_beside(bases, tmp_path):
    folder = tmp_path / "judge"
    (folder / "notes").mkdir(parents=True)
    (folder / "notes" / "mine.txt").write_text("kept")
    (folder / "README.md").write_text("of an earlier one")
    first = fit(toy_pairs(16), bases["bert"], folder, **BRIEF)
    assert first.folder == folder
    assert (folder / "notes" / "mine.txt").read_text() == "kept"
    assert "# A reward model" in card(folder)
    saved = weights(folder)
    fit(toy_pairs(16), bases["bert"], folder, **BRIEF, seed=1)
    assert any(not torch.equal(saved[name], weight) for name, weight in weights(folder).items())
    assert [path.name for path in tmp_path.iterdir()] == ["judge"]


def test_a_relative_folder_is_reported_whole(bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = fit(toy_pairs(10), bases["bert"], "runs/judge", **BRIEF)
    assert report.folder == tmp_path / "runs" / "judge"
    assert (tmp_path / "runs" / "judge" / "model.safetensors").is_file()


def test_gpt2_with_lora_is_fitted_without_warnings(bases, tmp_path):
    fit(toy_pairs(8), bases["gpt2"], tmp_path / "judge", epochs=1, lora_r=2)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_gpt2_with_lora_is_saved_whole(bases, tmp_path):
    fit(toy_pairs(12), bases["gpt2"], tmp_path / "judge", **BRIEF, lora_r=2)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.pad_token_id == 0
    reward = HuggingFaceRewardModel(str(tmp_path / "judge"), device="cpu")
    assert reward.text_format == "pair"
    assert reward.score(["why"], [" not"]) == close(plain_logits(str(tmp_path / "judge"), "why", " not"))


def test_distilbert_with_lora_is_fitted(tmp_path):
    config = DistilBertConfig(
        vocab_size=24, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=48, pad_token_id=0
    )
    tokenizer = word_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    base = save(tmp_path / "base", DistilBertModel(config), tokenizer)
    folder = str(fit(toy_pairs(8), base, tmp_path / "judge", epochs=1, lora_r=2).folder)
    assert HuggingFaceRewardModel(folder, device="cpu").score(["a"], ["b"]) == close(plain_logits(folder, "a", "b"))


def test_a_head_of_another_size_is_made_anew(bases, tmp_path):
    base = save(tmp_path / "base", bert(3), word_tokenizer())
    fit(toy_pairs(12), base, tmp_path / "judge", **BRIEF)
    assert weights(tmp_path / "judge")["classifier.weight"].shape == (1, 16)


@pytest.mark.parametrize(("options", "rate"), [({}, 1e-4), ({"lora_r": 2}, 1e-3), ({"learning_rate": 0.02}, 0.02)])
def test_the_learning_rate_follows_the_mode(bases, tmp_path, monkeypatch, options, rate):
    seen = []

    class Recorded(torch.optim.AdamW):
        def __init__(self, parameters, lr, **others):
            seen.append(lr)
            super().__init__(parameters, lr=lr, **others)

    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    fit(toy_pairs(8), bases["bert"], tmp_path / "judge", epochs=1, **options)
    assert seen == [rate]


def test_every_epoch_reads_every_text_once_and_no_more_than_max_length(bases, tmp_path, monkeypatch):
    read, true_forward = [], training.forward

    def recorded(model, encoded):
        if model.training:
            read.append([text["input_ids"] for text in encoded])
        return true_forward(model, encoded)

    monkeypatch.setattr(training, "forward", recorded)
    pairs = toy_pairs(23)
    options = {"epochs": 2, "batch_size": 4, "max_length": 10, "held_out": 0.0, "text_format": "joined"}
    fit([Preference(p.prompt + " ", p.chosen, p.rejected) for p in pairs], bases["bert"], tmp_path / "judge", **options)
    tokenizer = word_tokenizer()
    every = [tokenizer(f"{p.prompt} {text}").input_ids for p in pairs for text in (p.chosen, p.rejected)]
    expected = sorted([2, *ids[1:-1][-8:], 3] for ids in every)
    assert any(len(ids) > 10 for ids in every)
    assert sorted(len(batch) for batch in read) == [6, 6] + [8] * 10
    for epoch in (read[:6], read[6:]):
        assert sorted(ids for batch in epoch for ids in batch) == expected
    assert read[:6] != read[6:]


def test_pairs_that_are_equal_within_max_length_are_told_up_to_half(bases, tmp_path, caplog):
    end = " the film was so very long"
    cut = [Preference(word, "good" + end, "bad" + end) for word in FILLERS[:11]]
    options = BRIEF | {"max_length": 8, "text_format": "pair"}
    fit(cut[:10] + toy_pairs(10), bases["bert"], tmp_path / "judge", **options)
    found = "{} pairs are the same to the model, which reads 8 tokens of a text. Such pairs teach nothing"
    assert [record.getMessage() for record in caplog.records] == [
        f"The chosen and the rejected text of {found.format('10 of 20')}."
    ]
    told = []
    with pytest.raises(DatasetError, match=f"{found.format('11 of 21')}: raise max_length"):
        fit(cut + toy_pairs(10), bases["bert"], tmp_path / "other", told, **options)
    assert not told and not (tmp_path / "other").exists()


# --- seeds ---


def test_a_seed_decides_every_weight_and_torchs_own_numbers_are_left_alone(bases, tmp_path):
    torch.manual_seed(11)
    state = torch.get_rng_state()
    fit(toy_pairs(24), bases["bert"], tmp_path / "a", **BRIEF, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    fit(toy_pairs(24), bases["bert"], tmp_path / "b", **BRIEF, seed=5)
    fit(toy_pairs(24), bases["bert"], tmp_path / "c", **BRIEF, seed=6)
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert not same_weights(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize(("count", "share", "kept"), [(40, 0.2, 8), (8, 0.2, 2), (9, 0.0, 0), (100, 0.5, 50)])
def test_a_seed_decides_what_is_held_out(count, share, kept):
    pairs = toy_pairs(count)
    splits = [training._split(pairs, RewardTrainingConfig(held_out=share, seed=seed)) for seed in (0, 0, 1)]
    for train, held_out in splits:
        assert len(held_out) == kept
        assert sorted(map(repr, train + held_out)) == sorted(map(repr, pairs))
    assert splits[0] == splits[1]
    assert (splits[0][1] == splits[2][1]) is (kept == 0)


@pytest.mark.parametrize("examples", [toy_pairs(40), toy_texts(40)])
def test_copies_of_an_example_are_held_out_with_it(examples):
    config = RewardTrainingConfig(seed=3)
    alone = training._split(examples, config)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3)).tolist()
    assert alone == ([examples[row] for row in order[8:]], [examples[row] for row in order[:8]])
    for side, of_copies in zip(alone, training._split(examples * 3, config), strict=True):
        assert sorted(map(repr, of_copies)) == sorted(map(repr, side * 3))


def test_a_text_of_two_labels_is_on_one_side():
    train, held_out = training._split(
        [Labelled(str(n), label) for label in "ab" for n in range(20)], RewardTrainingConfig()
    )
    assert not {text.text for text in train} & {text.text for text in held_out}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 50), max_size=200), st.integers(1, 9), st.integers(0, 99))
def test_random_batches_hold_every_index_once(lengths, size, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        batches = training._random_batches(lengths, size)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert len(batches) == math.ceil(len(lengths) / size)
    assert all(len(batch) <= size for batch in batches)


def test_random_batches_are_of_like_lengths_and_differ_from_epoch_to_epoch():
    random = Random(0)
    lengths = [random.randint(1, 100) for _ in range(64)]
    torch.manual_seed(0)
    first, second = (training._random_batches(lengths, 8) for _ in range(2))
    assert first != second
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in first]
    assert sum(spread) / 8 < 25  # eight drawn at random span 78 of 99 on average
    longest_first = sorted(first, key=lambda batch: -max(lengths[i] for i in batch))
    assert first != longest_first


# --- rows ---

WHY = {"role": "user", "content": "why"}
BRIEFLY = {"role": "system", "content": "be brief"}
GOOD, BAD = ({"role": "assistant", "content": content} for content in ("good", "bad"))
BEFORE = [WHY, BAD, {"role": "user", "content": "and so"}]


def written(tmp_path, rows, suffix="jsonl"):
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    return str(path)


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"prompt": "why", "chosen": "good", "rejected": "bad"}, Preference("why", "good", "bad")),
        ({"chosen": "good", "rejected": "bad"}, Preference("", "good", "bad")),
        ({"prompt": None, "chosen": "good", "rejected": "bad"}, Preference("", "good", "bad")),
        ({"prompt": "", "chosen": "good", "rejected": "bad", "score": 3}, Preference("", "good", "bad")),
        ({"prompt": "why", "chosen": [GOOD], "rejected": [BAD]}, Preference("why", "good", "bad", [WHY])),
        ({"chosen": [WHY, GOOD], "rejected": [WHY, BAD]}, Preference("why", "good", "bad", [WHY])),
        ({"prompt": "why", "chosen": [WHY, GOOD], "rejected": [WHY, BAD]}, Preference("why", "good", "bad", [WHY])),
        (
            {"prompt": [BRIEFLY, WHY], "chosen": [GOOD], "rejected": [BAD]},
            Preference("why", "good", "bad", [BRIEFLY, WHY]),
        ),
        (
            {"prompt": [BRIEFLY, WHY], "chosen": "good", "rejected": "bad"},
            Preference("why", "good", "bad", [BRIEFLY, WHY]),
        ),
        ({"chosen": [*BEFORE, GOOD], "rejected": [*BEFORE, BAD]}, Preference("and so", "good", "bad", BEFORE)),
        *(
            (
                {"prompt": prompt, "chosen": [*BEFORE, GOOD], "rejected": [*BEFORE, BAD]},
                Preference("and so", "good", "bad", BEFORE),
            )
            for prompt in (" and so\n", BEFORE[0]["content"], str([m["content"] for m in BEFORE]), BEFORE, BEFORE[-1:])
        ),
        ({"chosen": [GOOD], "rejected": [BAD]}, Preference("", "good", "bad")),
        (
            {"chosen": json.dumps([WHY, GOOD]), "rejected": json.dumps([WHY, BAD])},
            Preference("why", "good", "bad", [WHY]),
        ),
        (
            {"prompt": json.dumps([BRIEFLY, WHY]), "chosen": "good", "rejected": "bad"},
            Preference("why", "good", "bad", [BRIEFLY, WHY]),
        ),
        ({"prompt": "[1]", "chosen": "[good]", "rejected": "[]"}, Preference("[1]", "[good]", "[]")),
        (
            {"chosen": [{"content": "why", "id": 7}, GOOD], "rejected": [{"content": "why"}, BAD]},
            Preference("why", "good", "bad", [WHY]),
        ),
    ],
)
def test_a_pair_may_be_texts_or_chats_with_or_without_its_prompt(tmp_path, row, pair):
    assert read_preferences(written(tmp_path, [row])) == [pair]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_pairs_and_labelled_texts_come_from_every_kind_of_file(tmp_path, suffix):
    rows = [{"prompt": "why", "chosen": "so", "rejected": "no, not"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    pairs = [Preference("why", "so", "no, not"), Preference("a", "b", "c")]
    assert read_preferences(written(tmp_path, rows, suffix)) == pairs
    assert read_preferences(str(tmp_path)) == pairs
    assert read_labelled(str(tmp_path), "chosen", "rejected") == [Labelled("so", "no, not"), Labelled("b", "c")]


def test_labels_that_are_numbers_become_their_names(tmp_path):
    def names(*labels, kind="jsonl"):
        path = written(tmp_path, [{"text": "good", "stars": label} for label in labels], kind)
        return [example.label for example in read_labelled(path, "text", "stars")]

    assert names(5, 0, -1, 0.5) == ["5", "0", "-1", "0.5"]
    assert names(True, False, "True") == ["True", "False", "True"]
    assert names(1, 1.0, "1", " 1.0 ") == ["1", "1", "1", "1"]
    assert names("1.0", " pos", "pos ", "v1.0", kind="csv") == ["1", "pos", "pos", "v1.0"]
    with pytest.raises(DatasetError, match="'stars' mixes numbers with True or False"):
        names(1, True)


PLAIN = {"prompt": "why", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "why", "choosen": "a", "rejected": "b"}, r"no column 'chosen'\. Did you mean 'choosen'\?"),
        ({"prompt": "why", "chosen": "a"}, r"no column 'rejected'.*The row has: prompt, chosen"),
        ("why", r"no column 'chosen'\. The row has: none"),
        (PLAIN | {"chosen": ""}, "'chosen' or 'rejected' holds no response"),
        (PLAIN | {"rejected": " \n"}, "'chosen' or 'rejected' holds no response"),
        (PLAIN | {"rejected": None}, "holds no response"),
        (PLAIN | {"chosen": []}, "holds no response"),
        (PLAIN | {"chosen": 5}, "'chosen' is neither a text nor a chat: 5"),
        (PLAIN | {"rejected": ["bad"]}, r"'rejected' is neither a text nor a chat: \['bad'\]"),
        (PLAIN | {"chosen": {"content": "good"}}, "'chosen' is neither a text nor a chat"),
        (PLAIN | {"chosen": json.dumps(GOOD)}, "'chosen' is neither a text nor a chat"),
        (PLAIN | {"chosen": json.dumps([GOOD])[:-3]}, "begins as a chat but cannot be read as one"),
        (PLAIN | {"chosen": [{"role": "assistant", "content": None}]}, "'chosen' is neither a text nor a chat"),
        (PLAIN | {"chosen": [WHY, GOOD], "rejected": [BRIEFLY, BAD]}, "differ before their last message"),
        (PLAIN | {"chosen": [WHY, GOOD], "rejected": "bad"}, "differ before their last message"),
        (PLAIN | {"prompt": "how", "chosen": [WHY, GOOD], "rejected": [WHY, BAD]}, "holds 'how', which is not in"),
        (PLAIN | {"prompt": [BRIEFLY, WHY], "chosen": [WHY, GOOD], "rejected": [WHY, BAD]}, "holds 'be brief'"),
        (PLAIN | {"prompt": 1.5}, r"'prompt' is neither a text nor a chat: 1\.5"),
        pytest.param(
            PLAIN | {"chosen": [WHY, {"role": "assistant", "content": " "}]}, "holds no response",
        ),
    ],
)  # fmt: skip
def test_a_row_that_is_no_pair_is_named(tmp_path, row, told):
    with pytest.raises(DatasetError, match=rf"data\.jsonl, row 2: .*{told}"):
        read_preferences(written(tmp_path, [PLAIN, PLAIN, row]))


def test_pairs_of_equal_responses_are_left_out_up_to_half(tmp_path, caplog):
    equal = PLAIN | {"rejected": "good"}
    assert len(read_preferences(written(tmp_path, [PLAIN, equal, PLAIN, equal]))) == 2
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "'chosen' and 'rejected' are equal in 2 of 4 rows, which are left out: rows 1, 3."
    ]
    with pytest.raises(DatasetError, match="are equal in 2 of 3 rows: rows 1, 2"):
        read_preferences(written(tmp_path, [PLAIN, equal, equal]))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "good"}, r"row 1: there is no column 'label'\. The row has: text"),
        ({"txt": "good", "label": "x"}, r"row 1: there is no column 'text'\. Did you mean 'txt'\?"),
        ({"text": " ", "label": "x"}, r"row 1: needs a text in 'text' and a label \(a word or a number\) in 'label'"),
        ({"text": "good", "label": None}, "row 1: needs a text"),
        ({"text": 5, "label": "x"}, "row 1: needs a text"),
        ({"text": "good", "label": " "}, "row 1: needs a text"),
        ({"text": "good", "label": math.nan}, "row 1: needs a text"),
        ({"text": "good", "label": ["x"]}, "row 1: needs a text"),
    ],
)
def test_a_row_that_is_no_labelled_text_is_named(tmp_path, row, told):
    with pytest.raises(DatasetError, match=told):
        read_labelled(written(tmp_path, [{"text": "good", "label": "x"}, row]), "text", "label")


def test_data_without_rows_or_out_of_reach_is_said(tmp_path):
    with pytest.raises(DatasetError, match=r"holds no rows\. Give examples, with the columns chosen, rejected\."):
        read_preferences(written(tmp_path, []))
    with pytest.raises(DatasetError, match="some/preferences"):
        read_preferences("some/preferences")


# --- what is refused ---


@pytest.mark.parametrize(
    ("examples", "told"),
    [
        (toy_pairs(7), "7 examples are too few to learn from; give at least 8"),
        ([], "0 examples are too few"),
        (toy_texts(7), "7 examples are too few"),
        (toy_texts(7) * 3, "7 examples are too few to learn from; give at least 8 different ones"),
        (
            [Labelled(text.text, "same") for text in toy_texts(20)],
            r"All texts have the label 'same'\. Give texts of at least two",
        ),
        ([Labelled("a", f"label {n}") for n in range(101)], "There are 101 different labels, such as label 0, label 1"),
    ],
)
def test_examples_that_cannot_be_learned_from_are_said(bases, tmp_path, examples, told):
    with pytest.raises(DatasetError, match=told):
        fit(examples, bases["bert"], tmp_path / "judge")
    assert list(tmp_path.iterdir()) == []


def test_labels_that_only_the_test_examples_have_are_refused_before_training(bases, tmp_path):
    told, test = [], [Labelled("bad", "loathed"), Labelled("dull", "bored"), Labelled("so", "n/a")]
    refusal = "^test: the examples to train on lack its labels 'bored', 'n/a'; they have 'liked', 'loathed', 'nei"
    with pytest.raises(DatasetError, match=refusal):
        fit(toy_texts(20), bases["bert"], tmp_path / "judge", told, test, **BRIEF)
    with pytest.raises(DatasetError, match="All texts have the label 'liked'"):
        fit([Labelled(text.text, "liked") for text in toy_texts(8)], bases["bert"], tmp_path / "judge", told, test)
    assert not told and list(tmp_path.iterdir()) == []


PAIR, TEXT = "Preference(prompt, chosen, rejected)", "Labelled(text, label)"


@pytest.mark.parametrize(
    ("examples", "test", "told"),
    [
        ([PLAIN] * 8, (), f"examples[0] must be {PAIR} or {TEXT}, got dict."),
        ([*toy_pairs(8), ("a", "b", "c")], (), f"examples[8] must be {PAIR}, got tuple."),
        ([*toy_texts(8), Preference("a", "b", "c")], (), f"examples[8] must be {TEXT}, got Preference."),
        (toy_pairs(8), toy_texts(1), f"test[0] must be {PAIR}, got Labelled."),
        ([Labelled("a", 1)] * 8, (), f"examples[0] must be {TEXT}, made of texts, got int 1 in it."),
        (
            "pairs.jsonl",
            (),
            f"examples must be a list of {PAIR} or {TEXT}, got str 'pairs.jsonl'. read_preferences and",
        ),
        (toy_pairs(8), None, f"test must be a list of {PAIR} or {TEXT}, got NoneType."),
        (iter(toy_pairs(8)), (), f"examples must be a list of {PAIR} or {TEXT}, got list_iterator."),
    ],
)
def test_examples_of_another_type_are_said(bases, tmp_path, examples, test, told):
    with pytest.raises(DatasetError, match=re.escape(told)):
        fit(examples, bases["bert"], tmp_path / "judge", test=test)


def test_the_config_may_be_a_dict(bases, tmp_path):
    told = []
    train_reward_model(toy_pairs(8), bases["bert"], tmp_path, {"epochs": 2}, device="cpu", tell=told.append)
    assert len(told) == 2
    for config, wrong in (({"epoch": 2}, "Did you mean 'epochs'"), (2, "^config must be a RewardTrainingConfig or a")):
        with pytest.raises(ConfigError, match=wrong):
            train_reward_model(toy_pairs(8), bases["bert"], tmp_path, config, device="cpu")


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("./nowhere", r"base='\./nowhere': there is no such folder"),
        ("some/base", r"base='some/base' is not a local folder.*from the Hub: "),
        ("all-minilm-l6", r"Did you mean 'all-minilm-l6-v2'\?"),
    ],
)
def test_a_base_that_is_not_there_is_said(tmp_path, base, told):
    with pytest.raises(ModelError, match=rf"(?s){told}"):
        fit(toy_pairs(8), base, tmp_path / "judge")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"epochs": 0}, "epochs"),
        ({"held_out": 1.0}, "held_out"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"lora_r": 0}, "lora_r"),
        ({"max_length": 7}, "max_length"),
        ({"text_format": "both"}, "text_format"),
        ({"epoch": 3}, "Did you mean 'epochs'"),
    ],
)
def test_settings_that_cannot_be_are_named(options, told):
    with pytest.raises(ConfigError, match=told):
        RewardTrainingConfig(**options)


def test_a_loss_that_is_no_longer_finite_stops_and_nothing_is_written(bases, tmp_path):
    with pytest.raises(TrainingError, match=r"loss became (nan|inf)\. Lower learning_rate=1e\+30"):
        fit(toy_pairs(40), bases["bert"], tmp_path / "judge", **BRIEF | {"learning_rate": 1e30})
    assert list(tmp_path.iterdir()) == []


def test_weights_that_the_last_step_broke_are_not_written(bases, tmp_path):
    with pytest.raises(TrainingError):
        fit(toy_pairs(20), bases["bert"], tmp_path / "judge", epochs=1, batch_size=8, learning_rate=1e30)


@pytest.mark.parametrize("place", ["file", "file/judge", "link", ""])
def test_an_output_that_cannot_be_is_found_before_the_training(bases, tmp_path, place):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("gone/too")
    told = []
    with pytest.raises((OutputError, ConfigError), match="output"):
        fit(toy_pairs(8), bases["bert"], tmp_path / place if place else place, told, **BRIEF)
    assert not told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_an_earlier_model_is_set_aside(bases, tmp_path, caplog):
    folder = tmp_path / "judge"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    fit(toy_pairs(8), bases["bert"], folder, **BRIEF)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert not caplog.records
    fit(toy_texts(20), bases["bert"], folder, **BRIEF)
    aside = {path.name: path.read_bytes() for path in (folder / "earlier-1").iterdir()}
    assert aside | {"notes.txt": b"mine"} == before
    assert HuggingFaceRewardModel(str(folder), device="cpu", label_index="liked").label == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"An earlier model was in {folder}; its files are now in {folder / 'earlier-1'}."
    ]
    fit(toy_pairs(8), bases["bert"], folder, **BRIEF)
    assert (folder / "earlier-2" / "config.json").is_file()


def test_something_is_always_left_to_learn_from(bases, tmp_path):
    report = fit(toy_pairs(8), bases["bert"], tmp_path / "judge", **BRIEF, held_out=0.95)
    assert report.num_examples >= 1


def test_a_single_step_learns_something(bases, tmp_path):
    options = {"epochs": 1, "batch_size": 16, "learning_rate": 0.1}
    fit(toy_pairs(12), undecided(1, tmp_path / "base"), tmp_path / "judge", **options)
    assert not same_weights(tmp_path / "base", tmp_path / "judge")


def test_a_multi_label_base_becomes_the_softmax_that_was_fitted(tmp_path):
    base = save(tmp_path / "base", bert(3, problem_type="multi_label_classification"), word_tokenizer())
    folder = str(fit(toy_texts(20), base, tmp_path / "judge", **BRIEF).folder)
    rewards = (HuggingFaceRewardModel(folder, device="cpu", label_index=n, output="probability") for n in range(3))
    assert sum(reward.score([""], ["very good"])[0] for reward in rewards) == pytest.approx(1)


@pytest.mark.parametrize("name", ["bert", "texts"])
def test_a_saved_tokenizer_cuts_on_the_side_its_base_did(judges, bases, name):
    folder = judges[name][0].folder
    assert AutoTokenizer.from_pretrained(bases["bert"]).truncation_side == "right"
    assert AutoTokenizer.from_pretrained(folder).truncation_side == "right"
    assert len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode("good " * 60)) == 62


# --- the interval of a share ---


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_as_published(successes, total, low, high):
    share = proportion(successes, total)
    assert share.mean == successes / total
    assert (round(share.low, 4), round(share.high, 4)) == (low, high)


@given(st.integers(1, 3000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilsons_bounds_are_the_shares_that_lie_196_standard_errors_off(counts):
    successes, total = counts
    share = proportion(*counts)
    for bound in (share.low, share.high):
        off = abs(successes / total - bound)
        assert off**2 == pytest.approx(1.959963985**2 * bound * (1 - bound) / total, abs=1e-9)
    assert share.low <= share.mean <= share.high or successes in (0, total)
    mirrored = proportion(total - successes, total)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - share.high, 1 - share.low))


def test_no_examples_have_no_share():
    share = proportion(0, 0)
    assert all(math.isnan(value) for value in (share.mean, share.low, share.high))


def test_the_interval_of_a_share_lies_within_zero_and_one():
    for total in range(1, 500):
        assert proportion(0, total).low >= 0
        assert proportion(total, total).high <= 1
        assert f"{proportion(0, total).low:.3f}" == "0.000"


# --- the command ---


@pytest.fixture
def konic(monkeypatch, capsys):
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["konic", "reward-model", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


def told_accuracies(out):
    lines = re.findall(r"^Accuracy, (.+): ([\d.]+) \(95 % interval ([\d.]+) to ([\d.]+), n=(\d+)\)$", out, re.M)
    return {name: (float(share), float(low), float(high), int(size)) for name, share, low, high, size in lines}


def as_row(example):
    return {name: value for name, value in vars(example).items() if value is not None}


def test_the_command_fits_pairs_and_prints_accuracies(konic, bases, tmp_path):
    data, folder = written(tmp_path, map(as_row, toy_pairs(60))), tmp_path / "judge"
    (tmp_path / "test").mkdir()
    test = written(tmp_path / "test", map(as_row, toy_pairs(30, seed=1)))
    code, out, err = konic(
        "train", data, "--base", bases["bert"], "--output", folder, "--test", test, "--epochs", 3,
        "--learning-rate", 0.01, "--batch-size", 8, "--max-length", 24, "--seed", 2, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert err == f"Loading {data} and {bases['bert']} ...\n"
    assert [line.partition(":")[0] for line in out.splitlines()] == [
        "Epoch 1/3", "Epoch 2/3", "Epoch 3/3", "Accuracy, held out", "Accuracy, test",
        f"Saved in {folder}; use it as HuggingFaceRewardModel('{folder}').",
    ]  # fmt: skip
    told = told_accuracies(out)
    assert (told["held out"][3], told["test"][3]) == (12, 30)
    for share, low, high, size in told.values():
        wilson = proportion(round(share * size), size)
        assert (share, low, high) == pytest.approx((wilson.mean, wilson.low, wilson.high), abs=6e-4)
    same = fit(
        toy_pairs(60), bases["bert"], tmp_path / "same", epochs=3, learning_rate=0.01, batch_size=8, max_length=24,
        seed=2,
    )  # fmt: skip
    assert same_weights(folder, same.folder)


def test_the_command_fits_labelled_texts_with_lora(konic, bases, tmp_path):
    data = written(tmp_path, [{"review": t.text, "opinion": t.label} for t in toy_texts(40)], "csv")
    (tmp_path / "test").mkdir()
    test = written(tmp_path / "test", [{"body": t.text, "opinion": t.label} for t in toy_texts(20, seed=1)], "csv")
    folder = tmp_path / "judge"
    code, out, err = konic(
        "train", data, "--base", bases["bert"], "--output", folder, "--text", "review", "--label", "opinion",
        "--test", test, "--test-text", "body", "--epochs", 1, "--lora-r", 2, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert {name: told[3] for name, told in told_accuracies(out).items()} == {"held out": 8, "test": 20}
    assert HuggingFaceRewardModel(str(folder), device="cpu", label_index="neither").label == 2
    same = fit(toy_texts(40), bases["bert"], tmp_path / "same", epochs=1, lora_r=2)
    assert same_weights(folder, same.folder)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--text", "prompt"), "Error: Give --text and --label together"),
        (("--label", "chosen"), "Error: Give --text and --label together"),
        (("--test-text", "body"), "Error: --test-text needs --test, the test data."),
        (("--text", "prompt", "--label", "chosen", "--test-label", "x"), "Error: --test-label needs --test"),
        (("--test", "rows.csv", "--test-text", "body"), "Error: --test-text needs --text and --label; pairs"),
        (("--epochs", 0), "epochs"),
        (("--text", "prompt", "--label", "lable"), "there is no column 'lable'"),
        (("--base", "./nowhere"), "Error: base='./nowhere': there is no such folder"),
    ],
)
def test_the_commands_mistakes_are_one_message_and_nothing_is_written(konic, bases, tmp_path, arguments, told):
    data = written(tmp_path, map(as_row, toy_pairs(8)))
    code, out, err = konic(
        "train", data, "--base", bases["bert"], "--output", tmp_path / "judge", "--device", "cpu", *arguments
    )
    assert (code, out) == (1, "")
    assert told in err
    assert "Traceback" not in err
    assert not (tmp_path / "judge").exists()


def test_without_an_output_it_speaks_of_the_data(konic, bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = konic("train", "nowhere.jsonl", "--base", bases["bert"], "--device", "cpu")
    assert code == 1
    assert "nowhere.jsonl" in err and "Traceback" not in err


def test_the_commands_help_shows_an_example(konic):
    code, out, _ = konic("train", "--help")
    assert code == 0
    assert "konic reward-model train pairs.jsonl --base all-minilm-l6-v2" in " ".join(out.split())


# --- the packaged encoder ---


def test_the_packaged_encoder_becomes_a_reward_model(tmp_path, caplog):
    """The real 22M encoder, an epoch on 32 opinions of films."""
    with FILMS.open(newline="") as file:
        rows = list(csv.DictReader(file))[:40]
    data = written(tmp_path, rows, "csv")
    examples = read_labelled(data, "text", "label")
    options = {"epochs": 1, "batch_size": 8, "max_length": 64}
    report = fit(examples, "all-minilm-l6-v2", tmp_path / "judge", **options)
    assert (report.num_examples, report.num_held_out) == (32, 8)
    folder, texts = str(report.folder), [example.text for example in examples[:6]]
    with caplog.at_level(logging.WARNING):
        reward = HuggingFaceRewardModel(folder, device="cpu", max_length=512)
    assert "the score of label 1, 'positive'" in caplog.text
    assert reward.text_format == "response"
    assert reward.score([""] * 6, texts) == pytest.approx([plain_logits(folder, text)[1] for text in texts], abs=1e-4)
