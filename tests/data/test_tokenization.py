import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from conftest import CHAT_TEMPLATE, byte_tokenizer
from konic.finetuning.data.config import DatasetConfig
from konic.finetuning.data.decoding import read_response
from konic.finetuning.data.prompts import Prompt, load_prompts, make_prompts
from konic.finetuning.data.tokenization import _warn_of_markup, encode_prompt, make_prompt_batch
from konic.finetuning.errors import ConfigError, DatasetError, ModelError
from konic.finetuning.models.positions import position_ids

CPU = torch.device("cpu")


def test_prompts_are_padded_on_the_left_under_a_mask_from_lengths():
    tokenizer = byte_tokenizer("gpt2")
    batch = make_prompt_batch(make_prompts(["abc", "z"], DatasetConfig(), "test"), tokenizer, 16, 0, CPU)
    a, b, c, z = tokenizer("abcz").input_ids
    assert batch.ids.tolist() == [[a, b, c], [0, 0, z]]
    assert batch.mask.tolist() == [[True, True, True], [False, False, True]]
    assert batch.texts == ["abc", "z"]


def test_a_pad_token_inside_a_prompt_still_counts():
    tokenizer = byte_tokenizer("gpt2")  # its pad token is its EOS
    batch = make_prompt_batch(make_prompts(["a<eos>b"], DatasetConfig(), "test"), tokenizer, 16, 0, CPU)
    assert 0 in batch.ids[0].tolist()
    assert batch.mask.all()


def test_long_prompts_keep_their_end_and_rewards_see_what_the_model_saw():
    tokenizer = byte_tokenizer("gpt2")
    ids, text = encode_prompt(Prompt(0, "abcdefgh"), tokenizer, 3)
    assert text == "fgh"
    assert ids == tokenizer("fgh").input_ids


def test_a_bos_token_survives_the_cut():
    tokenizer = byte_tokenizer("llama")
    ids, text = encode_prompt(Prompt(0, "abcdefgh"), tokenizer, 4)
    assert ids == tokenizer("fgh").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert text == "fgh"


def test_positions_count_the_tokens_before():
    mask = torch.tensor([[True, True, True, True], [False, False, True, True], [False, True, True, False]])
    assert position_ids(mask).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 1, 2]]


CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello there my friend"},
]


def test_messages_go_through_the_chat_template_and_strings_do_not():
    tokenizer = byte_tokenizer("llama")
    ids, text = encode_prompt(Prompt(0, CHAT), tokenizer, 100)
    assert tokenizer.decode(ids) == "[system]be kind[user]hello there my friend[assistant]"
    assert text == "hello there my friend"
    plain, _ = encode_prompt(Prompt(0, "hello"), tokenizer, 100)
    assert tokenizer.decode(plain) == "<bos>hello"


def test_a_chat_has_the_tokens_that_the_tokenizer_s_own_template_gives():
    tokenizer = thinking_tokenizer()
    for kwargs in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        prompt = make_prompts([CHAT], DatasetConfig(chat_template_kwargs=kwargs or None), "test")[0]
        expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False, **kwargs)
        assert encode_prompt(prompt, tokenizer, 200)[0] == expected
        cut, text = encode_prompt(prompt, tokenizer, len(expected) - 5)
        shorter = [CHAT[0], {"role": "user", "content": text}]
        assert cut == tokenizer.apply_chat_template(shorter, add_generation_prompt=True, return_dict=False, **kwargs)
    assert encode_prompt(prompt, tokenizer, 200)[0] != encode_prompt(Prompt(0, CHAT), tokenizer, 200)[0]


def thinking_tokenizer():
    tokenizer = byte_tokenizer("llama")
    tokenizer.chat_template += "{% if enable_thinking is defined %}<think>{{ enable_thinking }}{% endif %}"
    return tokenizer


def test_a_name_that_the_chat_template_does_not_read_is_refused():
    prompt = make_prompts([CHAT], DatasetConfig(chat_template_kwargs={"enable_thiking": False}), "test")[0]
    with pytest.raises(ConfigError, match=r"does not read 'enable_thiking'\. Did you mean 'enable_thinking'"):
        encode_prompt(prompt, thinking_tokenizer(), 100)


NAMES = """{% macro shown(text, mark=opening) %}{{ mark }}{{ text }}{% endmacro %}
{% if not date is defined %}{% set date = 3 %}{% endif %}{% set ns = namespace(first=true) %}
{% for m in messages %}{% generation %}[{{ m['role'] }}]{{ shown(m['content']) }}{% endgeneration %}{% endfor %}
{% if date == 0 %}{{ 'a' * 99999999999 }}{{ 'a' | center(99999999999) }}{{ raise_exception(ns.first) }}{% endif %}"""


@pytest.mark.parametrize("name", ["m", "role", "if", "ns", "first", "text", "mark", "shown", "loop", "date2"])
def test_a_word_of_the_chat_template_that_is_no_variable_from_outside_is_refused(name):
    tokenizer = byte_tokenizer("llama")
    tokenizer.chat_template = NAMES
    with pytest.raises(ConfigError, match=f"chat_template_kwargs: the model's chat template does not read '{name}'"):
        encode_prompt(Prompt(0, CHAT, chat_template_kwargs={name: 3}), tokenizer, 200)
    for read in ("date", "opening"):
        assert encode_prompt(Prompt(0, CHAT, chat_template_kwargs={read: 3}), tokenizer, 200)[0]
    tokenizer.chat_template = {"default": NAMES, "other": "{{ date2 }}"}
    assert encode_prompt(Prompt(0, CHAT, chat_template_kwargs={"date2": 3}), tokenizer, 200)[0]


@pytest.mark.parametrize("trimming", ["trim", "replace(' ', '')"])
def test_the_text_of_a_cut_message_is_what_a_trimming_template_shows(trimming):
    tokenizer = byte_tokenizer("llama")
    tokenizer.chat_template = f"{{% for m in messages %}}[{{{{ m['content'] | {trimming} }}}}]{{% endfor %}}"
    prompt = Prompt(0, [{"role": "user", "content": "a long  way  home   again "}])
    for length in range(6, 27):
        ids, text = encode_prompt(prompt, tokenizer, length)
        shown = text if trimming == "trim" else text.replace(" ", "")
        assert len(ids) <= length
        assert tokenizer.decode(ids) == f"[{shown}]"


def test_a_chat_template_that_leaves_the_system_message_out_is_refused():
    tokenizer = byte_tokenizer("llama")
    prompt = Prompt(4, [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "Hi"}])
    others = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    tokenizer.chat_template = others
    with pytest.raises(ModelError, match="Row 4: The tokenizer's chat template does not show the system message"):
        encode_prompt(prompt, tokenizer, 100)
    for shown in ("{{ messages[0].content | trim }}", "{{ messages[0].content | tojson }}"):
        tokenizer.chat_template = shown + others
        assert "Be kind." in tokenizer.decode(encode_prompt(prompt, tokenizer, 100)[0])


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", False),
        ("{{ messages[-1].content }}", False),
        ("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}", True),
        ("{% for m in messages %}{{ m.content if loop.last else m.content | upper or boom() }}{% endfor %}", True),
    ],
)
def test_a_chat_template_that_leaves_an_earlier_message_out_is_refused(template, shown):
    tokenizer = byte_tokenizer("llama")
    tokenizer.chat_template = template
    answer = {"role": "assistant", "content": "<think>who?</think>I am Ann."}
    prompt = Prompt(4, [{"role": "user", "content": "Hi"}, answer, {"role": "user", "content": "Who?"}])
    if shown:
        assert "ann" in tokenizer.decode(encode_prompt(prompt, tokenizer, 100)[0]).lower()
        return
    which = "1 of the chat .role: user" if "user" not in template else "2 of the chat .role: assistant"
    with pytest.raises(ModelError, match=f"Row 4: .* does not show the message {which}"):
        encode_prompt(prompt, tokenizer, 100)


@pytest.mark.parametrize("template", ["always", "{{ messages[0]['content'] }}", "{{ messages[-1]['role'] }}"])
def test_a_chat_template_that_leaves_the_last_message_out_is_refused(template):
    tokenizer = byte_tokenizer("llama")
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match="Row 4: The tokenizer's chat template does not show the last message"):
        encode_prompt(Prompt(4, CHAT), tokenizer, 100)
    tokenizer.chat_template = "{{ messages[-1]['content'] or raise_exception('empty') }}"
    assert encode_prompt(Prompt(4, CHAT[1:]), tokenizer, 100)[1] == CHAT[-1]["content"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_template": "{a}"}, "give one of them"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "cannot set 'add_generation_prompt'"),
        ({"chat_template_kwargs": {"tokenize": True}}, "cannot set 'tokenize'"),
        ({"chat_template_kwargs": {"max_length": 3}}, "cannot set 'max_length'"),
        (
            {"chat_template_kwargs": {"tools": "abc"}},
            r"chat_template_kwargs\['tools'\] must be a list of dicts, got 'abc'",
        ),
        ({"chat_template_kwargs": {"tools": ["abc"]}}, "must be a list of dicts"),
        ({"chat_template_kwargs": {"documents": {"text": "a"}}}, "'documents'.*must be a list of dicts"),
        ({"chat_template_kwargs": {"a": object()}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": ["a"]}, "chat_template_kwargs"),
    ],
)
def test_template_values_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DatasetConfig(prompts=[{"a": "b"}], **{"chat_template_kwargs": {"a": 1}} | settings)


def test_template_values_go_with_chats():
    with pytest.raises(DatasetError, match="plain text: chat_template_kwargs goes with chat messages"):
        load_prompts(DatasetConfig(prompts=["Hello"], chat_template_kwargs={"enable_thinking": False}))


def test_no_space_is_taken_out_of_text():
    tokenizer = byte_tokenizer("gpt2")
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    assert encode_prompt(Prompt(0, "a long text , it is n't ."), tokenizer, 14)[1] == " , it is n't ."


def test_all_tokens_before_a_text_survive_the_cut():
    tokenizer = byte_tokenizer("gpt2")
    template = processors.TemplateProcessing(single="<eos> <eos> $A", special_tokens=[("<eos>", 0)])
    tokenizer.backend_tokenizer.post_processor = template
    expected = [0, 0, *byte_tokenizer("gpt2")("fgh").input_ids]
    assert encode_prompt(Prompt(0, "abcdefgh"), tokenizer, 5) == (expected, "fgh")


def test_only_the_last_user_message_is_shortened_from_its_start():
    tokenizer = byte_tokenizer("llama")
    ids, text = encode_prompt(Prompt(0, CHAT), tokenizer, 40)
    assert len(ids) == 40
    assert tokenizer.decode(ids) == f"[system]be kind[user]{text}[assistant]"
    assert CHAT[1]["content"].endswith(text)
    assert text


def test_messages_that_cannot_fit_name_their_row():
    with pytest.raises(
        DatasetError, match=r"Row 5: the messages before the last one take 3. tokens.*Raise max_prompt_"
    ):
        encode_prompt(Prompt(5, CHAT), byte_tokenizer("llama"), 20)


def test_a_last_message_of_which_nothing_is_left_names_its_row():
    start = len("[system]be kind[user][assistant]")
    for length in range(start, start + 2):  # one token more, and the last character fits
        if length == start:
            with pytest.raises(DatasetError, match=r"Row 5: .*leaves no room for the last one.*Raise max_prompt_"):
                encode_prompt(Prompt(5, CHAT), byte_tokenizer("llama"), length)
        else:
            assert encode_prompt(Prompt(5, CHAT), byte_tokenizer("llama"), length)[1] == CHAT[1]["content"][-1:]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_message_that_a_template_shows_several_times_keeps_the_most_that_fits(times):
    tokenizer = byte_tokenizer("llama")
    tokenizer.chat_template = "|".join(["{{ messages[-1]['content'] }}"] * times)
    text = "0123456789" * 6
    for length in range(10, 62):
        ids, kept = encode_prompt(Prompt(0, [{"role": "user", "content": text}]), tokenizer, length)
        fits = (length - times + 1) // times
        assert kept == text[max(0, len(text) - fits) :]
        assert tokenizer.decode(ids) == "|".join([kept] * times)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages | nothing }}",
        "{% if %}",
        "{{ raise_exception('a') }}",
    ],
)
def test_a_chat_template_that_fails_names_the_row(template):
    tokenizer = byte_tokenizer("llama")
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=r"^Row 4: The tokenizer's chat template fails: \w+: "):
        encode_prompt(Prompt(4, CHAT), tokenizer, 100)


def test_named_chat_templates_need_a_default():
    tokenizer = byte_tokenizer("llama")
    with_tools = "{{ tools[0].name }}{{ messages[-1]['content'] }}"
    tokenizer.chat_template = {"rag": tokenizer.chat_template, "tool_use": with_tools}
    with pytest.raises(ModelError, match=r"Row 4: .*chat templates rag, tool_use and none named 'default'"):
        encode_prompt(Prompt(4, CHAT), tokenizer, 100)
    prompt = Prompt(4, CHAT[1:], chat_template_kwargs={"tools": [{"name": "f"}]})
    assert tokenizer.decode(encode_prompt(prompt, tokenizer, 100)[0]) == f"f{CHAT[-1]['content']}"


def test_messages_need_a_chat_template():
    with pytest.raises(ModelError, match="Row 3 holds chat messages, but the model's tokenizer has no chat template"):
        encode_prompt(Prompt(3, CHAT), byte_tokenizer("gpt2"), 100)


def test_a_prompt_without_tokens_names_its_row():
    with pytest.raises(DatasetError, match="Row 2: the tokenizer makes no tokens"):
        encode_prompt(Prompt(2, ""), byte_tokenizer("gpt2"), 10)


@pytest.mark.parametrize("text", ["😀" * 20, "中" * 30, "é" * 40])
def test_a_cut_through_a_character_ends_and_leaves_no_half_of_it(text):
    tokenizer = byte_tokenizer("llama")
    for length in range(30, 60):
        ids, kept = encode_prompt(Prompt(0, [{"role": "user", "content": text}]), tokenizer, length)
        assert len(ids) <= length
        assert text.endswith(kept)
        ids, kept = encode_prompt(Prompt(0, text), tokenizer, length)
        assert text.endswith(kept)
        assert tokenizer.decode(ids) == f"<bos>{kept}"  # the model reads no half of a character either


@pytest.mark.parametrize("length", [2, 3, 4])
def test_a_cut_that_leaves_no_whole_character_names_its_row(length):
    with pytest.raises(DatasetError, match=f"Row 6: max_prompt_length={length} leaves no room for the last character"):
        encode_prompt(Prompt(6, "a😀"), byte_tokenizer("llama"), length)


@pytest.mark.parametrize("text", ["\ufffd" * 20, "a\ufffdé\ufffd\ufffd😀\ufffd" * 5])
def test_a_cut_keeps_the_replacement_characters_of_the_text_itself(text):
    tokenizer = byte_tokenizer("llama")
    start = len("[user][assistant]")
    for room in range(4, 24):
        tail = text.encode()[-room:].decode(errors="ignore")
        ids, kept = encode_prompt(Prompt(0, [{"role": "user", "content": text}]), tokenizer, start + room)
        assert kept == tail
        assert tokenizer.decode(ids) == f"[user]{tail}[assistant]"
        assert encode_prompt(Prompt(0, text), tokenizer, 1 + room)[1] == tail


def test_no_prompts_are_one_error():
    with pytest.raises(ConfigError, match="no prompts to respond to"):
        make_prompt_batch([], byte_tokenizer("gpt2"), 10, 0, CPU)


@pytest.mark.parametrize("text", ["ab", "<eos>", "a<eos>b"])
@pytest.mark.parametrize("limit", [40, 3])
def test_a_tokenizer_that_ends_texts_does_not_end_prompts(text, limit):
    plain, ending = byte_tokenizer("gpt2"), byte_tokenizer("gpt2")
    template = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 0)])
    ending.backend_tokenizer.post_processor = template
    assert ending(text).input_ids[-1] == 0
    prompt = make_prompts([f"long before {text}"], DatasetConfig(), "test")[0]
    assert encode_prompt(prompt, ending, limit) == encode_prompt(prompt, plain, limit)


def test_special_tokens_of_a_prompt_stay_in_its_text_when_it_is_cut():
    prompt = make_prompts(["a long beginning <eos>b"], DatasetConfig(), "test")[0]
    assert encode_prompt(prompt, byte_tokenizer("gpt2"), 3)[1] == " <eos>b"


def space_tokenizer():
    """Words that begin with a space, which decoding leaves out of the first one, as Llama 2's tokenizer does."""
    words = ["<unk>", "<s>", "▁a", "▁the", "▁film", "s", "<think>"]
    tokenizer = Tokenizer(models.Unigram([(word, -float(len(word) < 3)) for word in words], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<think>"]})
    return fast


@pytest.mark.parametrize(
    ("tokens", "skip", "text"),
    [
        (["▁the", "▁film"], False, " the film"),
        (["s", "▁film"], False, "s film"),
        (["<think>", "▁film"], False, "<think> film"),
        (["<think>", "▁film"], True, " film"),
        ([], False, ""),
    ],
)
def test_a_response_keeps_the_space_of_its_first_token(tokens, skip, text):
    tokenizer = space_tokenizer()
    assert tokenizer.decode(tokenizer.convert_tokens_to_ids(["▁the", "▁film"])) == "the film"
    assert read_response(tokenizer.convert_tokens_to_ids(tokens), tokenizer, skip) == text


def test_bytes_of_a_character_that_begin_a_response_are_shown_as_they_are_alone():
    tokenizer = byte_tokenizer("gpt2")
    for ids in (tokenizer("é").input_ids, tokenizer("é").input_ids[1:], [0, *tokenizer("x").input_ids]):
        assert read_response(ids, tokenizer) == tokenizer.decode(ids)


@pytest.mark.parametrize("limit", [40, 9])
def test_text_that_begins_with_what_the_tokenizer_adds_does_not_get_it_twice(limit):
    tokenizer = byte_tokenizer("llama")
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    own = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert own[0] == 257
    ids, kept = encode_prompt(Prompt(0, text), tokenizer, limit)
    assert ids == (own if limit == 40 else [257, *own[-8:]])
    assert kept == (text if limit == 40 else text[-8:])


MARKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_the_markup_of_another_model_in_plain_text_is_reported_once(caplog):
    _warn_of_markup.cache_clear()
    make_prompt_batch([Prompt(0, MARKED), Prompt(1, MARKED)], byte_tokenizer("gpt2"), 99, 0, CPU)
    (record,) = caplog.records
    assert "Prompts of plain text hold '<|im_start|>'" in record.getMessage()
    assert "Give lists of messages" in record.getMessage()


def test_the_markup_of_the_model_itself_is_no_mistake(caplog):
    _warn_of_markup.cache_clear()
    with_tokens, with_template = byte_tokenizer("gpt2"), byte_tokenizer("gpt2")
    with_tokens.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    with_template.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }}{{ m['content'] }}{% endfor %}"
    for tokenizer in (with_tokens, with_template):
        assert encode_prompt(Prompt(0, MARKED), tokenizer, 99) == (tokenizer(MARKED).input_ids, MARKED)
    assert not caplog.records


def test_what_a_tokenizer_without_ordinary_text_adds_is_kept():
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "1": 1, "+": 2}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    assert encode_prompt(Prompt(0, "1 + 1"), fast, 8)[0] == [0, 1, 2, 1]
    assert read_response([1, 2], fast) == "1 +"


def test_what_the_tokenizer_adds_is_found_once_for_all_prompts(monkeypatch):
    tokenizer, texts = byte_tokenizer("llama"), []
    kind = type(tokenizer)
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, text, **rest: texts.append(text) or call(self, text, **rest))
    for prompt in make_prompts(["x", "y", "z"], DatasetConfig(), "test"):
        encode_prompt(prompt, tokenizer, 8)
    assert texts == ["a", "a", "a", "x", "y", "z"]
