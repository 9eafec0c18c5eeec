"""What holds for any rows and any bytes: rows come back as they were written, and nothing but a DataError is raised."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.data import json_source, streams
from fedlora.data.records import read_rows
from fedlora.errors import DataError
from fedlora.rows import ReadRules, Row

COLUMNS = ("instruction", "input", "output", "category")
TRICKY = (
    *("", " ", "2024-01-31", "007", "1e5", "NaN", "null", "true", "a\r\nb", "a\nb", "\r", '"', '""', ",", '",\n"', "'"),
    *("a\u2028b", "\u2029", "\x85", "\u202eevil\u202c", "\ufeff", "\x00", "a\x00b", "\x1b[31m", "é", "e\u0301", "𝄞"),
)
TEXT = st.sampled_from(TRICKY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PER_EXAMPLE = 80


def make_rows(texts: Sequence[str]) -> list[Row]:
    return [Row(*texts[start : start + 4]) for start in range(0, len(texts), 4)]


def as_array(rows: Sequence[Row]) -> bytes:
    return json.dumps([row.as_dict() for row in rows], indent=1, ensure_ascii=False).encode()


def as_lines(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(row.as_dict()) + "\r\n" for row in rows).encode()


def as_csv(rows: Sequence[Row]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([COLUMNS, *(row.as_dict().values() for row in rows)])
    return text.getvalue().encode()


def as_parquet(rows: Sequence[Row], **options: object) -> bytes:
    kinds = (pyarrow.string(), pyarrow.large_string(), pyarrow.string(), pyarrow.dictionary(pyarrow.int32(), "string"))
    values = {
        name: pyarrow.array([row.as_dict()[name] for row in rows], kind)
        for name, kind in zip(COLUMNS, kinds, strict=True)
    }
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(values), sink, **options)
    return sink.getvalue()


def as_deltas(rows: Sequence[Row]) -> bytes:
    encodings = dict.fromkeys(COLUMNS[:2], "DELTA_BYTE_ARRAY") | {COLUMNS[2]: "DELTA_LENGTH_BYTE_ARRAY"}
    options = {"use_dictionary": [COLUMNS[3]], "column_encoding": encodings, "data_page_version": "2.0"}
    return as_parquet(rows, compression="zstd", row_group_size=7, **options)


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


FORMATS: dict[str, Callable[[Sequence[Row]], bytes]] = {
    "array.json": as_array,
    "lines.jsonl": as_lines,
    "table.csv": as_csv,
    "table.parquet": as_parquet,
    "deltas.parquet": as_deltas,
    "array.json.gz": lambda rows: gzip.compress(as_array(rows), 1),
    "lines.jsonl.gz": lambda rows: gzip.compress(as_lines(rows[:1]), 1) + gzip.compress(as_lines(rows[1:]), 1),
    "table.csv.gz": lambda rows: gzip.compress(as_csv(rows), 1),
    "array.json.zst": lambda rows: zstd(as_array(rows)),
    "lines.jsonl.zst": lambda rows: zstd(as_lines(rows[:1])) + zstd(as_lines(rows[1:])),
    "table.csv.zst": lambda rows: zstd(as_csv(rows)),
}


@settings(max_examples=130)
@given(st.lists(TEXT, min_size=PER_EXAMPLE, max_size=PER_EXAMPLE))
def test_rows_of_any_text_come_back_byte_for_byte(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    rows = make_rows(texts)
    for name, write in FORMATS.items():
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(write(rows))
        assert read_rows(path) == rows, name


SOUND = {name: write(make_rows(TRICKY[:24])) for name, write in FORMATS.items()}


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    """A sound file with a few bytes changed, put in, left out or cut off; or bytes that were never a file of rows."""
    name = draw(st.sampled_from(sorted(SOUND)))
    if draw(st.integers(0, 4)) == 0:
        return name, draw(st.binary(max_size=60))
    content = bytearray(SOUND[name])
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        if draw(st.booleans()):
            start = max(0, len(content) - start % 1500)  # Parquet keeps what can be broken at its end
        end = draw(st.sampled_from([start, start + 1, start + 1, start + 4, len(content)]))
        content[start:end] = draw(st.binary(max_size=4))
    return name, bytes(content)


@settings(max_examples=600)
@given(damaged(), st.sampled_from([0, 1, 100]))
def test_any_bytes_give_rows_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, file: tuple[str, bytes], skip_bad: int
) -> None:
    path = tmp_path_factory.getbasetemp() / f"damaged-{file[0]}"
    path.write_bytes(file[1])
    fault, rows = None, []
    try:
        rows = read_rows(path, rules=ReadRules(skip_bad=skip_bad), on_skip=lambda message: None)
    except DataError as error:
        fault = error
    if fault is not None:
        assert str(fault).startswith(str(path))
        assert "\x1b" not in str(fault)
        assert fault.hint
    assert all(type(text) is str for row in rows for text in row.as_dict().values())


@settings(max_examples=300)
@given(damaged().filter(lambda file: file[0] == "array.json"), st.integers(1, 40))
def test_how_a_file_is_cut_into_blocks_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, file: tuple[str, bytes], block: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "blocks.json"
    path.write_bytes(file[1])

    def read() -> list[Row] | str:
        try:
            return read_rows(path)
        except DataError as error:
            return str(error).split("\n")[0]

    whole = read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_source, "BLOCK", block)
        patch.setattr(streams, "BLOCK", block)
        assert read() == whole
