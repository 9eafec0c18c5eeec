"""Reading rows: what is taken, what is refused, and where the message points."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.data.records import read_rows
from fedlora.errors import DataError, UsageError
from fedlora.rows import Row

GOOD = '{"instruction": "i", "input": "x", "output": "o", "category": "c"}'
DOLLY = '{"instruction": "i", "context": "x", "response": "o", "category": "c", "id": 7}'
ROW = Row("i", "x", "o", "c")


def _file(folder: Path, content: str | bytes, name: str = "rows.json") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    "content",
    [
        f"{GOOD}\n{DOLLY}\n",
        f"{GOOD}\n{DOLLY}",
        f"\n\n{GOOD}\n   \n{DOLLY}\n\n",
        f"{GOOD}\r\n\r\n{DOLLY}\r\n",
        f"\ufeff{GOOD}\n{DOLLY}\n",
        f"[{GOOD},{DOLLY}]",
        f"\ufeff\r\n [\r\n{GOOD}\r\n,\r\n{DOLLY}\r\n]\r\n",
        json.dumps([json.loads(GOOD), json.loads(DOLLY)], indent=4),
    ],
)
def test_arrays_and_lines_of_both_schemas_give_the_same_rows(tmp_path: Path, content: str) -> None:
    assert read_rows(_file(tmp_path, content)) == [ROW, ROW]


def test_input_and_category_may_be_absent(tmp_path: Path) -> None:
    assert read_rows(_file(tmp_path, '{"instruction": "i", "output": "o"}')) == [Row("i", "", "o", "")]


def test_an_output_key_is_taken_exactly(tmp_path: Path) -> None:
    path = _file(tmp_path, '{"instruction": "i", "output": "no", "response": "neither", "answer": "yes"}')
    assert read_rows(path, output_key="answer")[0].output == "yes"
    assert read_rows(path, output_key="output")[0].output == "no"
    with pytest.raises(DataError, match=r"rows.json:1:1: the field 'target' is missing"):
        read_rows(path, output_key="target")


def _field(name: str, value: str) -> str:
    fields = {"instruction": '"i"', "input": '"x"', "output": '"o"', "category": '"c"', name: value}
    return "{" + ", ".join(f'"{key}": {text}' for key, text in fields.items()) + "}"


LINE_FAULTS = [
    ("{'instruction': 1}", 2, "not valid JSON"),
    (GOOD[:-1], len(GOOD), "not valid JSON"),
    (GOOD + ",", len(GOOD) + 1, "text after the end of the row"),
    (GOOD + " " + GOOD, len(GOOD) + 2, "text after the end of the row"),
    ("  " + _field("score", "NaN"), 3, "NaN is not valid JSON"),
    (_field("score", "-Infinity"), 1, "-Infinity is not valid JSON"),
    (_field("score", "7" * 5000), 1, "a number of 5000 digits"),
    (_field("score", "[" * 200_000), 1, "nested too deeply"),
    (GOOD[:-1] + ', "output": "again"}', 1, "the key 'output' is given twice"),
    ('{"input": "x", "output": "o"}', 1, "the field 'instruction' is missing"),
    ('{"instruction": "i", "input": "x"}', 1, "the field 'response' or 'output' is missing"),
    (_field("instruction", "null"), 1, "the field 'instruction' must be text, got null"),
    (_field("output", "7"), 1, "the field 'output' must be text, got a number"),
    (_field("output", "true"), 1, "the field 'output' must be text, got true or false"),
    (_field("category", '["c"]'), 1, "the field 'category' must be text, got a list"),
    (_field("instruction", '{"a": 1}'), 1, "the field 'instruction' must be text, got an object"),
    (_field("response", '"other"'), 1, "the fields 'response' and 'output' differ"),
    (_field("context", '"other"'), 1, "the fields 'context' and 'input' differ"),
    (_field("output", '"\\ud800"'), 1, "half a surrogate pair (\\ud800)"),
    (_field("instruction", '"a\tb"'), 19, "not valid JSON"),
    ('"just text"', 1, "expected a JSON object, got text"),
    ("[1]", 1, "expected a JSON object, got a list"),
]


def test_a_broken_line_is_named_by_file_line_and_column(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for fault, column, what in LINE_FAULTS:
        with subtests.test(what):
            path = _file(tmp_path, f"{GOOD}\r\n\n{GOOD}\n{fault}\n{GOOD}\n")
            with pytest.raises(DataError) as caught:
                read_rows(path)
            first, excerpt = str(caught.value).split("\n")
            assert first.startswith(f"{path}:4:{column}: ")
            assert what in first
            assert excerpt.strip()[:30] in fault.replace("\t", "\\t")
            assert caught.value.exit_code == 3
            assert caught.value.hint


ARRAY_FAULTS = [
    (f"[\n{GOOD},\n{GOOD}\n{GOOD}\n]", 4, 1, "expected ',' or ']'"),
    (f"[\n{GOOD},\n\n  7\n]", 4, 3, "expected a JSON object, got a number"),
    (f"[\n{GOOD},\n]", 3, 1, "not valid JSON"),
    (f"[\n{GOOD}\n", 3, 1, "expected ',' or ']'"),
    (f"[\n{GOOD}\n]\nmore", 4, 1, "text after the end of the array"),
    (f'[\n  {GOOD},\n  {{\n    "instruction": "i",\n    "output": 3\n  }}\n]', 3, 3, "'output' must be text"),
    (f"[{GOOD}, {_field('input', '0')}]", 1, len(GOOD) + 4, "'input' must be text"),
    ("[]", 1, 1, "holds no rows"),
    ("", 1, 1, "the file is empty"),
    (" \r\n\n", 1, 1, "the file is empty"),
]


@pytest.mark.parametrize(("content", "line", "column", "what"), ARRAY_FAULTS)
def test_a_broken_array_is_named_by_file_line_and_column(
    tmp_path: Path, content: str, line: int, column: int, what: str
) -> None:
    path = _file(tmp_path, content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:{line}:{column}: ")
    assert what in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe{\x00", b"\x80\x04pickle", GOOD.encode() + b"\n\xc3\xa4\xff"])
def test_what_is_not_utf8_is_refused_with_its_place(tmp_path: Path, content: bytes) -> None:
    path = _file(tmp_path, content)
    place = "2:2" if content.startswith(b"{") else "1:1"
    with pytest.raises(DataError, match=rf"rows.json:{place}: not UTF-8 text"):
        read_rows(path)


def test_the_excerpt_is_short_and_shows_the_row_of_a_one_line_array(tmp_path: Path) -> None:
    path = _file(tmp_path, f"[{GOOD}, {_field('output', '1')[:-1]}, " + '"long": "' + "z" * 500 + '"}]')
    with pytest.raises(DataError) as caught:
        read_rows(path)
    excerpt = str(caught.value).split("\n")[1].strip()
    assert excerpt.startswith('{"instruction": "i", "input": "x", "output": 1')
    assert len(excerpt) <= 80


def test_control_characters_of_a_broken_line_never_reach_the_terminal(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(_file(tmp_path, '{"instruction": "\x1b[31m\u202e"'))
    assert "\x1b" not in str(caught.value)
    assert "\\x1b[31m\\u202e" in str(caught.value)


def test_a_category_can_be_required(tmp_path: Path) -> None:
    missing = _file(tmp_path, f'{GOOD}\n{{"instruction": "i", "output": "o"}}')
    with pytest.raises(DataError, match=r":2:1: the field 'category' is missing"):
        read_rows(missing, require_category=True)
    empty = _file(tmp_path, _field("category", '" "'))
    with pytest.raises(DataError, match=r":1:1: the field 'category' is empty"):
        read_rows(empty, require_category=True)


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_rows(tmp_path / "absent.json")


@given(st.text(st.characters(exclude_categories=["Cs"])), st.booleans(), st.booleans())
def test_text_comes_back_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, text: str, array: bool, ascii_only: bool
) -> None:
    row = {"instruction": text, "input": "2024-01-31", "output": "007", "category": text}
    content = json.dumps([row] if array else row, ensure_ascii=ascii_only)
    path = _file(tmp_path_factory.getbasetemp(), content, "any.json")
    assert read_rows(path) == [Row(text, "2024-01-31", "007", text)]
