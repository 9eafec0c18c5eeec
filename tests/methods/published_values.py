"""Numbers that can be worked out by hand from the papers, and checks that a server gives them.

The changes of three rounds, and five points of which one is far away.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedlora.laws.federation_of_one_round import aggregate, scalar
from fedlora.methods.robust import Krum
from fedlora.methods.strategy import Strategy
from fedlora.types import ServerState

CHANGES = (0.5, -0.25, 0.1)
"""The mean change of three rounds, whatever the server did before."""

POINTS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (10.0, 10.0))

PLACES = {
    "fedavgm": (0.5, 0.7, 0.98),
    "diloco": (0.665, 0.616, 0.8624),
    "fedadagrad": (0.00998002, 0.01355133, 0.01847319),
    "fedadam": (0.09802019, 0.13330199, 0.18216549),
    "fedyogi": (0.09802000, 0.13316281, 0.18160749),
}
"""Where a server is after each of the three rounds that starts at zero, with the settings of OPTIONS."""

OPTIONS = {
    "fedavgm": {},
    "diloco": {},
    "fedadagrad": {"server_learning_rate": 0.1, "server_beta1": 0.9},
    "fedadam": {"server_learning_rate": 0.1},
    "fedyogi": {"server_learning_rate": 0.1},
}

OTHER_PLACES = {
    "an exponential average as FedAvgM (OpenFedLLM)": (0.5, 0.925, 1.3175),
    "FedAdagrad from v = 0": (0.00998004, 0.01355136, 0.01847322),
    "FedAdam from v = 0": (0.09803922, 0.13332650, 0.18219734),
    "FedYogi from v = 0": (0.09803922, 0.13318755, 0.18163961),
    "FedAdam with bias correction of exponent t + 1 (Flower)": (0.07279018, 0.09523077, 0.12343978),
    "FedAdam with v from m squared and m beginning at delta (OpenFedLLM)": (0.98020190, 1.61988882, 2.12945625),
}
"""What published code gives for the same changes; test_mutations.py makes each of them."""


def follow(strategy: Strategy) -> list[float]:
    """Where a server that starts at zero is after each of the three rounds."""
    state, places = ServerState(scalar(0.0)), []
    for number, change in enumerate(CHANGES, start=1):
        here = float(state.adapter["one.lora_B.weight"])
        state = aggregate(strategy, state, [scalar(here + change)], round_number=number)
        places.append(float(state.adapter["one.lora_B.weight"]))
    return places


def assert_places(strategy: Strategy, places: Sequence[float]) -> None:
    """Eight decimals, as they are published."""
    for found, wanted in zip(follow(strategy), places, strict=True):
        assert abs(found - wanted) <= 6e-9, (found, wanted)


def point(*values: float) -> dict[str, torch.Tensor]:
    return {"one.lora_B.weight": torch.tensor([values], dtype=torch.float64)}


def combined(strategy: Strategy, points=POINTS, start=(0.0, 0.0)) -> list[float]:
    """Where a server goes from `start` with the points as its clients."""
    state = aggregate(strategy, ServerState(point(*start)), [point(*values) for values in points])
    return state.adapter["one.lora_B.weight"][0].tolist()


def assert_point(strategy: Strategy, wanted: Sequence[float], points=POINTS, tolerance: float = 1e-7) -> None:
    found = combined(strategy, points)
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= tolerance, (found, wanted)


def assert_scores(krum: Krum, points: Sequence[Sequence[float]], wanted: Sequence[float]) -> None:
    """To a millionth."""
    scores = krum.score({"x": torch.tensor(points, dtype=torch.float64)}).tolist()
    assert all(abs(a - b) <= 1e-6 * b for a, b in zip(scores, wanted, strict=True)), (scores, wanted)


CLOSE_POINTS = tuple((1e4 + 0.01 * index, 1e4) for index in range(5))
CLOSE_SCORES = (5e-4, 2e-4, 2e-4, 2e-4, 5e-4)
"""Where the Gram matrix in float32 gives zeros and negative squares."""
