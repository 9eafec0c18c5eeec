"""Agreement of judges: by hand, against scikit-learn and statsmodels, and by brute force."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from fedlora.evaluation.intervals import bootstrap_weights
from fedlora.evaluation.judge.agreement import describe_agreement, describe_pairs
from fedlora.evaluation.judge.judge_statistics import Outcome

NAMES: dict[str, Outcome] = {"w": "win", "t": "tie", "l": "loss"}
FIRST, SECOND, THIRD, FOURTH = "wwtlwtllwtwl", "wttlwwltwtll", "wwllwtwtttwt", "twtlltllwwwl"


def outcomes(*lines: str) -> list[list[Outcome]]:
    return [[NAMES[letter] for letter in line] for line in lines]


def agreement(*lines: str) -> dict:
    return describe_agreement(outcomes(*lines), range(len(lines[0])))


def test_cohen_s_kappa_of_the_textbook_table_is_two_fifths() -> None:
    # both yes 20, first alone 5, second alone 10, both no 15: 0.7 agree, 0.5 by chance
    found = agreement("w" * 25 + "l" * 25, "w" * 20 + "l" * 5 + "w" * 10 + "l" * 15)
    assert found["kappa_of"] == "cohen"
    assert found["kappa"] == pytest.approx(0.4)
    assert found["same_outcome"] == pytest.approx(0.7)
    assert found["interval"][0] < 0.4 < found["interval"][1]


@pytest.mark.parametrize(
    ("lines", "kappa"),
    # cohen_kappa_score of scikit-learn 1.9.1
    [((FIRST, SECOND), 0.5), ((FIRST, THIRD), 0.375), ((SECOND, THIRD), 0.125)],
)
def test_two_judges_have_the_kappa_that_scikit_learn_computes(lines: tuple[str, ...], kappa: float) -> None:
    assert agreement(*lines)["kappa"] == pytest.approx(kappa)


@pytest.mark.parametrize(
    ("lines", "kappa"),
    # fleiss_kappa of statsmodels 0.15.0
    [
        ((FIRST, SECOND, THIRD), 0.32710280373831757),
        ((FIRST, SECOND, THIRD, FOURTH), 0.2888888888888889),
    ],
)
def test_more_judges_have_the_kappa_that_statsmodels_computes(lines: tuple[str, ...], kappa: float) -> None:
    found = agreement(*lines)
    assert found["kappa_of"] == "fleiss"
    assert found["kappa"] == pytest.approx(kappa)


@pytest.mark.parametrize("judges", [2, 3])
def test_intervals_are_those_of_kappas_that_are_counted_resample_by_resample(judges: int) -> None:
    lines = [line * 2 for line in (FIRST, SECOND, THIRD)[:judges]]
    count = len(lines[0])

    def kappa(rows: list[int]) -> float:
        said = ["".join(line[row] for row in rows) for line in lines]
        pairs = list(combinations(said, 2))
        same = np.mean([[one == other for one, other in zip(*pair, strict=True)] for pair in pairs])
        if judges == 2:
            chance = sum(said[0].count(letter) * said[1].count(letter) for letter in "wtl") / count**2
        else:
            chance = sum(("".join(said).count(letter) / (judges * count)) ** 2 for letter in "wtl")
        return float((same - chance) / (1 - chance))

    (weights,) = bootstrap_weights(range(count), draws=200)
    drawn = [kappa([row for row, times in enumerate(line) for _ in range(int(times))]) for line in weights]
    found = describe_agreement(outcomes(*lines), range(count), draws=200)["interval"]
    assert found == pytest.approx(np.quantile(drawn, [0.025, 0.975]))


def test_rows_of_one_prompt_are_drawn_together() -> None:
    lines = outcomes(FIRST * 4, SECOND * 4)
    apart = describe_agreement(lines, range(48))["interval"]
    together = describe_agreement(lines, list(range(12)) * 4)["interval"]
    assert together[1] - together[0] > 1.5 * (apart[1] - apart[0])


def test_judges_that_always_agree_have_an_interval_with_a_width() -> None:
    found = agreement(FIRST, FIRST)
    assert (found["kappa"], found["same_outcome"]) == (1.0, 1.0)
    # 5, 4 and 3 of 12: chance is 50/144; Wilson's limit for 12 of 12 is 0.7575
    chance = (25 + 16 + 9) / 144 if sorted(map(FIRST.count, "wtl")) == [3, 4, 5] else 3 / 9
    assert found["interval"] == pytest.approx([(0.75751 - chance) / (1 - chance), 1.0], abs=1e-4)


def test_outcomes_that_are_all_alike_have_no_kappa() -> None:
    found = agreement("wwww", "wwww", "wwww")
    assert (found["kappa"], found["interval"], found["same_outcome"]) == (None, None, 1.0)


def test_every_two_of_several_judges_are_compared() -> None:
    found = describe_pairs(["a", "b", "c"], outcomes(FIRST, SECOND, THIRD), range(12))
    assert [(one["judges"], round(one["kappa"], 3)) for one in found] == [
        (["a", "b"], 0.5),
        (["a", "c"], 0.375),
        (["b", "c"], 0.125),
    ]
