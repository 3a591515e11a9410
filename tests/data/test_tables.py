import json
from collections import namedtuple

import pyarrow as pa
import pytest

from konic.finetuning.data.config import DatasetConfig
from konic.finetuning.data.prompts import load_prompts
from konic.finetuning.data.samples import collect_columns
from konic.finetuning.errors import ConfigError, DatasetError

np, pandas = pytest.importorskip("numpy"), pytest.importorskip("pandas")
CHAT = [{"role": "user", "content": "Hello"}]
Row = namedtuple("Row", ["prompt", "label"])


def load(prompts, **options):
    return load_prompts(DatasetConfig(prompts=prompts, shuffle=False, **options)).rows


def pyarrow_dataset():
    return pytest.importorskip("pyarrow.dataset").dataset(pa.table({"prompt": ["a", "b"]}))


@pytest.mark.parametrize(
    "make",
    [
        lambda: pandas.array(["a", "b"], dtype="string"),
        lambda: pandas.Categorical(["a", "b"]),
        lambda: pandas.Index(["a", "b"]),
        lambda: pandas.DataFrame({"prompt": pandas.Categorical(["a", "b"])}),
        pyarrow_dataset,
        lambda: pyarrow_dataset().scanner(),
        lambda: pa.table({"prompt": ["a", "b"]}).to_reader(),
        lambda: pa.chunked_array([["a"], ["b"]]),
        lambda: np.array([("a",), ("b",)], dtype=[("prompt", "U3")]),
        lambda: np.rec.fromarrays([["a", "b"]], names="prompt"),
        lambda: {"x": "a", "y": "b"}.values(),
        lambda: {"a": 1, "b": 2}.keys(),
        lambda: iter(["a", "b"]),
    ],
)
def test_whatever_holds_rows_gives_them(make):
    assert [row.content for row in load(make())] == ["a", "b"]


def test_named_tuples_are_rows_with_columns():
    rows = load(pandas.DataFrame({"prompt": ["a", "b"], "label": [1, 2]}).itertuples(index=False))
    assert [(row.content, row.columns) for row in rows] == [("a", {"label": 1}), ("b", {"label": 2})]
    assert load([Row("a", 1)])[0].columns == {"label": 1}


def test_missing_cells_of_arrays_are_none():
    frame = pandas.DataFrame({"prompt": ["a", "b"], "label": pandas.array([1, None], dtype="Int64")})
    assert [row.columns["label"] for row in load(frame)] == [1, None]
    assert [row.content for row in load(pandas.array(["a", None, "b"], dtype="string"))] == ["a", "b"]


NO_ROWS = [
    (lambda: pandas.DataFrame({"prompt": ["a"]}).groupby("prompt"), "DataFrameGroupBy"),
    (lambda: pandas.Timestamp("2020-01-01"), "Timestamp"),
    (lambda: pa.scalar("a"), "StringScalar"),
    (lambda: np.array("a"), "ndarray"),
    (lambda: np.array([["a", "b"]]), "ndarray"),
    (lambda: np.str_("a"), "str_"),
    (lambda: "text", "str"),
    (lambda: b"text", "bytes"),
    (lambda: {"prompt": ["a"]}, "dict"),
    (lambda: Row("a", 1), "Row"),
    (lambda: 3, "int"),
]


@pytest.mark.parametrize(("make", "kind"), NO_ROWS)
def test_what_is_not_rows_is_named_with_the_fix(make, kind):
    with pytest.raises(
        ConfigError, match=rf"prompts is of the type {kind}, which is not a list of rows.*Give a list of"
    ):
        DatasetConfig(prompts=make())


@pytest.mark.parametrize(
    "make",
    [
        lambda: pandas.DataFrame([["a", "b"]], columns=["prompt", "prompt"]),
        lambda: pa.table([["a"], ["b"]], names=["prompt", "prompt"]),
    ],
)
def test_two_columns_of_one_name_are_refused(make):
    with pytest.raises(ConfigError, match="two columns named 'prompt'"):
        DatasetConfig(prompts=make())


def test_chats_in_a_parquet_file_that_pandas_reads_are_chats(tmp_path):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"prompt": [CHAT], "tags": [[["a"], ["b", "c"]]]}), tmp_path / "a.parquet")
    (row,) = load(pandas.read_parquet(tmp_path / "a.parquet"))
    assert (row.content, row.columns) == (CHAT, {"tags": [["a"], ["b", "c"]]})
    assert load([{"prompt": np.array(CHAT)}])[0].content == CHAT
    assert load(np.array([CHAT, CHAT]))[1].content == CHAT


QUOTES = [{"role": "user", "content": 'It\'s a \\d and a "word"\n'}]


@pytest.mark.parametrize("chat", [CHAT, QUOTES, [{"role": "system", "content": "s", "name": None}, *CHAT]])
@pytest.mark.parametrize("write", [json.dumps, str, lambda chat: f" {chat}\n"])
def test_a_chat_stored_as_text_is_a_chat(chat, write):
    assert load([write(chat)])[0].content == chat


def test_a_chat_that_pandas_wrote_to_csv_is_a_chat(tmp_path):
    pandas.DataFrame({"prompt": [CHAT, QUOTES]}).to_csv(tmp_path / "a.csv", index=False)
    rows = load_prompts(DatasetConfig(name=str(tmp_path / "a.csv"), shuffle=False)).rows
    assert [row.content for row in rows] == [CHAT, QUOTES]


@pytest.mark.parametrize("text", ["[1]", "{'a': 1}", "['role': no]", "{x} of messages: 1", "[{[]: 1}]", "[" * 9999])
def test_other_text_in_brackets_stays_text(text):
    assert load([text])[0].content == text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"messages": CHAT}, "a dict with a chat in 'messages': give the list of messages itself"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "a dict with a chat in 'conversations'"),
        ([{"from": "human", "value": "x"}], "'from' and 'value': name these 'role' and 'content'"),
    ],
)
def test_chats_of_another_form_are_refused_with_the_fix(content, problem):
    for form in (content, json.dumps(content), str(content)):
        with pytest.raises(DatasetError, match=f"row 0 .*{problem}"):
            load([{"prompt": form}])


@pytest.mark.parametrize("text", [str(np.array(CHAT * 2)), json.dumps(CHAT)[:-5]])
def test_a_chat_whose_text_is_damaged_is_refused(text):
    with pytest.raises(DatasetError, match=r"row 0 .*begins as a chat but cannot be read as one"):
        load([text])


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_template_writes_nothing_for_a_missing_value(missing):
    rows = [{"a": missing, "n": missing}, {"a": "x", "n": 0.5}, {"a": "y"}]
    texts = [row.content for row in load(rows, prompt_template="{a:>2}|{n:.1f}|")]
    assert texts == ["||", " x|0.5|", " y||"]
    table = [row.content for row in load(pandas.DataFrame(rows), prompt_template="{a}|{n}")]
    assert table == ["|", "x|0.5", "y|"]


def test_a_template_s_column_that_is_in_no_row_is_named():
    with pytest.raises(DatasetError, match=r"row 0 has no column 'c'\. .*'a', 'b'"):
        load([{"a": "x"}, {"b": "y"}], prompt_template="{a} {c}")


def test_rows_in_memory_are_copied_when_they_are_loaded():
    opened = (number for number in ())  # it cannot be copied, and stays as it is
    rows = [{"prompt": [dict(CHAT[0])], "answer": {"steps": [1]}, "file": opened}, [dict(CHAT[0])]]
    first, second = load(rows)
    rows[0]["prompt"][0]["content"] = rows[1][0]["content"] = "changed"
    rows[0]["answer"]["steps"].append(2)
    assert (first.content, second.content, first.columns) == (CHAT, CHAT, {"answer": {"steps": [1]}, "file": opened})


@pytest.mark.parametrize(
    "rows", [["plain", {"prompt": "more", "n": 1}, CHAT], [CHAT, "plain", {"prompt": "more", "n": 1}]]
)
def test_plain_text_among_chats_has_messages_in_every_batch_and_order(rows):
    prompts = load(rows)
    assert [collect_columns([prompt])[0] for prompt in prompts] == [
        {"n": 1 if row == {"prompt": "more", "n": 1} else None, "messages": CHAT if row == CHAT else None}
        for row in rows
    ]
    assert collect_columns(load(["plain"])) == [{}]
