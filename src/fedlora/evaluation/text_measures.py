"""Measures of one answer against its target beside ROUGE, in any script; each in 0..1."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from fedlora.data.words import fold, split_words

CHRF_ORDER, CHRF_BETA = 6, 2
_MINUS = re.compile(r"(?<!\w)-(?=\d)")


def normalise(text: str) -> str:
    """`text` without case, punctuation and differences in white space and Unicode notation.

    Punctuation separates, as white space does; a minus before a number stays, and articles do.
    """
    folded = fold(text)
    signs = {found.start() for found in _MINUS.finditer(folded)}
    kept = [
        " " if unicodedata.category(letter)[0] == "P" and place not in signs else letter
        for place, letter in enumerate(folded)
    ]
    return " ".join("".join(kept).split())


def is_same(answer: str, target: str) -> bool:
    """Whether both are the same text once normalised; texts of punctuation alone are compared as they are."""
    wanted = normalise(target)
    return normalise(answer) == wanted if wanted else answer.strip() == target.strip()


def token_f1(answer: str, target: str) -> float:
    """F1 of the words that both have, each as often as both have it (as SQuAD does, 1606.05250, but with articles).

    Two texts without a word score 1.
    """
    said, wanted = split_words(answer), split_words(target)
    if not said or not wanted:
        return float(not said and not wanted)
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted))


def chrf(answer: str, target: str) -> float:
    """chrF2 (Popovic 2015, W15-3049): precision and recall of character n-grams without white space, n from 1 to 6,
    averaged over the lengths that both texts have, and their F with recall counted twice.

    The number of sacrebleu's `sentence_chrf`, divided by 100.
    """
    said, wanted = _ngrams_of(answer), _ngrams_of(target)
    found = [
        (shared / mine.total(), shared / theirs.total())
        for mine, theirs in zip(said, wanted, strict=True)
        if mine and theirs
        for shared in [(mine & theirs).total()]
    ]
    if not found:
        return 0.0
    precision, recall = (sum(column) / len(found) for column in zip(*found, strict=True))
    if not precision + recall:
        return 0.0
    return (1 + CHRF_BETA**2) * precision * recall / (CHRF_BETA**2 * precision + recall)


def _ngrams_of(text: str) -> tuple[Counter[str], ...]:
    letters = "".join(text.split())
    return tuple(
        Counter(letters[start : start + length] for start in range(len(letters) - length + 1))
        for length in range(1, CHRF_ORDER + 1)
    )
