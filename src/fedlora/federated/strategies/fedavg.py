"""FedAvg on LoRA factors: the weighted mean of the clients' A and B.

McMahan et al., AISTATS 2017 (arXiv 1602.05629); on LoRA as FedIT, Zhang et al. (arXiv 2305.05644).
The mean of factors is not the mean of products: `mean(B) @ mean(A) != mean(B @ A)` unless all A or
all B agree. Weights are the clients' numbers of training examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedlora.federated.adapters import weighted_mean
from fedlora.types import AdapterState, ClientId, ClientMemory, Download, Phase, RoundContext, Updates


@dataclass(frozen=True)
class FedAvg:
    """Server half: state is the global adapter itself."""

    def init(self, adapter: AdapterState, clients: Sequence[ClientId]) -> AdapterState:
        return adapter

    def restore(self, state: AdapterState, global_adapter: AdapterState | None) -> AdapterState:
        return global_adapter if global_adapter is not None else state

    def broadcast(self, state: AdapterState, client_id: ClientId) -> Download:
        return Download(adapter=state)

    def aggregate(self, state: AdapterState, updates: Updates, context: RoundContext) -> AdapterState:
        """`sum(n_k * x_k) / sum(n_k)`; without any update the global adapter stays as it was."""
        mean = weighted_mean((update.upload or {}, update.num_examples) for update in updates)
        return mean if mean is not None else state

    def global_adapter(self, state: AdapterState) -> AdapterState:
        return state


@dataclass(frozen=True)
class TrainAndSend:
    """Client half: train what the server sent, send all of it back, keep nothing of it."""

    def phases(self, download: Download, memory: ClientMemory) -> tuple[Phase, ...]:
        return (Phase(start=download.adapter),)

    def upload(self, trained: AdapterState, memory: ClientMemory) -> tuple[AdapterState, ClientMemory]:
        return trained, replace(memory, adapter=None)
