"""`--columns`: fields under other names, in every format, and what is said of a name that is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fedlora.config.train import TrainConfig
from fedlora.data.fields import RowFields
from fedlora.data.records import iter_rows, read_rows
from fedlora.errors import DataError, UsageError
from fedlora.rows import ReadRules, Row

ROW = {"question": "q", "answer": {"text": ["a", "b"]}, "topic": "t", "id": "7"}
COLUMNS = {"prompt": "question", "response": "answer.text.0", "category": "topic"}


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif name.endswith(".csv"):
        cells = [[cell if isinstance(cell, str) else json.dumps(cell) for cell in row.values()] for row in rows]
        quoted = ["\t".join('"' + cell.replace('"', '""') + '"' for cell in row).replace("\t", ",") for row in cells]
        path.write_text("\n".join([",".join(rows[0]), *quoted]))
    elif name.endswith(".jsonl"):
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text(json.dumps(rows))
    return path


FORMATS = ["a.json", "a.jsonl", "a.csv", "a.parquet"]


@pytest.mark.parametrize("name", FORMATS)
def test_any_names_make_a_row_and_the_others_are_named_once(tmp_path: Path, name: str) -> None:
    found: list[RowFields] = []
    path = write(tmp_path, name, [ROW, ROW])
    rows = list(iter_rows(path, rules=ReadRules(columns=COLUMNS), on_fields=found.append))
    assert rows == [Row("q", "", "a", "t")] * 2
    assert list(found[0].unused) == ["id"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_name_that_no_row_has_is_one_error_with_the_nearest(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, [ROW, ROW])
    with pytest.raises(DataError, match="no row has the column 'topics'") as caught:
        read_rows(path, rules=ReadRules(columns={**COLUMNS, "category": "topics"}, skip_bad=9))
    assert str(caught.value).startswith(f"{path}")
    assert caught.value.hint == "did you mean topic?"
    with pytest.raises(DataError) as caught:
        read_rows(path, rules=ReadRules(columns={**COLUMNS, "prompt": "questions"}))
    assert "'questions'" in str(caught.value)
    assert "json" not in name or "; the row has 'question', 'answer', 'topic', 'id'" in str(caught.value)
    assert caught.value.hint == "did you mean question?"


def test_some_rows_may_lack_an_optional_column(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", [{"question": "q", "answer": {"text": ["a"]}}, ROW])
    assert [row.category for row in read_rows(path, rules=ReadRules(columns=COLUMNS))] == ["", "t"]


def test_a_field_that_is_mapped_is_read_from_nowhere_else(tmp_path: Path) -> None:
    row = {"instruction": "mine", "response": "r", "output": "o", "input": "x", "question": "q"}
    path = write(tmp_path, "a.jsonl", [row])
    found: list[RowFields] = []
    rules = ReadRules(columns={"instruction": "question", "output": "response"})
    [read] = iter_rows(path, rules=rules, on_fields=found.append)
    assert read == Row("q", "x", "r", "")
    assert set(found[0].unused) == {"instruction", "output"}
    [read] = read_rows(path, rules=ReadRules(columns={"instruction": "input", "output": "output"}))
    assert read == Row("x", "", "o", "")


def test_a_name_that_the_file_has_with_its_dots_is_taken_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", [{"a.b": "dots", "a": {"b": "deep"}, "output": "o"}])
    assert read_rows(path, rules=ReadRules(columns={"instruction": "a.b"}))[0].instruction == "dots"


def test_errors_name_the_column_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", [{"q": "q", "a": 7}])
    with pytest.raises(DataError, match=r":1:1: the field 'a' must be text, got a number"):
        read_rows(path, rules=ReadRules(columns={"prompt": "q", "response": "a"}))
    path = write(tmp_path, "a.jsonl", [{"talk": [{"role": "owl", "content": "x"}]}])
    with pytest.raises(DataError, match=r"'talk\[0\].role' is no known role"):
        read_rows(path, rules=ReadRules(columns={"messages": "talk"}))


KINDS = [
    ({"prompt": "a", "completion": "b"}, Row("A", "", "B", "", kind="completion")),
    ({"text": "a"}, Row("", "", "A", "", kind="text")),
    ({"instruction": "a", "output": "b"}, Row("A", "", "B", "")),
    ({"prompt": "a", "context": "b", "response": "a"}, Row("A", "B", "A", "")),
]


@pytest.mark.parametrize(("columns", "row"), KINDS)
def test_the_fields_that_are_named_decide_the_kind(tmp_path: Path, columns: dict[str, str], row: Row) -> None:
    more = {"instruction": "i", "output": "o", "messages": [{"role": "user", "content": "x"}], "text": "t"}
    path = write(tmp_path, "a.jsonl", [{"a": "A", "b": "B", **more}])
    assert read_rows(path, rules=ReadRules(columns=columns)) == [row]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"columns": "promt=question"}, "did you mean prompt?"),
        ({"columns": "zzz=question"}, "category"),
        ({"columns": "messages=a,response=b"}, "no row has the fields messages and response"),
        ({"columns": "text=a", "row_kind": "instruction"}, "no row of the kind instruction has the fields text"),
        ({"columns": "prompt"}, "prompt"),
    ],
)
def test_columns_that_make_no_row_are_refused_with_the_configuration(fields: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        TrainConfig.of(**fields)
    assert words in f"{caught.value} {caught.value.hint}"


def test_the_columns_are_part_of_what_is_recorded_of_the_rules() -> None:
    rules = TrainConfig.of(columns="prompt=question,response=answer.text.0", row_kind="instruction").read_rules
    assert rules.record() == {
        "columns": {"prompt": "question", "response": "answer.text.0"},
        "row_kind": "instruction",
    }


def test_a_reply_that_is_mapped_comes_before_the_usual_name_that_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", [{**ROW, "output": "no"}])
    assert read_rows(path, rules=ReadRules(columns=COLUMNS), output_key="output")[0].output == "a"


def test_a_kind_without_an_answer_is_refused_where_answers_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", [{"text": "t"}])
    with pytest.raises(UsageError, match="no row of the kind text has the fields gold"):
        read_rows(path, rules=ReadRules(row_kind="text"), output_key="gold")


def test_a_column_that_is_kept_and_missing_is_named_with_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "a", "output": "b", "meta": {"site": "north"}}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:1:1: .*'meta.sit' is missing") as refused:
        read_rows(file, rules=ReadRules(keep=("meta.sit",)))
    assert "meta.site" in refused.value.hint
