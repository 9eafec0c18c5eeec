"""How many rounds of a method fit into a budget of optimizer steps or tokens.

Counted from the clients' rows and the cohorts that the run will draw, all clients of a round together: that is what
the federation computes. A method that trains more than once over a client's rows costs a multiple of this, which is
measured on its first run (`cost`) and held against it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.config.train import TrainConfig
from fedlora.engines.cohorts import choose_cohort
from fedlora.errors import UsageError
from fedlora.federated.modes import Mode
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
    config: TrainConfig, mode: Mode, clients: Mapping[ClientId, RowCount], unit: str, round_number: int
) -> int:
    """Steps or tokens of one round, one pass of training per client and local epoch."""
    cohort = choose_cohort(config, list(clients), round_number)
    if unit == "tokens":
        return config.local_num_epochs * sum(clients[client].num_tokens for client in cohort)
    sizes = [clients[client].num_examples for client in cohort]
    groups = [sum(sizes)] if mode.order == "pooled" else sizes
    return config.local_num_epochs * sum(math.ceil(size / config.local_batch_size) for size in groups)


def fit_rounds(
    config: TrainConfig,
    mode: Mode,
    clients: Mapping[ClientId, RowCount],
    *,
    unit: str,
    budget: int,
    cost: float = 1.0,
) -> Share:
    """The most rounds whose cost stays within the budget; UsageError when not even one does."""
    rounds = spent = 0
    while True:
        following = spent + count_round(config, mode, clients, unit, rounds + 1)
        # a cost that was measured as a quotient may be a rounding error too high
        if following * cost > budget * (1 + 1e-9):
            break
        rounds, spent = rounds + 1, following
    if not rounds:
        raise UsageError(
            f"a budget of {budget:,} {unit} is less than one round of {config.federation_mode}, "
            f"which takes {following * cost:,.0f}",
            hint="raise the budget, or make rounds smaller: fewer local epochs, larger batches, a smaller cohort",
        )
    return Share(rounds, spent)
