"""The part of a run that privacy changes: cohorts, what the strategy sees of the updates, and the privacy spent.

A strategy sees one update, the noisy mean, instead of the clients'; so whatever it does with a mean is private, and no
strategy knows of noise. The store keeps every client's own update as it came: the files of a run are the server's
memory, and only what is made from global adapters may leave it (docs/privacy.md).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.config.train import TrainConfig
from fedlora.federated.adapters import pick_half
from fedlora.federated.privacy.budget import Budget, Spent, check_limit, make_budget, make_mechanism
from fedlora.federated.privacy.mechanism import ClientMechanism
from fedlora.federated.privacy.randomness import Secret
from fedlora.plain_text import counted
from fedlora.types import (
    ClientFailure,
    ClientId,
    ClientMemory,
    ClientUpdate,
    Download,
    FailureKind,
    RoundContext,
    Updates,
)

FEW_CLIENTS = 100
"""With fewer clients, noise that gives a small epsilon is larger than what so few can say together."""

SENT: frozenset[FailureKind] = frozenset({"invalid", "late"})
"""Failures after which a client's training may have left it all the same."""


@dataclass(frozen=True)
class PrivateRun:
    """The budget of a run and, at client level, the mechanism with the secret that it draws from.

    `counts_refused` is False only to compute rounds again that were counted before refused updates were.
    """

    budget: Budget
    limit: float | None
    client_level: tuple[ClientMechanism, Secret] | None = None
    counts_refused: bool = True

    def draw_cohort(self, clients: Sequence[ClientId], round_number: int) -> tuple[ClientId, ...] | None:
        """The Poisson cohort of client-level privacy; None where cohorts are drawn as in any run."""
        if self.client_level is None:
            return None
        mechanism, secret = self.client_level
        return mechanism.draw_cohort(clients, secret, round_number)

    def check(self, spent: Spent | None, cohort: Sequence[ClientId], round_number: int) -> None:
        """BudgetError when the round to come would spend more than the limit."""
        if self.limit is not None:
            check_limit(self.budget.spend(spent, cohort), self.limit, round_number)

    def spend(
        self, spent: Spent | None, used: Collection[ClientId], failures: Iterable[ClientFailure]
    ) -> dict[str, Any]:
        """The state after a round with these clients' updates; at example level it counts whatever left a client.

        `refused` names the clients whose update was sent and not used, where there are any.
        """
        if self.client_level is not None or not self.counts_refused:
            return self.budget.spend(spent, sorted(used))
        refused = sorted({one.client_id for one in failures if one.kind in SENT} - set(used))
        after = self.budget.spend(spent, sorted({*used, *refused}))
        return {**after, "refused": refused} if refused else after

    def hide(self, updates: Updates, download: Download, context: RoundContext) -> Updates:
        """What the strategy may see of the updates; `download` is what any client of the round starts from."""
        if self.client_level is None:
            return updates
        return PrivateUpdates(updates, download, context, *self.client_level)


class PrivateUpdates:
    """One update in the place of all: the noisy mean of what they send. It weighs as much as a single example."""

    def __init__(
        self,
        updates: Updates,
        download: Download,
        context: RoundContext,
        mechanism: ClientMechanism,
        secret: Secret,
    ) -> None:
        self._updates = updates
        self._start = pick_half(download.adapter, download.shared)
        self._context = context
        self._mechanism = mechanism
        self._secret = secret

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[ClientUpdate]:
        number, clients = self._context.round, self._context.clients
        mean = self._mechanism.private_mean(
            self._start, (update.upload or {} for update in self._updates), len(clients), self._secret, number
        )
        yield ClientUpdate("", number, clients[0], mean, ClientMemory(), 1, 0, 0, "")


def make_private_run(config: TrainConfig, sizes: Mapping[ClientId, int], secret: Secret | None) -> PrivateRun | None:
    """The privacy of a configuration, None without; `sizes` are the training rows of all clients that have some.

    ValueError when client-level privacy has no secret to draw from.
    """
    budget, mechanism = make_budget(config, sizes), make_mechanism(config)
    if budget is None:
        return None
    if mechanism is None:
        return PrivateRun(budget, config.max_epsilon)
    if secret is None:
        raise ValueError("client-level privacy needs the run's secret")
    return PrivateRun(budget, config.max_epsilon, (mechanism, secret))


def find_doubts(config: TrainConfig, sizes: Mapping[ClientId, int]) -> Iterator[str]:
    """Warnings about a private run before its first round."""
    smallest = min(sizes.values(), default=1)
    if config.dp_noise_multiplier is not None:
        if len(sizes) < FEW_CLIENTS:
            yield (
                f"warning: client-level privacy over {counted(len(sizes), 'client')}: below {FEW_CLIENTS} "
                f"either epsilon is too "
                "large to promise anything, or the noise is larger than what the clients say"
            )
        if config.dp_delta * len(sizes) >= 1:
            yield (
                f"warning: dp_delta={config.dp_delta:g} is at least 1/{len(sizes)}: the guarantee would allow "
                "revealing one whole client"
            )
        yield (
            "only the global adapters are private: the clients' own folders, metrics.jsonl and the manifests are the "
            "server's memory and must not be published"
        )
    elif config.dp_example_delta * smallest >= 1:
        yield (
            f"warning: dp_example_delta={config.dp_example_delta:g} is at least 1/{smallest}: the guarantee would "
            f"allow revealing one of the {counted(smallest, 'row')} of the smallest client"
        )
