import json
from collections import namedtuple
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from konic.finetuning.data.config import DatasetConfig
from konic.finetuning.data.hub import stream_rows
from konic.finetuning.data.loaders import rows_of_dataset
from konic.finetuning.data.prompts import load_prompts
from konic.finetuning.data.rows import rows_of
from konic.finetuning.data.samples import collect_columns
from konic.finetuning.errors import ConfigError, DatasetError

np, pandas = pytest.importorskip("numpy"), pytest.importorskip("pandas")
datasets = pytest.importorskip("datasets")
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


@pytest.mark.parametrize(
    "missing", [None, float("nan"), np.float32("nan"), np.datetime64("NaT"), pandas.NA, pandas.NaT], ids=str
)
def test_a_missing_value_in_a_row_is_no_text(missing):
    rows = [{"prompt": "a", "name": "x"}, Row("b", "y")._asdict() | {"name": missing}, {"prompt": missing, "name": "z"}]
    assert [row.content for row in load(rows)] == ["a", "b"]
    assert [row.content for row in load(rows, prompt_template="{name}.")] == ["x.", ".", "z."]


NO_ROWS = [
    (lambda: pandas.DataFrame({"prompt": ["a"]}).groupby("prompt"), "DataFrameGroupBy"),
    (lambda: pandas.Timestamp("2020-01-01"), "Timestamp"),
    (lambda: pa.scalar("a"), "StringScalar"),
    (lambda: np.array("a"), "ndarray"),
    (lambda: np.array([["a", "b"]]), "ndarray"),
    (lambda: np.str_("a"), "str_"),
    (lambda: "text", "str"),
    (lambda: "", "str"),
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


@pytest.mark.parametrize("prompts", ["rows.csv", Path("rows")])
def test_a_path_in_place_of_prompts_is_reported_where_it_goes(prompts):
    with pytest.raises(ConfigError, match=r"prompts is of the type .*; for those of a file, DatasetConfig\(name="):
        DatasetConfig(prompts=prompts)


def test_an_index_of_pandas_that_has_a_name_is_a_column():
    frame = pandas.DataFrame({"prompt": ["a", "b"], "zip": ["01", "02"]})
    assert [row.columns for row in load(frame.set_index("zip"))] == [{"zip": "01"}, {"zip": "02"}]
    assert [row.content for row in load(frame.set_index("prompt"))] == ["a", "b"]
    both = frame.set_index("zip", drop=False)
    both.index = both.index + "0"
    assert [row.columns for row in load(both)] == [{"zip": "01"}, {"zip": "02"}]
    assert load(frame.rename(index={0: 5}))[0].columns == {"zip": "01"}


def test_columns_that_are_numbers_go_by_their_text():
    (row,) = load(pandas.DataFrame([["a", "x"]]), prompt_column="0")
    assert (row.content, row.columns) == ("a", {"1": "x"})
    assert collect_columns([row]) == [{"1": "x"}]
    with pytest.raises(DatasetError, match=r"row 0 \(two of its columns have one name"):
        load([{"prompt": "a", 0: "x", "0": "y"}])


@pytest.mark.parametrize(
    "make",
    [
        lambda: pandas.DataFrame([["a", "b"]], columns=["prompt", "prompt"]),
        lambda: pa.table([["a"], ["b"]], names=["prompt", "prompt"]),
    ],
)
def test_two_columns_of_one_name_are_refused(make):
    with pytest.raises(ConfigError, match="more than one column is named 'prompt': rename"):
        DatasetConfig(prompts=make())


def test_chats_in_a_parquet_file_that_pandas_reads_are_chats(tmp_path):
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


TEXTS = [
    "[1]", "{'a': 1}", "['role': no]", "{x} of messages: 1", "[{[]: 1}]", "[" * 9999, '"' + " " * 9999 + "x",
    '[INST] Write {"role": "user", "content": "hi"} [/INST]', "(as in {'role': 'user', 'content': 1})",
    '["role", "content"]', '{"role": "user", "id": 3}', '[{"role": "admin"}, {"role": "user"}] How many?',
    '{"from": "USD", "to": "EUR", "value": 5}', '{"from": "USD", "to": "EUR", "value": 5} Convert it.',
    "Role: user\nContent: what they see", "- role: admin\n  content: x", "- role: user",
    "Turn - role: user\n  content: x",
    '[{"content": "a long text"}] Summarise it.', '{"name": "f", "arguments": {"value": "user"}}',
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_other_text_in_brackets_stays_text(text):
    assert load([text])[0].content == text


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + json.dumps(CHAT), json.dumps(json.dumps(CHAT)), json.dumps(str(CHAT)), repr(json.dumps(CHAT)),
        "({'role': 'user', 'content': 'Hello'},)", '[{"role": "user", "content": "Hello"},\n]',
    ],
)  # fmt: skip
def test_a_chat_is_read_in_whatever_form_it_was_stored(text):
    assert list(load([text])[0].content) == CHAT


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


FROM_HUMAN = [{"from": "human", "value": "x"}]
DAMAGED = [
    str(np.array(CHAT * 2)), json.dumps(CHAT)[:-5], str(np.array(FROM_HUMAN * 2)), json.dumps(FROM_HUMAN)[:-4],
    repr(np.array(CHAT)), "[{'name': None, 'role': 'user', 'content': 'x'}\n {'role': 'user', 'content': 'y'}]",
    f"{json.dumps(CHAT[0])}\n{json.dumps(CHAT[0])}", '[{"role": "user", "content": "a", "content": "b"}]',
    "[{'role': 'user', 'role': 'user', 'content': 'b'}]", "[{role: 'user', content: 'hi'}]",
    "[{“role”: “user”, “content”: “hi”}]", f"{json.dumps(CHAT)} and more", '[{"role": "user", "parts": ["hi"]}]',
    str({"messages": np.array(CHAT)}), json.dumps(json.dumps(CHAT)[:-5]),
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED)
def test_a_chat_whose_text_is_damaged_is_refused(text):
    with pytest.raises(DatasetError, match=r"row 0 .*begins as a chat but cannot be read as one"):
        load([text])


@pytest.mark.parametrize(
    "text",
    [
        "- role: user\n  content: hi\n", "messages:\n  - role: 'system'\n    content: |\n      a\n      b\n",
        "- content: hi\n  role: user\n", "\n- from: human\n  value: hi\n",
    ],
)  # fmt: skip
def test_a_chat_in_yaml_is_refused_with_the_fix(text):
    with pytest.raises(DatasetError, match=r"row 0 \(text that begins as a chat in YAML: write .* as JSON"):
        load([text])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (json.dumps(CHAT[0]), "one message, not a list of messages"),
        (json.dumps([CHAT]), "a list with a chat inside"),
        (json.dumps({"prompt": CHAT}), "a dict with a chat in 'prompt'"),
        (json.dumps(FROM_HUMAN[0]), "one message, not a list of messages"),
        (json.dumps([{"Role": "user", "Content": "x"}]), "message 1 is without role and content"),
        (json.dumps([{"role": "user", "content": [{"type": "text", "text": "x"}]}]), "a list of parts: give"),
    ],
)
def test_the_text_of_a_chat_of_another_form_is_no_plain_text(text, problem):
    with pytest.raises(DatasetError, match=f"row 0 .*{problem}"):
        load([text])


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_template_writes_nothing_for_a_missing_value(missing):
    rows = [{"a": missing, "n": missing}, {"a": "x", "n": 0.5}, {"a": "y"}]
    texts = [row.content for row in load(rows, prompt_template="{a:>2}|{n:.1f}|")]
    assert texts == ["||", " x|0.5|", " y||"]
    table = [row.content for row in load(pandas.DataFrame(rows), prompt_template="{a}|{n}")]
    assert table == ["|", "x|0.5", "y|"]


def test_a_template_whose_value_cannot_be_shown_names_the_row():
    class Unshowable:
        def __repr__(self):
            raise RuntimeError("no")

    for value in (Unshowable(), 10**5000):
        with pytest.raises(DatasetError, match=r"prompt_template='\{a\}' does not fit row 1: "):
            load([{"a": 1}, {"a": value}], prompt_template="{a}")


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


# --- cells that cannot be read ---


def no_utf_8():
    offsets = pa.py_buffer(np.array([0, 1], dtype=np.int32))
    return pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xe9")])


UNREADABLE = {
    "far": pa.array([2**62], pa.timestamp("us")),
    "zone": pa.array([0], pa.timestamp("us", tz="Mars/Phobos")),
    "inside": pa.array([[2**62]], pa.list_(pa.timestamp("us"))),
}


@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("kind", ["parquet", "arrow", "memory", "datasets", "column", "stream"])
def test_a_cell_that_has_no_value_in_python_is_named_by_its_row_and_column(tmp_path, name, kind):
    cells = pa.concat_arrays([pa.nulls(1, UNREADABLE[name].type), UNREADABLE[name]])
    table = pa.table({"prompt": ["a", "b"], "x": cells})
    if kind == "parquet":
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    elif kind == "arrow":
        with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as file:
            file.write_table(table)
    data = datasets.Dataset(table)
    given = {"memory": table, "datasets": data, "column": data["x"], "stream": data.to_iterable_dataset()}
    error, named = (ConfigError, "row 1") if kind in given else (DatasetError, f"a.{kind}.*row 1, column 'x'")
    with pytest.raises(error, match=named) as raised:
        load(given[kind]) if kind in given else load_prompts(DatasetConfig(name=str(tmp_path / f"a.{kind}")))
    assert "column 'x'" in str(raised.value) or kind in ("column", "stream")


def test_text_of_another_encoding_in_a_table_is_named(tmp_path):
    table = pa.table({"prompt": no_utf_8()})
    with pytest.raises(ConfigError, match="row 0, column 'prompt'"):
        load(table)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match=r"a\.parquet.*Invalid UTF8"):
        load_prompts(DatasetConfig(name=str(tmp_path / "a.parquet")))


class Panic(BaseException):
    """Rust's panics are no Exception."""


def test_the_fault_of_a_library_that_reads_a_table_is_one_error():
    class LazyFrame:
        __module__ = "polars.lazyframe.frame"

        def collect(self):
            raise KeyError("no such column")

    class Series(list):
        def to_list(self):
            raise Panic("out-of-range date")

    class DataFrame:
        __module__ = "polars.dataframe.frame"
        columns = ("prompt", "when")

        def __getitem__(self, name):
            return pandas.Series(["a"]) if name == "prompt" else Series()

        def to_dicts(self):
            raise Panic("out-of-range date")

    with pytest.raises(ConfigError, match="prompts cannot be read: KeyError: 'no such column'"):
        load(LazyFrame())
    with pytest.raises(ConfigError, match="prompts, column 'when', cannot be read: PanicError: out-of-range date"):
        load(DataFrame())


# --- tables of datasets ---


def test_images_are_given_as_they_are_stored_and_never_decoded(tmp_path):
    pytest.importorskip("PIL")
    image = {"bytes": b"no image", "path": None}
    kinds = {"prompt": datasets.Value("string"), "seen": datasets.Image(), "many": datasets.List(datasets.Image())}
    features = datasets.Features({**kinds, "inside": {"one": datasets.Image()}, "json": datasets.Json()})
    row = {"prompt": "a", "seen": image, "many": [image], "inside": {"one": image}, "json": {"n": [1]}}
    data = datasets.Dataset.from_list([row], features=features)
    data.save_to_disk(tmp_path / "saved")
    saved = load_prompts(DatasetConfig(name=str(tmp_path / "saved"))).rows
    for rows in (load(data), load(data.to_iterable_dataset()), saved):
        assert [{"prompt": one.content, **one.columns} for one in rows] == [row]
    assert data.features["seen"].decode  # the user's own table stays as it was
    assert rows_of(data["seen"]) == [image]


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow"])
def test_a_format_of_datasets_changes_no_value(kind):
    data = datasets.Dataset.from_dict({"prompt": ["a", "b"], "n": [1, 2], "tags": [["x"], []]})
    expected = [("a", {"n": 1, "tags": ["x"]}), ("b", {"n": 2, "tags": []})]
    for table in (data.with_format(kind), data.to_iterable_dataset().with_format(kind)):
        assert [(row.content, row.columns) for row in load(table)] == expected
    chosen = data.with_format("numpy", columns=["prompt"])
    assert [row.columns for row in load(chosen)] == [{}, {}]


def test_a_table_of_the_hub_decodes_nothing_and_names_the_row_that_cannot_be_read():
    pytest.importorskip("PIL")
    features = datasets.Features({"prompt": datasets.Value("string"), "seen": datasets.Image()})
    image = {"bytes": b"no image", "path": None}
    data = datasets.Dataset.from_list([{"prompt": name, "seen": image} for name in "abc"], features=features)
    kept = [2, 0]
    assert rows_of_dataset(data.select(kept), "Here", kept) == [{"prompt": name, "seen": image} for name in "ca"]
    numbered = list(stream_rows(data.to_iterable_dataset(), None, "Here"))
    assert numbered == [(number, {"prompt": name, "seen": image}) for number, name in enumerate("abc")]
    cells = pa.chunked_array([pa.nulls(2, pa.timestamp("us")), UNREADABLE["far"]])
    broken = datasets.Dataset(pa.table({"prompt": ["a", "b", "c"], "x": cells}))
    with pytest.raises(
        DatasetError, match=r"^Here: row 2, column 'x', cannot be read: OverflowError.*remove its column"
    ):
        rows_of_dataset(broken.select(kept), "Here", kept)


@pytest.mark.parametrize("num_files", [1, 3])
def test_a_row_of_a_stream_has_one_number_whatever_the_order(tmp_path, num_files):
    files = [str(tmp_path / f"{file}.jsonl") for file in range(num_files)]
    for file in files:
        Path(file).write_text("".join(f'{{"prompt": "{Path(file).stem}-{row}"}}\n' for row in range(5)))
    stream = datasets.load_dataset("json", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path))
    drawn = [list(stream_rows(stream, seed, "Here")) for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert [number for number, _ in sorted(drawn[0], key=lambda pair: pair[0])] == list(range(5 * num_files))
    assert {number: row["prompt"] for number, row in drawn[0]} == {number: row["prompt"] for number, row in drawn[1]}
    in_order = list(stream_rows(stream, None, "Here"))
    assert [number for number, _ in in_order] == list(range(5 * num_files))
    assert num_files > 1 or sorted(drawn[0], key=lambda pair: pair[0]) == in_order


@pytest.mark.parametrize("num_rows", [4, 5])
def test_a_stream_given_as_prompts_is_said_to_be_read_whole(num_rows, monkeypatch, caplog):
    monkeypatch.setattr("konic.finetuning.data.rows._MANY", 5)
    data = datasets.Dataset.from_dict({"prompt": ["a"] * num_rows})
    load(data)
    load(data["prompt"])
    assert not caplog.records
    load(data.to_iterable_dataset(), max_samples=2)
    load(data.to_iterable_dataset()["prompt"])
    assert caplog.text.count("all rows are read into memory now: 5 so far") == (2 if num_rows == 5 else 0)


def streamed(texts, monkeypatch, **options):
    stream = datasets.Dataset.from_dict({"prompt": texts}).to_iterable_dataset()
    monkeypatch.setattr("konic.finetuning.data.prompts.read_hub", lambda *_, **__: stream)
    return load_prompts(DatasetConfig(source="huggingface", name="a/b", streaming=True, shuffle=False, **options))


def test_empty_prompts_of_a_stream_are_one_warning_and_an_error_where_they_are_most(monkeypatch, caplog):
    assert [prompt.row for prompt in streamed(["", "a", ""] * 20 + ["a"] * 60, monkeypatch).batch(0, 80)][:2] == [1, 4]
    assert [record.getMessage() for record in caplog.records] == [
        "Dataset 'a/b': the prompt of row 0 is empty and left out, as later ones are."
    ]
    told = r"67 of the first 101 prompts of the stream in column 'prompt' cannot be used: the last is row 100 \(empty\)"
    with pytest.raises(DatasetError, match=told + ". Name another column in prompt_column."):
        streamed(["a", "", ""] * 40, monkeypatch).batch(0, 60)


def test_a_transform_of_datasets_is_kept():
    data = datasets.Dataset.from_dict({"text": ["a", "b"]})
    data = data.with_transform(lambda batch: {"prompt": [text.upper() for text in batch["text"]]})
    assert [row.content for row in load(data)] == ["A", "B"]
    with pytest.raises(ConfigError, match="row 0 cannot be read: ZeroDivisionError: division by zero"):
        load(data.with_transform(lambda batch: 1 / 0))
