"""Columns that rows keep as they are, where they have them: lists, in every format."""

from __future__ import annotations

import json
from pathlib import Path

from fedlora.data.records import read_rows
from fedlora.rows import ReadRules

ROWS = [
    {"instruction": "q", "output": "a", "choices": ["a", "b"]},
    {"instruction": "r", "output": "a", "choices": None},
]
RULES = ReadRules(keep_any=("choices",))


def test_a_row_holds_the_list_that_it_has(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"instruction": "s", "output": "a"}]))
    assert [dict(row.more) for row in read_rows(file, rules=RULES)] == [{"choices": ["a", "b"]}, {}, {}]
    assert [dict(row.more) for row in read_rows(file)] == [{}, {}, {}]


def test_parquet_gives_the_same(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    assert [dict(row.more) for row in read_rows(file, rules=RULES)] == [{"choices": ["a", "b"]}, {}]
