"""ROUGE and exact match of answers, per category and overall.

The numbers are those of the rouge-score package (F1, no stemmer), averaged per category; "overall" is the plain
mean over the categories, so a category counts the same whatever its size. rouge-score's tokenizer keeps a to z and
0 to 9 alone: two equal texts in Cyrillic or Chinese score 0. Such answers are counted, so that a report can say so.
Exact match ignores white space at both ends of answer and target, and nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

from fedlora.errors import DataError

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
RESERVED_CATEGORIES = ("overall", "fedlora")
"""Keys of the result file beside the categories."""


@dataclass(frozen=True)
class AnswerScore:
    """One answer against its target: F1 per metric in 0..1, and whether both are the same text."""

    category: str
    rouge: Mapping[str, float]
    exact: bool

    @property
    def unseen_by_rouge(self) -> bool:
        """A right answer of which rouge-score's tokenizer keeps nothing."""
        return self.exact and self.rouge["rouge1"] == 0.0


class AnswerScorer:
    """Scores answers one by one; holds rouge-score's tokenizer."""

    def __init__(self) -> None:
        self._rouge = RougeScorer(list(METRICS), use_stemmer=False)

    def score(self, answer: str, target: str, category: str) -> AnswerScore:
        scores = self._rouge.score(target, answer)
        values = {metric: float(scores[metric].fmeasure) for metric in METRICS}
        return AnswerScore(category, values, answer.strip() == target.strip())


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
        },
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
