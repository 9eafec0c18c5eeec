"""Predictions find their rows by content; whatever does not fit is named."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from fedlora.errors import DataError, UsageError
from fedlora.evaluation.matching import pair_rows, read_predictions
from fedlora.rows import Row, Turn


def row(instruction: str, output: str = "", *, input: str = "", category: str = "x") -> Row:
    return Row(instruction, input, output, category)


def pair(predictions: list[Row], targets: list[Row]) -> list[tuple[str, str]]:
    pairs = pair_rows(predictions, targets, predictions_name="p.jsonl", targets_name="t.jsonl")
    return [(prediction.output, target.output) for prediction, target in pairs]


def test_the_order_of_the_predictions_does_not_matter() -> None:
    targets = [row(f"task {i}", f"target {i}", input=str(i % 3)) for i in range(50)]
    predictions = [row(f"task {i}", f"answer {i}", input=str(i % 3)) for i in range(50)]
    random.Random(3).shuffle(predictions)
    assert pair(predictions, targets) == [(f"answer {i}", f"target {i}") for i in range(50)]


def test_the_same_instruction_with_another_input_is_another_prompt() -> None:
    targets = [row("sort", "1", input="a"), row("sort", "2", input="b")]
    assert pair([row("sort", "B", input="b"), row("sort", "A", input="a")], targets) == [("A", "1"), ("B", "2")]


def test_the_kth_answer_to_a_prompt_pairs_with_its_kth_row() -> None:
    targets = [row("q", "1"), row("other", "o"), row("q", "2"), row("q", "3")]
    predictions = [row("q", "A"), row("q", "B"), row("q", "C"), row("other", "O")]
    assert pair(predictions, targets) == [("A", "1"), ("O", "o"), ("B", "2"), ("C", "3")]


def test_answers_to_the_same_last_turn_find_the_conversation_they_belong_to() -> None:
    before = [(Turn("user", "who?"), Turn("assistant", name)) for name in ("Ada", "Alan")]
    targets = [Row("when?", "", year, "x", turns, "conversation") for turns, year in zip(before, "12", strict=True)]
    targets.append(row("when?", "3"))
    predictions = [Row("when?", "", answer, "x", turns) for turns, answer in zip(reversed(before), "BA", strict=True)]
    assert pair([row("when?", "C"), *predictions], targets) == [("A", "1"), ("B", "2"), ("C", "3")]
    with pytest.raises(DataError, match='1 of 3 rows have no prediction: "when\\?"'):
        pair(predictions, targets)


def test_missing_rows_are_counted_and_the_first_three_named() -> None:
    targets = [row(f"task {i}") for i in range(6)]
    with pytest.raises(DataError) as caught:
        pair([row("task 1")], targets)
    message = str(caught.value)
    assert message.startswith("p.jsonl does not match t.jsonl: 5 of 6 rows have no prediction: ")
    assert '"task 0", "task 2", "task 3", ...' in message
    assert "task 4" not in message


def test_surplus_predictions_are_counted_and_named_even_when_the_prompt_is_known() -> None:
    with pytest.raises(DataError, match=r'2 of 4 predictions have no row: "q", "stranger"$'):
        pair([row("q", "A"), row("q", "B"), row("stranger"), row("r")], [row("q"), row("r")])


def test_equal_counts_of_other_rows_are_no_match() -> None:
    with pytest.raises(DataError, match=r'1 of 2 rows have no prediction: "b"; 1 of 2 predictions have no row: "c"'):
        pair([row("a"), row("c")], [row("a"), row("b")])


def test_another_category_is_named_with_both_names() -> None:
    targets = [row("a", category="sums"), row("b", category="dates")]
    predictions = [row("a", category="sums"), row("b", category="units")]
    with pytest.raises(DataError, match=r"1 of 2 rows have another category: \"b\" \('units' against 'dates'\)"):
        pair(predictions, targets)


def test_long_prompts_and_control_characters_are_shortened_and_escaped() -> None:
    with pytest.raises(DataError) as caught:
        pair([], [row("\x1b[31m" + "word\n" * 100, input="in")])
    message = str(caught.value)
    assert "\x1b" not in message
    assert "\n" not in message
    assert len(message) < 200


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_predictions_are_read_with_the_answer_under_the_key_that_is_asked_for(tmp_path: Path) -> None:
    fields = {"instruction": "q", "input": "i", "answer": " a ", "category": "c"}
    path = write_lines(tmp_path / "p.jsonl", json.dumps(fields), json.dumps({**fields, "second": "b"}))
    assert read_predictions(path, "answer") == [Row("q", "i", " a ", "c")] * 2
    with pytest.raises(DataError, match=r"p\.jsonl:1:1: the field 'second' is missing"):
        read_predictions(path, "second")


def test_a_broken_prediction_is_named_with_file_and_line(tmp_path: Path) -> None:
    fine = json.dumps({"instruction": "q", "input": "", "answer": "a", "category": "c"})
    with pytest.raises(DataError, match=r"p\.jsonl:2:") as caught:
        read_predictions(write_lines(tmp_path / "p.jsonl", fine, '{"instruction": "q",'), "answer")
    assert "answer" in caught.value.hint
    with pytest.raises(DataError, match=r"p\.jsonl:2:1: the field 'answer' must be text"):
        read_predictions(write_lines(tmp_path / "p.jsonl", fine, fine.replace('"a"', "7")), "answer")


def test_missing_predictions_are_a_usage_error_that_names_generate(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.jsonl") as caught:
        read_predictions(tmp_path / "none.jsonl", "answer")
    assert "fedlora generate" in caught.value.hint
