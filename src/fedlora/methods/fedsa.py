"""FedSA-LoRA: A is shared, B stays at home (Guo et al., ICLR 2025, arXiv 2410.01463).

Clients train both factors and send A only; client k's model is `W + s B_k mean(A)`. There is no global model: a
client that has never taken part has B = 0, which is the base. What differs between clients' features is learned by
B; where they differ in labels, the paper's gain turns into a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.federated.adapters import pick_half
from fedlora.methods.fedavg import FedAvg, TrainAndSend
from fedlora.types import AdapterState, ClientId, ClientMemory, Download, LocalResult, Phase, ServerState, Upload


@dataclass(frozen=True)
class FedSa(FedAvg):
    """Server half: FedAvg over A."""

    def broadcast(self, state: ServerState, client_id: ClientId, round_number: int) -> Download:
        return Download(state.adapter, travels="A", shared="A")

    def global_adapter(self, state: ServerState) -> AdapterState | None:
        return None


@dataclass(frozen=True)
class KeepB(TrainAndSend):
    """Client half: the server's A with the own B."""

    own_ranks: ClassVar[int] = 1

    def phases(self, download: Download, memory: ClientMemory) -> tuple[Phase, ...]:
        own = pick_half(memory.adapter, "B") if memory.adapter is not None else {}
        return (Phase(start={**download.adapter, **own}),)

    def upload(
        self, results: Sequence[LocalResult], download: Download, memory: ClientMemory
    ) -> tuple[Upload | None, ClientMemory]:
        trained = results[0].adapter
        return Upload(pick_half(trained, "A")), replace(memory, adapter=trained)
