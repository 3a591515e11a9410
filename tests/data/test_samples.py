"""One record for each response: what it holds, and what of it goes to a worker."""

from konic.finetuning.data.config import DatasetConfig
from konic.finetuning.data.prompts import make_prompts
from konic.finetuning.data.samples import Sample, make_samples, samples_from_texts

CHAT = [{"role": "user", "content": "Hello"}]


def test_a_sample_holds_its_row_texts_columns_chat_and_tokens():
    prompts = make_prompts([{"prompt": "plain", "label": 1}, {"prompt": CHAT}], DatasetConfig(), "test")
    first, second = make_samples(prompts, ["ain", "Hello"], ["a", "b"], [[5, 0], [7]])
    assert first == Sample(0, "ain", "a", {"label": 1, "messages": None}, [5, 0])
    assert (second.row, second.columns["label"], second.messages) == (1, None, CHAT)
    assert first.messages is None


def test_without_a_chat_there_is_no_column_of_messages():
    (sample,) = make_samples(make_prompts(["a"], DatasetConfig(), "test"), ["a"], ["r"])
    assert (sample.columns, sample.messages, sample.token_ids) == ({}, None, ())


def test_what_goes_to_a_reward_are_the_columns_it_asks_for_and_the_chat():
    sample = Sample(3, "p", "r", {"label": 1, "other": [2], "messages": CHAT}, [5, 6])
    assert sample.with_columns(["label"]) == Sample(3, "p", "r", {"label": 1, "messages": CHAT})
    assert sample.with_columns([]).messages == CHAT
    assert Sample(0, "p", "r", {"label": 1}).with_columns(["label", "gone"]).columns == {"label": 1}


def test_texts_without_a_dataset_become_samples_with_their_columns():
    samples = samples_from_texts(["p", "q"], ["r", "s"], {"label": [1, 2], "messages": [None, CHAT]})
    assert [(s.row, s.prompt, s.response, s.columns["label"]) for s in samples] == [(0, "p", "r", 1), (1, "q", "s", 2)]
    assert [s.messages for s in samples] == [None, CHAT]
