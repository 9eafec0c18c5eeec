"""What verdicts can show, by hand, against scipy, and with judges whose bias is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from fedlora.evaluation.judge.judge_statistics import (
    JudgedSample,
    Outcome,
    describe_verdicts,
    rate_at_equal_length,
    smallest_difference,
)
from fedlora.evaluation.judge.protocol import ORDERS, Sample, Verdict
from fedlora.evaluation.judge.results import combine
from fedlora.evaluation.judge.verdict_log import StoredVerdict


def sample(number: int, outcome: Outcome, *, category: str = "c", ours: int = 10, theirs: int = 10) -> JudgedSample:
    return JudgedSample(category, 50.0, 50.0, outcome, False, number, theirs, ours, (1, 1), True, 0)


def outcomes(wins: int, losses: int, ties: int = 0) -> list[Outcome]:
    counts: dict[Outcome, int] = {"win": wins, "loss": losses, "tie": ties}
    return [outcome for outcome, count in counts.items() for _ in range(count)]


def test_ties_count_half_and_the_sign_test_leaves_them_out() -> None:
    found = describe_verdicts([sample(number, outcome) for number, outcome in enumerate(outcomes(8, 2, 10))])
    assert found["win_rate_ties_half"] == pytest.approx(13 / 20)
    assert found["sign_test_p"] == pytest.approx(112 / 1024)
    low, high = found["interval"]
    deviation = np.std([1.0] * 8 + [0.0] * 2 + [0.5] * 10) / math.sqrt(20)
    assert (low, high) == pytest.approx((0.65 - 1.96 * deviation, 0.65 + 1.96 * deviation), abs=0.03)


def test_rows_of_one_prompt_count_as_one_in_intervals_and_test() -> None:
    samples = [sample(number, outcome) for number, outcome in enumerate(outcomes(8, 4))]
    once, thrice = describe_verdicts(samples), describe_verdicts([one for one in samples for _ in range(3)])
    assert (thrice["num_prompts"], thrice["interval"], thrice["sign_test_p"]) == (
        *(12, once["interval"], once["sign_test_p"]),
    )


@pytest.mark.parametrize(
    ("outcome", "ends"), [("win", (0.7225, 1.0)), ("loss", (0.0, 0.2775)), ("tie", (0.361, 0.639))]
)
def test_where_all_outcomes_are_alike_the_interval_still_has_a_width(
    outcome: Outcome, ends: tuple[float, float]
) -> None:
    found = describe_verdicts([sample(number, outcome) for number in range(10)])
    assert found["interval"] == pytest.approx(ends, abs=1e-3)
    assert found["length"]["controlled_interval"] == found["interval"]


def test_categories_have_their_own_rates_intervals_and_numbers() -> None:
    samples = [sample(number, "win" if number % 3 else "loss", category="ab"[number % 2]) for number in range(30)]
    found = describe_verdicts(samples)["categories"]
    assert {name: one["num_samples"] for name, one in found.items()} == {"a": 15, "b": 15}
    assert found["a"]["win_rate_ties_half"] == pytest.approx(10 / 15)
    assert found["a"]["interval"][0] < 10 / 15 < found["a"]["interval"][1]


def test_positions_are_counted_from_the_verdicts() -> None:
    def judged(first: Verdict, second: Verdict) -> JudgedSample:
        return combine(
            Sample(1, f"{first}{second}", "", "c", "x", "y", None),
            *map(stored, ORDERS, (first, second), ((90, 10),) * 2),
        )

    found = describe_verdicts([judged("A", "A"), judged("B", "A"), judged("tie", "tie"), judged("A", "tie")])
    assert found["order_consistency"] == 2 / 4
    assert found["first_slot_preference"] == 4 / 5
    # only the one verdict for B is for the answer with the lower score
    assert found["score_contradictions"] == 1
    always = describe_verdicts([judged("A", "A")])
    assert always["first_slot_preference"] == 1.0
    assert always["first_slot_interval"] == pytest.approx([0.2065, 1.0], abs=1e-3)
    none = describe_verdicts([judged("tie", "tie")])
    assert (none["first_slot_preference"], none["first_slot_interval"]) == (None, None)


def stored(order, verdict, scores) -> StoredVerdict:
    return StoredVerdict(
        **{"key": "k", "row": 1, "order": order, "score_a": scores[0], "score_b": scores[1], "verdict": verdict},
        **{"model": "", "fingerprint": "", "dropped": [], "request": ""},
    )


def test_lengths_are_characters_and_the_win_rate_is_split_by_which_answer_is_longer() -> None:
    longer = [sample(number, "win", ours=30) for number in range(6)]
    shorter = [sample(6 + number, "win" if number else "loss", ours=5) for number in range(4)]
    length = describe_verdicts([*longer, *shorter])["length"]
    assert (length["proposed_mean"], length["baseline_mean"]) == (20.0, 10.0)
    by = length["win_rate_by_longer"]
    assert by["proposed"] == {"num_samples": 6, "win_rate_ties_half": 1.0}
    assert by["baseline"] == {"num_samples": 4, "win_rate_ties_half": 0.75}
    assert by["neither"] == {"num_samples": 0, "win_rate_ties_half": None}


def test_the_regression_is_the_closed_form_where_there_are_two_lengths() -> None:
    # of a saturated model the rates are those of both groups: 3/4 at +1 and 1/4 at -1/2
    scores, term = np.array([1, 1, 1, 0, 1, 0, 0, 0], dtype=float), np.array([1.0] * 4 + [-0.5] * 4)
    at_one, at_half = math.log(3), -math.log(3)
    intercept = at_half + (at_one - at_half) / 3
    (rate,) = rate_at_equal_length(np.ones((1, 8)), scores, term)
    assert rate == pytest.approx(1 / (1 + math.exp(-intercept)), abs=1e-3)


def test_the_regression_finds_what_scipy_s_minimiser_finds_for_every_resample() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    generator = np.random.default_rng(5)
    scores, term = generator.choice([0.0, 0.5, 1.0], 60), np.tanh(generator.normal(size=60))
    weights = generator.multinomial(60, [1 / 60] * 60, size=5).astype(float)
    for line, rate in zip(weights, rate_at_equal_length(weights, scores, term), strict=True):

        def loss(values: np.ndarray, line: np.ndarray = line) -> float:
            logits = values[0] + values[1] * term
            return float(line @ (np.logaddexp(0, logits) - scores * logits)) + 5e-4 * float(values @ values)

        best = optimize.minimize(loss, np.zeros(2), tol=1e-12).x
        assert rate == pytest.approx(1 / (1 + math.exp(-best[0])), abs=1e-5)


def test_a_length_that_separates_wins_from_losses_gives_a_rate_all_the_same() -> None:
    term = np.array([1.0, 0.5, -0.5, -1.0])
    (rate,) = rate_at_equal_length(np.ones((1, 4)), np.array([1.0, 1.0, 0.0, 0.0]), term)
    assert rate == pytest.approx(0.5)
    (won,) = rate_at_equal_length(np.ones((1, 4)), np.ones(4), term)
    assert 0.99 < won <= 1.0


def test_the_smallest_difference_is_the_usual_formula() -> None:
    # (1.96 + 0.8416) * 0.5 / sqrt(200)
    assert smallest_difference(200) == pytest.approx(0.0990, abs=1e-4)
    assert smallest_difference(1) == 0.5


@pytest.mark.thorough
def test_the_smallest_difference_shows_in_four_of_five_experiments() -> None:
    rate = 0.5 + smallest_difference(200)
    wins = np.random.default_rng(2).binomial(1, rate, size=(400, 200))
    shown = 0
    for line in wins:
        found = describe_verdicts([sample(n, "win" if won else "loss") for n, won in enumerate(line)], draws=200)
        shown += found["interval"][0] > 0.5
    assert shown / 400 == pytest.approx(0.8, abs=0.06)


def simulate(generator: np.random.Generator, count: int, judge: Bias, lengths: np.ndarray) -> list[JudgedSample]:
    """Samples of a judge who prefers ours by `edge`, what is shown first by `position` and what is longer by `length`,
    in logits, with noise that both orders share and noise of each."""
    shared = generator.logistic(scale=judge.noise, size=count) if judge.noise else np.zeros(count)
    samples = []
    for number in range(count):
        ours = judge.edge + judge.length * lengths[number] + shared[number]
        logits = (ours - judge.position, ours + judge.position)
        wins = [generator.random() < 1 / (1 + math.exp(-logit)) for logit in logits]
        verdicts: tuple[Verdict, Verdict] = ("B" if wins[0] else "A", "A" if wins[1] else "B")
        texts = ("x" * 500, "x" * (500 + round(300 * math.atanh(lengths[number]))))
        asked = Sample(number, str(number), "", "c", *texts, None)
        samples.append(combine(asked, *map(stored, ORDERS, verdicts, ((50, 50),) * 2)))
    return samples


class Bias:
    def __init__(self, edge: float, position: float = 0.0, length: float = 0.0, noise: float = 0.0) -> None:
        self.edge, self.position, self.length, self.noise = edge, position, length, noise

    def truth(self, lengths: np.ndarray) -> float:
        """The mean score of answers whose lengths differ like `lengths`, by numerical integration over the noise."""
        quantiles = (np.arange(200) + 0.5) / 200
        shared = self.noise * np.log(quantiles / (1 - quantiles)) if self.noise else np.zeros(1)
        ours = self.edge + self.length * np.asarray(lengths)[:, None] + shared
        chance: Callable[[np.ndarray], np.ndarray] = lambda logit: 1 / (1 + np.exp(-logit))  # noqa: E731
        # the score is the mean of both orders' verdicts, as a changed mind is a tie
        return float(np.mean((chance(ours - self.position) + chance(ours + self.position)) / 2))


JUDGES = {
    "position and length": Bias(0.3, position=1.0, length=1.0),
    "length and noise": Bias(0.4, length=1.0, noise=0.7),
}


@pytest.mark.thorough
@pytest.mark.parametrize("judge", JUDGES.values(), ids=JUDGES)
def test_intervals_cover_the_truth_of_a_judge_of_known_bias(judge: Bias) -> None:
    generator = np.random.default_rng(11)
    covered, controlled, rates = [], [], []
    everyone = np.tanh(generator.normal(0.5, 1.0, size=20_000))
    truth, truth_of_equal = judge.truth(everyone), judge.truth(np.zeros(1))
    for _ in range(1000):
        lengths = np.tanh(generator.normal(0.5, 1.0, size=200))
        found = describe_verdicts(simulate(generator, 200, judge, lengths), draws=400)
        covered.append(found["interval"][0] <= truth <= found["interval"][1])
        rates.append(found["length"]["controlled_win_rate"])
        low, high = found["length"]["controlled_interval"]
        controlled.append(low <= truth_of_equal <= high)
    assert np.mean(rates) == pytest.approx(truth_of_equal, abs=0.02)
    assert 0.93 <= np.mean(covered) <= 0.97
    assert 0.93 <= np.mean(controlled) <= 0.97
