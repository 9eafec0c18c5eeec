"""Repeated rows: exact ones by what they say, near ones by a similarity that brute force confirms."""

from __future__ import annotations

import random

import pytest

from fedlora.data import duplicates
from fedlora.data.duplicates import NEAR, find_repeats
from fedlora.data.words import split_words
from fedlora.rows import Row, Turn


def row(instruction: str, output: str = "yes", input: str = "") -> Row:
    return Row(instruction, input, output, "c")


def found(*sources: list[Row]) -> list[tuple]:
    return [(r.kind, r.scope, r.source, r.row, r.first_source, r.first_row) for r in find_repeats(sources)]


def sentence(draw: random.Random, words: int = 40, vocabulary: int = 3000) -> list[str]:
    return [f"w{draw.randrange(vocabulary)}" for _ in range(words)]


def triples(text: str) -> set[tuple[str, ...]]:
    words = split_words(text)
    return set(zip(words, words[1:], words[2:], strict=False))


def test_rows_that_differ_repeat_nothing():
    assert found([row("a"), row("b")], [row("c"), row("d", "other")]) == []


def test_an_equal_row_names_the_first_of_its_own_file_and_of_another():
    assert found([row("a"), row("b"), row("a")], [row("a")]) == [
        ("row", "inside", 0, 2, 0, 0),
        ("row", "across", 1, 0, 0, 0),
    ]


def test_case_white_space_and_unicode_notation_make_no_difference():
    assert found([row("Caf\u00e9  au\nlait", "Yes ")], [row("cafe\u0301 au lait", "yes")]) == [
        ("row", "across", 1, 0, 0, 0)
    ]


def test_numbers_and_signs_do_make_one():
    assert found([row("2 + 2"), row("2 - 2"), row("2 + 3")]) == []


def test_a_prompt_with_another_response_is_told_from_an_equal_row():
    assert found([row("a", "one")], [row("a", "two"), row("a", "one")]) == [
        ("prompt", "across", 1, 0, 0, 0),
        ("row", "across", 1, 1, 0, 0),
        ("prompt", "inside", 1, 1, 1, 0),
    ]


def test_the_border_of_instruction_and_input_counts():
    assert found([row("a b", input="c"), row("a", input="b c")]) == []


def talk(*texts: str, system: str = "") -> Row:
    """A conversation of user and assistant in turn, which ends with the assistant."""
    turns = [Turn("assistant" if place % 2 else "user", text) for place, text in enumerate(texts)]
    head = [Turn("system", system)] if system else []
    return Row(texts[-2], "", texts[-1], "c", tuple(head + turns[:-2]), "conversation")


def test_a_conversation_of_one_exchange_repeats_an_instruction_with_the_same_text():
    assert found([row("a")], [talk("A", "yes")]) == [("row", "across", 1, 0, 0, 0)]
    assert found([row("a")], [talk("a", "no")]) == [("prompt", "across", 1, 0, 0, 0)]
    assert found([row("a")], [talk("a", "yes", system="Be short.")]) == []


def test_conversations_that_end_alike_differ_by_what_was_said_before():
    first = talk("who?", "Ada", "when?", "1815")
    assert found([first], [talk("who?", "Alan", "when?", "1912")]) == []
    assert found([first], [talk("who?", "Ada", "when?", "1815")]) == [("row", "across", 1, 0, 0, 0)]


def test_the_beginning_of_a_conversation_and_the_conversation_repeat_each_other():
    long = talk("who?", "Ada", "when?", "1815", "where?", "London", system="Be short.")
    assert found([long], [talk("who?", "Ada", "when?", "1816", system="be short.")]) == [("turn", "across", 1, 0, 0, 0)]
    assert found([long], [talk("who?", "Ada", system="Be short."), talk("when?", "1815")]) == [
        ("turn", "across", 1, 0, 0, 0)
    ]
    assert found([talk("who?", "Ada")], [talk("who?", "Ada", "when?", "1815")]) == [("turn", "across", 1, 0, 0, 0)]
    grows = [talk("who?", "Ada"), talk("who?", "Ada", "when?", "1815"), talk("who?", "Ada", "when?", "1815", "a", "b")]
    assert found(grows) == [("turn", "inside", 0, 1, 0, 0), ("turn", "inside", 0, 2, 0, 0)]
    assert found([talk("Hello", "Hi", "who?", "Ada")], [talk("Hello", "Hi", "when?", "1815")]) == []


def test_texts_repeat_by_their_text_and_are_near_by_its_words():
    text = " ".join(sentence(random.Random(1)))
    rows = [Row("", "", one, "c", kind="text") for one in (text, text.upper(), f"{text} more", "other")]
    assert found(rows) == [("row", "inside", 0, 1, 0, 0), ("near", "inside", 0, 2, 0, 0)]


def test_the_words_of_all_turns_count_for_nearness():
    parts = [" ".join(sentence(random.Random(seed), 20)) for seed in range(4)]
    assert found([talk(*parts)], [talk(*parts[:3], f"{parts[3]} more")]) == [("prompt", "across", 1, 0, 0, 0)]
    assert found([talk(*parts)], [talk(*parts[:2], f"{parts[2]} more", parts[3])]) == [("near", "across", 1, 0, 0, 0)]
    assert found([talk(*parts)], [talk("a", "b", *parts[2:])]) == []


def test_all_planted_near_repeats_are_found_and_nothing_else():
    draw = random.Random(1)
    texts = [sentence(draw) for _ in range(400)]
    planted = {}
    for number in range(0, 400, 4):
        copy = list(texts[number])
        # the last word changes one triple of 38: similarity 37/39
        copy[-1] = "changed"
        planted[number] = copy
    sources = [[row(" ".join(text)) for text in texts], [row(" ".join(copy)) for copy in planted.values()]]
    repeats = find_repeats(sources)
    assert {(r.kind, r.scope) for r in repeats} == {("near", "across")}
    assert [(r.row, r.first_row) for r in repeats] == list(enumerate(planted))


@pytest.mark.parametrize("seed", range(4))
def test_near_means_what_brute_force_finds_at_every_degree_of_change(seed):
    draw = random.Random(seed)
    # few words and small edits, so that similarities lie on both sides of the border
    texts = []
    for _ in range(40):
        text = sentence(draw, draw.randrange(10, 60), 60)
        texts.append(text)
        for _ in range(4):
            text = list(text)
            text[draw.randrange(len(text))] = f"w{draw.randrange(60)}"
            texts.append(text)
    rows = [row(" ".join(text), "") for text in texts]
    sets = [triples(one.instruction) for one in rows]
    expected, settled = set(), {(r.row) for r in find_repeats([rows]) if r.kind != "near"}
    for number, mine in enumerate(sets):
        close = any(len(mine & other) >= NEAR * len(mine | other) for other in sets[:number])
        if close and number not in settled:
            expected.add(number)
    assert {r.row for r in find_repeats([rows]) if r.kind == "near"} == expected
    assert 10 < len(expected) < len(rows) - 10


def test_what_is_found_is_really_that_similar():
    draw = random.Random(5)
    rows = [row(" ".join(sentence(draw, 30, 40)), "") for _ in range(300)]
    rows += [row(one.instruction + " more", "") for one in rows[:50]]
    for repeat in find_repeats([rows]):
        one, other = (triples(rows[number].instruction) for number in (repeat.row, repeat.first_row))
        assert len(one & other) >= NEAR * len(one | other)


def test_short_rows_are_never_near():
    assert found([row("name a fish", "tope"), row("name a fish please", "tope")]) == []


def test_characters_are_words_where_no_spaces_are_written():
    assert split_words("\u5317\u4eac is \u5927!") == ["\u5317", "\u4eac", "is", "\u5927"]
    text = "".join(chr(0x4E00 + number) for number in range(60))
    assert found([row(text, "\u5927")], [row(text[:-1], "\u5927")]) == [("near", "across", 1, 0, 0, 0)]


def test_the_result_does_not_depend_on_what_other_rows_there_are():
    draw = random.Random(2)
    base = sentence(draw)
    pair = [row(" ".join(base)), row(" ".join([*base[:-1], "else"]))]
    noise = [row(" ".join(sentence(draw))) for _ in range(500)]
    assert found(pair)[0][:4] == ("near", "inside", 0, 1)
    assert found([*pair, *noise])[0][:4] == ("near", "inside", 0, 1)


def test_a_fixed_instruction_does_not_take_quadratic_time(monkeypatch):
    draw = random.Random(3)
    fixed = " ".join(sentence(draw, 100))
    rows = [row(fixed, "yes", " ".join(sentence(draw, 15, 10**6))) for _ in range(300)]
    compared = 0
    is_near = duplicates._Triples.is_near

    def counted(self, one, other):
        nonlocal compared
        compared += 1
        return is_near(self, one, other)

    monkeypatch.setattr(duplicates, "MOST_TRIES", 20)
    monkeypatch.setattr(duplicates._Triples, "is_near", counted)
    assert find_repeats([rows]) == []
    assert len(rows) < compared <= 20 * len(rows)


def test_no_rows_at_all_repeat_nothing():
    assert find_repeats([]) == find_repeats([[], []]) == []
