"""Small files that unpack to gigabytes are one error, soon and in little memory; large files are read as needed."""

import io
import os
import subprocess
import sys
import types

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from konic.finetuning.data import formats, packed
from konic.finetuning.data.config import DatasetConfig
from konic.finetuning.data.loaders import read_local
from konic.finetuning.data.pages import page_claims
from konic.finetuning.data.prompts import load_prompts
from konic.finetuning.errors import DatasetError

BIG = "a" * 10**6


def write_parquet(path, table):
    pa.parquet.write_table(table, path, compression="zstd")


def write_arrow(path, table, compression="zstd"):
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(str(path), table.schema, options=options) as file:
        file.write_table(table)


def write_packed(path, *pieces):
    with pa.output_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}[path.suffix]) as file:
        for piece in pieces:
            file.write(piece)


def long_cell(name):
    return pa.table({"prompt": ["hi", "there"], "other": ["a" * 50_000_000, "b"]})


def repeated(text, num_times):
    return pa.DictionaryArray.from_arrays(pa.array([0] * num_times, pa.int32()), pa.array([text]))


def list_of(items):
    return pa.table({"prompt": ["hi"], "other": pa.ListArray.from_arrays([0, len(items)], items)})


def write_liar(path):
    """A parquet file whose page holds 400 MB, of which its footer says 4 kB."""
    data = pa.table({"prompt": pa.array([b"a" * 400_000_000], pa.binary())})
    pa.parquet.write_table(data, path, compression="zstd", use_dictionary=False, write_statistics=False)
    content = path.read_bytes()
    size = pa.parquet.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size
    total = pa.parquet.ParquetFile(path).metadata.row_group(0).total_byte_size
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer = content[start:]
    for claim in {size, total}:
        footer = footer.replace(varint(2 * claim), varint(2 * 4096, len(varint(2 * claim))))
    path.write_bytes(content[:start] + footer)
    assert pa.parquet.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size == 4096


def varint(number, size=1):
    parts = []
    while number or len(parts) < size:
        number, low = number >> 7, number & 127
        parts.append(low)
    return bytes(part | 128 for part in parts[:-1]) + bytes(parts[-1:])


VIEW = pa.ListViewArray.from_arrays(pa.array([0] * 60, pa.int32()), pa.array([10**6] * 60, pa.int32()), pa.nulls(10**6))
BOMBS = {
    "pages.parquet": write_liar,
    "views.arrow": lambda path: write_arrow(path, pa.table({"prompt": ["hi"] * 60, "other": VIEW})),
    "ends.arrow": lambda path: write_arrow(
        path, list_of(pa.RunEndEncodedArray.from_arrays(pa.array([10**7], pa.int32()), pa.array([1])))
    ),
    "nulls.arrow": lambda path: write_arrow(path, list_of(pa.nulls(50_000_000))),
    "texts.arrow": lambda path: write_arrow(path, list_of(pa.array(["a" * 10**6] * 60).cast(pa.string_view()))),
    "list_of_texts.parquet": lambda path: write_parquet(path, list_of(repeated(BIG, 500))),
    "list_of_texts.arrow": lambda path: write_arrow(path, list_of(repeated(BIG, 500))),
    "map_of_texts.arrow": lambda path: write_arrow(
        path,
        pa.table(
            {"prompt": ["hi"], "other": pa.MapArray.from_arrays([0, 500], pa.array(range(500)), repeated(BIG, 500))}
        ),
    ),
    "list_of_numbers.parquet": lambda path: write_parquet(path, list_of(pa.array([1000] * 3_000_000))),
    "columns.parquet": lambda path: write_parquet(path, pa.table({f"c{i}": repeated(BIG * 9, 5) for i in range(9)})),
    "lists.jsonl.gz": lambda path: write_packed(path, b'{"x":[', b"[]," * 4_000_000, b"[]]}"),
    "long_cell.parquet": lambda path: write_parquet(path, long_cell("other")),
    "many_nulls.parquet": lambda path: write_parquet(
        path, pa.table({"prompt": ["hi"], "other": pa.array([[None] * 7_000_000], pa.list_(pa.null()))})
    ),
    "long_rows.parquet": lambda path: write_parquet(path, pa.table({"prompt": [BIG] * 100})),
    "many_rows.parquet": lambda path: write_parquet(
        path, pa.table({"prompt": pa.array(["a"]).dictionary_encode().take(pa.array([0] * 400_000))})
    ),
    "one_batch.arrow": lambda path: write_arrow(path, pa.table({"prompt": [BIG] * 50})),
    "dictionary.arrow": lambda path: write_arrow(
        path, pa.table({"prompt": pa.array([BIG]).dictionary_encode().take(pa.array([0] * 100))})
    ),
    "rows.csv.gz": lambda path: write_packed(path, b"prompt\n", b"a\n" * 400_000),
    "header.csv.gz": lambda path: write_packed(path, *[b"," * 10**6] * 40),
    "cells.tsv.gz": lambda path: write_packed(path, b"a\tb\n", *[b"\t" * 10**6] * 40),
    "lines_of_a_cell.csv.gz": lambda path: write_packed(path, b'a,b\n"', *[b"\n" * 10**6] * 40),
    "cell.csv.zst": lambda path: write_packed(path, b"prompt\n", *[BIG.encode()] * 50),
    "line.jsonl.zst": lambda path: write_packed(path, b'{"prompt": "', *[BIG.encode()] * 50),
    "list.json.gz": lambda path: write_packed(path, b"[", *[b'"a",' * 10**6] * 13),
    "lists.json.gz": lambda path: write_packed(path, b"[", *[b"[]," * 10**6] * 8, b"1]"),
    "objects.jsonl.gz": lambda path: write_packed(path, b'{"prompt": [', *[b"{}," * 10**6] * 8, b"1]}"),
    "lines.txt.zst": lambda path: write_packed(path, b"a\n" * 400_000),
    "table.parquet.zst": lambda path: write_packed(path, *[b"PAR1" * 10**6] * 13),
}
CLAIMS = {
    "list_of_texts.parquet": "unpacks, in column 'other'",
    "list_of_texts.arrow": "unpacks, in column 'other'",
    "map_of_texts.arrow": "unpacks, in column 'other'",
    "pages.parquet": "unpacks, up to column 'prompt'",
    "views.arrow": "column 'other' is of the type list_view<item: null>, which is not read",
    "ends.arrow": "column 'other' is of the type run_end_encoded",
    "nulls.arrow": "unpacks, in column 'other'",
    "texts.arrow": "unpacks",
    "list_of_numbers.parquet": "unpacks, up to column 'other.list.element'",
    "columns.parquet": "unpacks, up to column 'c",
    "lists.json.gz": "takes, as rows,",
    "lists.jsonl.gz": "takes, as rows,",
    "header.csv.gz": "takes, as rows,",
    "cells.tsv.gz": "takes, as rows,",
    "lines_of_a_cell.csv.gz": "takes, as rows,",
    "long_cell.parquet": "unpacks, up to column 'other'",
    "many_nulls.parquet": "unpacks, up to column 'other.list.element'",
    "one_batch.arrow": "unpacks, in one batch of rows",
}
FEW_CAN_BE_READ = ("long_rows.parquet", "dictionary.arrow")
READ = """
import resource, sys
from konic.finetuning.data import packed
from konic.finetuning.data.config import DatasetConfig
from konic.finetuning.data.prompts import load_prompts
from konic.finetuning.errors import DatasetError
packed._ALWAYS = 48_000_000  # a quarter, which takes a quarter of the time
def megabytes():
    if sys.platform == "linux":  # where ru_maxrss begins at that of the parent
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024**2
start = megabytes()
for name in sys.argv[1:]:
    for max_samples in (None, 2):
        try:
            load_prompts(DatasetConfig(name=name, max_samples=max_samples))
            print("read")
        except DatasetError as error:
            print(error)
print(megabytes() - start)
"""


def test_a_small_file_that_unpacks_to_gigabytes_is_one_error_in_little_memory(tmp_path):
    paths = [tmp_path / name for name in BOMBS]
    for path in paths:
        BOMBS[path.name](path)
        assert path.stat().st_size < 1_500_000, path
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", READ, *map(str, paths)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    *told, megabytes = child.stdout.splitlines()
    for path, every_row, two_rows in zip(paths, told[::2], told[1::2], strict=True):
        assert f"Dataset '{path}' " in every_row
        assert "far more than its" in every_row or path.name in ("views.arrow", "ends.arrow")
        assert path.name not in CLAIMS or CLAIMS[path.name] in every_row  # before it is unpacked
        is_read = path.name in FEW_CAN_BE_READ and two_rows == "read"
        assert "far more than its" in two_rows or is_read or "is of the type" in two_rows
    assert int(megabytes) < 320


@pytest.fixture
def small_allowance(monkeypatch):
    monkeypatch.setattr(packed, "_ALWAYS", 20_000)


TABLE = pa.table({"prompt": [f"number {i}" for i in range(1000)], "label": list(range(1000))})


def write_files(folder):
    pa.parquet.write_table(TABLE, folder / "a.parquet", row_group_size=100)
    for name, new in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        with new(str(folder / f"{name}.arrow"), TABLE.schema) as file:
            file.write_table(TABLE, max_chunksize=100)
    lines = [f"number {i}" for i in range(1000)]
    (folder / "a.csv").write_text("prompt\n" + "\n".join(lines) + "\n")
    (folder / "a.txt").write_text("\r\n".join(lines))
    (folder / "a.jsonl").write_text("\n".join(f'{{"prompt": "{line}"}}' for line in lines))
    (folder / "a.json").write_text("[" + ",".join(f'"{line}"' for line in lines) + "]")
    write_packed(folder / "b.csv.gz", b"prompt\n", *[line.encode() + b"\n" for line in lines])
    return sorted(folder.iterdir())


@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_that_are_picked_are_those_of_the_whole_file(shuffle, tmp_path):
    for path in write_files(tmp_path):
        settings = {"name": str(path), "shuffle": shuffle, "shuffle_seed": 7}
        whole = load_prompts(DatasetConfig(**settings)).rows
        assert load_prompts(DatasetConfig(**settings, max_samples=30)).rows == whole[:30], path
        assert load_prompts(DatasetConfig(**settings, max_samples=5000)).rows == whole, path
    rows = load_prompts(DatasetConfig(name=str(path), max_samples=5)).rows
    assert [row.row for row in rows] == [3, 884, 354, 865, 142]  # as they always were for the default seed


def test_rows_are_picked_from_several_files(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}{i}\n" for i in range(50)))
    whole = load_prompts(DatasetConfig(name=str(tmp_path))).rows
    assert load_prompts(DatasetConfig(name=str(tmp_path), max_samples=40)).rows == whole[:40]


def test_large_files_are_read_with_max_samples_and_plain_text_always(tmp_path, small_allowance):
    for path in write_files(tmp_path):
        assert len(load_prompts(DatasetConfig(name=str(path), max_samples=2)).rows) == 2, path
        if "." not in path.stem and path.suffix not in (".parquet", ".arrow"):
            assert len(read_local(str(path))) == 1000


def test_row_groups_without_a_row_that_is_wanted_are_not_read(tmp_path, monkeypatch):
    pa.parquet.write_table(TABLE, tmp_path / "a.parquet", row_group_size=100)
    read, rows = [], formats._rows
    monkeypatch.setattr(formats, "_rows", lambda batch, *rest: read.append(batch.num_rows) or rows(batch, *rest))
    load_prompts(DatasetConfig(name=str(tmp_path / "a.parquet"), max_samples=1))
    assert sum(read) == 100


def test_an_arrow_file_whose_list_of_batches_is_wrong_is_refused(tmp_path):
    write_arrow(tmp_path / "a.arrow", TABLE)
    with pa.ipc.new_file(str(tmp_path / "b.arrow"), TABLE.schema) as file:
        file.write_table(TABLE, max_chunksize=500)
    whole = (tmp_path / "b.arrow").read_bytes()
    for end in (len(whole) // 2, len(whole) - 1):
        (tmp_path / "c.arrow").write_bytes(whole[:end])
        with pytest.raises(DatasetError, match=r"c\.arrow.*cannot be read as arrow"):
            read_local(str(tmp_path / "c.arrow"))


def test_lists_of_texts_are_read_as_they_are(tmp_path):
    rows = [{"tags": ["ab", None, "ab"], "turns": [{"role": "user", "n": 1}]}, {"tags": [], "turns": None}]
    table = pa.Table.from_pylist([row | {"prompt": str(i)} for i, row in enumerate(rows * 50)])
    for compression in ("zstd", "none"):
        for with_dictionary in (True, False):
            file = tmp_path / f"{compression}{with_dictionary}.parquet"
            pa.parquet.write_table(table, file, compression=compression, use_dictionary=with_dictionary)
            assert read_local(str(file)) == table.to_pylist()


def test_maps_are_read_as_they_are_also_inside_of_lists_and_from_part_of_a_batch(tmp_path):
    kind = pa.map_(pa.string(), pa.string())
    maps = pa.array([[("a", "b"), ("c", None)], None, []] * 50, kind)
    lists = pa.array([[[("a", "b")], None], None, []] * 50, pa.list_(kind))
    table = pa.table({"prompt": [str(i) for i in range(150)], "maps": maps, "lists": lists})
    write_parquet(tmp_path / "a.parquet", table)
    write_arrow(tmp_path / "a.arrow", table)
    for name in ("a.parquet", "a.arrow"):
        assert read_local(str(tmp_path / name)) == table.to_pylist()


@pytest.mark.parametrize(
    "header",
    [
        b"\x2c\x00\x00",  # what it unpacks to is a struct
        b"\x21\x00",  # ... is true
        b"\x35\x01\x00",  # its size is below 0
        b"\x5c\x1c\x00\x00\x00",  # how many values it has is a struct
        b"\x5c\x15\x01\x00\x00",  # ... is below 0
    ],
)
def test_a_page_whose_header_counts_nothing_is_damaged(header):
    column = types.SimpleNamespace(
        dictionary_page_offset=None, data_page_offset=4, total_compressed_size=len(header), num_values=1
    )
    with pytest.raises(ValueError, match="the header of a page is damaged"):
        page_claims(io.BytesIO(b"PAR1" + header), column)
