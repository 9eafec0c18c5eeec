"""Strengths of several models from their pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedlora.evaluation.judge.bradley_terry import Compared, fit_strengths, rank_models
from fedlora.evaluation.judge.judge_statistics import JudgedSample, Outcome


def pair(one: str, other: str, wins: int, losses: int, ties: int = 0) -> Compared:
    counts: dict[Outcome, int] = {"win": wins, "loss": losses, "tie": ties}
    outcomes: list[Outcome] = [outcome for outcome, count in counts.items() for _ in range(count)]
    samples = [
        JudgedSample("c", 50.0, 50.0, outcome, False, number, 10, 10, (1, 1), True, 0)
        for number, outcome in enumerate(outcomes)
    ]
    return Compared(one, other, samples)


def test_three_wins_of_four_are_a_lead_of_log_three() -> None:
    won = np.zeros((1, 2, 2))
    won[0, 0, 1], won[0, 1, 0] = 750, 250
    one, other = fit_strengths(won)[0]
    assert one - other == pytest.approx(math.log(3), abs=1e-3)
    assert one + other == pytest.approx(0)


def test_the_fit_has_the_wins_that_it_expects_and_agrees_with_scipy_s_minimiser() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    won = np.random.default_rng(3).integers(1, 30, size=(4, 4)).astype(float)
    np.fill_diagonal(won, 0)

    def loss(values: np.ndarray) -> float:
        lead = values[:, None] - values[None, :]
        return float((won * np.logaddexp(0, -lead)).sum()) + 0.005 * float(values @ values)

    best = optimize.minimize(loss, np.zeros(4), tol=1e-10).x
    assert fit_strengths(won[None])[0] == pytest.approx(best - best.mean(), abs=1e-4)


def test_models_are_ranked_with_intervals_that_narrow_with_more_prompts() -> None:
    def ranked(times: int):
        return rank_models(
            [
                pair("global", "base", 8 * times, 2 * times),
                pair("client 0", "base", 6 * times, 4 * times),
                pair("global", "client 0", 5 * times, 3 * times, 2 * times),
            ]
        )

    few, many = ranked(4), ranked(40)
    assert [one.name for one in few] == [one.name for one in many] == ["global", "client 0", "base"]
    assert sum(one.strength for one in many) == pytest.approx(0)
    for one, other in zip(few, many, strict=True):
        assert one.interval[0] < one.strength < one.interval[1]
        assert other.interval[1] - other.interval[0] < (one.interval[1] - one.interval[0]) / 2


def test_it_does_not_matter_who_of_a_pair_is_the_baseline() -> None:
    there = rank_models([pair("a", "b", 7, 3), pair("b", "c", 6, 4)])
    back = rank_models([pair("b", "a", 3, 7), pair("c", "b", 4, 6)])
    assert [one.strength for one in there] == pytest.approx([one.strength for one in back])


def test_two_models_or_models_that_no_pair_connects_have_no_ranking() -> None:
    assert rank_models([pair("a", "b", 7, 3)]) == []
    assert rank_models([pair("a", "b", 7, 3), pair("c", "d", 6, 4)]) == []


def test_a_model_that_wins_everything_has_a_strength_that_is_a_number() -> None:
    strongest = rank_models([pair("a", "b", 9, 0), pair("b", "c", 6, 3)])[0]
    assert strongest.name == "a"
    assert 2 < strongest.strength < 10


def test_a_pair_that_is_compared_in_both_directions_counts_once() -> None:
    others = [pair("c", "b", 6, 4), pair("a", "c", 5, 5)]
    once = rank_models([pair("a", "b", 7, 3), *others])
    assert rank_models([pair("a", "b", 7, 3), *others, pair("b", "a", 3, 7)]) == once
