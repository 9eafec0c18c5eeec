"""Conversations in Parquet: lists and structs of every type of text, bounded like a column of text."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from fedlora.data import parquet_source
from fedlora.data.records import read_rows
from fedlora.errors import DataError
from fedlora.rows import ReadRules, Turn

STRING, LARGE, VIEW = pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()
SHARED = pyarrow.dictionary(pyarrow.int32(), STRING)
TALK = (Turn("user", "hi"), Turn("assistant", "yes"), Turn("user", "why?"), Turn("assistant", "so"))
OPENAI = [turn.as_dict() for turn in TALK]
SHAREGPT = [{"from": "human" if turn.role == "user" else "gpt", "value": turn.content} for turn in TALK]


def turns_of(text: pyarrow.DataType, *names: str) -> pyarrow.DataType:
    return pyarrow.struct(dict.fromkeys(names, text))


def write(folder: Path, columns: dict[str, Any], **options: Any) -> Path:
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


TYPES = {
    "string": pyarrow.list_(turns_of(STRING, "role", "content")),
    "large": pyarrow.large_list(turns_of(LARGE, "role", "content")),
    "dictionary": pyarrow.list_(turns_of(SHARED, "role", "content")),
    "fixed": pyarrow.list_(turns_of(STRING, "content", "role"), 4),
}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("use_dictionary", [True, False])
def test_turns_of_every_type_of_text_are_read(tmp_path: Path, name: str, use_dictionary: bool) -> None:
    rows = pyarrow.array([OPENAI] * 2500, TYPES[name])
    path = write(tmp_path, {"messages": rows}, use_dictionary=use_dictionary, row_group_size=1100)
    assert {row.turns for row in read_rows(path)} == {TALK}


def test_a_dictionary_that_is_given_up_within_a_row_group_is_read_on(tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": f"{number} {'x' * 50}"}, OPENAI[1]] for number in range(3000)]
    path = write(tmp_path, {"messages": rows}, dictionary_pagesize_limit=1000, data_page_size=2000)
    assert [row.instruction for row in read_rows(path)] == [turns[0]["content"] for turns in rows]


@pytest.mark.parametrize("text", [STRING, LARGE, VIEW, SHARED, pyarrow.dictionary(pyarrow.int8(), LARGE)])
def test_every_type_of_text_is_text(tmp_path: Path, text: pyarrow.DataType) -> None:
    columns = {"instruction": pyarrow.array(["i"], text), "output": pyarrow.array(["o"], text)}
    assert read_rows(write(tmp_path, columns))[0].output == "o"


def test_null_values_and_further_keys_of_turns_are_read_as_in_json_lines(tmp_path: Path) -> None:
    kind = pyarrow.struct(
        {"from": STRING, "value": STRING, "weight": pyarrow.float64(), "tool_calls": pyarrow.list_(STRING)}
    )
    columns = {
        "conversations": pyarrow.array([SHAREGPT, SHAREGPT], pyarrow.list_(kind)),
        "system": pyarrow.array([None, "s"], STRING),
        "messages": pyarrow.array([None, []], TYPES["string"]),
    }
    path = write(tmp_path, columns)
    first, second = read_rows(path, rules=ReadRules(row_kind="conversations"))
    assert first.turns == TALK
    assert second.turns == (Turn("system", "s"), *TALK)
    columns["conversations"] = pyarrow.array(
        [SHAREGPT, [*SHAREGPT[:3], {**SHAREGPT[3], "tool_calls": ["f"]}]], pyarrow.list_(kind)
    )
    with pytest.raises(DataError, match=r"row 2: the field 'conversations\[3\].tool_calls': tools are not supported"):
        read_rows(write(tmp_path, columns), rules=ReadRules(row_kind="conversations"))


def test_a_column_of_nothing_but_null_is_an_empty_field(tmp_path: Path) -> None:
    columns = {"instruction": ["i"], "input": [None], "output": ["o"], "system": [None], "history": [None]}
    assert read_rows(write(tmp_path, columns))[0].turns == (Turn("user", "i"), Turn("assistant", "o"))
    with pytest.raises(DataError, match="row 1: the field 'output' must be text, got null"):
        read_rows(write(tmp_path, {"instruction": ["i"], "output": [None]}))


def test_pairs_of_a_history_and_conversations_as_text_are_read(tmp_path: Path) -> None:
    columns = {"instruction": ["why?"] * 2, "output": ["so"] * 2, "history": [[["hi", "yes"]], None]}
    first, second = read_rows(write(tmp_path, columns))
    assert first.turns == TALK
    assert second.turns == TALK[2:]
    assert read_rows(write(tmp_path, {"messages": [json.dumps(OPENAI)]}))[0].turns == TALK
    assert read_rows(write(tmp_path, {"prompt": [OPENAI[:3]], "completion": [OPENAI[3:]]}))[0].turns == TALK


def test_names_with_dots_lead_into_structs_and_lists(tmp_path: Path) -> None:
    answers = [{"text": ["yes", "no"], "start": [1, 2]}, {"text": ["so"], "start": [3]}]
    columns = {"q": ["hi", "why?"], "answers": answers, "a.b": ["x", "y"], "meta": [json.dumps({"topic": ["t"]})] * 2}
    rules = ReadRules(
        columns={"prompt": "q", "response": "answers.text.0", "context": "a.b", "category": "meta.topic.0"}
    )
    first, second = read_rows(write(tmp_path, columns), rules=rules)
    assert (first.instruction, first.input, first.output, first.category) == ("hi", "x", "yes", "t")
    assert second.output == "so"


def test_other_columns_than_text_and_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the column 'messages' must be text or a list, got int64"):
        read_rows(write(tmp_path, {"messages": [1]}))
    with pytest.raises(DataError, match="the column 'instruction' must be text, got list"):
        read_rows(write(tmp_path, {"instruction": [["i"]], "output": ["o"]}))
    with pytest.raises(DataError, match=r"row 1: the field 'messages\[0\]' must be an object with role and content"):
        read_rows(write(tmp_path, {"messages": [[1, 2]]}))


def test_half_of_a_letter_in_a_turn_is_refused_with_its_row(tmp_path: Path) -> None:
    bad = pyarrow.Array.from_buffers(
        STRING, 2, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")]
    )
    turns = pyarrow.StructArray.from_arrays([pyarrow.array(["user", "assistant"]), bad], ["role", "content"])
    with pytest.raises(DataError, match="row 1: not UTF-8 text"):
        read_rows(write(tmp_path, {"messages": pyarrow.ListArray.from_arrays([0, 2], turns)}))


def test_a_row_of_many_references_to_one_text_is_refused_before_it_is_made(tmp_path: Path) -> None:
    long = [{"role": "user", "content": "x" * 4000}] * 2000
    path = write(tmp_path, {"messages": [OPENAI, long, OPENAI]})
    assert path.stat().st_size < 20_000
    with pytest.raises(DataError, match="row 2: the row is larger than 4194304 bytes"):
        read_rows(path)
    assert len(read_rows(path, rules=ReadRules(skip_bad=1), on_skip=lambda message: None)) == 2
    path = write(tmp_path, {"messages": [OPENAI, [{"role": "", "content": ""}] * 60_000]})
    with pytest.raises(DataError, match="row 2: the row is larger than 1048576 bytes"):
        read_rows(path, rules=ReadRules(1 << 20))


def test_bytes_of_turns_count_as_in_a_column_of_text(tmp_path: Path) -> None:
    letters = {"role": "user", "content": "é" * 600}
    path = write(tmp_path, {"messages": [[letters, OPENAI[1]]]})
    assert read_rows(path, rules=ReadRules(1300))
    with pytest.raises(DataError, match="the row is larger than 1100 bytes"):
        read_rows(path, rules=ReadRules(1100))


def test_a_list_without_end_is_refused_by_the_headers_of_its_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_source, "_MOST_VALUES", 1000)
    path = write(tmp_path, {"messages": [OPENAI, [None] * 2000]})
    with pytest.raises(DataError, match=r"the column 'messages.list.element.role' has 2004 values in 2 rows"):
        read_rows(path)
    assert len(read_rows(write(tmp_path, {"messages": [OPENAI] * 200}))) == 200


def test_a_page_of_a_turn_is_bounded_like_one_of_a_column(tmp_path: Path) -> None:
    sink = io.BytesIO()
    big = [{"role": "user", "content": "x" * (17 << 20)}]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [OPENAI, big]}), sink, compression="zstd")
    (tmp_path / "a.parquet").write_bytes(sink.getvalue())
    with pytest.raises(DataError, match=r"a page of the column 'messages.list.element.content' takes 178\d+ bytes"):
        read_rows(tmp_path / "a.parquet")


def test_columns_that_are_kept_may_be_numbers_or_parts_of_structs(tmp_path: Path) -> None:
    columns = {"messages": [OPENAI, OPENAI], "site": [7, 8], "meta": [{"town": "Lima"}, {"town": "Cusco"}]}
    rows = read_rows(write(tmp_path, columns), rules=ReadRules(keep=("site", "meta.town")))
    assert [row.more for row in rows] == [{"site": "7", "meta.town": "Lima"}, {"site": "8", "meta.town": "Cusco"}]
    with pytest.raises(DataError, match="row 1: the field 'meta' must be text or a number, got an object"):
        read_rows(write(tmp_path, columns), rules=ReadRules(keep=("meta",)))


def test_conversations_in_the_arrow_files_of_a_data_set_are_read(tmp_path: Path) -> None:
    table = pyarrow.table({"messages": pyarrow.array([OPENAI] * 9, TYPES["dictionary"]), "history": [None] * 9})
    with pyarrow.ipc.new_stream(tmp_path / "data.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    assert [row.turns for row in read_rows(tmp_path)] == [TALK] * 9


def test_whole_numbers_are_text_where_that_is_asked_for(tmp_path: Path) -> None:
    numbers = ReadRules(numbers_as_text=True)
    columns = {"instruction": ["i", "j"], "output": [3, -4], "category": [7, None]}
    rows = read_rows(write(tmp_path, columns), rules=numbers)
    assert [(row.output, row.category) for row in rows] == [("3", "7"), ("-4", "")]
    with pytest.raises(DataError, match="the column 'output' must be text, got int64") as refused:
        read_rows(write(tmp_path, columns))
    assert "--numbers_as_text" in refused.value.hint
    with pytest.raises(DataError, match="the column 'output' must be text, got double") as refused:
        read_rows(write(tmp_path, {**columns, "output": [0.1, 1e300]}), rules=numbers)
    assert "strings" in refused.value.hint
