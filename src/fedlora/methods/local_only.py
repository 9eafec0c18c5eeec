"""No federation: every client continues with its own adapter and nothing is shared.

The baseline of every comparison. A client continues from round to round, so it takes as many steps as under any other
method; the server only hands out the common starting point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.methods.fedavg import RankedServer, TrainAndSend
from fedlora.types import (
    AdapterState,
    ClientId,
    ClientMemory,
    ClientUpdate,
    Download,
    LocalResult,
    Phase,
    RoundContext,
    ServerState,
    Updates,
    Upload,
)


@dataclass(frozen=True)
class NoServer(RankedServer):
    """Server half: keeps the untrained adapter, combines nothing."""

    def weight_of(self, update: ClientUpdate) -> float:
        return 1.0

    def broadcast(self, state: ServerState, client_id: ClientId, round_number: int) -> Download:
        return replace(super().broadcast(state, client_id, round_number), travels=None, shared=None)

    def aggregate(self, state: ServerState, updates: Updates, context: RoundContext) -> ServerState:
        return state

    def global_adapter(self, state: ServerState) -> AdapterState | None:
        return None


@dataclass(frozen=True)
class KeepOwn(TrainAndSend):
    """Client half: start from the own adapter once there is one, send nothing."""

    own_ranks: ClassVar[int] = 1

    def phases(self, download: Download, memory: ClientMemory) -> tuple[Phase, ...]:
        if memory.adapter is None:
            return super().phases(download, memory)
        return (Phase(memory.adapter, download.trainable),)

    def upload(
        self, results: Sequence[LocalResult], download: Download, memory: ClientMemory
    ) -> tuple[Upload | None, ClientMemory]:
        return None, replace(memory, adapter=results[0].adapter)
