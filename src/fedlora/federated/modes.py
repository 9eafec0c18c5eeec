"""The table of federation modes: what the server does, what a client does, who goes when.

`seq` has no code of its own: it is FedAvg over waves of one client, so a wave's mean is that
client's adapter and the next client starts from it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedlora.federated.strategies.fedavg import FedAvg, TrainAndSend
from fedlora.federated.strategies.local_only import KeepOwn, NoServer
from fedlora.federated.strategy import ClientRule, Strategy
from fedlora.paths import POOLED
from fedlora.seeds import derive_seed
from fedlora.types import ClientId

Wave = tuple[tuple[ClientId, tuple[ClientId, ...]], ...]
"""The members of a wave, each with the clients whose rows it trains on."""


@dataclass(frozen=True)
class Mode:
    """One row of the table; `order` says how a cohort becomes waves."""

    strategy: Strategy
    rule: ClientRule
    order: Literal["parallel", "chain", "pooled"]

    def waves(self, cohort: Sequence[ClientId], *, shuffle: bool, seed: int, round_number: int) -> tuple[Wave, ...]:
        """parallel: everybody in one wave; chain: one client a wave; pooled: one trainer with everybody's rows."""
        members = sorted(cohort)
        if self.order == "pooled":
            return (((POOLED, tuple(members)),),)
        if self.order == "parallel":
            return (tuple((client, (client,)) for client in members),)
        if shuffle:
            random.Random(derive_seed(seed, "seq_order", round_number)).shuffle(members)  # noqa: S311
        return tuple(((client, (client,)),) for client in members)


MODES: dict[str, Mode] = {
    "homo": Mode(FedAvg(), TrainAndSend(), "parallel"),
    "seq": Mode(FedAvg(), TrainAndSend(), "chain"),
    "none": Mode(NoServer(), KeepOwn(), "parallel"),
    "pooled": Mode(FedAvg(), TrainAndSend(), "pooled"),
}
