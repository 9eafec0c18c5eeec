"""Means, intervals and paired differences, by hand and by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from fedlora.evaluation.intervals import macro_interval, mean_interval, share_interval
from fedlora.evaluation.score_table import Measure, ScoreTable


def measure(*values: float, **more) -> Measure:
    return Measure(np.array(values, dtype=float), **more)


def test_a_group_counts_the_same_whatever_its_size() -> None:
    table = ScoreTable({"m": {"f1": measure(1, 0, 0, 0.5)}}, ["a", "b", "b", "b"], range(4))
    assert table.overall("m")["f1"].mean == pytest.approx((1 + 0.5 / 3) / 2)
    assert {group: own["f1"].mean for group, own in table.by_group("m").items()} == pytest.approx({"a": 1, "b": 1 / 6})


def test_a_loss_counts_its_tokens() -> None:
    loss = measure(1, 2, 4, weights=np.array([1.0, 1.0, 2.0]))
    table = ScoreTable({"m": {"loss": loss}}, ["a", "b", "b"], range(3))
    assert table.overall("m")["loss"].mean == pytest.approx((1 + 2 + 8) / 4)
    assert table.by_group("m")["b"]["loss"].mean == pytest.approx(10 / 3)


def test_rows_without_a_number_are_no_part_of_the_mean() -> None:
    table = ScoreTable({"m": {"choice": measure(1, np.nan, 0, np.nan, is_share=True)}}, ["a", "a", "a", "b"], range(4))
    assert table.overall("m")["choice"].mean == 0.5
    assert table.overall("m")["choice"].interval == share_interval(0.5, 2)
    assert table.by_group("m")["b"] == {}


def test_intervals_are_those_of_the_bootstrap_and_wilsons_for_shares() -> None:
    values = np.random.default_rng(1).random(40)
    right = (values > 0.5).astype(float)
    groups = ["a"] * 15 + ["b"] * 25
    table = ScoreTable({"m": {"f1": Measure(values), "exact": Measure(right, is_share=True)}}, ["a"] * 40, range(40))
    assert table.overall("m")["f1"].interval == pytest.approx(mean_interval(values, range(40)))
    assert table.overall("m")["exact"].interval == share_interval(right.mean(), 40)
    table = ScoreTable({"m": {"exact": Measure(right, is_share=True)}}, groups, range(40))
    shares = {"a": right[:15].mean(), "b": right[15:].mean()}
    assert table.overall("m")["exact"].interval == pytest.approx(macro_interval(shares, {"a": 15, "b": 25}))


def test_a_difference_has_the_width_of_the_answers_and_not_of_the_rows() -> None:
    hard = np.random.default_rng(2).random(60)
    both = {"one": {"f1": Measure(hard + 0.1)}, "two": {"f1": Measure(hard)}}
    table = ScoreTable(both, ["a"] * 60, range(60))
    found = table.difference("one", "two")["f1"]
    assert found.estimate.mean == pytest.approx(0.1)
    assert found.estimate.interval == pytest.approx((0.1, 0.1))
    assert (found.higher, found.lower) == (60, 0)
    low, high = table.overall("one")["f1"].interval
    assert high - low > 0.1


def test_exact_match_is_compared_by_mcnemars_test() -> None:
    # 6 rows where one alone is right, 1 where the other is: p = 2 (1 + 7) / 2^7
    one, two = measure(1, 1, 1, 1, 1, 1, 0, 1, 0, is_share=True), measure(0, 0, 0, 0, 0, 0, 1, 1, 0, is_share=True)
    found = ScoreTable({"one": {"exact": one}, "two": {"exact": two}}, ["a"] * 9, range(9)).difference("one", "two")
    assert (found["exact"].higher, found["exact"].lower) == (6, 1)
    assert found["exact"].p == pytest.approx(16 / 128)
    assert found["exact"].estimate.mean == pytest.approx(5 / 9)


def test_measures_that_one_model_alone_has_are_not_compared() -> None:
    table = ScoreTable({"one": {"f1": measure(1, 0), "loss": measure(1, 2)}, "two": {"f1": measure(0, 0)}}, "ab", "xy")
    assert list(table.difference("one", "two")) == ["f1"]


@pytest.mark.thorough
def test_intervals_of_paired_differences_cover_the_truth_as_often_as_they_say() -> None:
    generator, covered = np.random.default_rng(7), 0
    for _ in range(200):
        hard = generator.normal(0, 1, 120)
        one = hard + 0.2 + generator.normal(0, 0.5, 120)
        two = hard + generator.normal(0, 0.5, 120)
        groups = ["a", "b", "c"] * 40
        table = ScoreTable({"one": {"x": Measure(one)}, "two": {"x": Measure(two)}}, groups, range(120))
        low, high = table.difference("one", "two")["x"].estimate.interval
        covered += low <= 0.2 <= high
    assert 0.91 <= covered / 200 <= 0.99
