"""Broken files of every format: each is refused with its place and what is wrong with it."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fedlora.data.records import read_rows
from fedlora.errors import DataError, UsageError
from fedlora.rows import ReadRules

GOOD = '{"instruction": "i", "input": "x", "output": "o", "category": "c"}'
HEADER = "instruction,input,output,category"
PACKED = gzip.compress(f"{GOOD}\n{GOOD}\n".encode())
ZSTD = pyarrow.compress(f"{GOOD}\n{GOOD}\n".encode() * 1000, "zstd", asbytes=True)


def table(**columns: Any) -> bytes:
    """A Parquet file with these columns; `instruction` and `output` are sound unless given."""
    sink = io.BytesIO()
    whole = {"instruction": ["i", "i"], "output": ["o", "o"], **columns}
    pyarrow.parquet.write_table(pyarrow.table({name: value for name, value in whole.items() if value}), sink)
    return sink.getvalue()


def not_text() -> pyarrow.Array:
    return pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")]
    )


BROKEN = [
    # name, content, place, part of the message
    ("a.jsonl", f"{GOOD}\n{GOOD[:-1]}\n{GOOD}", ":2:66", "not valid JSON"),
    ("a.jsonl", f"\ufeff{GOOD}\r\n\r\n{{}}\r\n", ":3:1", "'instruction' is missing"),
    ("a.jsonl", '{"question": "q", "id": 7}', ":1:1", "no kind of row has the fields 'question', 'id'"),
    ("a.jsonl", f"\ufeff  {GOOD}x", ":1:69", "text after the end of the row"),
    ("a.jsonl", "\n\n  7", ":3:3", "expected a JSON object, got a number"),
    ("a.jsonl", f"{GOOD}\n" + GOOD.replace('"x"', "1" * 5000), ":2:1", "a number of 5000 digits"),
    ("a.jsonl", f"{GOOD}\n" + GOOD.replace('"x"', "[" * 100_000), ":2:1", "nested too deeply"),
    ("a.jsonl", f"{GOOD}\n" + GOOD.replace("i", "é", 1).replace('"x"', "NaN"), ":2:1", "NaN is not valid JSON"),
    ("a.jsonl", GOOD.encode() + b'\n{"a": "\xc3\xa4\xff"}', ":2:9", "not UTF-8 text"),
    ("a.jsonl", GOOD.encode("utf-16"), ":1:1", "not UTF-8 text"),
    ("a.json", f"\ufeff\n [{GOOD},\n {GOOD[:-1]} ]", ":3:68", "not valid JSON"),
    ("a.json", f"[{GOOD},\n{GOOD}", ":2:67", "expected ',' or ']'"),
    ("a.json", f"[{GOOD},\n{GOOD},\n", ":3:1", "not valid JSON: Expecting value"),
    ("a.json", f"[{GOOD},\n[{GOOD}]]", ":2:1", "expected a JSON object, got a list"),
    ("a.json", f"[{GOOD}] [", ":1:70", "text after the end of the array"),
    ("a.json", b"[" + GOOD.encode() + b",\n\xe4", ":2:1", "not UTF-8 text"),
    ("a.json", "[" + "[" * 100_000, ":1:2", "nested too deeply"),
    ("a.json", f'[{GOOD},{{"k\x1b": 1, "k\x1b": 2}}]', ":1:72", "not valid JSON: Invalid control character"),
    ("a.json", '[{"k\\u202e": 1, "k\\u202e": 2}]', ":1:2", "the key 'k\\u202e' is given twice"),
    ("a.json", "", ":1:1", "the file is empty"),
    ("a.csv", "", ":1:1", "the file is empty"),
    ("a.csv", f"{HEADER}\r\n", ":1:1", "holds no rows"),
    ("a.csv", "\r\n", ":1:1", "the file is empty"),
    ("a.csv", "\n\ninstruction,context\n", ":3:1", "the column 'response' or 'output' is missing"),
    ("a.csv", "instruction;output\ni;o\n", ":1:1", "no kind of row has the fields 'instruction;output'"),
    ("a.csv", "input,output\ni,o\n", ":1:1", "the column 'instruction' is missing; the columns are 'input', 'output'"),
    ("a.csv", "output,instruction,output\n", ":1:1", "the column 'output' is given twice"),
    ("a.csv", f'{HEADER}\n"a\nb",x,o,c\n\ni,x,o\n', ":5:1", "3 fields where the header names 4"),
    ("a.csv", f'{HEADER}\ni,"x,o,c\ni,x,o,c\n', ":2:1", "a quoted field is never closed"),
    ("a.csv", f'{HEADER}\ni,x,o,c\ni,"x"y,o,c\n', ":3:1", "text after the quote that closes a field"),
    ("a.csv", f"{HEADER}\ni,x\ry,o,c\n", ":2:1", "a carriage return outside quotes"),
    ("a.csv", f"{HEADER}\r".encode() + b"i,x,o,c\r", ":1:1", "a carriage return outside quotes"),
    ("a.csv", HEADER.encode() + b'\n"\n\n\xc3\xa4\xff",x,o,c\n', ":4:2", "not UTF-8 text"),
    ("a.csv", HEADER.encode("utf-16"), ":1:1", "not UTF-8 text"),
    ("a.csv", "instruction,context,input,output\ni,x,y,o\n", ":2:1", "the fields 'context' and 'input' differ"),
    ("a.jsonl.gz", GOOD, "", "not sound gzip data"),
    ("a.jsonl.gz", PACKED[:-9], "", "the gzip data is cut short"),
    ("a.jsonl.gz", PACKED[:-8] + bytes(8), "", "not sound gzip data"),
    ("a.jsonl.gz", PACKED + b"more", "", "not sound gzip data"),
    ("a.jsonl.gz", b"", ":1:1", "the file is empty"),
    ("a.jsonl.zst", GOOD, "", "not sound zstd data"),
    ("a.jsonl.zst", ZSTD[:-9], "", "the zstd data is cut short"),
    ("a.jsonl.zst", ZSTD[:9], "", "the zstd data is cut short"),
    ("a.jsonl.zst", ZSTD[:10] + bytes(8) + ZSTD[18:], "", "not sound zstd data"),
    ("a.jsonl.zst", ZSTD + b"more", "", "not sound zstd data"),
    ("a.jsonl.zst", b"", ":1:1", "the file is empty"),
    ("a.csv.gz", gzip.compress(f"{HEADER}\ni,x\n".encode()), ":2:1", "2 fields where the header names 4"),
    ("a.json.gz", gzip.compress(b"[\n{}]"), ":2:1", "a row without fields"),
    ("a.parquet", b"", "", "not a whole Parquet file"),
    ("a.parquet", f"{GOOD}\n", "", "not a whole Parquet file"),
    ("a.parquet", table()[:-1], "", "not a whole Parquet file"),
    ("a.parquet", table()[:-8] + b"\xff\xff\xff\x7fPAR1", "", "the Parquet footer is damaged or too large"),
    ("a.parquet", table()[:-60] + bytes(52) + table()[-8:], "", "Parquet"),
    ("a.parquet", b"PAR1" + bytes(40) + table()[44:], "", "a page of the Parquet file is damaged"),
    ("a.parquet", table(output=[]), "", "the column 'response' or 'output' is missing"),
    ("a.parquet", table(input=[1, 2]), "", "the column 'input' must be text, got int64"),
    ("a.parquet", table(category=[b"c", b"c"]), "", "the column 'category' must be text, got binary"),
    ("a.parquet", table(output=[["o"], ["o"]]), "", "the column 'output' must be text, got list"),
    ("a.parquet", table(output=["x", None]), ": row 2", "the field 'output' must be text, got null"),
    ("a.parquet", table(input=not_text()), ": row 2", "not UTF-8 text"),
    ("a.parquet", table(context=["x", "y"], input=["x", "z"]), ": row 2", "'context' and 'input' differ"),
]


def test_a_broken_file_is_named_with_place_and_reason(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for number, (name, content, place, what) in enumerate(BROKEN):
        with subtests.test(f"{name} {what}"):
            path = tmp_path / str(number) / name
            path.parent.mkdir()
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            with pytest.raises(DataError) as caught:
                read_rows(path)
            first, *excerpt = str(caught.value).split("\n")
            assert first.startswith(f"{path}{place}: ")
            assert what in first
            assert all(len(line) < 200 and line.isprintable() for line in (first.removeprefix(str(path)), *excerpt))
            assert caught.value.hint
            assert caught.value.exit_code == 3


@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
def test_rows_of_parquet_are_counted_over_batches_and_row_groups(tmp_path: Path, encoding: str) -> None:
    columns = {"instruction": ["i"] * 2500 + [None], "output": [f"o{row}" for row in range(2501)]}
    path = tmp_path / "a.parquet"
    options: Any = {"use_dictionary": False, "column_encoding": encoding, "row_group_size": 1100}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    with pytest.raises(DataError, match=r"a\.parquet: row 2501: the field 'instruction' must be text, got null"):
        read_rows(path)
    assert [row.output for row in read_rows(path, rules=ReadRules(skip_bad=1))] == columns["output"][:-1]


FAULTS = {"null": "null", "7": "a number", "-1.5e3": "a number", "true": "true or false", "[]": "a list"}
FAULTS |= {'{"text": "x"}': "an object"}


@pytest.mark.parametrize("field", ["instruction", "context", "response", "category"])
def test_a_field_of_another_type_is_named_with_the_type(tmp_path: Path, field: str, subtests: pytest.Subtests) -> None:
    row = GOOD.replace("input", "context").replace("output", "response")
    texts = {"instruction": '"i"', "context": '"x"', "response": '"o"', "category": '"c"'}
    for value, kind in FAULTS.items():
        if value == "null" and field in ("context", "category"):
            continue
        with subtests.test(value):
            path = tmp_path / "rows.jsonl"
            path.write_text(f"{row}\n" + row.replace(f'"{field}": {texts[field]}', f'"{field}": {value}'))
            with pytest.raises(DataError, match=f":2:1: the field '{field}' must be text, got {kind}\n"):
                read_rows(path)


@pytest.mark.parametrize(
    "name",
    [
        "a.pkl",
        "a.py",
        "a.npy",
        "a.txt",
        "a.arrow",
        "a.json.zip",
        "a.parquet.gz",
        "a.gz",
        "a.tar.gz",
        "a.jsonl.bz2",
        "a.parquet.zst",
        "a.zst",
    ],
)
def test_no_other_file_is_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    with pytest.raises(DataError, match=r"rows are not read from a \.\w+ file") as caught:
        read_rows(tmp_path / name)
    assert ".parquet" in caught.value.hint
    assert not (tmp_path / "canary").exists()


def test_the_format_is_told_by_the_name_in_any_case_and_a_name_without_suffix_is_json(tmp_path: Path) -> None:
    for name in ("rows", "ROWS.JSON", "Rows.JsonL"):
        (tmp_path / name).write_text(GOOD)
        assert len(read_rows(tmp_path / name)) == 1
    (tmp_path / "rows.CSV.GZ").write_bytes(gzip.compress(b"instruction,output\ni,o"))
    assert len(read_rows(tmp_path / "rows.CSV.GZ")) == 1


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet", "a.json.gz", "a.pkl"])
def test_a_file_that_is_not_there_is_a_usage_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_rows(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match="a folder without a file of rows"):
        read_rows(tmp_path / name)
