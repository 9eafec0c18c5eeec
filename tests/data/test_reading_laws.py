"""What holds for any rows and any bytes: rows come back as they were written, and nothing but a DataError is raised."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.data import json_source, streams
from fedlora.data.records import read_rows
from fedlora.errors import DataError
from fedlora.rows import ReadRules, Row, Turn

TRICKY = (
    *("", " ", "2024-01-31", "007", "1e5", "NaN", "null", "true", "a\r\nb", "a\nb", "\r", '"', '""', ",", '",\n"', "'"),
    *("a\u2028b", "\u2029", "\x85", "\u202eevil\u202c", "\ufeff", "\x00", "a\x00b", "\x1b[31m", "é", "e\u0301", "𝄞"),
)
TEXT = st.sampled_from(TRICKY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PER_EXAMPLE = 80


def make_rows(texts: Sequence[str]) -> list[Row]:
    return [Row(*texts[start : start + 4]) for start in range(0, len(texts), 4)]


def make_talks(texts: Sequence[str]) -> list[Row]:
    """Conversations of one or two exchanges, every other with a system turn; only a reply may be blank."""
    rows = []
    for number, row in enumerate(make_rows(texts)):
        before = [Turn("system", f"s{row.category}")] if number % 2 else []
        before += [Turn("user", f"u{row.output}"), Turn("assistant", f"a{row.input}")] if number % 3 else []
        rows.append(Row(f"q{row.instruction}", "", row.output, row.category, tuple(before), "conversation"))
    return rows


def make_histories(texts: Sequence[str]) -> list[Row]:
    talks = make_talks(texts)
    return [
        replace(talk, kind="instruction", input=row.input) for talk, row in zip(talks, make_rows(texts), strict=True)
    ]


KINDS: dict[str, Callable[[Sequence[str]], list[Row]]] = {
    "plain": make_rows,
    "talks": make_talks,
    "histories": make_histories,
    "completions": lambda texts: [replace(row, input="", kind="completion") for row in make_rows(texts)],
    "texts": lambda texts: [Row("", "", row.output, row.category, kind="text") for row in make_rows(texts)],
}


def as_array(rows: Sequence[Row]) -> bytes:
    return json.dumps([row.as_dict() for row in rows], indent=1, ensure_ascii=False).encode()


def as_lines(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(row.as_dict()) + "\r\n" for row in rows).encode()


def columns_of(rows: Sequence[Row]) -> dict[str, list[Any]]:
    records = [row.as_dict() for row in rows]
    return {name: [record.get(name) for record in records] for name in dict.fromkeys(itertools.chain(*records))}


def as_csv(rows: Sequence[Row]) -> bytes:
    text = io.StringIO(newline="")
    columns = columns_of(rows)
    lines = zip(*columns.values(), strict=True)
    csv.writer(text).writerows(
        [columns, *([json.dumps(c) if isinstance(c, list) else c for c in line] for line in lines)]
    )
    return text.getvalue().encode()


STRING, LARGE, DICTIONARY = pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), "string")


def as_parquet(
    rows: Sequence[Row], texts: Sequence[pyarrow.DataType] = (STRING, LARGE, STRING, DICTIONARY), **options: object
) -> bytes:
    kinds = itertools.cycle(texts)
    listed = {
        "messages": pyarrow.large_list(pyarrow.struct({"role": texts[-1], "content": texts[0]})),
        "history": pyarrow.list_(pyarrow.list_(texts[0], 2)),
    }
    columns = columns_of(rows).items()
    values = {name: pyarrow.array(cells, listed.get(name) or next(kinds)) for name, cells in columns}
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(values), sink, **options)
    return sink.getvalue()


def as_deltas(rows: Sequence[Row]) -> bytes:
    leaves = pyarrow.parquet.ParquetFile(io.BytesIO(as_parquet(rows))).schema
    paths = [leaves.column(place).path for place in range(len(leaves))]
    encodings = itertools.cycle(["DELTA_BYTE_ARRAY", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
    options = {
        "use_dictionary": paths[3:4],
        "column_encoding": {path: next(encodings) for place, path in enumerate(paths) if place != 3},
        "data_page_version": "2.0",
    }
    return as_parquet(rows, [STRING, LARGE], compression="zstd", row_group_size=7, **options)


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


@settings(max_examples=100)
@given(st.lists(TEXT, min_size=PER_EXAMPLE, max_size=PER_EXAMPLE))
def test_rows_of_any_text_come_back_byte_for_byte(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    check_formats(tmp_path_factory.getbasetemp(), make_rows(texts))


@settings(max_examples=60)
@given(st.sampled_from(sorted(KINDS)), st.lists(TEXT, min_size=PER_EXAMPLE, max_size=PER_EXAMPLE))
def test_rows_of_every_kind_come_back_from_every_format(
    tmp_path_factory: pytest.TempPathFactory, kind: str, texts: list[str]
) -> None:
    check_formats(tmp_path_factory.getbasetemp(), KINDS[kind](texts))


def check_formats(folder: Path, rows: list[Row]) -> None:
    for name, write in FORMATS.items():
        (folder / name).write_bytes(write(rows))
        assert read_rows(folder / name) == rows, name


SOUND = {
    f"{kind}-{name}": write(make(TRICKY[:24]))
    for name, write in FORMATS.items()
    for kind, make in KINDS.items()
    if kind in ("plain", "talks", "histories")
}


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
    assert all(type(text) is str for row in rows for turn in row.turns for text in (turn.content, row.category))


@settings(max_examples=300)
@given(damaged().filter(lambda file: file[0].endswith("array.json")), st.integers(1, 40))
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
