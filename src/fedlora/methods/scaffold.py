"""SCAFFOLD: control variates against client drift (Karimireddy et al., ICML 2020, arXiv 1910.06378).

Clients step along `d = clip(g - c_k + c)`. Option II of the paper sets `c_k <- c_k - c + (x - y) / (E eta)`, which
under SGD at a constant rate and without weight decay is `mean(d) - (c - c_k)`. That is what is computed here, so a
control variate is a mean gradient under AdamW as well, where the paper's formula would turn it into a sum of Adam's
steps. The correction is added to the gradient before clipping and the optimizer; under AdamW (the default) that is a
deviation from the theory, `local_optimizer=sgd` is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedlora.federated.adapters import combine, weighted_mean, zeros_like
from fedlora.methods.fedavg import FedAvg, TrainAndSend
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

CONTROL, CHANGE = "control", "control_change"


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """Server half: `x <- x + eta mean(x_k - x)` unweighted, `c <- c + |S| / N mean(c_k change)` over all N clients."""

    server_learning_rate: float = 1.0

    def weight_of(self, update: ClientUpdate) -> float:
        return 1.0

    def init(self, adapter: AdapterState, clients: Sequence[ClientId]) -> ServerState:
        return ServerState(adapter, {CONTROL: zeros_like(adapter)})

    def broadcast(self, state: ServerState, client_id: ClientId, round_number: int) -> Download:
        return Download(state.adapter, extra={CONTROL: state.slots[CONTROL]})

    def aggregate(self, state: ServerState, updates: Updates, context: RoundContext) -> ServerState:
        mean = weighted_mean(((update.upload or {}, 1.0) for update in updates), dtype=torch.float64)
        change = weighted_mean(((update.extra[CHANGE], 1.0) for update in updates), dtype=torch.float64)
        if mean is None or change is None:
            return state
        eta, part = self.server_learning_rate, len(updates) / len(context.clients)
        adapter = combine(lambda x, m: x + eta * (m - x), state.adapter, mean)
        control = combine(lambda c, d: c + part * d, state.slots[CONTROL], change)
        return ServerState(adapter, {CONTROL: control})


@dataclass(frozen=True)
class ControlledTraining(TrainAndSend):
    """Client half: keeps `c_k` between its rounds and sends how it changed."""

    sends: ClassVar[tuple[str, ...]] = (CHANGE,)
    needs_gradient: ClassVar[bool] = True

    def phases(self, download: Download, memory: ClientMemory) -> tuple[Phase, ...]:
        control = download.extra[CONTROL]
        own = memory.slots.get(CONTROL) or zeros_like(control)
        return (Phase(download.adapter, correction=combine(lambda c, k: c - k, control, own)),)

    def upload(
        self, results: Sequence[LocalResult], download: Download, memory: ClientMemory
    ) -> tuple[Upload | None, ClientMemory]:
        result = results[0]
        if result.mean_gradient is None:
            raise ValueError("SCAFFOLD needs the mean gradient of local training")
        own = memory.slots.get(CONTROL) or zeros_like(result.mean_gradient)
        change = combine(lambda new, old: new - old, result.mean_gradient, own)
        memory = replace(memory, adapter=None, slots={CONTROL: result.mean_gradient})
        return Upload(result.adapter, {CHANGE: change}), memory
