"""FLoRA: the clients' factors are stacked into the base, and everybody starts from a fresh adapter.

Wang et al., NeurIPS 2024 (arXiv 2409.05976). The model is the exact mean of the clients' models, whatever their ranks.
What is added stays beside the base (`base_delta`), not in its weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.federated.adapters import layer_pairs, make_adapter, shapes_of
from fedlora.federated.base_delta import append
from fedlora.federated.export import export_model
from fedlora.methods.fedavg import RankedServer
from fedlora.seeds import derive_seed
from fedlora.types import AdapterState, BaseDelta, ClientId, Download, Export, RoundContext, ServerState, Updates


@dataclass(frozen=True)
class FLora(RankedServer):
    """Server half of FLoRA. Between rounds `adapter` is the fresh one that everybody draws for the next round; a client
    of a smaller rank trains its first directions."""

    export_rank: int = 256

    def init(self, adapter: AdapterState, clients: Sequence[ClientId]) -> ServerState:
        return ServerState(adapter, base=BaseDelta())

    def broadcast(self, state: ServerState, client_id: ClientId, round_number: int) -> Download:
        return replace(super().broadcast(state, client_id, round_number), travels=None, base=state.base)

    def aggregate(self, state: ServerState, updates: Updates, context: RoundContext) -> ServerState:
        """`[w_1 s B_1, w_2 s B_2, ...]` and `[A_1; A_2; ...]` for the base: the weight stands in one factor only."""
        received = [(update.upload or {}, float(update.num_examples)) for update in updates]
        if not received:
            return state
        total = math.fsum(weight for _, weight in received)
        factors: dict[str, Tensor] = {}
        for a_key, b_key in layer_pairs(state.adapter).values():
            parts = [sent[b_key].to(torch.float64) * (context.scaling * weight / total) for sent, weight in received]
            factors[a_key] = torch.cat([sent[a_key] for sent, _ in received])
            factors[b_key] = torch.cat(parts, dim=1).to(state.adapter[b_key].dtype)
        fresh = make_adapter(shapes_of(state.adapter), derive_seed(context.seed, "fresh_adapter", context.round + 1))
        kept = {key: fresh[key].to(value.dtype) for key, value in state.adapter.items()}
        return replace(state, adapter=kept, base=append(state.base or BaseDelta(), context.round, factors))

    def increment_rank(self, ranks: Sequence[int], d_out: int, d_in: int) -> int:
        return sum(ranks)

    def export(self, state: ServerState, scaling: float) -> Export:
        return export_model(state.adapter, state.base or BaseDelta(), scaling=scaling, most_rank=self.export_rank)
