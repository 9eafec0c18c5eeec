"""What Flower's strategies give for a few small clients, as JSON: the oracle of tests/methods/test_flower_oracle.py.

Flower is no dependency, so this runs once in an environment of its own, and its answers are committed:

    python -m venv oracle && oracle/bin/pip install flwr==1.41.0
    oracle/bin/python tools/flower_oracle.py > tests/methods/flower_oracle.json

Every strategy sees the same three rounds: in each, a client's arrays are where the server is plus the client's change
of that round.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

ROUNDS, CLIENTS = 3, 7
ROWS = (5, 2, 9, 1, 4, 7, 3)
SHAPES = {"l.lora_A.weight": (2, 3), "l.lora_B.weight": (4, 2)}
STRATEGIES: dict[str, tuple[type, dict[str, Any]]] = {
    "FedAvg": (flower.FedAvg, {}),
    "FedAvgM": (flower.FedAvgM, {"server_learning_rate": 0.4, "server_momentum": 0.9}),
    "FedAdagrad": (flower.FedAdagrad, {"eta": 0.1, "tau": 1e-3}),
    "FedAdam": (flower.FedAdam, {"eta": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3}),
    "FedYogi": (flower.FedYogi, {"eta": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3}),
    "FedMedian": (flower.FedMedian, {}),
    "FedTrimmedAvg": (flower.FedTrimmedAvg, {"beta": 0.2}),
    "Krum": (flower.Krum, {"num_malicious_nodes": 1}),
    "MultiKrum": (flower.MultiKrum, {"num_malicious_nodes": 1, "num_nodes_to_select": 3}),
}


class TwoNodes:
    """As much of a grid as choosing nodes needs."""

    def get_node_ids(self) -> list[int]:
        return [1, 2]


@dataclass(frozen=True)
class Reply:
    """As much of a message as aggregation reads; a real one asks for a running app."""

    content: RecordDict

    def has_error(self) -> bool:
        return False


def reply_of(arrays: dict[str, np.ndarray], rows: int) -> Reply:
    content = {
        "arrays": ArrayRecord({key: Array(value) for key, value in arrays.items()}),
        "metrics": MetricRecord({"num-examples": rows}),
    }
    return Reply(RecordDict(content))


def follow(kind: type, options: dict[str, Any], start: dict, changes: list) -> list[dict[str, Any]]:
    """Where the server is after each round."""
    server, place, places = kind(**options), start, []
    server._construct_messages = lambda *_: []  # nobody to send to
    for number in range(1, ROUNDS + 1):
        record = ArrayRecord({key: Array(value) for key, value in place.items()})
        # the server learns where it is from what it sends out
        server.configure_train(number, record, ConfigRecord(), TwoNodes())
        clients = [{key: place[key] + change[key] for key in place} for change in changes[number - 1]]
        found, _ = server.aggregate_train(number, [reply_of(*pair) for pair in zip(clients, ROWS, strict=True)])
        place = {key: value.numpy() for key, value in found.items()}
        places.append(as_lists(place))
    return places


def as_lists(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {key: value.tolist() for key, value in arrays.items()}


def main() -> None:
    draw = np.random.default_rng(5)
    start = {key: draw.normal(size=shape) for key, shape in SHAPES.items()}
    changes = [
        [{key: draw.normal(size=shape) * 0.3 for key, shape in SHAPES.items()} for _ in range(CLIENTS)]
        for _ in range(ROUNDS)
    ]
    answers = {
        name: {"options": options, "places": follow(kind, options, start, changes)}
        for name, (kind, options) in STRATEGIES.items()
    }
    content = {
        "flwr": version("flwr"),
        "rows": ROWS,
        "start": as_lists(start),
        "changes": [[as_lists(change) for change in round_] for round_ in changes],
        "answers": answers,
    }
    print(json.dumps(content, indent=None, separators=(",", ":")))


if __name__ == "__main__":
    main()
