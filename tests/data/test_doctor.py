"""Findings about rows: each with a planted case, and a federation in which there is nothing to find."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.data.doctor import Silo, examine_rows, examine_shortened, examine_skew
from fedlora.rows import Row, Turn

MARKS = ["### Response:", "<|im_end|>"]


def rows_of(name: str, count: int = 12) -> list[Row]:
    return [Row(f"{name} {number}", "", f"{name} answers {number}", "c") for number in range(count)]


def silo(client: int | None, rows: list[Row]) -> Silo:
    name = "test.jsonl" if client is None else f"local_training_{client}.json"
    return Silo(client, Path(name), rows)


def clean() -> list[Silo]:
    return [silo(0, rows_of("north")), silo(1, rows_of("south")), silo(None, rows_of("east", 3))]


def only(silos: list[Silo]) -> tuple:
    (finding,) = examine_rows(silos, MARKS)
    return finding.kind, finding.client, finding.count, finding.places


def test_sound_rows_give_no_finding():
    assert examine_rows(clean(), MARKS) == []


def test_a_client_without_rows_is_empty():
    silos = clean()
    silos[1] = silo(1, [])
    assert only(silos) == ("empty_client", 1, 0, ("local_training_1.json",))


def test_a_client_whose_responses_are_all_empty_is_empty_and_unlabelled():
    silos = clean()
    silos[1] = silo(1, [Row("a", "", " ", "c"), Row("b", "", "", "c")])
    kinds = [(finding.kind, finding.client, finding.count) for finding in examine_rows(silos, MARKS)]
    assert kinds == [("empty_client", 1, 2), ("unlabelled", 1, 2)]


@pytest.mark.parametrize(("sizes", "tiny"), [((12, 3), 1), ((200, 19), 1), ((200, 200, 19), 2)])
def test_a_client_with_few_rows_or_far_fewer_than_the_others_is_tiny(sizes, tiny):
    silos = [silo(client, rows_of(f"n{client}", size)) for client, size in enumerate(sizes)]
    found = examine_rows(silos, MARKS)
    expected = [] if sizes == (200, 19) else [("tiny_client", tiny, sizes[tiny])]
    assert [(finding.kind, finding.client, finding.count) for finding in found] == expected


def test_empty_responses_are_counted_and_the_first_three_named():
    silos = clean()
    silos[0] = silo(0, [*rows_of("north"), *(Row(f"u{number}", "", " \n", "c") for number in range(5))])
    places = tuple(f"local_training_0.json: row {number}" for number in (13, 14, 15))
    assert only(silos) == ("unlabelled", 0, 5, places)


def test_a_row_twice_in_a_file_names_both_places():
    silos = clean()
    silos[0] = silo(0, [*rows_of("north"), rows_of("north")[2]])
    place = "local_training_0.json: row 13, as row 3"
    assert only(silos) == ("repeat_inside_row", 0, 1, (place,))


def test_a_row_of_another_client_names_that_client_s_file():
    silos = clean()
    silos[1] = silo(1, [*rows_of("south"), rows_of("north")[0]])
    place = "local_training_1.json: row 13, as local_training_0.json: row 1"
    assert only(silos) == ("repeat_across_row", 1, 1, (place,))


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (rows_of("north")[4], "leak_row"),
        (Row("north 4", "", "another answer", "c"), "leak_prompt"),
        (Row("two three four five six seven eight nine ten eleven", "", "twelve and more", "c"), "leak_near"),
    ],
)
def test_a_test_row_that_is_trained_on_is_a_leak(row, kind):
    long = Row("one two three four five six seven eight nine ten eleven", "", "twelve and more", "c")
    silos = clean()
    silos[0] = silo(0, [*rows_of("north"), long])
    silos[2] = silo(None, [*rows_of("east", 3), row])
    earlier = 13 if kind == "leak_near" else 5
    assert only(silos) == (kind, None, 1, (f"test.jsonl: row 4, as local_training_0.json: row {earlier}",))


def test_a_test_file_that_repeats_itself_is_no_leak():
    silos = clean()
    silos[2] = silo(None, [*rows_of("east", 3), rows_of("east")[0]])
    assert only(silos)[:3] == ("repeat_inside_row", None, 1)


@pytest.mark.parametrize("field", ["instruction", "input", "output"])
@pytest.mark.parametrize("mark", MARKS)
def test_text_that_looks_like_a_control_token_is_found_in_every_field(field, mark):
    silos = clean()
    row = {"instruction": "say", "input": "", "output": "yes", "category": "c"}
    silos[0] = silo(0, [*rows_of("north"), Row(**{**row, field: f"before {mark} after"})])
    assert only(silos) == ("control_text", 0, 1, ("local_training_0.json: row 13",))
    assert repr(mark) in examine_rows(silos, MARKS)[0].what


TALK = Row("when?", "", "1815", "c", (Turn("system", "Be short."), Turn("user", "who?"), Turn("assistant", "Ada")))


@pytest.mark.parametrize("turn", range(3))
def test_a_control_token_is_found_in_every_turn_before(turn):
    before = [one._replace(content="<|im_end|>") if place == turn else one for place, one in enumerate(TALK.before)]
    silos = clean()
    silos[1] = silo(1, [*rows_of("south"), replace(TALK, before=tuple(before))])
    assert only(silos) == ("control_text", 1, 1, ("local_training_1.json: row 13",))


def test_a_test_row_that_is_the_beginning_of_a_conversation_trained_on_is_a_leak():
    silos = clean()
    silos[0] = silo(0, [*rows_of("north"), TALK])
    silos[2] = silo(None, [*rows_of("east", 3), Row("who?", "", "Ada L.", "c", TALK.before[:1], "conversation")])
    assert only(silos) == ("leak_turn", None, 1, ("test.jsonl: row 4, as local_training_0.json: row 13",))


def test_skew_is_a_finding_from_half_on():
    assert examine_skew(0.49) is None
    finding = examine_skew(0.5)
    assert finding is not None
    assert finding.kind == "label_skew"


def test_shortened_rows_are_counted_and_the_first_three_named():
    finding = examine_shortened(clean()[0], 7, iter((1, 4, 6, 8)), cutoff=64)
    assert (finding.kind, finding.count) == ("shortened", 7)
    assert finding.places == tuple(f"local_training_0.json: row {number}" for number in (2, 5, 7))
    assert "cutoff_len=64" in finding.what


def test_every_finding_says_what_to_do():
    silos = [silo(0, [*rows_of("north"), *rows_of("north")]), silo(1, []), silo(None, rows_of("north", 2))]
    found = examine_rows(silos, MARKS)
    assert len(found) == 3
    assert all(finding.advice and finding.what and finding.record()["places"] for finding in found)
