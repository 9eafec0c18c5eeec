"""Robust aggregation: golden points, bounds under attack, and what must not matter."""

import pytest
import torch
from published_values import CLOSE_POINTS, CLOSE_SCORES, POINTS, assert_scores, combined

from fedlora.laws.federation_of_one_round import adapter, aggregate, close
from fedlora.methods.fedavg import FedAvg
from fedlora.methods.robust import CoordinateMedian, GeometricMedian, Krum, MultiKrum, TrimmedMean
from fedlora.types import ServerState


def test_five_points_give_the_published_answers():
    assert combined(CoordinateMedian()) == [1.0, 1.0]
    assert combined(TrimmedMean(0.2)) == pytest.approx([2 / 3, 2 / 3])
    assert combined(FedAvg()) == pytest.approx([2.4, 2.4])
    assert combined(GeometricMedian(weiszfeld_steps=500)) == pytest.approx([0.78867513, 0.78867513], abs=1e-8)
    stack = {"x": torch.tensor(POINTS, dtype=torch.float64)}
    assert Krum().score(stack).tolist() == [2.0, 2.0, 2.0, 2.0, 343.0]
    assert Krum().choose(stack) == [0]
    assert combined(Krum()) == [0.0, 0.0]
    assert combined(Krum(krum_selected=4)) == pytest.approx([0.5, 0.5])
    # two of five, by default: the first two of four that are equally near to others
    assert combined(MultiKrum()) == pytest.approx([0.5, 0.0])


ROBUST = [CoordinateMedian(), TrimmedMean(0.25), Krum(num_hostile=2), Krum(2, 3), MultiKrum(2), GeometricMedian()]


@pytest.mark.parametrize("strategy", ROBUST, ids=str)
@pytest.mark.parametrize("attack", [1e6, -1e6, 1e12])
def test_two_of_eight_cannot_leave_the_honest_range(strategy, attack):
    start = ServerState(adapter(0))
    honest = [adapter(seed) for seed in range(1, 7)]
    hostile = [{key: value + attack for key, value in adapter(seed).items()} for seed in (7, 8)]
    found = aggregate(strategy, start, [hostile[0], *honest, hostile[1]]).adapter
    for key, value in found.items():
        values = torch.stack([one[key] for one in honest])
        # the geometric median is bounded, but not coordinate by coordinate
        slack = 2e-2 * (values.amax(0) - values.amin(0))
        assert bool((value >= values.amin(0) - slack).all() and (value <= values.amax(0) + slack).all()), key


def test_the_mean_leaves_it():
    found = combined(FedAvg(), [(0.0, 0.0)] * 6 + [(1e6, 1e6)] * 2)
    assert found[0] > 1e5


@pytest.mark.parametrize("strategy", ROBUST, ids=str)
def test_order_does_not_matter_and_a_common_shift_shifts_the_result(strategy):
    start, sent = ServerState(adapter(0)), [adapter(seed) for seed in range(1, 9)]
    found = aggregate(strategy, start, sent).adapter
    assert close(aggregate(strategy, start, sent[::-1]).adapter, found, 1e-9)
    shifted = [{key: value + 3.0 for key, value in one.items()} for one in sent]
    moved = aggregate(strategy, start, shifted).adapter
    assert close(moved, {key: value + 3.0 for key, value in found.items()}, 1e-8)


@pytest.mark.parametrize("strategy", ROBUST, ids=str)
def test_rows_give_no_weight(strategy):
    start, sent = ServerState(adapter(0)), [adapter(seed) for seed in range(1, 9)]
    assert close(
        aggregate(strategy, start, sent, rows=[10**9] + [1] * 7).adapter, aggregate(strategy, start, sent).adapter
    )


@pytest.mark.parametrize("strategy", [*ROBUST[:2], GeometricMedian()], ids=str)
def test_equal_clients_are_themselves(strategy):
    start, one = ServerState(adapter(0)), adapter(1)
    assert close(aggregate(strategy, start, [one] * 3).adapter, one)
    assert close(aggregate(strategy, start, [one] * 8).adapter, one)
    assert close(aggregate(Krum(), start, [one] * 5).adapter, one)


def test_the_geometric_median_leaves_a_client_s_own_point_where_the_way_begins():
    """The coordinate median of the five points is (1, 1), one of them; how far the fifth is makes no difference."""
    for far in (10.0, 1e6):
        found = combined(GeometricMedian(), [*POINTS[:4], (far, far)])
        assert found == pytest.approx([0.78867513, 0.78867513], abs=2e-5)
    # and stays at one where three of five are, or where the others pull less than it holds
    assert combined(GeometricMedian(), [(1.0, 2.0)] * 3 + [(9.0, 0.0), (-5.0, 7.0)]) == [1.0, 2.0]
    assert combined(GeometricMedian(), [(0.0, 0.0), (1.0, 0.0), (-1.0, 0.1)]) == pytest.approx([0.0, 0.0], abs=1e-9)


def test_nearly_equal_changes_keep_their_distances():
    assert_scores(Krum(), CLOSE_POINTS, CLOSE_SCORES)


@pytest.mark.parametrize(
    ("strategy", "count"),
    [(Krum(), 4), (Krum(num_hostile=2), 6), (Krum(0), 2), *((one, 2) for one in (*ROBUST[:2], GeometricMedian()))],
    ids=str,
)
def test_with_too_few_clients_for_the_promise_nothing_moves(strategy, count):
    state = ServerState(adapter(0))
    assert strategy.fewest_clients == count + 1
    assert aggregate(strategy, state, [adapter(seed) for seed in range(count)]) is state
