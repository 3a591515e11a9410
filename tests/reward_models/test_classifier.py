"""HuggingFaceRewardModel against plain transformers, one unpadded text at a time, and against hand-made token ids."""

import logging
import math
import re
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import konic.finetuning
from conftest import CHAT_TEMPLATE, LORA_TARGETS, byte_tokenizer
from konic.finetuning import (
    ConfigError,
    DatasetConfig,
    KonicFinetuningAgent,
    KonicFinetuningCallback,
    KonicFinetuningEngine,
    KonicLLMRewardComposer,
    LoraConfig,
    ModelError,
    TrainingConfig,
)
from konic.finetuning.data.chat_tokens import shorten_chat
from konic.finetuning.data.prompts import make_prompts
from konic.finetuning.data.samples import make_samples
from konic.finetuning.reward_models.classifier import HuggingFaceRewardModel, batches_by_length, reward_name
from konic.finetuning.reward_models.texts import TEXT_FORMATS, encode_pair
from konic.finetuning.rewards.listing import list_rewards
from konic.finetuning.rewards.scoring import Scorer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = tuple("a the film was is it good bad very not long dull fine why so and hello friend bye plot".split())
VOCABULARY = {word: index for index, word in enumerate(SPECIAL + WORDS)}
PAD, UNK, CLS, SEP = range(4)
LABELS = {1: ("reward",), 2: ("negative", "positive"), 3: ("negative", "neutral", "positive")}

PROMPTS = ["the film was", "a", "why is the film so very long and dull", "hello friend", "it"]
RESPONSES = [" good", " very bad and not a fine film so bye", " dull", "", " why not"]


def ids_of(text):
    return [VOCABULARY[word] for word in text.split()]


def word_tokenizer():
    """One token per word, [CLS] and [SEP] around, type 1 on the second text of a pair."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def chat_tokenizer():
    """One token per byte, a BOS, a chat template, and no pad token."""
    backend = byte_tokenizer("llama").backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


ENCODER = {
    "vocab_size": len(VOCABULARY), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 48, "initializer_range": 0.5, "pad_token_id": PAD,
}  # fmt: skip


def bert_config(labels=1, **options):
    return BertConfig(**ENCODER | {"id2label": dict(enumerate(LABELS[labels]))} | options)


def save(folder, model, tokenizer, **config):
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def bert(labels=1, **options):
    torch.manual_seed(labels)
    return BertForSequenceClassification(bert_config(labels, **options))


def llama(labels=1):
    torch.manual_seed(labels)
    config = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=160, initializer_range=0.5, bos_token_id=257, eos_token_id=0,
        pad_token_id=None, id2label=dict(enumerate(LABELS[labels])),
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


def gpt2(labels=2):
    torch.manual_seed(labels)
    config = GPT2Config(
        vocab_size=257, n_positions=128, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
        pad_token_id=0, initializer_range=0.5, id2label=dict(enumerate(LABELS[labels])),
    )  # fmt: skip
    return GPT2ForSequenceClassification(config)


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory):
    """Folders of tiny random classifiers by kind and number of labels. GPT-2 pads with its EOS, Llama with nothing."""
    root = tmp_path_factory.mktemp("classifiers")
    byte = byte_tokenizer("gpt2")
    byte.pad_token = "<eos>"
    folders = {f"bert-{n}": save(root / f"bert-{n}", bert(n), word_tokenizer()) for n in (1, 2, 3)}
    multi = bert(3, problem_type="multi_label_classification")
    folders["bert-multi"] = save(root / "bert-multi", multi, word_tokenizer())
    for n in (1, 3):
        folders[f"llama-{n}"] = save(root / f"llama-{n}", llama(n), chat_tokenizer())
    folders["gpt2-2"] = save(root / "gpt2-2", gpt2(2), byte)
    return folders


@cache
def plain(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def plain_logits(folder, text, second=None, special=True):
    """What plain transformers makes of one text or pair, alone and unpadded."""
    model, tokenizer = plain(folder)
    with torch.no_grad():
        return model(**tokenizer(text, second, return_tensors="pt", add_special_tokens=special)).logits[0].tolist()


def plain_chat_logits(folder, *turns):
    """The same of a chat, as CHAT_TEMPLATE writes it: (role, content), ..."""
    return plain_logits(folder, "".join(f"[{role}]{content}" for role, content in turns), special=False)


def plain_logits_as(text_format, folder, prompt, response):
    if text_format == "chat":
        return plain_chat_logits(folder, ("user", prompt), ("assistant", response))
    if text_format == "pair":
        return plain_logits(folder, prompt, response)
    return plain_logits(folder, prompt + response if text_format == "joined" else response)


def close(values):
    return pytest.approx(values, abs=1e-5)


def test_it_is_imported_from_the_package():
    from konic.finetuning import HuggingFaceRewardModel as imported

    assert imported is HuggingFaceRewardModel
    assert "HuggingFaceRewardModel" in konic.finetuning.__all__


# --- scores ---


def test_it_is_freed_by_cleanup_and_then_says_so(classifiers):
    model = HuggingFaceRewardModel(str(next(iter(classifiers.values()))), device="cpu", label_index=0)
    model.cleanup()
    model.cleanup()
    with pytest.raises(AttributeError, match=r"cleanup\(\) has dropped it"):
        model.score(["p"], ["r"])


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize(
    ("kind", "text_format"),
    [
        ("bert-1", "joined"),
        ("bert-1", "pair"),
        ("bert-3", "response"),
        ("llama-1", "chat"),
        ("llama-3", "joined"),
        ("gpt2-2", "joined"),
    ],
)
def test_scores_are_those_of_each_text_alone_in_any_batch_and_order(classifiers, kind, text_format, batch_size):
    last = int(kind[-1]) - 1
    reward = HuggingFaceRewardModel(
        classifiers[kind], device="cpu", text_format=text_format, batch_size=batch_size, label_index=last
    )
    pairs = list(zip(PROMPTS, RESPONSES, strict=True))
    expected = [plain_logits_as(text_format, classifiers[kind], *pair)[last] for pair in pairs]
    assert len({round(score, 3) for score in expected}) == len(pairs)
    assert reward.score(PROMPTS, RESPONSES) == close(expected)
    assert reward.score(PROMPTS[::-1], RESPONSES[::-1]) == close(expected[::-1])
    assert all(type(score) is float for score in reward.score(PROMPTS, RESPONSES))


@pytest.mark.parametrize("kind", ["llama-1", "gpt2-2"])
def test_a_response_that_ends_in_the_padding_token_is_scored_as_it_is_alone(classifiers, kind):
    reward = HuggingFaceRewardModel(classifiers[kind], device="cpu", text_format="joined", label_index=0)
    responses = ["good<eos>", "good<eos><eos>", "!<eos>", "good", '"<eos>!', "a much longer one that is not cut"]
    expected = [plain_logits(classifiers[kind], "so " + response)[0] for response in responses]
    assert reward.score(["so "] * len(responses), responses) == close(expected)


def test_without_any_pad_token_an_end_of_text_counts_and_nothing_is_set_for_good(classifiers):
    model, tokenizer = plain(classifiers["llama-1"])
    assert model.config.pad_token_id is None and tokenizer.pad_token is None
    reward = HuggingFaceRewardModel(classifiers["llama-1"], device="cpu", text_format="joined")
    ended, open_ended, _ = reward.score([""] * 3, ["good<eos>", "good", "good and a little longer"])
    assert abs(ended - open_ended) > 1e-3
    assert reward.model.config.pad_token_id is None and reward.tokenizer.pad_token is None


def test_a_pad_token_outside_the_vocabulary_is_none(tmp_path):
    """Early Llama checkpoints say -1."""
    folder = save(tmp_path / "judge", llama(1), chat_tokenizer(), pad_token_id=-1)
    reward = HuggingFaceRewardModel(folder, device="cpu")
    expected = [plain_logits_as("chat", folder, p, r)[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert reward.score(PROMPTS, RESPONSES) == close(expected)


def test_the_pad_token_of_the_config_comes_back_when_the_model_fails(classifiers, monkeypatch):
    reward = HuggingFaceRewardModel(classifiers["llama-1"], device="cpu")

    def broken(**inputs):
        assert reward.model.config.pad_token_id is not None
        raise RuntimeError("out of memory")

    monkeypatch.setattr(reward.model, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        reward.score(["a"], ["b"])
    assert reward.model.config.pad_token_id is None


def test_no_responses_have_no_scores_and_lists_of_two_lengths_are_refused(classifiers):
    reward = HuggingFaceRewardModel(classifiers["bert-1"], device="cpu")
    assert reward.score([], []) == []
    with pytest.raises(ValueError, match="shorter"):
        reward.score(["a", "b"], ["c"])


def test_an_empty_response_that_is_read_alone_gets_a_score(classifiers):
    """A policy that ends at once answers nothing; GPT-2's tokenizer adds no special token."""
    reward = HuggingFaceRewardModel(classifiers["gpt2-2"], device="cpu", text_format="response", label_index=0)
    assert math.isfinite(reward.score(["why"], [""])[0])


def test_the_model_is_in_eval_mode_and_no_weight_learns(classifiers):
    reward = HuggingFaceRewardModel(classifiers["bert-1"], device="cpu")
    assert reward.model.config.hidden_dropout_prob > 0
    assert not any(module.training for module in reward.model.modules())
    assert not any(weight.requires_grad for weight in reward.model.parameters())
    assert reward.score(PROMPTS, RESPONSES) == reward.score(PROMPTS, RESPONSES)


def test_on_the_cpu_it_computes_in_float32_unless_told_otherwise(classifiers, tmp_path):
    half = AutoModelForSequenceClassification.from_pretrained(classifiers["bert-1"], dtype=torch.bfloat16)
    folder = save(tmp_path / "half", half, word_tokenizer())
    assert HuggingFaceRewardModel(folder, device="cpu").model.dtype == torch.float32
    assert HuggingFaceRewardModel(folder, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    kwargs = {"dtype": torch.float64}
    assert HuggingFaceRewardModel(folder, device="cpu", model_kwargs=kwargs).model.dtype == torch.float64


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 9))
def test_batches_hold_every_row_once_the_longest_first(lengths, size):
    batches = list(batches_by_length(lengths, size))
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(1 <= len(batch) <= size for batch in batches)


# --- output ---


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_hand(logits, label, output, is_multi):
    """Plain Python, from the definitions."""
    if output == "logit":
        return logits[label]
    if len(logits) == 1 or is_multi:
        probability = sigmoid(logits[label])
    else:
        probability = math.exp(logits[label]) / sum(math.exp(logit) for logit in logits)
    return probability if output == "probability" else math.log(probability / (1 - probability))


@pytest.mark.parametrize("output", ["logit", "probability", "log_odds"])
@pytest.mark.parametrize(
    ("kind", "label"),
    [
        ("bert-1", 0), ("bert-2", 0), ("bert-2", 1), ("bert-3", 0), ("bert-3", 1), ("bert-3", 2), ("bert-multi", 1),
        ("gpt2-2", 1), ("llama-3", 0),
    ],
)  # fmt: skip
def test_outputs_are_the_formulas(classifiers, kind, label, output):
    reward = HuggingFaceRewardModel(
        classifiers[kind], device="cpu", output=output, label_index=label, text_format="joined"
    )
    logits = [plain_logits(classifiers[kind], p + r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    expected = [by_hand(row, label, output, kind == "bert-multi") for row in logits]
    assert reward.score(PROMPTS, RESPONSES) == pytest.approx(expected, abs=1e-5, rel=1e-4)


@pytest.mark.parametrize(("label", "log_odds"), [(0, -500.0), (1, -300.0), (2, 300.0)])
def test_log_odds_stay_finite_where_a_probability_rounds_to_one(tmp_path, label, log_odds):
    """Logits of −200, 0 and 300 whatever is read."""
    model = bert(3)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([-200.0, 0.0, 300.0]))
    folder = save(tmp_path / "sure", model, word_tokenizer())
    reward = HuggingFaceRewardModel(folder, device="cpu", output="log_odds", label_index=label)
    assert reward.score(["a"], [" film"]) == close([log_odds])
    reward.output = "probability"
    assert reward.score(["a"], [" film"]) == close([1.0 if label == 2 else 0.0])


# --- label_index ---


@pytest.mark.parametrize(("wanted", "index"), [(0, 0), (1, 1), (2, 2), ("negative", 0), ("neutral", 1)])
def test_a_label_is_chosen_by_index_or_name(classifiers, caplog, wanted, index):
    with caplog.at_level(logging.WARNING):
        reward = HuggingFaceRewardModel(classifiers["bert-3"], device="cpu", label_index=wanted, text_format="response")
    assert reward.score([""], ["very good"]) == close([plain_logits(classifiers["bert-3"], "very good")[index]])
    assert "label_index" not in caplog.text


@pytest.mark.parametrize(
    ("kind", "wanted", "told"),
    [
        ("bert-2", "positve", r"no label 'positve'\. Did you mean 'positive'\? Its labels: negative, positive"),
        ("bert-2", "1", r"no label '1'\. Its labels: negative, positive"),
        ("bert-2", 2, r"label_index=2 is not one of its labels: negative, positive"),
        ("bert-2", -1, r"label_index=-1 is not one of its labels"),
        ("bert-2", True, r"label_index=True is not one of its labels"),
        ("bert-2", 1.0, r"label_index=1\.0 is not one of its labels"),
        ("bert-1", 1, r"label_index=1 is not one of its labels: reward"),
        (
            "bert-3",
            None,
            r"hf_bert_3 has 3 labels.*label_index, such as 'positive'. Its labels: negative, neutral, positive",
        ),
    ],
)
def test_a_label_that_cannot_be_is_said(classifiers, kind, wanted, told):
    with pytest.raises(ConfigError, match=told):
        HuggingFaceRewardModel(classifiers[kind], device="cpu", label_index=wanted)


def test_three_labels_without_a_choice_are_listed(classifiers):
    with pytest.raises(ConfigError, match=r"negative.*neutral.*positive"):
        HuggingFaceRewardModel(classifiers["bert-3"], device="cpu")


def test_of_two_labels_the_second_is_taken_with_a_warning_that_names_it(classifiers, caplog):
    with caplog.at_level(logging.WARNING):
        reward = HuggingFaceRewardModel(classifiers["bert-2"], device="cpu", text_format="response")
    assert "hf_bert_2: label_index is not given; the reward is the score of label 1, 'positive'" in caplog.text
    assert reward.score([""], ["very good"]) == close([plain_logits(classifiers["bert-2"], "very good")[1]])


def test_a_single_label_needs_no_choice(classifiers, caplog):
    with caplog.at_level(logging.WARNING):
        reward = HuggingFaceRewardModel(classifiers["bert-1"], device="cpu", text_format="response")
    assert caplog.records == []
    assert reward.score([""], ["very good"]) == close(plain_logits(classifiers["bert-1"], "very good"))


# --- name ---


@pytest.mark.parametrize(
    ("model_id", "name"),
    [
        ("distilbert-imdb", "hf_distilbert_imdb"),
        ("some-one/a-judge_v1.5", "hf_some_one_a_judge_v1.5"),
        ("/absent/folder/my-judge", "hf_my_judge"),
    ],
)
def test_a_name_is_made_of_the_id_and_of_a_path_its_last_part(model_id, name):
    assert reward_name(model_id) == name


def test_a_folder_gives_its_name_however_it_is_written(classifiers, tmp_path, monkeypatch):
    (tmp_path / "runs" / "my-judge").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert reward_name("runs/my-judge") == reward_name("./runs/my-judge/") == "hf_my_judge"
    assert HuggingFaceRewardModel(classifiers["bert-1"], device="cpu").name == "hf_bert_1"
    assert HuggingFaceRewardModel(classifiers["bert-1"], device="cpu", name="judge").name == "judge"


def test_the_folder_one_stands_in_gives_its_name(tmp_path, monkeypatch):
    (tmp_path / "my-judge").mkdir()
    monkeypatch.chdir(tmp_path / "my-judge")
    assert reward_name(".") == "hf_my_judge"


def test_two_models_of_one_name_need_another_name(classifiers):
    one, two = (HuggingFaceRewardModel(classifiers["bert-1"], device="cpu", output=o) for o in ("logit", "probability"))
    with pytest.raises(ConfigError, match="two rewards named 'hf_bert_1'"):
        KonicLLMRewardComposer(reward_models=[one, two])
    other = HuggingFaceRewardModel(classifiers["bert-1"], device="cpu", output="probability", name="judge")
    assert KonicLLMRewardComposer(reward_models=[one, other]).reward_names == ["hf_bert_1", "judge"]


# --- what is read ---

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "and the film"},
]
CHAT_START = "[system]be kind[user]hello[assistant]hi[user]"


@pytest.mark.parametrize(
    ("text_format", "ids", "types"),
    [
        ("pair", [CLS, *ids_of("the film was"), SEP, *ids_of("very good"), SEP], [0, 0, 0, 0, 0, 1, 1, 1]),
        ("joined", [CLS, *ids_of("the film was very good"), SEP], [0] * 7),
        ("response", [CLS, *ids_of("very good"), SEP], [0] * 4),
    ],
)
def test_an_encoder_reads_special_tokens_and_types(classifiers, text_format, ids, types):
    tokenizer = plain(classifiers["bert-1"])[1]
    encoded = encode_pair(tokenizer, "the film was", " very good", text_format, 48)
    assert encoded == {"input_ids": ids, "token_type_ids": types, "attention_mask": [1] * len(ids)}
    assert all(type(values) is list for values in encoded.values())


@pytest.mark.parametrize(
    ("text_format", "messages", "text"),
    [
        ("chat", None, "[user]the film[assistant] good"),
        ("chat", [], "[user]the film[assistant] good"),
        ("chat", CHAT, CHAT_START + "and the film[assistant] good"),
        ("joined", None, "<bos>the film good"),
        ("joined", CHAT, "<bos>the film good"),
        ("response", None, "<bos> good"),
    ],
)
def test_a_chat_goes_through_the_template_once(classifiers, text_format, messages, text):
    tokenizer = plain(classifiers["llama-1"])[1]
    encoded = encode_pair(tokenizer, "the film", " good", text_format, 160, messages)
    backend = chat_tokenizer().backend_tokenizer
    assert encoded["input_ids"] == backend.encode(text, add_special_tokens=False).ids
    assert encoded["attention_mask"] == [1] * len(encoded["input_ids"])


def test_the_messages_given_are_left_as_they_were(classifiers):
    chat = [dict(message) for message in CHAT]
    encode_pair(plain(classifiers["llama-1"])[1], "and the film", " good", "chat", 70, chat)
    assert chat == CHAT


@pytest.mark.parametrize(("kind", "text_format"), [("bert-1", "joined"), ("llama-1", "chat"), ("gpt2-2", "joined")])
def test_by_itself_it_reads_a_chat_where_there_is_a_template_else_one_text(classifiers, kind, text_format):
    reward = HuggingFaceRewardModel(classifiers[kind], device="cpu", label_index=0)
    assert reward.text_format == text_format
    expected = [
        plain_logits_as(text_format, classifiers[kind], p, r)[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    assert reward.score(PROMPTS, RESPONSES) == close(expected)


@pytest.mark.parametrize("trained_with", [*TEXT_FORMATS[1:], "sideways"])
def test_by_itself_it_reads_what_konic_trained_the_model_with(tmp_path, trained_with):
    folder = save(tmp_path / "judge", bert(1), word_tokenizer(), konic_text_format=trained_with)
    reward = HuggingFaceRewardModel(folder, device="cpu")
    assert reward.text_format == ("joined" if trained_with == "sideways" else trained_with)
    expected = plain_logits_as(reward.text_format, folder, "the film was", " good")
    assert reward.score(["the film was"], [" good"]) == close(expected)
    told = HuggingFaceRewardModel(folder, device="cpu", text_format="response")
    assert told.score(["the film was"], [" good"]) == close(plain_logits(folder, "good"))


# --- what is cut ---

PROMPT, ANSWER = "the film was so very dull and long", "why not hello friend"


@pytest.mark.parametrize("max_length", range(8, 17))
def test_a_pair_loses_the_start_of_its_prompt_and_nothing_of_its_response(classifiers, max_length):
    encoded = encode_pair(plain(classifiers["bert-1"])[1], PROMPT, ANSWER, "pair", max_length)
    kept = ids_of(PROMPT)[-min(8, max_length - 7) :]
    assert encoded["input_ids"] == [CLS, *kept, SEP, *ids_of(ANSWER), SEP]
    assert encoded["token_type_ids"] == [0] * (len(kept) + 2) + [1] * 5


@pytest.mark.parametrize("max_length", [6, 8, 11])
def test_a_pairs_overlong_response_keeps_its_end(classifiers, max_length):
    response = " ".join(WORDS)
    encoded = encode_pair(plain(classifiers["bert-1"])[1], PROMPT, response, "pair", max_length)
    ids, types = encoded["input_ids"], encoded["token_type_ids"]
    assert len(ids) == max_length
    read = [token for token, kind in zip(ids, types, strict=True) if kind == 1]
    assert read[-1] == SEP
    assert read[:-1] and read[:-1] == ids_of(response)[-len(read) + 1 :]


@pytest.mark.parametrize(("max_length", "kept"), [(7, 4), (6, 3), (4, 1)])
def test_a_pairs_response_is_only_cut_where_it_alone_is_too_long(classifiers, max_length, kept):
    encoded = encode_pair(plain(classifiers["bert-1"])[1], PROMPT, ANSWER, "pair", max_length)
    assert encoded["input_ids"] == [CLS, SEP, *ids_of(ANSWER)[-kept:], SEP]


@pytest.mark.parametrize("max_length", range(3, 15))
@pytest.mark.parametrize("text_format", ["joined", "response"])
def test_one_text_keeps_its_end_between_special_tokens(classifiers, text_format, max_length):
    encoded = encode_pair(plain(classifiers["bert-1"])[1], PROMPT + " ", ANSWER, text_format, max_length)
    words = ids_of(f"{PROMPT} {ANSWER}" if text_format == "joined" else ANSWER)
    assert encoded["input_ids"] == [CLS, *words[-(max_length - 2) :], SEP]
    bos, *tail = encode_pair(plain(classifiers["llama-1"])[1], "abcdefgh", "ijkl", "joined", max_length)["input_ids"]
    assert bos == 257
    assert plain(classifiers["llama-1"])[1].decode(tail) == "abcdefghijkl"[-(max_length - 1) :]


@pytest.mark.parametrize("max_length", range(1, 90, 4))
def test_of_a_chat_only_the_last_message_shrinks_then_the_end_is_kept(classifiers, max_length):
    tokenizer = plain(classifiers["llama-1"])[1]
    encoded = encode_pair(tokenizer, "ignored", "very good", "chat", max_length, CHAT)
    tail = "[assistant]very good"
    room = max_length - len(CHAT_START + tail)
    last = "and the film"[max(0, len("and the film") - max(0, room)) :]
    assert tokenizer.decode(encoded["input_ids"]) == (CHAT_START + last + tail)[-max_length:]
    assert encoded["attention_mask"] == [1] * len(encoded["input_ids"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text_format", ["pair", "joined", "response"])
def test_the_tokenizers_own_truncation_side_comes_back(text_format, side):
    tokenizer = word_tokenizer()
    tokenizer.truncation_side = side
    encoded = encode_pair(tokenizer, PROMPT, ANSWER, text_format, 8)
    assert encoded["input_ids"][-2] == ids_of(ANSWER)[-1]
    assert tokenizer.truncation_side == side
    with pytest.raises((TypeError, ValueError)):
        encode_pair(tokenizer, PROMPT, None, text_format, 8)
    assert tokenizer.truncation_side == side


def test_a_cut_changes_no_later_call_of_the_tokenizer(classifiers):
    tokenizer = plain(classifiers["bert-1"])[1]
    encode_pair(tokenizer, PROMPT, ANSWER, "pair", 8)
    assert tokenizer(PROMPT).input_ids == [CLS, *ids_of(PROMPT), SEP]


@pytest.mark.parametrize(("asked", "read"), [(512, 48), (48, 48), (20, 20)])
def test_no_more_is_read_than_the_model_has_positions(classifiers, asked, read):
    reward = HuggingFaceRewardModel(classifiers["bert-1"], device="cpu", max_length=asked, text_format="joined")
    assert reward.max_length == read
    words = " ".join(WORDS * 5).split()
    expected = plain_logits(classifiers["bert-1"], " ".join(words[-(read - 2) :]))
    assert reward.score([" ".join(words[:60])], [" " + " ".join(words[60:])]) == close(expected)


def test_no_more_is_read_than_a_roberta_has_positions(tmp_path):
    """Its positions start after that of the padding: a text of as many tokens as it has positions is too long."""
    torch.manual_seed(0)
    config = RobertaConfig(**ENCODER | {"max_position_embeddings": 18, "type_vocab_size": 2, "num_labels": 1})
    folder = save(tmp_path / "judge", RobertaForSequenceClassification(config), word_tokenizer())
    reward = HuggingFaceRewardModel(folder, device="cpu", text_format="joined")
    assert math.isfinite(reward.score([" ".join(WORDS)], [" good"])[0])


def test_no_more_is_read_than_the_tokenizer_allows(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 10
    folder = save(tmp_path / "short", bert(1), tokenizer)
    assert HuggingFaceRewardModel(folder, device="cpu").max_length == 10
    assert HuggingFaceRewardModel(folder, device="cpu", max_length=9).max_length == 9


@pytest.mark.parametrize(
    ("trained_with", "asked", "read"),
    [
        (256, None, 256), (256, 300, 300), (600, None, 600), (9999, None, 700), (None, None, 512),
        *((stray, None, 512) for stray in (True, 0, -3, 2.5, "256", [256], 10**30)),
    ],
)  # fmt: skip
def test_by_itself_it_reads_as_much_as_konic_trained_the_model_with(tmp_path, trained_with, asked, read):
    model = bert(1, max_position_embeddings=700)
    folder = save(tmp_path / "judge", model, word_tokenizer(), konic_max_length=trained_with)
    assert HuggingFaceRewardModel(folder, device="cpu", max_length=asked).max_length == read


def test_max_length_reaches_what_is_read(classifiers):
    reward = HuggingFaceRewardModel(classifiers["llama-1"], device="cpu", max_length=len("[user]ilm[assistant] good"))
    expected = plain_chat_logits(classifiers["llama-1"], ("user", "ilm"), ("assistant", " good"))
    assert reward.score(["the film"], [" good"]) == close(expected)


@pytest.mark.parametrize("max_length", range(20, 100, 3))
def test_a_shortened_chat_keeps_as_much_of_its_last_message_as_fits(max_length):
    """One token per byte, so that what fits can be counted."""
    tokenizer = chat_tokenizer()
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "0123456789" * 5}]
    start, end = "[system]s[user]", "[assistant]yes"
    ids, text = shorten_chat(chat, [{"role": "assistant", "content": "yes"}], tokenizer, max_length)
    fits = min(50, max(0, max_length - len(start + end)))
    assert text == ("0123456789" * 5)[50 - fits :]
    assert tokenizer.decode(ids) == start + text + end
    assert chat[1]["content"] == "0123456789" * 5


def test_without_an_answer_a_shortened_chat_opens_the_assistants_turn():
    tokenizer = chat_tokenizer()
    chat = [{"role": "user", "content": "0123456789"}]
    ids, text = shorten_chat(chat, [], tokenizer, 20)
    assert (tokenizer.decode(ids), text) == ("[user]789[assistant]", "789")
    ids, text = shorten_chat(chat, [], tokenizer, 5)
    assert (tokenizer.decode(ids), text) == ("[user][assistant]", "")
    ids, text = shorten_chat(chat, [{"role": "assistant", "content": "x"}], tokenizer, 100)
    assert (tokenizer.decode(ids), text) == ("[user]0123456789[assistant]x", "0123456789")


@pytest.mark.parametrize("text", ["😀" * 12, "é" * 24])
def test_a_shortened_chat_holds_no_half_of_a_character(text):
    tokenizer = chat_tokenizer()
    for max_length in range(20, 70):
        ids, kept = shorten_chat(
            [{"role": "user", "content": text}], [{"role": "assistant", "content": "ok"}], tokenizer, max_length
        )
        assert len(ids) <= max_length
        assert text.endswith(kept)
        assert tokenizer.decode(ids) == f"[user]{kept}[assistant]ok"


# --- in a composer and a run ---


def test_a_composer_counts_and_weights_its_scores(classifiers):
    reward = HuggingFaceRewardModel(classifiers["bert-1"], device="cpu", text_format="pair")
    composer = KonicLLMRewardComposer(reward_models=[reward], reward_weights={"hf_bert_1": 3})
    rewards, breakdown = composer.compose_batch(PROMPTS, RESPONSES)
    expected = [plain_logits(classifiers["bert-1"], *pair)[0] for pair in zip(PROMPTS, RESPONSES, strict=True)]
    assert breakdown == {"hf_bert_1": close(expected)}
    assert rewards == pytest.approx([3 * score for score in expected], abs=1e-4)


def scores_of_rows(reward, rows, responses, update_moments=False):
    prompts = make_prompts(rows, DatasetConfig(), "test")
    with Scorer(KonicLLMRewardComposer(reward_models=[reward]), TrainingConfig()) as scorer:
        return scorer.score(
            make_samples(prompts, [prompt.text for prompt in prompts], responses), update_moments=update_moments
        )


@pytest.mark.parametrize("normalize", [True, False])
def test_a_composer_normalises_its_scores_where_it_says_so(classifiers, normalize):
    reward = HuggingFaceRewardModel(classifiers["bert-1"], device="cpu", normalize=normalize)
    assert list_rewards(KonicLLMRewardComposer(reward_models=[reward]))[0].normalize is normalize
    rewards = scores_of_rows(reward, PROMPTS, RESPONSES, update_moments=True).rewards
    logits = [plain_logits(classifiers["bert-1"], p + r)[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    mean = sum(logits) / 5
    spread = math.sqrt(sum((logit - mean) ** 2 for logit in logits) / 4)
    expected = [(logit - mean) / spread for logit in logits] if normalize else logits
    assert rewards == pytest.approx(expected, abs=1e-4)


def test_rows_of_chats_are_read_whole_and_plain_rows_beside_them_as_a_chat(classifiers):
    folder = classifiers["llama-1"]
    reward = HuggingFaceRewardModel(folder, device="cpu")
    turns = [(message["role"], message["content"]) for message in CHAT]
    expected = [
        *plain_chat_logits(folder, *turns, ("assistant", "dull")),
        *plain_chat_logits(folder, ("user", "plain"), ("assistant", "good")),
    ]
    assert scores_of_rows(reward, [CHAT, "plain"], ["dull", "good"]).rewards == close(expected)
    assert reward.score(["and the film"], ["dull"], [CHAT]) == close(expected[:1])
    assert reward.score(["and the film"], ["dull"]) != close(expected[:1])


def test_a_column_named_messages_beside_plain_prompts_is_not_the_prompts_chat(classifiers):
    """As in ultrachat_200k: `prompt` is plain, `messages` holds the whole conversation, the old answer too."""
    folder = classifiers["llama-1"]
    row = {"prompt": "hello", "messages": [CHAT[1], CHAT[2]]}
    expected = plain_chat_logits(folder, ("user", "hello"), ("assistant", "good"))
    assert scores_of_rows(HuggingFaceRewardModel(folder, device="cpu"), [row], ["good"]).rewards == close(expected)


class Silent(KonicFinetuningCallback):
    def __init__(self):
        super().__init__(verbose=False)


def test_in_a_run_responses_are_read_by_the_classifiers_own_tokenizer(classifiers, model_folders, tmp_path):
    """The policy writes bytes; the classifier has a vocabulary of 24 words."""
    seen = []

    class Recorded(HuggingFaceRewardModel):
        def score(self, prompts, responses):
            assert all(isinstance(text, str) for text in [*prompts, *responses])
            scores = super().score(prompts, responses)
            seen.extend(zip(prompts, responses, scores, strict=True))
            return scores

    reward = Recorded(classifiers["bert-1"], device="cpu", text_format="pair")
    agent = KonicFinetuningAgent(
        base_model=model_folders["gpt2"],
        reward_composer=KonicLLMRewardComposer(reward_models=[reward]),
        lora_config=LoraConfig(r=2, target_modules=LORA_TARGETS["gpt2"]),
        dataset_config=DatasetConfig(prompts=["the film was", "why", "hello friend", "a"]),
        training_config={"batch_size": 4},
        generation_config={"max_new_tokens": 6, "max_prompt_length": 32},
    )
    before = {name: weight.clone() for name, weight in reward.model.state_dict().items()}
    engine = KonicFinetuningEngine.from_agent(agent, checkpoint_dir=tmp_path, callback=Silent(), device="cpu")
    result = engine.train(1)
    assert len(seen) >= 4
    for prompt, response, score in seen:
        assert [score] == close(plain_logits(classifiers["bert-1"], prompt, response))
    assert result.get_reward_curve()[0] == pytest.approx(sum(score for *_, score in seen[:4]) / 4, abs=1e-4)
    assert all(torch.equal(weight, before[name]) for name, weight in reward.model.state_dict().items())


# --- what is refused ---


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("output", "logits", r"output='logits'\) is not one of logit, probability, log_odds\. Did you mean 'logit'"),
        ("output", None, r"output=None\) is not one of"),
        ("text_format", "joint", r"text_format='joint'\) is not one of auto, chat, pair, joined, response"),
        ("text_format", "pairs", r"Did you mean 'pair'\?"),
        ("batch_size", 0, r"batch_size=0\): it must be a whole number of at least 1"),
        ("max_length", True, r"max_length=True\): it must be a whole number of at least 1"),
        ("batch_size", -4, r"batch_size=-4\): it must be"),
        ("batch_size", 1.5, r"batch_size=1\.5\): it must be"),
        ("batch_size", "16", r"batch_size='16'\): it must be"),
        ("max_length", 0, r"max_length=0\): it must be"),
        ("batch_size", None, r"batch_size=None\): it must be"),
        ("device", "gpu", r"device='gpu' is not a device: give auto"),
        ("dtype", "fp16x", r"RewardModel\(dtype='fp16x'\) is not a floating-point.*Did you mean 'float16'\? Use one"),
        ("dtype", torch.int8, r"dtype=torch\.int8\) is not a floating-point type of torch.*'bfloat16'"),
        ("dtype", "", r"dtype=''\) is not a floating-point type"),
        ("model_kwargs", {"revison": "main"}, r"no key 'revison'.*Did you mean 'revision'"),
        ("text_format", "chat", r"text_format='chat'\): its tokenizer has no chat template. Use another text_format"),
    ],
)
def test_settings_that_cannot_be_are_named(classifiers, option, value, told):
    with pytest.raises(ConfigError, match=told):
        HuggingFaceRewardModel(classifiers["bert-1"], **{"device": "cpu", option: value})


@pytest.mark.parametrize("model_id", [None, 5, b"judge", ["judge"], "", " "])
def test_a_model_id_of_the_wrong_type_is_one_error(model_id):
    with pytest.raises(ConfigError, match=re.escape(f"model_id takes a path, got {model_id!r}")):
        HuggingFaceRewardModel(model_id, device="cpu")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("./nowhere", r"model_id='\./nowhere': there is no such folder"),
        ("/nowhere/at/all", "there is no such folder"),
        ("some/judge", r"'some/judge' is not a local folder.*from the Hub: "),
    ],
)
def test_a_model_that_is_not_there_is_said(name, told):
    with pytest.raises(ModelError, match=told):
        HuggingFaceRewardModel(name, device="cpu")


def test_a_folder_without_a_config_is_said(tmp_path):
    with pytest.raises(ModelError, match=r"model_id=.*no config\.json"):
        HuggingFaceRewardModel(str(tmp_path), device="cpu")


def test_a_causal_language_model_is_no_reward_model(model_folders, architecture):
    folder = model_folders[architecture]
    with pytest.raises(ModelError, match=r"no trained classification head \(score\.weight would be random\)") as error:
        HuggingFaceRewardModel(folder, device="cpu")
    assert f"konic reward-model train DATA --base {folder}" in str(error.value)


def test_an_encoder_without_a_head_is_no_reward_model(tmp_path):
    folder = save(tmp_path / "bare", BertModel(bert_config()), word_tokenizer())
    with pytest.raises(ModelError, match=r"head \(classifier\.bias, classifier\.weight would be random\)"):
        HuggingFaceRewardModel(folder, device="cpu")


def test_pickled_weights_are_refused(tmp_path):
    model = bert(1)
    folder = tmp_path / "pickled"
    save(folder, model, word_tokenizer())
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert AutoModelForSequenceClassification.from_pretrained(folder)  # plain transformers would take it
    with pytest.raises(ModelError, match=r"as a pickle .* is not read.*safetensors"):
        HuggingFaceRewardModel(str(folder), device="cpu")


@pytest.mark.parametrize("make", [bert, llama, gpt2])
def test_a_folder_without_a_tokenizer_is_one_error(tmp_path, make):
    make(1).save_pretrained(tmp_path / "untold")
    with pytest.raises(ModelError, match=r"reward model '.*untold'"):
        HuggingFaceRewardModel(str(tmp_path / "untold"), device="cpu")
