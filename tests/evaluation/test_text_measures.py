"""Exact match, token F1 and chrF against numbers worked out by hand and those of sacrebleu 2.6.0."""

from __future__ import annotations

import pytest

from fedlora.evaluation.text_measures import chrf, is_same, normalise, token_f1

MOSCOW = "\u041c\u043e\u0441\u043a\u0432\u0430"
CAPITAL = "\u0441\u0442\u043e\u043b\u0438\u0446\u0430"
SACREBLEU = [
    ("the cat sat on the mat", "the cat is on the mat", 0.645779420625287),
    ("Paris", "Paris", 1.0),
    ("", "Paris", 0.0),
    ("Paris", "", 0.0),
    ("a", "ab", 0.5555555555555556),
    ("ab", "ba", 0.5),
    ("colour of magic", "color of magic", 0.7029372162308857),
    (f"{MOSCOW} {CAPITAL}", f"{MOSCOW} - {CAPITAL}", 0.6772478480142464),
    ("\u5317\u4eac\u5927\u5b66", "\u5317\u4eac", 0.78125),
    ("The sum is 6.", "the sum is 5.", 0.5938492063492063),
    ("  spaced   out ", "spaced out", 1.0),
    ("abcdefgh", "xyz", 0.0),
]


@pytest.mark.parametrize(("answer", "target", "value"), SACREBLEU)
def test_chrf_is_the_number_of_sacrebleu(answer: str, target: str, value: float) -> None:
    assert chrf(answer, target) == pytest.approx(value, abs=1e-12)


def test_chrf_counts_recall_twice() -> None:
    # characters: P = 1/1, R = 1/2, and no pairs: 5 * 0.5 / (4 * 1 + 0.5)
    assert chrf("a", "ab") == pytest.approx(5 / 9)
    # the other way round P = 1/2, R = 1: 5 * 0.5 / (4 * 0.5 + 1)
    assert chrf("ab", "a") == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("answer", "target", "value"),
    [
        ("the cat sat", "the cat", 4 / 5),
        ("the the cat", "the cat cat", 4 / 6),
        ("Paris!", "paris", 1.0),
        ("London", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("", "", 1.0),
        (MOSCOW, f"{MOSCOW} {CAPITAL}", 2 / 3),
        ("\u5317\u4eac", "\u5317\u6d77", 1 / 2),
    ],
)
def test_token_f1_counts_the_words_that_both_have(answer: str, target: str, value: float) -> None:
    assert token_f1(answer, target) == pytest.approx(value)
    assert token_f1(target, answer) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (" The  Eiffel\nTower. ", "the eiffel tower"),
        ("e-mail, don't!", "e mail don t"),
        ("-5 - 3.5", "-5 3 5"),
        ("$5 + 1", "$5 + 1"),
        ("Stra\u00dfe \u300c\uff21\u300d", "strasse a"),
        ("?!", ""),
    ],
)
def test_normalising_leaves_words_numbers_and_articles(text: str, normal: str) -> None:
    assert normalise(text) == normal


def test_normalised_texts_are_the_same_where_only_case_and_punctuation_differ() -> None:
    assert is_same("paris.", "Paris")
    assert not is_same("a Paris", "Paris")
    assert not is_same("-5", "5")
    assert not is_same("35", "3.5")
    assert is_same("?", " ?")
    assert not is_same("!", "?")
