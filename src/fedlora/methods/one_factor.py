"""Methods that train one factor at a time, so that the mean of factors is the mean of products.

FFA-LoRA, Sun et al., ICLR 2024 (arXiv 2403.12313): A stays as it was drawn, only B is trained and sent. RoLoRA, Chen
et al., NeurIPS 2025 (arXiv 2502.01755): B in odd rounds, A in even ones; B first, for at B = 0 the gradient of A is
zero. FedSVD, Lee et al., NeurIPS 2025 (arXiv 2505.12805): FFA-LoRA whose server turns `B A` into `U S` and `V^T`
after every round, so that A learns without being trained. All three are exact: `sum(w_k B_k) A = sum(w_k B_k A)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedlora.federated.adapters import layer_pairs
from fedlora.methods.fedavg import FedAvg
from fedlora.types import AdapterState, ClientId, Download, Half, RoundContext, ServerState, Updates


@dataclass(frozen=True)
class FfaLora(FedAvg):
    """Server half of FFA-LoRA: everybody trains and sends B only, and has A from the seed."""

    travels: ClassVar[Half] = "B"

    def broadcast(self, state: ServerState, client_id: ClientId, round_number: int) -> Download:
        return Download(state.adapter, self.travels, trainable="B", shared="B")


@dataclass(frozen=True)
class RoLora(FedAvg):
    """Server half of RoLoRA: the factor alternates with the number of the round."""

    def broadcast(self, state: ServerState, client_id: ClientId, round_number: int) -> Download:
        half = "B" if round_number % 2 else "A"
        return Download(state.adapter, trainable=half, shared=half)


@dataclass(frozen=True)
class FedSvd(FfaLora):
    """Server half of FedSVD: the product is kept and A becomes its right singular vectors, `A A^T = I`."""

    travels: ClassVar[Half] = "both"

    def aggregate(self, state: ServerState, updates: Updates, context: RoundContext) -> ServerState:
        return ServerState(split_products(super().aggregate(state, updates, context).adapter))


def split_products(state: AdapterState) -> AdapterState:
    """Every layer's B: (d_out, r) and A: (r, d_in) as `U S` and `V^T` of their product, without forming it.

    A layer whose B is zero stays as it is: its product has no singular vectors to speak of.
    """
    result = dict(state)
    for a_key, b_key in layer_pairs(state).values():
        a, b = state[a_key].to(torch.float64), state[b_key].to(torch.float64)
        if not bool(b.any()):
            continue
        left, upper = torch.linalg.qr(b)
        right, lower = torch.linalg.qr(a.T)
        u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        # a rank above the layer's own leaves columns and rows of zeros
        new_a, new_b = torch.zeros_like(a), torch.zeros_like(b)
        new_b[:, : len(s)], new_a[: len(s)] = (left @ u) * s, vh @ right.T
        result[b_key], result[a_key] = new_b.to(state[b_key].dtype), new_a.to(state[a_key].dtype)
    return result
