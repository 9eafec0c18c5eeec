"""Numbers that leave an owner: means and standard errors by hand, nothing of too few rows, nothing else read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedlora.evaluation.private_numbers import (
    PrivateMean,
    difference_estimate,
    estimate,
    read_numbers,
    summarise_rows,
    unpaired,
)
from fedlora.evaluation.score_table import Measure

NAMES = ("loss", "exact")


def measures(exact: list[float], loss: list[float], tokens: list[float]) -> dict[str, Measure]:
    return {
        "loss": Measure(np.array(loss), np.array(tokens)),
        "exact": Measure(np.array(exact), is_share=True),
    }


def summary(fewest: int = 2) -> dict[str, Any]:
    base = measures([0.0, 0.0, 1.0, 0.0], [3.0, 2.0, 1.0, 2.0], [1.0, 2.0, 1.0, 4.0])
    shared = measures([1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 1.0, 4.0])
    return summarise_rows({"base": base, "global": shared}, ["a", "b", "c", "d"], fewest)


def test_means_and_errors_are_those_of_the_rows() -> None:
    found = summary()
    assert (found["num_rows"], found["num_prompts"]) == (4, 4)
    exact = found["models"]["global"]["exact"]
    assert exact == {"mean": 0.75, "se": pytest.approx(np.std([1, 0, 1, 1], ddof=1) / 2, abs=1e-9)}
    # by response token: 3 + 4 + 1 + 8 over 8 tokens
    assert found["models"]["base"]["loss"]["mean"] == 2.0
    assert found["models"]["base"]["loss"]["se"] == pytest.approx(math.sqrt(4 / 3 * (1 + 0 + 1 + 0)) / 8, abs=1e-9)


def test_a_difference_is_paired_row_by_row() -> None:
    apart = summary()["differences"]["global-base"]["exact"]
    assert apart == {"mean": 0.5, "se": pytest.approx(np.std([1, 0, 0, 1], ddof=1) / 2, abs=1e-9)}


def test_rows_with_one_prompt_count_as_one() -> None:
    one = summarise_rows({"base": measures([1, 0], [1, 2], [1, 1])}, ["a", "b"], 2)
    twice = summarise_rows({"base": measures([1, 1, 0, 0], [1, 1, 2, 2], [1] * 4)}, ["a", "a", "b", "b"], 2)
    assert (twice["num_rows"], twice["num_prompts"]) == (4, 2)
    assert twice["models"] == one["models"]


def test_of_too_few_prompts_not_even_the_count_is_given() -> None:
    assert summary(fewest=5) == {"withheld": "fewer than 5 test rows with different prompts"}


def test_what_was_given_is_read_and_written_alike() -> None:
    assert read_numbers(summary(), NAMES, 4) == summary()


WRONG = {
    "too few rows": lambda told: told | {"num_prompts": 3, "num_rows": 3},
    "more prompts than rows": lambda told: told | {"num_prompts": 9},
    "a count that is a bool": lambda told: told | {"num_prompts": True},
    "a further field": lambda told: told | {"rows": ["the text of a row"]},
    "another model": lambda told: told | {"models": {"client 3": {}}},
    "a metric that nobody asked for": lambda told: told | {"models": {"base": {"chrf": {"mean": 0.5, "se": 0.1}}}},
    "a mean that is no number": lambda told: told | {"models": {"base": {"loss": {"mean": math.nan, "se": 0.1}}}},
    "a text for a mean": lambda told: told | {"models": {"base": {"loss": {"mean": "text", "se": 0.1}}}},
    "a negative error": lambda told: told | {"models": {"base": {"loss": {"mean": 1.0, "se": -0.1}}}},
    "another pair": lambda told: told | {"differences": {"base-global": {}}},
    "a list": lambda told: [told],
    "numbers beside a reason": lambda told: told | {"withheld": "no"},
}


@pytest.mark.parametrize("what", WRONG)
def test_anything_else_is_refused(what: str) -> None:
    with pytest.raises(ValueError, match=r"its numbers|a mean|a number"):
        read_numbers(WRONG[what](summary()), NAMES, 4)


def test_a_reason_is_one_short_line() -> None:
    assert len(read_numbers({"withheld": "no\n" * 500}, NAMES, 2)["withheld"].splitlines()) == 1


def test_intervals_are_student_s_and_wilson_s_for_a_share() -> None:
    # t with 9 degrees: 2.262157
    assert estimate("loss", PrivateMean(1.0, 0.1), 10).interval == pytest.approx((0.7737843, 1.2262157), abs=1e-6)
    assert estimate("exact", PrivateMean(1.0, 0.0), 10).interval == pytest.approx((0.7225, 1.0), abs=1e-3)
    assert estimate("chrf", PrivateMean(0.1, 0.1), 10).interval[0] == 0.0, "a score is in 0..1"
    assert difference_estimate(PrivateMean(0.5, 0.1), 9).interval[0] == pytest.approx(0.2737843, abs=1e-6)
    # Welch: equal errors of 10 rows each have 18 degrees, t 2.100922
    apart = unpaired(PrivateMean(1.0, 0.1), PrivateMean(0.5, 0.1), (10, 10))
    assert apart.interval[1] == pytest.approx(0.5 + 2.100922 * math.sqrt(0.02), abs=1e-6)
