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
    ClientUpdate,
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

    `aggregate` pulls the clients' training: the first pass over `updates` trains them, one after another; further
    passes read the same updates from the store, one in memory at a time.

    `broadcast` is given the number of the round, for methods that alternate. A strategy whose clients may have
    different ranks has a field `client_ranks` and sends every client an adapter of its own rank. `weight_of` is what an
    update weighs in the method's mean, up to a common factor. With fewer than `fewest_clients` updates `aggregate`
    leaves the state as it is. `find_cohort_fault` says why the hyper-parameters cannot be meant for cohorts of this
    size, beginning with `name=value`; None when they can. `asks_everybody` says whether a round trains all
    clients instead of a drawn cohort. `increment_rank` is the most ranks that a round adds to the base under a layer,
    from clients of these ranks; `export` gives the global model as the one adapter that a round leaves.
    """

    @property
    def fewest_clients(self) -> int: ...

    def find_cohort_fault(self, size: int) -> str | None: ...
    def weight_of(self, update: ClientUpdate) -> float: ...
    def init(self, adapter: AdapterState, clients: Sequence[ClientId]) -> ServerState: ...
    def broadcast(self, state: ServerState, client_id: ClientId, round_number: int) -> Download: ...
    def aggregate(self, state: ServerState, updates: Updates, context: RoundContext) -> ServerState: ...
    def global_adapter(self, state: ServerState) -> AdapterState | None: ...
    def asks_everybody(self, round_number: int) -> bool: ...
    def increment_rank(self, ranks: Sequence[int], d_out: int, d_in: int) -> int: ...
    def export(self, state: ServerState, scaling: float) -> Export: ...


class ClientRule(Protocol):
    """The client: what to train from where, what leaves (`upload`) and what stays (`ClientMemory`).

    The server sees only the first of its phases: loss, norm and start belong to that one.
    `sends` names the extra tensors of an upload; `needs_gradient` asks for the mean gradient of local training.
    `sends_smaller` says that an upload may be of a smaller rank than the download. `own_ranks` is the rank of the model
    that a client keeps for itself, in multiples of the rank that travels; 0 where it keeps none.
    """

    sends: ClassVar[tuple[str, ...]]
    sends_smaller: ClassVar[bool]
    needs_gradient: ClassVar[bool]
    own_ranks: ClassVar[int]

    def phases(self, download: Download, memory: ClientMemory) -> tuple[Phase, ...]: ...
    def upload(
        self, results: Sequence[LocalResult], download: Download, memory: ClientMemory
    ) -> tuple[Upload | None, ClientMemory]: ...
