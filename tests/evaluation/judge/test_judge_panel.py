"""The majority of several judges, and several verdicts of one."""

from __future__ import annotations

import dataclasses

import pytest

from fedlora.evaluation.judge.judge_statistics import JudgedSample, Outcome
from fedlora.evaluation.judge.panel import combine_judges
from fedlora.evaluation.judge.protocol import ORDERS, Order, Sample, Verdict, make_question
from fedlora.evaluation.judge.results import combine, summarise
from fedlora.evaluation.judge.verdict_log import StoredVerdict

SAMPLE = Sample(1, "task", "", "c", "short", "a longer one", None)
OUTCOME: dict[str, Outcome] = {"w": "win", "t": "tie", "l": "loss"}


def said(outcome: str, **more: object) -> JudgedSample:
    one = JudgedSample("c", 20.0, 60.0, OUTCOME[outcome], False, "p", 5, 12, (1, 1), True, 0)
    return dataclasses.replace(one, **more)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("judges", "outcome"),
    [
        *(("ww", "win"), ("ll", "loss"), ("wl", "tie"), ("wt", "tie"), ("tt", "tie")),
        *(("wwl", "win"), ("lwl", "loss"), ("wtl", "tie"), ("wtt", "tie"), ("twt", "tie")),
        # half of four is no majority
        *(("wwll", "tie"), ("wwtl", "tie"), ("wwwl", "win")),
    ],
)
def test_a_majority_is_more_than_half_of_the_judges(judges: str, outcome: str) -> None:
    assert combine_judges([said(one) for one in judges]).outcome == outcome


def test_scores_are_means_and_positions_are_added_over_the_judges() -> None:
    one = combine_judges(
        [
            said("w", slots=(2, 0), flipped=True, agreed=False, contradictions=1),
            said("l", baseline_score=40.0, proposed_score=30.0),
            said("w", flipped=True, agreed=False),
        ]
    )
    assert (one.baseline_score, one.proposed_score) == (pytest.approx(80 / 3), pytest.approx(50))
    assert (one.slots, one.contradictions, one.flipped, one.agreed) == ((4, 2), 1, True, False)
    assert one.repeats_agreed is None


def verdicts(order: Order, said_there: str) -> list[StoredVerdict]:
    letters: dict[str, Verdict] = {"A": "A", "B": "B", "t": "tie"}
    shared = {"key": "k", "row": 1, "model": "m", "fingerprint": "", "dropped": [], "request": "r"}
    return [
        StoredVerdict(order=order, score_a=10, score_b=20, verdict=letters[one], repeat=number, **shared)
        for number, one in enumerate(said_there, start=1)
    ]


@pytest.mark.parametrize(
    ("baseline_first", "proposed_first", "outcome", "flipped", "alike"),
    [
        ("BBA", "AAA", "win", False, (1 / 3 + 1) / 2),
        ("BBA", "AAB", "win", False, 1 / 3),
        ("AAB", "ABB", "loss", False, 1 / 3),
        ("AAB", "ABA", "tie", True, 1 / 3),
        # no verdict has more than half: a tie in that order, and so of the sample
        ("ABt", "AAA", "tie", False, 0.5),
        ("AB", "AA", "tie", False, 0.5),
        ("BB", "AA", "win", False, 1.0),
    ],
)
def test_the_verdict_of_an_order_is_that_of_more_than_half_of_its_repeats(
    baseline_first: str, proposed_first: str, outcome: str, flipped: bool, alike: float
) -> None:
    one = combine(SAMPLE, *verdicts(ORDERS[0], baseline_first), *verdicts(ORDERS[1], proposed_first))
    assert (one.outcome, one.flipped) == (outcome, flipped)
    assert one.repeats_agreed == pytest.approx(alike)
    assert one.slots == tuple((baseline_first + proposed_first).count(slot) for slot in "AB")
    # 10 for A: the baseline's in the first order, ours in the second
    assert (one.baseline_score, one.proposed_score) == (15, 15)


def test_repeats_narrow_no_interval_and_have_their_own_consistency() -> None:
    def result(repeats: int) -> dict:
        samples = [
            dataclasses.replace(
                combine(SAMPLE, *verdicts(ORDERS[0], said_there * repeats), *verdicts(ORDERS[1], "A" * repeats)),
                prompt=number,
            )
            for number, said_there in enumerate("BBAtBA" * 5)
        ]
        return summarise(samples)

    once, thrice = result(1), result(3)
    assert "repeat_consistency" not in once["statistics"]
    assert thrice["statistics"].pop("repeat_consistency") == 1.0
    assert thrice["statistics"].pop("repeat_consistency_interval")[1] == 1.0
    assert thrice["statistics"]["interval"] == once["statistics"]["interval"]
    assert thrice["statistics"].pop("score_contradictions") == 3 * once["statistics"].pop("score_contradictions")
    assert thrice == once


def test_the_key_of_a_repeat_is_its_own_and_the_first_has_the_key_of_a_question_asked_once() -> None:
    once = make_question(SAMPLE, ORDERS[0], judge="j", host="h")
    asked = [make_question(SAMPLE, ORDERS[0], judge="j", host="h", repeat=number) for number in (1, 2, 3)]
    assert asked[0].key == once.key
    assert len({one.key for one in asked}) == 3
    # of a version that knew no repeats
    assert once.key == "65b4a1b280af059708658e5b5dadebfa2e93abba79cce1744424e559d4456c68"


def test_the_mirror_of_a_question_is_the_key_that_the_other_direction_of_the_pair_gives_it() -> None:
    turned = dataclasses.replace(SAMPLE, baseline=SAMPLE.proposed, proposed=SAMPLE.baseline)
    for order, other in (ORDERS, ORDERS[::-1]):
        for repeat in (1, 2):
            one = make_question(SAMPLE, order, judge="j", host="h", repeat=repeat)
            there = make_question(turned, other, judge="j", host="h", repeat=repeat)
            assert (one.mirror, one.key) == (there.key, there.mirror)
            assert one.sample.answers(order) == there.sample.answers(other)
