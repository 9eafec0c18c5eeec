"""FedEx-LoRA: A and B are averaged, and what that misses of the mean of products goes into the base.

Singhal et al., ACL 2025 (arXiv 2410.09432). The residual `sum(w B A) - mean(B) mean(A)` is the covariance of the
factors, of rank (K-1) r at most. What is added stays beside the base (`base_delta`), not in its weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.federated.adapters import layer_pairs, weighted_mean
from fedlora.federated.base_delta import append
from fedlora.federated.export import export_model
from fedlora.federated.low_rank_svd import svd_of_product
from fedlora.methods.fedavg import FedAvg
from fedlora.types import AdapterState, BaseDelta, ClientId, Download, Export, RoundContext, ServerState, Updates

NOISE = 1e-13
"""Singular values below this part of the factors' norms are rounding in float64, and are not sent around."""


@dataclass(frozen=True)
class FedEx(FedAvg):
    """Server half of FedEx-LoRA. With `residual_rank` only the best part of that rank of each residual is added."""

    residual_rank: int | None = None
    export_rank: int = 256

    def init(self, adapter: AdapterState, clients: Sequence[ClientId]) -> ServerState:
        return ServerState(adapter, base=BaseDelta())

    def broadcast(self, state: ServerState, client_id: ClientId, round_number: int) -> Download:
        return Download(state.adapter, base=state.base)

    def aggregate(self, state: ServerState, updates: Updates, context: RoundContext) -> ServerState:
        """The means of A and of B, and `s * (sum(w B A) - mean(B) mean(A))` for the base; holds all updates at once."""
        received = [(update.upload or {}, float(update.num_examples)) for update in updates]
        mean = weighted_mean(received)
        if mean is None:
            return state
        factors, error = _find_residuals(received, scaling=context.scaling, rank=self.residual_rank)
        base = append(state.base or BaseDelta(), context.round, factors, truncation_error=error)
        return replace(state, adapter=mean, base=base)

    def increment_rank(self, ranks: Sequence[int], d_out: int, d_in: int) -> int:
        """`(K-1) r` at most, for K centred factors are dependent; never more than the layer's or the limit."""
        most = min((len(ranks) - 1) * max(ranks), d_out, d_in)
        return most if self.residual_rank is None else min(most, self.residual_rank)

    def export(self, state: ServerState, scaling: float) -> Export:
        return export_model(state.adapter, state.base or BaseDelta(), scaling=scaling, most_rank=self.export_rank)


def _find_residuals(
    received: Sequence[tuple[AdapterState, float]], *, scaling: float, rank: int | None
) -> tuple[dict[str, Tensor], float]:
    """Every layer's residual as factors with the scaling in B, and the relative error of cutting them to `rank`."""
    total = math.fsum(weight for _, weight in received)
    weights = [weight / total for _, weight in received]
    factors: dict[str, Tensor] = {}
    whole = cut = 0.0
    for a_key, b_key in layer_pairs(received[0][0]).values():
        a_parts, b_parts = ([sent[key].to(torch.float64) for sent, _ in received] for key in (a_key, b_key))
        u, s, vh = _factor_covariance(b_parts, a_parts, weights)
        kept = s if rank is None else s[:rank]
        whole += float(s.square().sum())
        cut += float(s[len(kept) :].square().sum())
        if len(kept):
            sent = received[0][0]
            factors[b_key] = (u[:, : len(kept)] * (scaling * kept)).to(sent[b_key].dtype).contiguous()
            factors[a_key] = vh[: len(kept)].to(sent[a_key].dtype).contiguous()
    return factors, math.sqrt(cut / whole) if whole else 0.0


def _factor_covariance(
    b_parts: Sequence[Tensor], a_parts: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """`U, S, Vh` of `sum(w (B - mean B) (A - mean A))`, which is `sum(w B A) - mean(B) mean(A)`.

    At most `(K-1) r` singular values, and none that is only rounding.
    """
    means = [
        sum((w * part for w, part in zip(weights, parts, strict=True)), start=torch.zeros_like(parts[0]))
        for parts in (b_parts, a_parts)
    ]
    roots = [math.sqrt(weight) for weight in weights]
    b = torch.cat([root * (part - means[0]) for root, part in zip(roots, b_parts, strict=True)], dim=1)
    a = torch.cat([root * (part - means[1]) for root, part in zip(roots, a_parts, strict=True)])
    u, s, vh = svd_of_product(b, a)
    size = math.sqrt(sum(w * float(part.square().sum()) for w, part in zip(weights, b_parts, strict=True)))
    size *= math.sqrt(sum(w * float(part.square().sum()) for w, part in zip(weights, a_parts, strict=True)))
    most = min((len(weights) - 1) * a_parts[0].shape[0], len(s))
    count = min(most, int((s > NOISE * size).sum()))
    return u[:, :count], s[:count], vh[:count]
