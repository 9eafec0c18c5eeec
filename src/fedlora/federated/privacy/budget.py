"""The privacy that a run has spent, round by round, and the limit that stops it before it spends more.

The state is in the last round's manifest, so an interruption loses nothing. A round that is trained again from the same
secret gives the same bytes and costs nothing twice. An epsilon is rounded up to four decimal places, and null where
there is no guarantee (no noise).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedlora.config.train import TrainConfig
from fedlora.errors import BudgetError
from fedlora.federated.privacy.accountant import Accountant, epsilon
from fedlora.federated.privacy.mechanism import ClientMechanism
from fedlora.types import ClientId

Spent = Mapping[str, Any]
"""The privacy state of a round's manifest: JSON values with `unit`, `epsilon`, `delta` and what they follow from."""


class Budget(Protocol):
    """What one run spends."""

    def spend(self, before: Spent | None, clients: Sequence[ClientId]) -> dict[str, Any]:
        """The state after one more round in which `clients` took part."""
        ...

    def forecast(self, rounds: int, clients: Sequence[ClientId]) -> dict[str, Any]:
        """The state after so many rounds from the beginning in which all `clients` could take part."""
        ...


@dataclass(frozen=True)
class ClientBudget:
    """Client-level: every round is one noisy sum over a Poisson cohort of any size."""

    mechanism: ClientMechanism
    delta: float
    accountant: Accountant

    def spend(self, before: Spent | None, clients: Sequence[ClientId]) -> dict[str, Any]:
        """`rounds` counts the noisy sums that were released; empty cohorts count."""
        rounds = 1 + (before["rounds"] if before else 0)
        rate, noise = self.mechanism.rate, self.mechanism.noise_multiplier
        return {
            "unit": "client",
            "rounds": rounds,
            "rate": rate,
            "clip": self.mechanism.clip,
            "noise_multiplier": noise,
            "delta": self.delta,
            "accountant": self.accountant,
            "epsilon": _round_up(epsilon(rate, noise, rounds, self.delta, accountant=self.accountant)),
        }

    def forecast(self, rounds: int, clients: Sequence[ClientId]) -> dict[str, Any]:
        return self.spend({"rounds": rounds - 1}, clients)


@dataclass(frozen=True)
class ExampleBudget:
    """Example-level: every step of a client is one noisy sum over a Poisson lot of its rows.

    Clients hold different rows, so the run's epsilon is that of the client who spent most, not the sum.
    """

    sizes: Mapping[ClientId, int]
    lot_size: int
    epochs: int
    clip: float
    noise_multiplier: float
    delta: float
    accountant: Accountant

    def spend(self, before: Spent | None, clients: Sequence[ClientId]) -> dict[str, Any]:
        """`steps` counts each client's noisy sums over all rounds that it took part in."""
        steps = {int(client): count for client, count in (before["steps"] if before else {}).items()}
        for client in clients:
            steps[client] = steps.get(client, 0) + count_lots(self.sizes[client], self.lot_size, self.epochs)
        costs = [
            epsilon(
                lot_rate(self.sizes[client], self.lot_size),
                self.noise_multiplier,
                count,
                self.delta,
                accountant=self.accountant,
            )
            for client, count in sorted(steps.items())
        ]
        return {
            "unit": "example",
            "steps": {str(client): count for client, count in sorted(steps.items())},
            "lot_size": self.lot_size,
            "clip": self.clip,
            "noise_multiplier": self.noise_multiplier,
            "delta": self.delta,
            "accountant": self.accountant,
            "epsilon": _round_up(max(costs, default=0.0)),
        }

    def forecast(self, rounds: int, clients: Sequence[ClientId]) -> dict[str, Any]:
        steps = {str(k): (rounds - 1) * count_lots(self.sizes[k], self.lot_size, self.epochs) for k in clients}
        return self.spend({"steps": steps}, clients)


def lot_rate(num_examples: int, lot_size: int) -> float:
    """The probability with which each of a client's rows is in a lot."""
    return min(1.0, lot_size / num_examples)


def count_lots(num_examples: int, lot_size: int, epochs: int) -> int:
    """Steps of a client in one round: as many as plain training takes."""
    return epochs * math.ceil(num_examples / lot_size)


def make_mechanism(config: TrainConfig) -> ClientMechanism | None:
    """The client-level mechanism of a configuration, None without one."""
    if config.dp_noise_multiplier is None or config.dp_clip is None:
        return None
    return ClientMechanism(config.client_selection_frac, config.dp_clip, config.dp_noise_multiplier)


def make_budget(config: TrainConfig, sizes: Mapping[ClientId, int]) -> Budget | None:
    """The budget of a configuration, None for a run without privacy; `sizes` are the clients' training rows."""
    if (mechanism := make_mechanism(config)) is not None:
        return ClientBudget(mechanism, config.dp_delta, config.dp_accountant)
    if config.dp_example_noise_multiplier is None or config.dp_example_clip is None:
        return None
    return ExampleBudget(
        sizes,
        config.local_batch_size,
        config.local_num_epochs,
        config.dp_example_clip,
        config.dp_example_noise_multiplier,
        config.dp_example_delta,
        config.dp_accountant,
    )


def check_limit(coming: Spent, limit: float | None, round_number: int) -> None:
    """BudgetError when the state after the coming round would be above `limit`; called before anything is trained."""
    if limit is None:
        return
    if coming["epsilon"] is None or coming["epsilon"] > limit:
        text = "without bound" if coming["epsilon"] is None else f"{coming['epsilon']:.4f}"
        raise BudgetError(
            f"round {round_number} would bring the {coming['unit']}-level epsilon to {text} at delta "
            f"{coming['delta']:g}, above max_epsilon={limit:g}; it is not trained",
            hint="the rounds before it are complete; to resume, give the same command with a higher --max_epsilon, or "
            "start a run with more noise, fewer rounds or a smaller --client_selection_frac",
        )


def describe_spent(spent: Spent) -> str:
    """The state as a phrase for a message."""
    if spent["epsilon"] is None:
        return f"no {spent['unit']}-level privacy (the noise is too small)"
    return f"{spent['unit']}-level epsilon {spent['epsilon']:.4g} at delta {spent['delta']:g}"


def _round_up(value: float) -> float | None:
    return math.ceil(value * 1e4) / 1e4 if math.isfinite(value) else None
