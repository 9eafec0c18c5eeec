"""Two orders become one result: agreement wins, all else is a tie."""

from __future__ import annotations

import pytest

from fedlora.evaluation.judge.judge_statistics import JudgedSample, Outcome
from fedlora.evaluation.judge.protocol import ORDERS, Order, Sample, Verdict
from fedlora.evaluation.judge.results import combine, results_parts, summarise
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


SAMPLE = Sample(1, "task", "", "c", "short", "a longer one", None)


def judged(category: str, baseline: float, proposed: float, outcome: Outcome, flipped: bool = False) -> JudgedSample:
    number = len(category) + baseline + proposed
    return JudgedSample(category, baseline, proposed, outcome, flipped, number, 10, 20, (1, 1), not flipped, 0)


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
    sample = combine(SAMPLE, stored("baseline_first", baseline_first), stored("proposed_first", proposed_first))
    assert (sample.outcome, sample.flipped) == (outcome, flipped)


def test_scores_follow_the_answers_and_are_averaged_over_the_orders() -> None:
    sample = combine(SAMPLE, stored(ORDERS[0], "A", 10, 40), stored(ORDERS[1], "A", 60, 21))
    assert sample.baseline_score == (10 + 21) / 2
    assert sample.proposed_score == (40 + 60) / 2
    # the first says A and gives B more
    assert (sample.contradictions, sample.slots, sample.agreed) == (1, (2, 0), False)
    assert (sample.baseline_length, sample.proposed_length) == (5, 12)


def test_the_overall_average_is_over_samples_not_over_categories() -> None:
    samples = [judged("a", 10, 20, "win")] * 3 + [judged("b", 50, 100, "tie", True)]
    result = summarise(samples)
    assert result["overall_pred_avg"] == 20
    assert result["overall_prop_avg"] == 40
    assert result["overall_ratio"] == 2
    assert (result["win"], result["tie"], result["loss"], result["win_rate"]) == (3, 1, 0, 0.75)
    assert result["position_flip_rate"] == 0.25
    assert list(result["categories"]) == ["a", "b"]
    assert result["categories"]["b"]["avg_proposed_score"] == 100


def test_the_table_shows_every_category_and_failures_and_cannot_drive_a_terminal() -> None:
    result = summarise([judged("\x1b[31mred\n", 10, 20, "win"), judged("b", 10, 5, "loss")])
    table = "\n".join(results_parts({**result, "total_in_files": 4, "failures_by_kind": {"refused": 2}}))
    assert "\x1b" not in table
    assert "judged 2 of 4 samples" in table
    assert "refused 2" in table
    assert "win rate 0.500 with ties as halves, 95 % interval 0.000 to 1.000, sign test p = 1" in table
    # heads, categories, a rule, all; what was judged, what it can show, positions, length, failures
    assert len(table.splitlines()) == 1 + 2 + 1 + 1 + 5
