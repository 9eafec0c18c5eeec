"""Words of any script."""

from __future__ import annotations

import pytest

from fedlora.data.words import split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat's MAT, x_y 42.", ["the", "cat", "s", "mat", "x_y", "42"]),
        ("\u5317\u4eac is \u5927!", ["\u5317", "\u4eac", "is", "\u5927"]),
        # fullwidth letters and halfwidth kana are the usual ones; the dot between is no word
        ("\uff21\uff11 \uff76\uff9e\u30fb\u30a2", ["a1", "\u30ac", "\u30a2"]),
        ("\u0e01\u0e31\u0e1a", ["\u0e01", "\u0e31", "\u0e1a"]),
        ("\u1794\u17d2\u179a\u17d4", ["\u1794", "\u17d2", "\u179a"]),
        ("\U00020000\U00020001", ["\U00020000", "\U00020001"]),
        ("Stra\u00dfe \u041c\u043e\u0441\u043a\u0432\u0430", ["strasse", "\u043c\u043e\u0441\u043a\u0432\u0430"]),
        ("\ud55c\uad6d\uc5b4 \ub9d0", ["\ud55c\uad6d\uc5b4", "\ub9d0"]),
    ],
)
def test_words_are_runs_of_letters_and_single_characters_without_spaces(text: str, words: list[str]) -> None:
    assert split_words(text) == words


@pytest.mark.parametrize("word", ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u0645\u064e\u062f\u0650\u064a\u0646\u0629"])
def test_vowel_signs_and_diacritics_cut_no_word(word: str) -> None:
    assert split_words(f"{word}, {word}") == [word, word]


def test_notation_makes_no_difference() -> None:
    assert split_words("caf\u00e9 \ufb01n") == split_words("cafe\u0301 fin")
