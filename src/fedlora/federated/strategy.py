"""The two halves of a federated method: what the server does and what a client does.

Both are pure functions over explicit state, with hyper-parameters as dataclass fields; a method
knows nothing of files, transport or language models, and so runs on every engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from fedlora.types import (
    AdapterState,
    ClientId,
    ClientMemory,
    Download,
    Export,
    LocalResult,
    Phase,
    RoundContext,
    ServerState,
    Updates,
    Upload,
)


class Strategy(Protocol):
    """The server: `aggregate` must not mutate its inputs and must not depend on the order of updates.

    `broadcast` is given the number of the round, for methods that alternate. `is_weighted` says whether rows weigh,
    `turns_factors` whether the factors a client starts from are others than those it left, so that its optimizer's
    memory of them means nothing. With fewer than `fewest_clients` updates `aggregate` leaves the state as it is.
    `increment_rank` is the most ranks that a round adds to the base under a layer, from clients of these ranks;
    `export` gives the global model as the one adapter that a round leaves.
    """

    is_weighted: ClassVar[bool]
    turns_factors: ClassVar[bool]

    @property
    def fewest_clients(self) -> int: ...

    def init(self, adapter: AdapterState, clients: Sequence[ClientId]) -> ServerState: ...
    def broadcast(self, state: ServerState, client_id: ClientId, round_number: int) -> Download: ...
    def aggregate(self, state: ServerState, updates: Updates, context: RoundContext) -> ServerState: ...
    def global_adapter(self, state: ServerState) -> AdapterState | None: ...
    def increment_rank(self, ranks: Sequence[int], d_out: int, d_in: int) -> int: ...
    def export(self, state: ServerState, scaling: float) -> Export: ...


class ClientRule(Protocol):
    """The client: what to train from where, what leaves (`upload`) and what stays (`ClientMemory`).

    The first of its phases is the one that the server hears of: loss, norm and where it began are told of that one.
    `sends` names the extra tensors of an upload; `needs_gradient` asks for the mean gradient of local training.
    """

    sends: ClassVar[tuple[str, ...]]
    needs_gradient: ClassVar[bool]

    def phases(self, download: Download, memory: ClientMemory) -> tuple[Phase, ...]: ...
    def upload(
        self, results: Sequence[LocalResult], download: Download, memory: ClientMemory
    ) -> tuple[Upload | None, ClientMemory]: ...
