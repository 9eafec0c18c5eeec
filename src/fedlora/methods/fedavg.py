"""FedAvg on LoRA factors: the weighted mean of the clients' A and B.

McMahan et al., AISTATS 2017 (arXiv 1602.05629); on LoRA as FedIT, Zhang et al. (arXiv 2305.05644). The mean of
factors is not the mean of products: `mean(B) @ mean(A) != mean(B @ A)` unless all A or all B agree. Weights are the
clients' numbers of training examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.federated.adapters import pick_half, weighted_mean
from fedlora.federated.base_delta import background_of
from fedlora.federated.ranks import Rank, cut_rank, rank_of, rank_of_adapter
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


@dataclass(frozen=True)
class FedAvg:
    """Server half: the state is the global adapter."""

    @property
    def fewest_clients(self) -> int:
        return 1

    def find_cohort_fault(self, size: int) -> str | None:
        return None

    def weight_of(self, update: ClientUpdate) -> float:
        return float(update.num_examples)

    def init(self, adapter: AdapterState, clients: Sequence[ClientId]) -> ServerState:
        return ServerState(adapter)

    def broadcast(self, state: ServerState, client_id: ClientId, round_number: int) -> Download:
        return Download(state.adapter)

    def aggregate(self, state: ServerState, updates: Updates, context: RoundContext) -> ServerState:
        """`sum(n_k * x_k) / sum(n_k)` of what was sent; without any update the global adapter stays as it was."""
        mean = weighted_mean((update.upload or {}, update.num_examples) for update in updates)
        return replace(state, adapter={**state.adapter, **(mean or {})})

    def global_adapter(self, state: ServerState) -> AdapterState | None:
        return state.adapter

    def asks_everybody(self, round_number: int) -> bool:
        return False

    def increment_rank(self, ranks: Sequence[int], d_out: int, d_in: int) -> int:
        return 0

    def export(self, state: ServerState, scaling: float) -> Export:
        return Export(self.global_adapter(state))


@dataclass(frozen=True)
class RankedServer(FedAvg):
    """What servers of different ranks share: the global adapter has the largest rank, a client its first directions."""

    client_ranks: tuple[Rank, ...] | None = None

    def broadcast(self, state: ServerState, client_id: ClientId, round_number: int) -> Download:
        rank = rank_of(client_id, self.client_ranks, rank_of_adapter(state.adapter))
        return Download(cut_rank(state.adapter, rank))


@dataclass(frozen=True)
class TrainAndSend:
    """Client half: train what the server says from what it sent, send the shared factors back, keep nothing."""

    sends: ClassVar[tuple[str, ...]] = ()
    sends_smaller: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False
    own_ranks: ClassVar[int] = 0

    def phases(self, download: Download, memory: ClientMemory) -> tuple[Phase, ...]:
        return (Phase(download.adapter, download.trainable, background=background_of(download.base)),)

    def upload(
        self, results: Sequence[LocalResult], download: Download, memory: ClientMemory
    ) -> tuple[Upload | None, ClientMemory]:
        return Upload(pick_half(results[0].adapter, download.shared)), replace(memory, adapter=None)
