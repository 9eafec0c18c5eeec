import math
import random
import subprocess
import sys

import pytest

from fedlora.federated.sampling import cohort_size, draw_cohort
from fedlora.federated.schedule import learning_rate


def draw(how="random", fraction=0.3, seed=1, round_number=1, clients=range(10)):
    return draw_cohort(list(clients), how=how, fraction=fraction, seed=seed, round_number=round_number)


@pytest.mark.parametrize(
    ("fraction", "clients", "size"),
    [(0.29, 100, 29), (0.57, 100, 57), (0.1, 5, 1), (0.1, 8, 1), (1.0, 8, 8), (1e-9, 8, 1), (0.5, 3, 2), (0.3, 10, 3)],
)
def test_the_cohort_size_is_the_documented_rule(fraction, clients, size):
    assert cohort_size(fraction, clients) == size


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, math.nan, math.inf])
def test_a_fraction_outside_zero_to_one_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction"):
        cohort_size(fraction, 8)


def test_a_cohort_depends_on_seed_and_round_alone():
    random.seed(3)
    first = [draw(round_number=number) for number in range(1, 30)]
    random.seed(4)
    assert [draw(round_number=number) for number in range(1, 30)] == first
    assert [draw(round_number=number, clients=reversed(range(10))) for number in range(1, 30)] == first
    assert len(set(first)) > 10
    assert [draw(round_number=number, seed=2) for number in range(1, 30)] != first
    assert all(list(cohort) == sorted(set(cohort)) for cohort in first)


def test_a_cohort_is_the_same_in_processes_with_other_hash_seeds():
    code = (
        "from fedlora.federated.sampling import draw_cohort\n"
        "print([draw_cohort(range(50), how='random', fraction=.2, seed=1, round_number=r) for r in range(1, 9)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1", "77")
    }
    assert len(outputs) == 1


def test_round_robin_reaches_everybody_equally_often():
    counts = dict.fromkeys(range(10), 0)
    for number in range(1, 11):
        for client in draw(how="round_robin", round_number=number):
            counts[client] += 1
    assert set(counts.values()) == {3}


def test_all_takes_everybody_whatever_the_fraction():
    assert draw(how="all", fraction=0.1) == tuple(range(10))


def rates(kind, warmup=0):
    return [
        learning_rate(kind, 1.0, round_number=number, step=step, steps_per_round=4, rounds=3, warmup=warmup)
        for number in (1, 2, 3)
        for step in range(4)
    ]


def test_schedules_run_over_the_whole_run():
    assert rates("constant") == [1.0] * 12
    assert rates("linear") == pytest.approx([1 - step / 12 for step in range(12)])
    assert rates("cosine") == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 12)) for step in range(12)])
    assert rates("linear_per_round") == pytest.approx([1, 0.75, 0.5, 0.25] * 3)


def test_warm_up_rises_once_in_the_run_and_once_a_round_where_the_schedule_restarts():
    assert rates("constant", warmup=2)[:3] == [0.5, 1.0, 1.0]
    assert min(rates("constant", warmup=2)[2:]) == 1.0
    assert rates("linear_per_round", warmup=2) == pytest.approx([0.5, 1.0, 1.0, 0.5] * 3)
    with pytest.raises(ValueError, match="unknown schedule"):
        rates("step")
