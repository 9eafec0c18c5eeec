"""No federation: every client goes on with its own adapter and nothing is shared.

The row every comparison needs. A client continues from round to round, so it takes as many steps
as under any other mode; the server only hands out the common starting point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedlora.types import AdapterState, ClientId, ClientMemory, Download, Phase, RoundContext, Updates


@dataclass(frozen=True)
class NoServer:
    """Server half: remembers the untrained adapter, combines nothing."""

    def init(self, adapter: AdapterState, clients: Sequence[ClientId]) -> AdapterState:
        return adapter

    def restore(self, state: AdapterState, global_adapter: AdapterState | None) -> AdapterState:
        return state

    def broadcast(self, state: AdapterState, client_id: ClientId) -> Download:
        return Download(adapter=state)

    def aggregate(self, state: AdapterState, updates: Updates, context: RoundContext) -> AdapterState:
        return state

    def global_adapter(self, state: AdapterState) -> None:
        return None


@dataclass(frozen=True)
class KeepOwn:
    """Client half: start from the own adapter once there is one, send nothing."""

    def phases(self, download: Download, memory: ClientMemory) -> tuple[Phase, ...]:
        return (Phase(start=memory.adapter if memory.adapter is not None else download.adapter),)

    def upload(self, trained: AdapterState, memory: ClientMemory) -> tuple[None, ClientMemory]:
        return None, replace(memory, adapter=trained)
