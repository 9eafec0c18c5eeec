"""How many rounds of a method fit into a budget of optimizer steps or tokens.

Counted from the clients' rows and the cohorts that the run will draw, all clients of a round together: that is what
the federation computes. A method that takes more than is counted here is measured on its first run (`cost`), and that
cost decides its rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.config.train import TrainConfig
from fedlora.engines.cohorts import choose_cohort
from fedlora.errors import UsageError
from fedlora.methods.choosing import LoadedMethod, choose_method
from fedlora.types import ClientId


@dataclass(frozen=True)
class RowCount:
    """What one client trains on."""

    num_examples: int
    num_tokens: int


@dataclass(frozen=True)
class Share:
    """So many rounds, and the steps or tokens that they should take."""

    rounds: int
    expected: int


def count_round(
    config: TrainConfig, method: LoadedMethod, clients: Mapping[ClientId, RowCount], unit: str, round_number: int
) -> int:
    """Steps or tokens of one round, for everything that a client trains in it."""
    cohort = choose_cohort(config, method, list(clients), round_number)
    passes = config.local_num_epochs * method.num_trainings
    if unit == "tokens":
        return passes * sum(clients[client].num_tokens for client in cohort)
    sizes = [clients[client].num_examples for client in cohort]
    groups = [sum(sizes)] if method.pools_rows else sizes
    return passes * sum(math.ceil(size / config.local_batch_size) for size in groups)


def fit_rounds(
    config: TrainConfig, clients: Mapping[ClientId, RowCount], *, unit: str, budget: int, cost: float = 1.0
) -> Share:
    """The most rounds whose cost stays within the budget; UsageError when not even the fewest do.

    The rounds that `config` names do not matter.
    """
    row = config.method
    fewest = row.fewest_rounds(config.method_options)
    found, rounds = Share(0, 0), fewest
    while True:
        run = config.model_copy(update={"num_communication_rounds": rounds})
        method = choose_method(run)
        # where rounds depend on how many there are, those before are others now
        new = range(found.rounds + 1 if row.bound_to_length is False else 1, rounds + 1)
        known = found.expected if new.start > 1 else 0
        expected = known + sum(count_round(run, method, clients, unit, number) for number in new)
        # a cost that was measured as a quotient may be a rounding error too high
        if expected * cost > budget * (1 + 1e-9):
            break
        found, rounds = Share(rounds, expected), rounds + 1
    if not found.rounds:
        raise UsageError(
            f"a budget of {budget:,} {unit} is less than {_count(fewest)} of {config.federation_mode}, "
            f"which takes {expected * cost:,.0f}",
            hint="raise the budget, or make rounds smaller: fewer local epochs, larger batches, a smaller cohort",
        )
    return found


def _count(rounds: int) -> str:
    return "one round" if rounds == 1 else f"the fewest rounds, {rounds},"
