"""Two orders become one result: agreement wins, all else is a tie."""

from __future__ import annotations

import pytest

from fedlora.evaluation.judge.protocol import ORDERS, Order, Verdict
from fedlora.evaluation.judge.results import JudgedSample, combine, results_parts, summarise
from fedlora.evaluation.judge.verdict_log import StoredVerdict


def stored(order: Order, verdict: Verdict, score_a: int = 50, score_b: int = 50) -> StoredVerdict:
    return StoredVerdict(
        key="k",
        row=1,
        order=order,
        score_a=score_a,
        score_b=score_b,
        verdict=verdict,
        model="m",
        fingerprint="",
        dropped=[],
        request="r",
    )


@pytest.mark.parametrize(
    ("baseline_first", "proposed_first", "outcome", "flipped"),
    [
        ("B", "A", "win", False),
        ("A", "B", "loss", False),
        ("A", "A", "tie", True),
        ("B", "B", "tie", True),
        ("tie", "tie", "tie", False),
        ("A", "tie", "tie", False),
        ("B", "tie", "tie", False),
        ("tie", "A", "tie", False),
        ("tie", "B", "tie", False),
    ],
)
def test_only_agreement_of_both_orders_decides(
    baseline_first: Verdict, proposed_first: Verdict, outcome: str, flipped: bool
) -> None:
    sample = combine("c", stored("baseline_first", baseline_first), stored("proposed_first", proposed_first))
    assert (sample.outcome, sample.flipped) == (outcome, flipped)


def test_scores_follow_the_answers_and_are_averaged_over_the_orders() -> None:
    sample = combine("c", stored(ORDERS[0], "A", 10, 40), stored(ORDERS[1], "A", 60, 21))
    assert sample.baseline_score == (10 + 21) / 2
    assert sample.proposed_score == (40 + 60) / 2


def test_the_overall_average_is_over_samples_not_over_categories() -> None:
    samples = [JudgedSample("a", 10, 20, "win", False)] * 3 + [JudgedSample("b", 50, 100, "tie", True)]
    result = summarise(samples)
    assert result["overall_pred_avg"] == 20
    assert result["overall_prop_avg"] == 40
    assert result["overall_ratio"] == 2
    assert (result["win"], result["tie"], result["loss"], result["win_rate"]) == (3, 1, 0, 0.75)
    assert result["position_flip_rate"] == 0.25
    assert list(result["categories"]) == ["a", "b"]
    assert result["categories"]["b"]["avg_proposed_score"] == 100


def test_the_table_shows_every_category_and_failures_and_cannot_drive_a_terminal() -> None:
    result = summarise([JudgedSample("\x1b[31mred\n", 10, 20, "win", False), JudgedSample("b", 10, 5, "loss", False)])
    table = "\n".join(results_parts({**result, "total_in_files": 4, "failures_by_kind": {"refused": 2}}))
    assert "\x1b" not in table
    assert "judged 2 of 4 samples" in table
    assert "refused 2" in table
    assert len(table.splitlines()) == 1 + 2 + 1 + 1 + 1 + 1
