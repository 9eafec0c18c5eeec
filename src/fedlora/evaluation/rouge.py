"""ROUGE and exact match of answers, per category and overall.

The numbers are those of the rouge-score package (F1, no stemmer), averaged per category; "overall" is the plain
mean over the categories, so a category counts the same whatever its size. rouge-score's tokenizer keeps a to z and
0 to 9 alone: two equal texts in Cyrillic or Chinese score 0, and two that share nothing but a year score 1. Texts of
which it keeps less than half are counted, so that the number is not taken for ROUGE; the tokenizer `unicode` reads any
script. Exact match ignores white space at both ends of answer and target, and nothing else.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from fedlora.config.evaluate import RougeTokenizer
from fedlora.data.words import split_words
from fedlora.errors import DataError

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
RESERVED_CATEGORIES = ("overall", "fedlora")
"""Keys of the result file beside the categories."""


@dataclass(frozen=True)
class AnswerScore:
    """One answer against its target: F1 per metric in 0..1, whether both are the same text, and of which of them the
    tokenizer keeps less than half."""

    category: str
    rouge: Mapping[str, float]
    exact: bool
    hides_target: bool = False
    hides_answer: bool = False


class _WordTokenizer(Tokenizer):
    """Words of any script, for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


class AnswerScorer:
    """Scores answers one by one; holds the tokenizer of ROUGE."""

    def __init__(self, tokenizer: RougeTokenizer = "ascii") -> None:
        self._tokenizer = DefaultTokenizer(use_stemmer=False) if tokenizer == "ascii" else _WordTokenizer()
        self._rouge = RougeScorer(list(METRICS), tokenizer=self._tokenizer)

    def score(self, answer: str, target: str, category: str) -> AnswerScore:
        scores = self._rouge.score(target, answer)
        values = {metric: float(scores[metric].fmeasure) for metric in METRICS}
        exact = answer.strip() == target.strip()
        return AnswerScore(category, values, exact, self._hides(target), self._hides(answer))

    def _hides(self, text: str) -> bool:
        """Whether the tokenizer keeps nothing of a text, or less than half of its letters. Digits do not count: the
        year alone is kept of a sentence in Chinese."""
        kept = "".join(self._tokenizer.tokenize(text))
        letters = sum(map(str.isalpha, unicodedata.normalize("NFC", text)))
        return bool(text.strip()) and (not kept or 2 * sum(map(str.isalpha, kept)) < letters)


def check_categories(categories: Sequence[str], where: str) -> None:
    """DataError when a category has a name that the result file needs for itself."""
    for name in RESERVED_CATEGORIES:
        if name in categories:
            raise DataError(
                f"{where}: a category is named {name!r}",
                hint="rename the category: the result file uses that key for its own figures",
            )


def summarise(scores: Sequence[AnswerScore]) -> dict[str, Any]:
    """The reference project's result, {category: {metric: mean}, "overall": {avg_metric: mean}}, and ours under
    "fedlora".

    Needs at least one score. Categories come in the order of their first answer; micro is the mean over answers, macro
    the plain mean over categories.
    """
    groups: defaultdict[str, list[AnswerScore]] = defaultdict(list)
    for score in scores:
        groups[score.category].append(score)
    categories = {category: _mean_rouge(group) for category, group in groups.items()}
    exact = {category: fmean(score.exact for score in group) for category, group in groups.items()}
    return {
        **categories,
        "overall": {f"avg_{metric}": fmean(means[metric] for means in categories.values()) for metric in METRICS},
        "fedlora": {
            "micro": _mean_rouge(scores),
            "exact_match": {
                "categories": exact,
                "macro": fmean(exact.values()),
                "micro": fmean(score.exact for score in scores),
            },
            "num_samples": {category: len(group) for category, group in groups.items()},
            # left out where there are none, as in files older than the count
            **({"hidden_from_rouge": hidden} if any((hidden := _count_hidden(scores)).values()) else {}),
        },
    }


def _count_hidden(scores: Sequence[AnswerScore]) -> dict[str, int]:
    """Texts of which the tokenizer keeps less than half."""
    return {
        "references": sum(score.hides_target for score in scores),
        "answers": sum(score.hides_answer for score in scores),
    }


def by_group(scores: Sequence[AnswerScore], groups: Sequence[str]) -> dict[str, dict[str, float]]:
    """Number of answers, exact match and ROUGE of every group, where `groups` has the group of each score."""
    found: defaultdict[str, list[AnswerScore]] = defaultdict(list)
    for score, group in zip(scores, groups, strict=True):
        found[group].append(score)
    return {
        group: {"num_samples": len(of), "exact_match": fmean(score.exact for score in of), **_mean_rouge(of)}
        for group, of in found.items()
    }


def _mean_rouge(scores: Sequence[AnswerScore]) -> dict[str, float]:
    return {metric: fmean(score.rouge[metric] for score in scores) for metric in METRICS}
