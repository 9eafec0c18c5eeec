"""The two halves of a federated method: what the server does and what a client does.

Both are pure functions over explicit state, with hyper-parameters as dataclass fields; a method
knows nothing of files, transport or language models, and so runs on every engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from fedlora.types import (
    AdapterState,
    ClientId,
    ClientMemory,
    Download,
    Phase,
    RoundContext,
    Updates,
)


class Strategy(Protocol):
    """The server: `aggregate` must not mutate its inputs and must not depend on the order of updates.

    `restore` turns the state of `init` into that after a committed round, from what the round left.
    """

    def init(self, adapter: AdapterState, clients: Sequence[ClientId]) -> Any: ...
    def restore(self, state: Any, global_adapter: AdapterState | None) -> Any: ...
    def broadcast(self, state: Any, client_id: ClientId) -> Download: ...
    def aggregate(self, state: Any, updates: Updates, context: RoundContext) -> Any: ...
    def global_adapter(self, state: Any) -> AdapterState | None: ...


class ClientRule(Protocol):
    """The client: what to train from where, what leaves (`upload`) and what stays (`memory`)."""

    def phases(self, download: Download, memory: ClientMemory) -> tuple[Phase, ...]: ...
    def upload(self, trained: AdapterState, memory: ClientMemory) -> tuple[AdapterState | None, ClientMemory]: ...
