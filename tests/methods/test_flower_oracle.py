"""Flower's servers as an oracle: the same clients, round after round, and the same place where the formulas agree.

flower_oracle.json was written by tools/flower_oracle.py, so that Flower is needed neither here nor anywhere else.
"""

import json
from pathlib import Path

import pytest
import server_mutants as mutants
import torch

from fedlora.laws.federation_of_one_round import aggregate
from fedlora.laws.measures import near
from fedlora.methods.fedavg import FedAvg
from fedlora.methods.robust import CoordinateMedian, Krum, TrimmedMean
from fedlora.methods.server_adaptive import FedAdagrad, FedAdam, FedYogi
from fedlora.methods.server_momentum import FedAvgM
from fedlora.types import ServerState

ORACLE = json.loads((Path(__file__).parent / "flower_oracle.json").read_text(encoding="utf-8"))
ROWS = ORACLE["rows"]


def tensors(state):
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in state.items()}


def follow(strategy, rows=ROWS):
    """Where the strategy is after each round of the oracle's changes."""
    state, places = ServerState(tensors(ORACLE["start"])), []
    for number, changes in enumerate(ORACLE["changes"], start=1):
        here = state.adapter
        sent = [{key: here[key] + moved[key] for key in here} for moved in map(tensors, changes)]
        state = aggregate(strategy, state, sent, rows, number)
        places.append(state.adapter)
    return places


def assert_follows(strategy, name):
    for number, (found, wanted) in enumerate(zip(follow(strategy), ORACLE["answers"][name]["places"], strict=True)):
        near(found, tensors(wanted), f"{name}, round {number + 1}")


def test_the_oracle_tells_its_version():
    assert ORACLE["flwr"] == "1.41.0"


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("FedAvg", FedAvg()),
        ("FedAvgM", FedAvgM(0.4, 0.9)),
        ("FedMedian", CoordinateMedian()),
        ("FedTrimmedAvg", TrimmedMean(0.2)),
        ("Krum", Krum()),
    ],
)
def test_where_the_formulas_agree_flower_s_server_goes_the_same_way(name, strategy):
    assert_follows(strategy, name)


ADAPTIVE = [
    ("FedAdagrad", FedAdagrad(0.1), mutants.AdagradFromZero(0.1, 0.0)),
    ("FedAdam", FedAdam(0.1), mutants.BiasCorrected(0.1)),
    ("FedYogi", FedYogi(0.1), mutants.YogiFromZero(0.1)),
]


@pytest.mark.parametrize(("name", "ours", "theirs"), ADAPTIVE, ids=lambda value: type(value).__name__)
def test_flower_s_adaptive_servers_begin_at_v_0_and_its_fedadam_corrects_for_bias(name, ours, theirs):
    """The difference is known to the last digit: with Flower's choices put in, its numbers come out."""
    assert_follows(theirs, name)
    with pytest.raises(AssertionError, match="round 1"):
        assert_follows(ours, name)


def test_flower_s_multi_krum_is_ours_with_the_chosen_weighted_by_rows():
    from robust_mutants import ExampleWeightedKrum

    assert_follows(ExampleWeightedKrum(krum_selected=3), "MultiKrum")
    with pytest.raises(AssertionError, match="round 1"):
        assert_follows(Krum(krum_selected=3), "MultiKrum")
