"""The kinds of rows: how each is found and read, and that the same talk gives the same turns however it is written."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fedlora.data.fields import RowFields
from fedlora.data.records import iter_rows, read_rows
from fedlora.errors import DataError
from fedlora.rows import MIXED, ReadRules, Row, Turn

TALK = (
    Turn("system", "Answer briefly."),
    Turn("user", "Capital of Peru?"),
    Turn("assistant", "Lima"),
    Turn("user", "And of Chile?\n\nOne word."),
    Turn("assistant", "Santiago"),
)
OPENAI = [turn.as_dict() for turn in TALK]
SIDES = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [{"from": SIDES[turn.role], "value": turn.content} for turn in TALK]
PARTS = [{"role": turn.role, "content": [{"type": "text", "text": turn.content}]} for turn in TALK]
HISTORY = [["Capital of Peru?", "Lima"]]
WRITTEN: dict[str, dict[str, Any]] = {
    "messages": {"messages": OPENAI},
    "parts": {"messages": PARTS},
    "system beside messages": {"messages": OPENAI[1:], "system": "Answer briefly."},
    "the same system twice": {"messages": OPENAI, "system": "Answer briefly."},
    "conversations": {"conversations": SHAREGPT},
    "conversations of roles": {"conversations": OPENAI},
    "both alike": {"messages": OPENAI, "conversations": SHAREGPT},
    "as text": {"messages": json.dumps(OPENAI)},
    "prompt and completion": {"prompt": OPENAI[:-1], "completion": OPENAI[-1:]},
    "history": {
        **{"instruction": "And of Chile?", "input": "One word.", "response": "Santiago"},
        **{"history": HISTORY, "system": "Answer briefly."},
    },
    "prompt and response": {
        **{"prompt": "And of Chile?", "context": "One word.", "output": "Santiago"},
        **{"history": HISTORY, "system": "Answer briefly."},
    },
}


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def refusal(path: Path, **rules: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path, rules=ReadRules(**rules))
    return str(caught.value).split("\n")[0].removeprefix(str(path))


@pytest.mark.parametrize("name", WRITTEN)
def test_the_same_talk_gives_the_same_turns_however_it_is_written(tmp_path: Path, name: str) -> None:
    [row] = read_rows(write(tmp_path, {**WRITTEN[name], "category": "towns"}))
    assert row.turns == TALK
    assert row.category == "towns"
    assert row.kind == ("instruction" if "history" in WRITTEN[name] else "conversation")


@pytest.mark.parametrize("name", WRITTEN)
def test_a_row_that_is_written_again_is_the_same_row(tmp_path: Path, name: str) -> None:
    [row] = read_rows(write(tmp_path, WRITTEN[name]))
    assert read_rows(write(tmp_path, row.as_dict())) == [row]


@pytest.mark.parametrize("name", WRITTEN)
def test_an_answered_row_has_the_same_question_and_its_answer(tmp_path: Path, name: str) -> None:
    [row] = read_rows(write(tmp_path, WRITTEN[name]))
    [answered] = read_rows(write(tmp_path, row.as_answered("Valparaíso")), output_key="answer")
    assert answered.asked == row.asked
    assert answered.output == "Valparaíso"


def test_text_and_a_completion_have_no_turns_before(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path, {"text": "Once."})) == [Row("", "", "Once.", "", kind="text")]
    [row] = read_rows(write(tmp_path, {"prompt": "Once", "completion": " upon", "category": "c"}))
    assert row == Row("Once", "", " upon", "c", kind="completion")
    assert read_rows(write(tmp_path, row.as_answered(" more")), output_key="answer")[0].kind == "completion"


ORDER = [
    ("instruction", "conversation", {"instruction": "i", "output": "o", "messages": OPENAI}),
    ("messages", "conversation", {"messages": OPENAI, "prompt": "p", "completion": "c"}),
    ("conversations", "conversation", {"conversations": SHAREGPT, "text": "t"}),
    ("completion", "completion", {"prompt": "p", "completion": "c", "response": "r", "text": "t"}),
    ("text", "text", {"text": "t", "prompt": "p"}),
]


@pytest.mark.parametrize(("kind", "_", "row"), ORDER)
def test_kinds_are_tried_in_their_order(tmp_path: Path, kind: str, _: str, row: dict[str, Any]) -> None:
    found: list[RowFields] = []
    list(iter_rows(write(tmp_path, row), on_fields=found.append))
    assert found[0].shape is not None
    assert found[0].shape.kind == kind


@pytest.mark.parametrize("kind", ["instruction", "messages", "conversations", "completion", "text"])
def test_a_kind_that_is_asked_for_is_taken_and_the_rest_is_named(tmp_path: Path, kind: str) -> None:
    row = {"instruction": "i", "output": "o", "messages": OPENAI, "conversations": SHAREGPT}
    row |= {"prompt": "p", "completion": "c", "text": "t", "id": 7}
    found: list[RowFields] = []
    list(iter_rows(write(tmp_path, row), rules=ReadRules(row_kind=kind), on_fields=found.append))  # type: ignore[arg-type]
    assert found[0].shape is not None
    assert found[0].shape.kind == kind
    assert set(found[0].unused) == row.keys() - found[0].shape.names


def test_null_and_empty_lists_are_fields_that_are_not_there(tmp_path: Path) -> None:
    row = {"instruction": None, "output": None, "messages": [], "conversations": SHAREGPT, "system": None}
    assert read_rows(write(tmp_path, {**row, "history": [], "category": None}))[0].turns == TALK
    plain = {"instruction": "i", "context": None, "input": "x", "response": None, "output": "o", "category": None}
    assert read_rows(write(tmp_path, {**plain, "system": "", "history": None})) == [Row("i", "x", "o", "")]


def test_a_file_has_rows_of_the_kind_of_its_first_sound_row(tmp_path: Path) -> None:
    plain, talk = {"instruction": "i", "output": "o"}, {"messages": OPENAI}
    path = write(tmp_path, plain, talk)
    assert refusal(path) == (":2:1: a row with messages, but the file began with instruction and response or output")
    assert refusal(write(tmp_path, talk, {"text": "t"})) == ":2:1: a row with text, but the file began with messages"
    prompts = [{"prompt": "p", "completion": "c"}, {"prompt": OPENAI[:-1], "completion": OPENAI[-1:]}]
    assert "the kind conversation, but the file began with the kind completion" in refusal(write(tmp_path, *prompts))
    bad = write(tmp_path, {"instruction": "i", "output": 7}, talk)
    assert [row.turns for row in read_rows(bad, rules=ReadRules(skip_bad=1))] == [TALK]
    both = write(tmp_path, talk, {**plain, **talk})
    assert [row.turns for row in read_rows(both)] == [TALK, TALK]


def test_every_row_may_decide_for_itself_where_that_is_asked_for(tmp_path: Path) -> None:
    prompts = [{"prompt": OPENAI[:-1], "completion": OPENAI[-1:]}, {"prompt": "p", "completion": "c"}]
    rows = [{"instruction": "i", "output": "o", "id": 1}, {"messages": OPENAI}, {"text": "t"}, *prompts]
    path, found = write(tmp_path, *rows), []
    kinds = [row.kind for row in iter_rows(path, rules=MIXED, on_fields=found.append)]
    assert kinds == ["instruction", "conversation", "text", "conversation", "completion"]
    assert list(found[0].unused) == ["id"]
    assert len(found[0].kinds) == 5
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert "--row_kind any" in caught.value.hint
    with pytest.raises(DataError, match=r":2:1: the field 'response' or 'output' is missing"):
        read_rows(write(tmp_path, {"messages": OPENAI}, {"instruction": "i"}), rules=MIXED)


def test_a_table_is_of_one_kind_whatever_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,prompt,completion\nt,p,c\nt,,c\n")
    assert [row.kind for row in read_rows(file, rules=MIXED)] == ["completion", "completion"]


NO_ROW = [
    ({"question": "q", "id": 7}, "no kind of row has the fields 'question', 'id'"),
    ({}, "a row without fields"),
    ({"prompt": "p"}, "the field 'completion' is missing; the row has 'prompt'"),
    ({"input": "x", "output": "o"}, "the field 'instruction' is missing; the row has 'input', 'output'"),
]


@pytest.mark.parametrize(("row", "what"), NO_ROW)
def test_what_is_no_row_is_refused_with_the_fields_it_has(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    path = write(tmp_path, row)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:1:1: {what}")
    assert "--columns" in caught.value.hint


def turns(*said: Any) -> dict[str, Any]:
    return {"messages": [{"role": each[0], "content": each[1]} if isinstance(each, tuple) else each for each in said]}


HI, YES = ("user", "hi"), ("assistant", "yes")
FAULTY = [
    ({"messages": OPENAI, "conversations": SHAREGPT[1:]}, "'messages' and 'conversations' are two conversations"),
    (turns(HI, ("owl", "hoo")), "'messages[1].role' is no known role: 'owl'"),
    (turns(HI, ("Assistant", "yes")), "'messages[1].role' is no known role: 'Assistant'"),
    (turns(HI, ("tool", "42"), YES), "'messages[1].role' is 'tool': tools are not supported"),
    (turns(HI, {"role": "assistant", "content": None, "tool_calls": [{}]}), "'messages[1].tool_calls': tools are not"),
    (turns(HI, ("", "yes")), "'messages[1].role' is empty"),
    (turns(HI, {"content": "yes"}), "'messages[1]' has neither 'role' nor 'from', but 'content'"),
    (turns(HI, (7, "yes")), "'messages[1].role' must be text, got a number"),
    (turns(HI, HI, YES), "'messages[1].role' repeats 'user'"),
    (turns(HI, YES, YES), "'messages[2].role' repeats 'assistant'"),
    (turns(("system", "s"), YES), "'messages[1].role': the conversation starts with the assistant"),
    (turns(YES, HI, YES), "'messages[0].role': the conversation starts with the assistant"),
    (turns(HI), "'messages[0].role': the conversation must end with the assistant"),
    (turns(HI, YES, HI), "'messages[2].role': the conversation must end with the assistant"),
    (turns(("user", " "), YES), "'messages[0].content' is empty"),
    (turns(("system", ""), HI, YES), "'messages[0].content' is empty"),
    (turns(HI, ("assistant", ""), HI, YES), "'messages[1].content' is empty"),
    (turns(HI, ("system", "s"), YES), "'messages[1].role': the system turn must be the first"),
    (turns(("system", "s")), "no user turn"),
    ({"messages": []}, "no user turn"),
    (turns(HI, {"role": "assistant", "content": None}), "'messages[1].content' must be text, got null"),
    (turns(HI, {"role": "assistant"}), "'messages[1].content' must be text, got null"),
    (turns(HI, ("assistant", 7)), "'messages[1].content' must be text, got a number"),
    (turns(HI, ("assistant", "\ud800")), "'messages[1].content' holds half a surrogate pair"),
    (turns(HI, ("assistant", {"text": "yes"})), "'messages[1].content' must be text, got an object"),
    (turns(("user", [{"type": "image_url", "image_url": "x"}]), YES), "'messages[0].content[0]' is a part of the type"),
    (turns(("user", ["hi"]), YES), "'messages[0].content[0]' is a part of the type 'text'; only text is supported"),
    (turns(HI, {"role": "assistant", "from": "human", "content": "yes"}), "'messages[1].role' and 'messages[1].from'"),
    ({"messages": ["hi"]}, "'messages[0]' must be an object with role and content, got text"),
    ({"messages": {"role": "user"}}, "'messages' must be a list of messages, got an object"),
    ({"messages": "hi"}, "'messages' is text that is not valid JSON"),
    ({"messages": "[] []"}, "'messages' is text that is not valid JSON: text after the end"),
    ({"messages": '[{"role": "user", "role": "user"}]'}, "the key 'role' is given twice"),
    ({"messages": "[" * 100_000}, "'messages' is text that is not valid JSON: nested too deeply"),
    ({"conversations": [{"from": "human", "value": ""}]}, "'conversations[0].value' is empty"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, "'conversations[0].from' is no known role"),
    ({"messages": OPENAI, "system": "Other."}, "'system' and 'messages[0].content' are different system prompts"),
    ({"messages": OPENAI, "history": HISTORY}, "'history' has no place beside messages"),
    ({"prompt": "p", "completion": "c", "system": "s"}, "'system' has no place beside prompt and completion"),
    ({"prompt": "p", "completion": "c", "history": HISTORY}, "'history' has no place beside prompt"),
    ({"text": "t", "system": "s"}, "'system' has no place beside text"),
    ({"text": "t", "history": HISTORY}, "'history' has no place beside text"),
    ({"prompt": OPENAI[:-1], "completion": "c"}, "of the fields 'prompt' and 'completion' one is text"),
    ({"prompt": "p", "completion": OPENAI[-1:]}, "of the fields 'prompt' and 'completion' one is text"),
    ({"prompt": OPENAI, "completion": OPENAI[-1:]}, "'completion[0].role' repeats 'assistant'"),
    ({"instruction": "i", "output": "o", "history": "x"}, "'history' is text that is not valid JSON"),
    ({"instruction": "i", "output": "o", "history": ["x"]}, "'history[0]' must be a pair of texts, got text"),
    ({"instruction": "i", "output": "o", "history": [["x"]]}, "'history[0]' must be a pair of texts, got 1 values"),
    ({"instruction": "i", "output": "o", "history": [["x", 7]]}, "'history[0][1]' must be text, got a number"),
    ({"instruction": "i", "output": "o", "history": [["x", ""]]}, "'history[0][1]' is empty"),
    ({"instruction": "i", "output": "o", "system": 7}, "'system' must be text, got a number"),
]


@pytest.mark.parametrize(("row", "what"), FAULTY, ids=[what for _, what in FAULTY])
def test_a_faulty_row_is_named_by_line_and_field_and_can_be_left_out(
    tmp_path: Path, row: dict[str, Any], what: str
) -> None:
    path = write(tmp_path, row)
    assert what in refusal(path)
    assert refusal(path).startswith(":1:1: ")
    path = write(tmp_path, row, {"messages": OPENAI})
    assert [row.turns for row in read_rows(path, rules=ReadRules(skip_bad=1), on_skip=lambda message: None)] == [TALK]


def test_a_conversation_that_is_missing_is_not_called_null(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": OPENAI}, {"id": 1}, {"messages": None})
    assert refusal(path) == ":2:1: the field 'messages' is missing; the row has 'id'"
    assert "'messages' must be a list of messages, got null" in refusal(path, skip_bad=1)
    asked = write(tmp_path, {"prompt": OPENAI[:-1], "id": 1})
    assert refusal(asked) == ":1:1: the field 'completion' is missing; the row has 'prompt', 'id'"


def test_numbers_and_surrogates_in_a_conversation_are_taken_as_the_rules_say(tmp_path: Path) -> None:
    path = write(tmp_path, turns(HI, ("assistant", 1.50)))
    assert read_rows(path, rules=ReadRules(numbers_as_text=True))[0].output == "1.5"
    path = write(tmp_path, turns(HI, ("assistant", "\ud800")))
    assert read_rows(path, rules=ReadRules(surrogates="replace"))[0].output == "\ufffd"


def test_a_question_alone_is_read_where_no_reply_is_needed(tmp_path: Path) -> None:
    for row in ({"instruction": "q"}, {"prompt": "q"}, turns(HI), {"prompt": [OPENAI[1]]}):
        [read] = read_rows(write(tmp_path, row), needs_reply=False)
        assert read.output == ""
        assert read.question in ("q", "hi", "Capital of Peru?")
    [row] = read_rows(write(tmp_path, {"prompt": "q", "response": "r"}), needs_reply=False)
    assert (row.kind, row.output) == ("instruction", "r")


def test_a_file_whose_first_row_has_a_reply_is_no_file_of_questions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=":2:1: the field 'response' or 'output' is missing"):
        read_rows(write(tmp_path, {"instruction": "q", "output": "a"}, {"instruction": "q"}), needs_reply=False)
    with pytest.raises(DataError, match=r":2:1: .* must end with the assistant"):
        read_rows(write(tmp_path, turns(HI, YES), turns(HI)), needs_reply=False)
    assert len(read_rows(write(tmp_path, turns(HI), turns(HI, YES)), needs_reply=False)) == 2


def test_answers_to_a_conversation_stand_in_their_own_field(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": OPENAI, "answer": "x"})
    with pytest.raises(DataError, match="the conversation must end with the user"):
        read_rows(path, output_key="answer")
    path = write(tmp_path, {"messages": OPENAI[:-1]})
    with pytest.raises(DataError, match="the field 'answer' is missing"):
        read_rows(path, output_key="answer")


def test_a_usual_name_of_a_reply_as_the_output_key_leaves_conversations_as_they_are(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path, {"messages": OPENAI}), output_key="output")[0].turns == TALK


def test_unused_keys_of_turns_are_named(tmp_path: Path) -> None:
    found: list[RowFields] = []
    said = [{**OPENAI[1], "name": "Ann", "tool_calls": None}, {**OPENAI[2], "weight": 0}]
    list(iter_rows(write(tmp_path, {"messages": said, "tools": []}), on_fields=found.append))
    assert list(found[0].unused) == ["messages[].name", "messages[].weight", "tools"]


def test_seven_files_of_seven_formats_and_several_kinds_hold_the_same_talks(tmp_path: Path) -> None:
    talks = [[("Capital of Peru?", "Lima"), (f"And {number}?", f"no {number}")] for number in range(20)]
    openai = [
        [
            {"role": role, "content": text}
            for pair in talk
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        for talk in talks
    ]
    sharegpt = [[{"from": SIDES[each["role"]], "value": each["content"]} for each in talk] for talk in openai]
    histories = [{"instruction": talk[1][0], "output": talk[1][1], "history": [list(talk[0])]} for talk in talks]
    lines = "".join(json.dumps({"conversations": talk}) + "\n" for talk in sharegpt).encode()
    cells = io.StringIO(newline="")
    csv.writer(cells).writerows([["messages"], *([json.dumps(talk)] for talk in openai)])
    contents = {
        "a.json": json.dumps([{"messages": talk} for talk in openai]).encode(),
        "b.jsonl": "".join(json.dumps(row) + "\n" for row in histories).encode(),
        "c.jsonl.gz": gzip.compress(lines),
        "d.jsonl.zst": pyarrow.compress(lines, "zstd", asbytes=True),
        "e.csv": cells.getvalue().encode(),
        "f.csv.gz": gzip.compress(cells.getvalue().encode()),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    table = {"prompt": [talk[:-1] for talk in openai], "completion": [talk[-1:] for talk in openai]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "g.parquet")
    wanted = [tuple(Turn(each["role"], each["content"]) for each in talk) for talk in openai]  # type: ignore[arg-type]
    for name in (*contents, "g.parquet"):
        assert [row.turns for row in read_rows(tmp_path / name)] == wanted, name


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("a.csv", "Instruction,Response\na,b\n", "--columns instruction=Instruction,response=Response"),
        ("b.csv", "instruction,Output\na,b\n", "--columns output=Output"),
        ("c.csv", "instruction, output\na,b\n", "spaces around ' output'"),
        ("d.csv", "instruction;output\na;b\n", "not semicolons"),
        ("e.csv", "instruction\toutput\na\tb\n", "not tabs"),
        ("f.csv", "messages\n\"[{'role': 'user', 'content': 'a'}]\"\n", "json.dumps"),
        ("g.jsonl", '{"Instruction": "a", "output": "b"}', "--columns instruction=Instruction"),
        ("h.jsonl", '{"instruction": "a", "output": "b", "history": ["c", "d"]}', '[["question", "answer"], ...]'),
        ("i.jsonl", '{"messages": {"role": "user"}}', 'messages is [{"role": "user"'),
        ("j.jsonl", '{"messages": [{"role": "user", "content": null}]}', 'write ""'),
        ("k.jsonl", '{"question": "a", "answer": "b"}', "--columns prompt=question,response=answer"),
    ],
)
def test_the_hint_of_a_row_that_is_no_row_says_how_to_write_it(
    tmp_path: Path, name: str, content: str, hint: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as refused:
        read_rows(tmp_path / name)
    assert hint in refused.value.hint


def test_a_developer_turn_is_the_system_turn_of_newer_exports(tmp_path: Path) -> None:
    messages = [{"role": "developer", "content": "Answer briefly."}, *OPENAI[1:]]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}))
    assert read_rows(tmp_path / "rows.jsonl")[0].turns == TALK
