import copy
import functools
import itertools
import json
import re
from datetime import date
from decimal import Decimal
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from konic.finetuning.data import formats
from konic.finetuning.data.config import DatasetConfig, DatasetSource
from konic.finetuning.data.prompts import Prompt, PromptSet, load_prompts, make_prompts
from konic.finetuning.errors import ConfigError, DatasetError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


TEXT_FILES = ("csv", "tsv", "json", "jsonl", "ndjson", "txt")


class Unshowable:
    def __repr__(self):
        raise RuntimeError("no")


def contains_itself():
    items = []
    items.append(items)
    return items


def local(path, **options):
    return load_prompts(DatasetConfig(source=DatasetSource.LOCAL, name=str(path), shuffle=False, **options))


def memory(prompts, **options):
    return load_prompts(DatasetConfig(source=DatasetSource.MEMORY, prompts=prompts, **options))


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


def contents(prompts):
    return [prompt.content for prompt in prompts]


def complaint(load, *args, **options):
    with pytest.raises(DatasetError) as error:
        load(*args, **options)
    return str(error.value)


# --- local files ---


def test_csv_keeps_quotes_and_newlines_in_a_prompt_and_every_cell_as_it_was_written(tmp_path):
    text = 'prompt,label,score,note\n"She said ""go"", then\nleft",03,0.50,NA\nplain,true,,2026-01-02\n'
    rows = local(write(tmp_path / "data.csv", text)).rows
    assert contents(rows) == ['She said "go", then\nleft', "plain"]
    assert [row.columns for row in rows] == [
        {"label": "03", "score": "0.50", "note": "NA"},
        {"label": "true", "score": "", "note": "2026-01-02"},
    ]


def test_a_large_csv_may_have_newlines_anywhere(tmp_path):
    """Above a mebibyte it is read in blocks, whose ends must not fall at a newline inside quotes."""
    prompts = [f"{n}\n{'x' * 400}\n{'y' * 400}" for n in range(3000)]
    path = write(tmp_path / "data.csv", "".join(["prompt\n", *(f'"{prompt}"\n' for prompt in prompts)]))
    assert contents(local(path).rows) == prompts


def test_json_is_a_list_of_rows_or_of_plain_strings(tmp_path):
    rows = local(write(tmp_path / "a.json", json.dumps([{"prompt": "é", "tags": ["x"]}, {"prompt": "b"}]))).rows
    assert contents(rows) == ["é", "b"]
    assert rows[0].columns == {"tags": ["x"]}
    assert contents(local(write(tmp_path / "b.json", '["one", "two"]')).rows) == ["one", "two"]


def test_json_that_is_not_a_list_says_so(tmp_path):
    assert "top level is a dict" in complaint(local, write(tmp_path / "a.json", '{"prompt": ["a"]}'))


def test_jsonl_is_a_row_a_line_and_blank_lines_are_none(tmp_path):
    text = '{"prompt": "a", "n": 1}\n\n{"prompt": "b\\nc", "n": 2}\n'
    rows = local(write(tmp_path / "data.jsonl", text)).rows
    assert [(row.row, row.content, row.columns) for row in rows] == [(0, "a", {"n": 1}), (1, "b\nc", {"n": 2})]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_jsonl_lines_end_at_newlines_only(tmp_path, separator):
    """JSON allows these characters inside a string, and json.dumps(..., ensure_ascii=False) writes them as they are."""
    prompts = [f"one{separator}two", "three"]
    text = "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts)
    assert contents(local(write(tmp_path / "data.jsonl", text)).rows) == prompts


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0c"])
def test_txt_lines_end_at_newlines_only(tmp_path, separator):
    prompts = [f"one{separator}two", "three"]
    assert contents(local(write(tmp_path / "data.txt", "\n".join(prompts) + "\n")).rows) == prompts


def test_jsonl_with_windows_line_ends_and_a_byte_order_mark(tmp_path):
    text = '\ufeff{"prompt": "a"}\r\n{"prompt": "b"}\r\n'
    assert contents(local(write(tmp_path / "data.jsonl", text)).rows) == ["a", "b"]


def test_a_bad_jsonl_line_is_named_by_its_number(tmp_path):
    path = write(tmp_path / "data.jsonl", '{"prompt": "a"}\n\n{"prompt": \n{"prompt": "b"}\n')
    message = complaint(local, path)
    assert "line 3:" in message
    assert str(path) in message


def test_parquet_keeps_types_and_nested_columns(tmp_path):
    table = pa.table({"prompt": ["a", "b"], "label": pa.array([1, None], pa.int8()), "chat": [CHAT, CHAT]})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    rows = local(tmp_path / "data.parquet").rows
    assert [row.columns for row in rows] == [{"label": 1, "chat": CHAT}, {"label": None, "chat": CHAT}]
    assert contents(local(tmp_path / "data.parquet", prompt_column="chat").rows) == [CHAT, CHAT]


def test_txt_is_one_prompt_a_line_in_column_text(tmp_path):
    path = write(tmp_path / "data.txt", 'first, "quoted"\nsecond line\r\nthird')
    expected = ['first, "quoted"', "second line", "third"]
    assert contents(local(path).rows) == expected
    assert contents(local(path, prompt_column="text").rows) == expected


def test_txt_has_no_other_column(tmp_path):
    message = complaint(local, write(tmp_path / "data.txt", "a\n"), prompt_column="txt")
    assert "no column 'txt'. Did you mean 'text'?" in message


def test_a_folder_of_one_kind_is_read_in_the_order_of_its_names(tmp_path):
    for name, prompt in (("b.jsonl", "two"), ("a.jsonl", "one"), ("c.jsonl", "three")):
        write(tmp_path / name, json.dumps({"prompt": prompt, "file": name}) + "\n")
    write(tmp_path / ".hidden", "not data")
    rows = local(tmp_path).rows
    assert [(row.row, row.content, row.columns["file"]) for row in rows] == [
        (0, "one", "a.jsonl"),
        (1, "two", "b.jsonl"),
        (2, "three", "c.jsonl"),
    ]


@pytest.mark.parametrize("twin", ["train.jsonl.gz", "Train.JSONL.zst"])
def test_a_file_beside_its_compressed_copy_is_refused_by_name(tmp_path, twin):
    for name in ("train.jsonl", twin):
        with pyarrow.output_stream(str(tmp_path / name), compression="detect") as file:
            file.write(b'{"prompt": "x"}\n')
    write(tmp_path / "test.jsonl", '{"prompt": "y"}\n')
    message = complaint(local, tmp_path)
    assert "train.jsonl" in message
    assert f"{twin}" in message
    assert "Remove one of them" in message
    assert contents(local(tmp_path, split="test").rows) == ["y"]


def test_subfolders_that_hold_the_data_are_named(tmp_path):
    for name in ("main/train-0.parquet", "socratic/train-0.parquet", "de/new/a.csv", ".cache/x.csv", "empty/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, "x\n")
    write(tmp_path / "gsm8k.py", "")
    write(tmp_path / "README.md", "")
    message = complaint(local, tmp_path)
    assert message.endswith(
        f"give the path of one of them, '{tmp_path}/main', '{tmp_path}/socratic', '{tmp_path}/de/new'."
    )
    write(tmp_path / "a.csv", "prompt\nx\n")
    assert "give the path" not in complaint(local, tmp_path)  # the folder itself holds data, of several kinds


def test_a_folder_of_several_kinds_is_refused_with_what_was_found(tmp_path):
    write(tmp_path / "a.csv", "prompt\nx\n")
    write(tmp_path / "b.txt", "x\n")
    message = complaint(local, tmp_path)
    assert "expected one kind of file" in message
    assert message.endswith("found .csv (a.csv), .txt (b.txt). Name one file, or a folder with files of one kind.")


@pytest.mark.parametrize("name", ["nowhere.csv", "empty_folder", "notes.docx"])
def test_what_cannot_be_a_dataset_is_refused_by_name(tmp_path, name):
    if name == "empty_folder":
        (tmp_path / name).mkdir()
    elif name == "notes.docx":
        write(tmp_path / name, "x")
    assert name in complaint(local, tmp_path / name)


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.csv", b""), ("a.json", b"[1,"), ("a.jsonl", b"\xff\xfe\n"), ("a.parquet", b"PAR1"), ("a.txt", b"\xff\n")],
)
def test_a_damaged_file_is_refused_with_its_name_and_kind(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    message = complaint(local, tmp_path / name)
    assert name in message
    assert f"cannot be read as {name[2:]}" in message or "is not UTF-8 text" in message
    assert message.endswith(("Save it as UTF-8.", "Fix the file, or rename it with the extension of its real format."))


@pytest.mark.parametrize(
    ("name", "column", "encoding", "told"),
    [
        ("a.csv", "prompt", "latin-1", r"may be Latin-1 or Windows-1252\. Line 2 holds the byte 0xe9 in .*Where,café"),
        ("a.csv", "answer", "latin-1", r"may be Latin-1 or Windows-1252\. Line 2 holds the byte 0xe9"),
        ("a.tsv", "prompt", "latin-1", "may be Latin-1"),
        ("a.jsonl", "prompt", "utf-16", "may be UTF-16"),
        ("a.json", "prompt", "utf-16", "may be UTF-16"),
        ("a.txt", "prompt", "cp1252", "may be Latin-1 or Windows-1252"),
        *((f"a.{kind}", "prompt", "utf-16-le", "may be UTF-16") for kind in TEXT_FILES),
        *((f"a.{kind}", "prompt", "utf-16-be", "may be UTF-16") for kind in TEXT_FILES),
        ("a.txt", "prompt", "utf-32", "may be UTF-16"),
    ],
)
def test_an_encoding_other_than_utf_8_is_named_with_the_line_and_the_fix(tmp_path, name, column, encoding, told):
    text = "prompt,answer\nWhere,café\n" if name.endswith("csv") else 'prompt\tanswer\n"é"\tx\n'
    (tmp_path / name).write_bytes(text.encode(encoding))
    message = complaint(local, tmp_path / name, prompt_column=column)
    assert re.search(told, message)
    assert message.endswith("Save it as UTF-8.")


def test_text_with_a_zero_byte_is_refused_with_its_line(tmp_path):
    assert "Line 2 holds the byte 0x00 in" in complaint(local, write(tmp_path / "a.csv", "prompt\na\0b\n"))


@pytest.mark.parametrize(
    ("name", "text", "fix"),
    [
        ("a.jsonl", '[{"prompt": "a"}, {"prompt": "b"}]', "line 1 is a list of rows. If the file is one JSON list"),
        ("a.jsonl", '["a", "b"]', "line 1 is a list of rows. If the file is one JSON list"),
        ("a.ndjson", '[[{"role": "user", "content": "a"}]]', "line 1 is a list of rows. If the file is one JSON list"),
        ("a.jsonl", '[\n  {"prompt": "a"}\n]\n', "line 1: .*If the file is one JSON list, rename it to .json"),
        ("a.jsonl", '[{"prompt": "a"},\n{"prompt": "b"}]\n', "line 1: .*If the file is one JSON list"),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}\n', "If each line is a row, rename it to .jsonl"),
    ],
)
def test_json_under_the_extension_of_its_other_form_says_which(tmp_path, name, text, fix):
    assert re.search(fix, complaint(local, write(tmp_path / name, text)))


def test_a_line_of_jsonl_may_be_a_chat(tmp_path):
    assert contents(local(write(tmp_path / "a.jsonl", f"{json.dumps(CHAT)}\n")).rows) == [CHAT]


def test_a_file_that_is_not_there_is_reported_with_its_whole_path():
    assert str(Path("gone.csv").absolute()) in complaint(local, "gone.csv")


def as_file(path, rows):
    """The rows in the format of the path's extension, compressed if it has two."""
    kind = path.suffixes[0]
    if kind in (".parquet", ".arrow"):
        table = pa.Table.from_pylist(rows)
        if kind == ".parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pa.ipc.new_file(str(path), table.schema) as file:
                file.write_table(table)
        return path
    delimiter = "\t" if kind == ".tsv" else ","
    lines = [delimiter.join(row.values()) for row in ({name: name for name in rows[0]}, *rows)]
    text = {
        ".json": json.dumps(rows), ".jsonl": "\n".join(map(json.dumps, rows)),
        ".ndjson": "\n".join(map(json.dumps, rows)), ".txt": "\n".join(row["prompt"] for row in rows),
    }.get(kind, "\n".join(lines))  # fmt: skip
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.output_stream(str(path), compression=compression) as file:
        file.write(text.encode())
    return path


@pytest.mark.parametrize(
    ("kind", "compression"),
    [*((kind, end) for kind in TEXT_FILES for end in ("", ".gz", ".zst")), ("parquet", ""), ("arrow", "")],
)
def test_every_kind_of_file_gives_the_text_as_it_was_written(tmp_path, kind, compression):
    rows = [{"prompt": "007", "note": "NA"}, {"prompt": "true", "note": "2026-01-02"}, {"prompt": "é", "note": ""}]
    found = local(as_file(tmp_path / f"data.{kind}{compression}", rows)).rows
    assert contents(found) == ["007", "true", "é"]
    if kind != "txt":
        assert [row.columns for row in found] == [{"note": "NA"}, {"note": "2026-01-02"}, {"note": ""}]


def test_a_cell_may_hold_megabytes(tmp_path):
    path = write(tmp_path / "a.csv", f'prompt,answer\n"{"word " * 500_000}",1\nshort,2\n')
    assert [len(row.content) for row in local(path).rows] == [2_500_000, 5]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prompt,answer\na,b\nc\n", "line 3: it has 1 cells, the header 2"),
        ("prompt,answer\na,b,c\n", "line 2: it has 3 cells, the header 2"),
        ('prompt\n"a\n', "line 2: unexpected end of data"),
        ('prompt,answer\na,b\n"c\nd",e\nf,"g\nh,i\n', "line 5: unexpected end of data, because no quote ends a cell"),
        ('prompt,answer\na,b\n"c" d,e\n', "line 3: ',' expected after '\"'. Fix the file"),
        ("prompt,,\na,,\nb,,c\n", "line 3: it has a cell in a column without a name"),
        ("", "the file is empty"),
        ("prompt;answer\na;b\n", "Its cells seem to be separated by ';': save it with commas"),
        ("prompt|answer\na, b|c\n", "line 2: it has 2 cells, the header 1. Its cells seem to be separated by '|'"),
        ("prompt\tanswer\na\tb\n", "separated by '\\t': save it with commas as .csv, or with tabs as .tsv"),
    ],
)
def test_a_csv_that_does_not_add_up_is_reported_with_its_line(tmp_path, text, told):
    assert told in complaint(local, write(tmp_path / "a.csv", text))


def test_empty_cells_that_end_a_header_are_no_columns(tmp_path):
    rows = local(write(tmp_path / "a.csv", "prompt,label,,\na,1,,\n")).rows
    assert [(row.content, row.columns) for row in rows] == [("a", {"label": "1"})]


@pytest.mark.parametrize(("quote", "lines"), [('"', [(2, 4)]), ("", [])])
def test_rows_of_a_tsv_that_a_quote_makes_one_are_named(tmp_path, caplog, quote, lines):
    formats._warn_of_swallowed.cache_clear()
    text = f'prompt\tlabel\n{quote}Hello there\t1\nmid\t2\nBye{quote}\t3\n"two\nlines"\t"a\tb"\n"1\t\n2"\t1\n'
    if not quote:
        text = text.replace('"1\t\n2"\t1\n', "")
    local(write(tmp_path / "a.tsv", text))
    told = [f"File 'a.tsv', lines {first} to {last}: the quote that begins a cell" for first, last in lines]
    assert [record.getMessage()[: len(told[0])] for record in caplog.records] == told


def test_a_folder_of_train_and_test_files_follows_split_and_leaves_documents_aside(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl", "README.md", "LICENSE", "dataset_infos.json"):
        write(tmp_path / name, json.dumps({"prompt": name}))
    assert contents(local(tmp_path).rows) == ["train-0.jsonl", "train-1.jsonl"]
    assert contents(local(tmp_path, split="test").rows) == ["test.jsonl"]
    message = complaint(local, tmp_path, split="validation")
    assert "named after the splits 'test', 'train', and none after split='validation'" in message
    other = tmp_path / "other"
    other.mkdir()
    write(other / "trainers.csv", "prompt\na\n")  # not a split's name
    assert contents(local(other, split="train").rows) == ["a"]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("trainset.csv", "testset.csv"), ("gsm8kTrain.csv", "gsm8kTest.csv"), ("GSM8KTrain.csv", "GSM8KTest.csv"),
        ("training-data.csv", "test-data.csv"), ("traindata.csv", "dev_files.csv"), ("a_train.csv", "a_holdout.csv"),
        ("train2.csv", "evaluation.csv"), ("TRAIN.csv", "Heldout.csv"),
        ("train.csv", "held_out.csv"), ("a_train.csv", "a-held-out.csv"), ("train.csv", "HoldOut.csv"),
        ("train.csv", "hold out.csv"),
    ],
)  # fmt: skip
def test_a_split_is_seen_in_every_usual_name_of_a_file(tmp_path, train, test):
    for name in (train, test):
        write(tmp_path / name, f"prompt\n{name}\n")
    assert contents(local(tmp_path).rows) == [train]
    other = "test" if re.search("test|hold|held", test.lower()) else "validation"
    assert contents(local(tmp_path, split=other).rows) == [test]


def test_held_out_prompts_of_a_folder_are_not_trained_on(tmp_path):
    for name in ("prompts.csv", "prompts_held_out.csv"):
        write(tmp_path / name, f"prompt\n{name}\n")
    assert "named after the splits 'test', and none after split='train'" in complaint(local, tmp_path)
    assert contents(local(tmp_path, split="held_out").rows) == ["prompts_held_out.csv"]


@pytest.mark.parametrize("test", ["mytest.csv", "unvalidated.csv"])
def test_names_in_which_splits_are_parts_of_words_are_refused(tmp_path, test):
    for name in ("mytrain.csv", test):
        write(tmp_path / name, f"prompt\n{name}\n")
    message = complaint(local, tmp_path)
    assert f"mytrain.csv and {test} may be different splits. Name the file to train on" in message
    (tmp_path / test).rename(tmp_path / "more.csv")
    assert len(local(tmp_path).rows) == 2


def test_a_file_that_is_no_data_is_named_and_the_marker_of_spark_is_none(tmp_path):
    write(tmp_path / "part-0.csv", "prompt\na\n")
    write(tmp_path / "_SUCCESS", "")
    assert contents(local(tmp_path).rows) == ["a"]
    write(tmp_path / "part-0.csv~", "prompt\nb\n")
    assert "found .csv (part-0.csv), .csv~ (part-0.csv~). Name one file" in complaint(local, tmp_path)


def test_folders_of_save_to_disk_are_read_by_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"prompt": "a", "label": 1}, {"prompt": "b", "label": None}])
    data.save_to_disk(tmp_path / "one")
    found = [(row.content, row.columns) for row in local(tmp_path / "one").rows]
    assert found == [("a", {"label": 1}), ("b", {"label": None})]
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "two")
    assert contents(local(tmp_path / "two", split="test").rows) == ["b"]
    assert "no split 'valid'; it has 'train', 'test'" in complaint(local, tmp_path / "two", split="valid")
    assert "is one dataset, so split='test' chooses nothing" in complaint(local, tmp_path / "one", split="test")


def test_tables_in_memory_are_rows():
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    rows = [{"prompt": "Tell me a joke", "answer": "a"}, {"prompt": "Name a river", "answer": None}]
    frame = pandas.DataFrame(rows, index=[7, 8])
    for table in (frame, pa.Table.from_pylist(rows), datasets.Dataset.from_list(rows)):
        assert [(row.content, row.columns) for row in memory(table, shuffle=False).rows] == [
            ("Tell me a joke", {"answer": "a"}),
            ("Name a river", {"answer": None}),
        ]
    for column in (frame["prompt"], frame["prompt"].to_numpy()):
        assert contents(memory(column, shuffle=False).rows) == ["Tell me a joke", "Name a river"]
    assert DatasetConfig(prompts=frame).source == DatasetSource.MEMORY
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    with pytest.raises(ConfigError, match=r"holds the splits test: give one of them, prompts=data\['test'\]"):
        DatasetConfig(prompts=datasets.DatasetDict({"test": splits["train"]}))
    with pytest.raises(ConfigError, match=r"holds the splits train: give one of them"):
        DatasetConfig(prompts=splits)


def test_polars_frames_are_rows():
    """Stand-ins with the methods of polars that are called; polars itself is not installed here."""

    class DataFrame:
        __module__ = "polars.dataframe.frame"

        def to_dicts(self):
            return [{"prompt": "a", "n": 1}, {"prompt": "b", "n": None}]

    class Series:
        __module__ = "polars.series.series"

        def to_list(self):
            return ["a", "b"]

    class LazyFrame:
        __module__ = "polars.lazyframe.frame"

        def collect(self):
            return DataFrame()

    for frame in (DataFrame(), LazyFrame()):
        assert [row.columns for row in memory(frame, shuffle=False).rows] == [{"n": 1}, {"n": None}]
    assert contents(memory(Series(), shuffle=False).rows) == ["a", "b"]


@pytest.mark.parametrize(
    "values",
    [
        (np.int64(1), np.int64(2)), (np.arange(2000), np.arange(2000)[::-1]), (b"a", b"b"), ({1, 2}, {1, 3}),
        (date(2026, 1, 1), date(2026, 1, 2)), (Decimal("1"), Decimal("2")),
    ],
)  # fmt: skip
def test_rows_with_other_values_have_another_fingerprint(values):
    first, second = (memory([{"prompt": "a", "y": value}]).fingerprint() for value in values)
    assert first != second
    assert first == memory([{"prompt": "a", "y": copy.copy(values[0])}]).fingerprint()


@pytest.mark.parametrize(
    "value",
    [
        contains_itself(), {"a": [contains_itself()]}, 10**5000, np.longdouble(1), Unshowable(), {Unshowable()},
        torch.ones(2).to_sparse(), torch.ones(2, device="meta"), functools.reduce(lambda a, _: [a], range(9999), []),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_value_that_cannot_be_written_counts_by_its_type_and_the_others_as_they_are(value):
    rows = [{"prompt": "a", "x": value, "y": 1}]
    fingerprint = memory(rows).fingerprint()
    assert fingerprint == memory(rows).fingerprint()
    assert fingerprint != memory([{**rows[0], "y": 2}]).fingerprint()
    assert fingerprint != memory([{**rows[0], "x": None}]).fingerprint()
    chat = [{"role": "user", "content": "a", "x": 10**5000}]
    first, second = (memory([{"prompt": chat, "y": number}]).fingerprint() for number in (1, 2))
    assert first != second


def test_a_split_word_counts_anywhere_in_a_name(tmp_path, caplog):
    for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl", "train_test_extra.jsonl"):
        write(tmp_path / name, json.dumps({"prompt": name}) + "\n")
    assert contents(local(tmp_path).rows) == ["gsm8k_train.jsonl"]
    assert "train_test_extra.jsonl: not named after a split, so not read" in caplog.text
    assert contents(local(tmp_path, split="test").rows) == ["gsm8k_test.jsonl"]
    (tmp_path / "plain").mkdir()
    write(tmp_path / "plain" / "rows.jsonl", json.dumps({"prompt": "a"}))
    with pytest.raises(DatasetError, match="none of its files is named after a split, so split='test' chooses nothing"):
        local(tmp_path / "plain", split="test")


def test_a_path_is_a_name(tmp_path):
    config = DatasetConfig(name=write(tmp_path / "a.txt", "one\n"))
    assert (config.source, config.name) == (DatasetSource.LOCAL, str(tmp_path / "a.txt"))


def test_a_chat_stored_as_json_text_is_a_chat(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"prompt": json.dumps(CHAT)}) + "\n" + json.dumps({"prompt": "[1]"}))
    assert contents(local(path).rows) == [CHAT, "[1]"]
    assert contents(memory(['[{"a": 1}]', "[not json", "[]"], shuffle=False).rows) == ['[{"a": 1}]', "[not json", "[]"]


def test_a_capital_suffix_is_the_same_kind(tmp_path):
    assert contents(local(write(tmp_path / "DATA.CSV", "prompt\na\n")).rows) == ["a"]


# --- in memory, and bundled ---


def test_memory_takes_strings_dicts_and_chats():
    prompts = ["plain", {"prompt": "with", "label": 1}, CHAT, {"prompt": CHAT, "label": 2}]
    rows = memory(prompts, shuffle=False).rows
    assert [(row.row, row.content, row.columns) for row in rows] == [
        (0, "plain", {"label": None}),
        (1, "with", {"label": 1}),
        (2, CHAT, {"label": None}),
        (3, CHAT, {"label": 2}),
    ]
    assert [row.text for row in rows] == ["plain", "with", "Hello", "Hello"]


def test_new_prompts_take_the_place_of_a_name_and_a_new_name_that_of_prompts():
    in_memory, named = DatasetConfig(prompts=["a"]), DatasetConfig(name="org/data")
    changed = in_memory.with_fields({"name": "org/data"})
    assert (changed.source, changed.prompts) == (DatasetSource.HUGGINGFACE, None)
    changed = named.with_fields({"prompts": ["a"]})
    assert (changed.source, changed.name) == (DatasetSource.MEMORY, None)
    assert in_memory.with_fields({"name": None}).prompts == ("a",)
    with pytest.raises(ConfigError, match="are both given"):
        in_memory.with_fields({"prompts": ["a"], "name": "x"})


def test_given_prompts_need_no_source_and_are_left_as_they_were():
    row = {"prompt": "a", "label": 1}
    assert load_prompts(DatasetConfig(prompts=[row])).rows == [Prompt(0, "a", {"label": 1})]
    assert row == {"prompt": "a", "label": 1}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"source": "memory"}, "needs prompts"),
        ({"source": "bundled", "prompts": ["a"]}, "goes with source=MEMORY"),
        ({"source": "local"}, "needs name="),
        ({"source": "bundled", "split": "test"}, "train, held_out"),
        ({"source": "hdfs"}, "source"),
        ({"prompts": "one string"}, "prompts"),
    ],
)
def test_a_source_at_odds_with_the_rest_is_refused(values, told):
    with pytest.raises(ConfigError, match=told):
        DatasetConfig(**values)


def test_bundled_prompts_are_the_default_with_their_own_held_out_split():
    prompts = load_prompts(DatasetConfig(held_out=5))
    lines = {
        split: files("konic.finetuning.data")
        .joinpath("bundled", f"movie_reviews_{split}.txt")
        .read_text(encoding="utf-8")
        .splitlines()
        for split in ("train", "held_out")
    }
    assert sorted(contents(prompts.rows)) == sorted(lines["train"])
    assert contents(prompts.held_out) == lines["held_out"][:5]
    assert contents(load_prompts(DatasetConfig(split="held_out", shuffle=False)).rows) == lines["held_out"]


def word_runs(prompts, length):
    runs = {}
    for prompt in prompts:
        words = re.findall(r"[a-z']+", prompt.lower())
        for start in range(len(words) - length + 1):
            runs.setdefault(tuple(words[start : start + length]), set()).add(prompt)
    return runs


def test_bundled_splits_are_large_distinct_and_share_no_run_of_five_words():
    train, held_out = (
        files("konic.finetuning.data").joinpath("bundled", name).read_text(encoding="utf-8").splitlines()
        for name in ("movie_reviews_train.txt", "movie_reviews_held_out.txt")
    )
    assert len(train) >= 400
    assert len(held_out) >= 50
    assert len(set(train + held_out)) == len(train) + len(held_out)
    assert all(line == line.strip() and line for line in train + held_out)
    repeated = {run: prompts for run, prompts in word_runs(train + held_out, 5).items() if len(prompts) > 1}
    assert not repeated


# --- rows that cannot be prompts ---


def test_a_missing_column_is_reported_with_those_there_are_and_the_nearest():
    message = complaint(memory, [{"promt": "a", "label": 1}])
    assert "row 0 has no column 'prompt'. Did you mean 'promt'?" in message
    assert "'promt', 'label'" in message
    assert "prompt_column" in message


@pytest.mark.parametrize("prompts", [CHAT, [{"prompt": "a"}, *CHAT], [{"from": "human", "value": "x"}]])
def test_one_chat_in_the_place_of_a_list_of_chats_says_so(prompts):
    assert "This is one chat, not a list of chats: give [[{'role': ..., 'content': ...}]]." in complaint(
        memory, prompts
    )


def test_a_column_missing_from_a_later_row_is_reported_with_its_number():
    assert "row 1 has no column" in complaint(memory, [{"prompt": "a"}, {"text": "b"}])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        (None, "missing"),
        (float("nan"), "missing"),
        (3, "int, not text"),
        (b"bytes", "bytes, not text"),
        ([], "no messages"),
        ([CHAT[0], "text"], "message 2 is without role and content"),
        ([{"role": "user"}], "without role and content: it has 'role'"),
        ([{"role": "user", "content": None}], "message 1 has a role or content that is not text"),
        ([CHAT[1], {"role": "assistant", "content": None, "tool_calls": [{}]}, CHAT[1]], "message 2 has tool calls"),
        ([CHAT[0], {"role": "user", "content": [{"type": "text"}]}], "message 2 has a content that is a list of parts"),
        ({"role": ["user"], "content": ["a"]}, "a dict of lists: give a list of messages"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "its role is 'assistant'"),
        ([{"role": "user", "content": "  "}], "the last message is empty"),
        ({"role": "user", "content": "a"}, "one message, not a list of messages: put it in a list"),
        ([[{"role": "user", "content": "a"}]], "a list with a chat inside: give the list of messages itself"),
        ({"chat": [{"role": "user", "content": "a"}]}, "a dict with a chat in 'chat'"),
        ([{"role": "us\ud800er", "content": "a"}, {"role": "user", "content": "a"}], "half a character"),
        ([{"role": "assistant", "content": "", "calls": [{"a": "\ud800"}]}, *CHAT], "half a character"),
        (contains_itself(), "a list or dict that contains itself"),
        ({"a": {"b": contains_itself()}}, "a list or dict that contains itself"),
    ],
)
def test_a_row_that_cannot_be_a_prompt_is_named_by_number_with_why(content, problem):
    rows = [{"prompt": "good"}, {"prompt": content}, {"prompt": "good"}]
    message = complaint(make_prompts, rows, DatasetConfig(), "Here")
    assert "1 of 3 prompts in column 'prompt'" in message
    assert re.search(rf"row 1 \([^)]*{problem}", message)


def test_many_bad_rows_are_counted_and_the_first_ten_named():
    message = complaint(make_prompts, ["good", *[""] * 25], DatasetConfig(), "Here")
    assert message.startswith("Here: 25 of 26 prompts")
    assert re.findall(r"row (\d+)", message) == [str(number) for number in range(1, 11)]
    assert message.endswith("and 15 more. Remove these rows, or name another column in prompt_column.")


def test_empty_prompts_of_a_dataset_are_left_out_and_told_unless_they_are_most(tmp_path, caplog):
    path = write(tmp_path / "a.csv", 'prompt,label\na,1\n"",2\nb,3\n')
    assert [(row.row, row.content) for row in local(path).rows] == [(0, "a"), (2, "b")]
    assert "empty prompts are left out, 1 of 3: rows 1." in caplog.text
    rows = ["a", "b", None, "", {"prompt": []}, *"cdefg"]
    assert contents(memory(rows, shuffle=False).rows) == [*"abcdefg"]
    assert "rows 2, 3, 4." in caplog.text
    assert "row 1 (empty), row 2 (empty)" in complaint(memory, ["a", "", ""])
    assert "row 1 (int, not text), row 2 (empty)" in complaint(memory, ["a", 3, "", "b", "c"])


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.txt"])
def test_a_file_without_rows_is_refused(tmp_path, name):
    text = {"a.csv": "prompt\n", "a.json": "[]"}.get(name, "")
    message = complaint(local, write(tmp_path / name, text))
    assert name in message
    assert "no rows" in message


def test_no_prompts_in_memory_are_refused():
    assert "no rows" in complaint(memory, [])


# --- selection ---


@pytest.mark.parametrize("shuffle", [True, False])
def test_held_out_prompts_are_disjoint_from_the_rest_and_fixed(shuffle):
    texts = [f"p{n}" for n in range(20)]
    first, again = (memory(texts, held_out=6, shuffle=shuffle) for _ in range(2))
    assert len(first.held_out) == 6
    assert sorted(contents([*first.rows, *first.held_out])) == sorted(texts)
    assert first.held_out == again.held_out
    seen = {prompt.row for prompt in first.batch(0, 14 * 5)}
    assert seen == {prompt.row for prompt in first.rows}


def test_another_seed_holds_out_others():
    texts = [f"p{n}" for n in range(50)]
    one, other = (set(contents(memory(texts, held_out=10, shuffle_seed=seed).held_out)) for seed in (1, 2))
    assert one != other


@pytest.mark.parametrize("held_out", [3, 4])
def test_at_least_one_row_is_left_to_learn_on(held_out):
    assert "at most 2 rows can be held out" in complaint(memory, ["a", "b", "c"], held_out=held_out)


def test_max_samples_are_drawn_at_random_where_rows_are_shuffled_and_the_first_where_not():
    texts = [f"p{n}" for n in range(100)]
    drawn = memory(texts, max_samples=10).rows
    assert len({row.row for row in drawn}) == 10
    assert [row.content for row in drawn] == [texts[row.row] for row in drawn]
    assert sorted(row.row for row in drawn) != list(range(10))
    assert drawn == memory(texts, max_samples=10).rows
    assert contents(memory(texts, max_samples=10, shuffle=False).rows) == texts[:10]


def test_max_samples_counts_the_held_out_rows():
    prompts = memory([f"p{n}" for n in range(100)], max_samples=10, held_out=4)
    assert (len(prompts.rows), len(prompts.held_out)) == (6, 4)


# --- order ---


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 2**63 - 1))
def test_no_prompt_comes_again_before_all_have_come(num_rows, batch_size, seed):
    prompts = memory([f"p{n}" for n in range(num_rows)], shuffle_seed=seed)
    batches = [prompts.batch(start, batch_size) for start in range(0, 4 * num_rows, batch_size)]
    order = [prompt.row for batch in batches for prompt in batch]
    for start in range(0, len(order) - num_rows + 1, num_rows):
        assert sorted(order[start : start + num_rows]) == list(range(num_rows))


def test_every_pass_is_another_order():
    prompts = memory([f"p{n}" for n in range(30)])
    passes = [tuple(contents(prompts.batch(30 * n, 30))) for n in range(5)]
    assert len(set(passes)) == 5


def test_a_batch_may_straddle_two_passes_and_batches_do_not_depend_on_their_size():
    prompts = memory([f"p{n}" for n in range(7)])
    whole = prompts.batch(0, 21)
    assert prompts.batch(5, 4) == whole[5:9]
    assert list(itertools.chain(*(prompts.batch(start, 3) for start in range(0, 21, 3)))) == whole


def test_without_shuffle_the_order_is_the_datasets_in_every_pass():
    prompts = memory(["a", "b", "c"], shuffle=False)
    assert contents(prompts.batch(0, 7)) == ["a", "b", "c", "a", "b", "c", "a"]


def test_the_seed_alone_decides_the_order():
    texts = [f"p{n}" for n in range(30)]
    first = contents(memory(texts, shuffle_seed=5).batch(0, 90))
    assert contents(memory(texts, shuffle_seed=5).batch(0, 90)) == first
    assert contents(memory(texts, shuffle_seed=6).batch(0, 90)) != first


def test_two_seeds_order_the_same_rows_differently():
    rows = make_prompts([f"p{n}" for n in range(30)], DatasetConfig(), "test")
    one, other = (PromptSet(rows=rows, held_out=[], shuffle=True, shuffle_seed=seed).batch(0, 30) for seed in (1, 2))
    assert one != other
    assert sorted(contents(one)) == sorted(contents(other))


def test_a_prompt_keeps_its_row_and_columns_wherever_it_comes():
    texts = [{"prompt": f"p{n}", "label": n * n, "n": n} for n in range(20)]
    for prompt in memory(texts).batch(0, 50):
        assert prompt == Prompt(prompt.row, f"p{prompt.row}", {"label": prompt.row**2, "n": prompt.row})


def test_training_on_the_prompts_held_out_is_refused():
    with pytest.raises(ConfigError, match="train on the same prompts that held_out reserves"):
        DatasetConfig(source=DatasetSource.BUNDLED, split="held_out", held_out=4)


def test_a_csv_prompt_that_looks_like_a_number_stays_text(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,answer\n007,1\n42,2\n")
    prompts = load_prompts(DatasetConfig(source="local", name=str(tmp_path / "p.csv"), shuffle=False)).rows
    assert [prompt.content for prompt in prompts] == ["007", "42"]
    assert [prompt.columns["answer"] for prompt in prompts] == ["1", "2"]


TWO_NAMED_X = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], names=["prompt", "x", "x"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "prompt,x,x\na,1,2\n"),
        ("a.tsv", "prompt\tx\tx\na\t1\t2\n"),
        ("a.jsonl", '{"prompt": "b", "x": 0}\n{"prompt": "a", "x": 1, "x": 2}\n'),
        ("a.json", '[{"prompt": "a", "x": 1, "x": 2}]'),
        ("b.json", '[{"prompt": [{"role": "user", "x": "a", "x": "b", "content": "c"}]}]'),
        ("a.parquet", None),
        ("a.arrow", None),
    ],
)
def test_two_columns_of_one_name_are_refused(tmp_path, name, text):
    if name == "a.parquet":
        pyarrow.parquet.write_table(TWO_NAMED_X, tmp_path / name)
    elif name == "a.arrow":
        with pa.ipc.new_file(str(tmp_path / name), TWO_NAMED_X.schema) as file:
            file.write_table(TWO_NAMED_X)
    else:
        write(tmp_path / name, text)
    message = complaint(local, tmp_path / name)
    assert "more than one column is named 'x'" in message
    assert name in message
    assert "line 2" in message or name != "a.jsonl"


CHAT = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("name", ["rows.csv", "./rows", "data/rows.jsonl.gz", "~/no-rows"])
def test_a_name_that_is_a_path_is_not_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "row.csv").write_text("prompt\na\n")
    assert DatasetConfig(name=name).source is DatasetSource.LOCAL
    hint = "Did you mean 'row.csv'" if name == "rows.csv" else ""
    with pytest.raises(DatasetError, match=f"there is no such file or folder.*{hint}"):
        load_prompts(DatasetConfig(name=name))
    assert DatasetConfig(name="someone/rows").source is DatasetSource.HUGGINGFACE


def test_a_system_prompt_goes_before_chats_that_have_none():
    own = [{"role": "system", "content": "Mine."}, *CHAT]
    rows = load_prompts(DatasetConfig(prompts=[CHAT, own], system_prompt="Be kind.", shuffle=False)).rows
    assert rows[0].content == [{"role": "system", "content": "Be kind."}, *CHAT]
    assert rows[1].content == own
    assert [row.text for row in rows] == ["Hello", "Hello"]
    assert CHAT == [{"role": "user", "content": "Hello"}]


def test_plain_strings_never_get_a_system_prompt():
    with pytest.raises(DatasetError, match=r"row 0 \(plain text: system_prompt goes with chat messages"):
        load_prompts(DatasetConfig(prompts=["Hello"], system_prompt="Be kind."))


def test_a_template_makes_text_of_a_rows_columns_and_leaves_them_to_the_rewards(tmp_path):
    (tmp_path / "r.csv").write_text("title,text\nUp,fine\nDown,dull\n")
    config = DatasetConfig(name=str(tmp_path / "r.csv"), prompt_template="{title} - Review: {text}", shuffle=False)
    assert config.source is DatasetSource.LOCAL
    rows = load_prompts(config).rows
    assert [row.content for row in rows] == ["Up - Review: fine", "Down - Review: dull"]
    assert rows[1].columns == {"title": "Down", "text": "dull"}


@pytest.mark.parametrize(
    "template", ["no columns", "{}", "{text.__class__}", "{0}", "{text", "{a b }", '{"a": "{text}"}', "{text:>10000}"]
)
def test_a_template_must_name_columns(template):
    with pytest.raises(ConfigError, match="prompt_template="):
        DatasetConfig(prompts=["x"], prompt_template=template)


def test_a_template_may_name_columns_whose_names_have_spaces():
    config = DatasetConfig(prompts=[{"Prompt Text": "fine", "a-b": "x"}], prompt_template="{Prompt Text} {a-b} {{}}")
    assert load_prompts(config).rows[0].content == "fine x {}"


@pytest.mark.parametrize("chats", [False, True])
def test_held_out_prompts_that_are_also_trained_on_are_reported(caplog, chats):
    def prompts(*texts):
        return [[{"role": "user", "content": text}] for text in texts] if chats else list(texts)

    load_prompts(DatasetConfig(prompts=prompts("a", "b", "a", "c", "a"), held_out=2, shuffle=False))
    assert "held-out prompts that are also trained on, 1 of 2: rows 4. A gain on them" in caplog.text
    caplog.clear()
    load_prompts(DatasetConfig(prompts=prompts("a", "b", "a", "c"), held_out=1, shuffle=False))
    load_prompts(DatasetConfig(prompts=prompts("a", "a", "a")))
    assert not caplog.text


def test_a_template_and_a_system_prompt_exclude_each_other():
    with pytest.raises(ConfigError, match="give one"):
        DatasetConfig(prompts=["x"], prompt_template="{text}", system_prompt="s")


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"name": "imdb"}, DatasetSource.HUGGINGFACE),
        ({"prompts": ["a"]}, DatasetSource.MEMORY),
        ({}, DatasetSource.BUNDLED),
        ({"source": "bundled", "name": "x"}, "goes with source=HUGGINGFACE or LOCAL"),
        ({"source": "huggingface"}, "needs name="),
        ({"prompts": ["a"], "name": "x"}, r"are both given: give one of them"),
        ({"prompts": ["a"], "streaming": True}, "streaming goes with source=HUGGINGFACE"),
        ({"prompts": ["a"], "subset": "s"}, "subset goes with source=HUGGINGFACE"),
        ({"prompts": ["a"], "split": "test"}, "split='test' goes with"),
        ({"name": "imdb", "split": "train[:9]", "streaming": True}, "takes a part of a split.*use max_samples"),
        ({"name": "a.csv", "split": "train[:9]"}, "takes a part of a split.*use max_samples"),
    ],
)
def test_the_source_follows_from_what_is_given_and_nothing_is_ignored(settings, told):
    if isinstance(told, DatasetSource):
        assert DatasetConfig(**settings).source is told
    else:
        with pytest.raises(ConfigError, match=told):
            DatasetConfig(**settings)


def test_a_token_is_shown_nowhere():
    config = DatasetConfig(name="imdb", token="hf_secret")
    assert "hf_secret" not in repr(config)


def test_an_empty_prompt_of_a_template_is_not_blamed_on_a_column():
    rows, template = [{"text": "a"}, {"text": " "}], "{text}"
    with pytest.raises(DatasetError, match=r"1 of 2 prompts made by prompt_template cannot be used: row 1 \(empty\)"):
        make_prompts(rows, DatasetConfig(prompt_template=template), "test")


@pytest.mark.parametrize("row", ["The film was", CHAT])
def test_a_row_without_columns_for_a_template_is_told_so(row):
    config = DatasetConfig(prompts=[{"text": "a", "name": "b"}], prompt_template="{name}: {text}")
    with pytest.raises(DatasetError, match=r"test: row 0 has no columns.*: \[\{'name': \.\.\., 'text': \.\.\.\}\]\.$"):
        make_prompts([row], config, "test")


@pytest.mark.parametrize("conversion", ["", "!s", "!r"])
@pytest.mark.parametrize("cell", [CHAT, CHAT[0], tuple(CHAT)])
def test_a_template_takes_no_chat_as_text(cell, conversion):
    config = DatasetConfig(prompts=[{"prompt": cell}] * 2, prompt_template=f"Answer: {{prompt{conversion}}}")
    with pytest.raises(DatasetError, match=r"row \d: one of its columns is a chat"):
        load_prompts(config)


def test_a_template_takes_lists_and_numbers_in_formats():
    config = DatasetConfig(
        prompts=[{"tags": ["a", "b"], "share": 0.5, "none": None}] * 2,
        prompt_template="{tags} {share:.2f}{none:>3}{none!r}!",
    )
    assert [prompt.text for prompt in load_prompts(config).rows] == ["['a', 'b'] 0.50!"] * 2
