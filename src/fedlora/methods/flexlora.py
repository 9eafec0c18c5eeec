"""FlexLoRA: the mean of products, cut by SVD to every client's rank (Bai et al., NeurIPS 2024, arXiv 2402.11505).

`sum(w_k s B_k A_k) = U S V^T`; the global adapter is its best approximation of the largest rank, and a client gets the
first r_k directions of that, which is the best of its own rank. No d_out x d_in matrix is formed: the factors side by
side are QR-decomposed, and what remains for the SVD is as large as the sum of the ranks. s is one for all and cancels.
Exact where the ranks of a round add up to no more than the largest; what is cut otherwise is noted with the round as
`truncation_error`, `||W - W_r|| / ||W||`. A direction without a singular value keeps its A, so that it can learn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedlora.federated.adapters import layer_pairs
from fedlora.federated.low_rank_svd import svd_of_product
from fedlora.federated.ranks import Rank, rank_of_adapter
from fedlora.methods.fedavg import RankedServer
from fedlora.types import AdapterState, RoundContext, ServerState, Updates

Split = Literal["b", "balanced"]


@dataclass(frozen=True)
class Svd:
    """`U S V^T` of one layer in float64: u (d_out, n), s (n,) falling, vh (n, d_in)."""

    u: Tensor
    s: Tensor
    vh: Tensor


@dataclass(frozen=True)
class FlexLora(RankedServer):
    """Server half. `svd_split` b leaves `B = U S, A = V^T`, balanced `B = U sqrt(S), A = sqrt(S) V^T`."""

    svd_split: Split = "b"

    def aggregate(self, state: ServerState, updates: Updates, context: RoundContext) -> ServerState:
        layers = decompose_mean((update.upload or {}, update.num_examples) for update in updates)
        adapter = dict(state.adapter)
        for name, (a_key, b_key) in layer_pairs(state.adapter).items():
            if name in layers:
                adapter[a_key], adapter[b_key] = split_svd(layers[name], adapter[a_key], adapter[b_key], self.svd_split)
        spectra = {name: svd.s for name, svd in layers.items()}
        return ServerState(adapter, notes={"truncation_error": truncation_error(spectra, rank_of_adapter(adapter))})


def decompose_mean(pairs: Iterable[tuple[AdapterState, float]]) -> dict[str, Svd]:
    """Layer -> the SVD of `sum(w_k B_k A_k) / sum(w_k)`, of adapters of any ranks; empty without a pair.

    All factors are held in float64. Signs are fixed: the entry of largest size in each row of V^T is positive.
    """
    lefts: dict[str, list[Tensor]] = {}
    rights: dict[str, list[Tensor]] = {}
    weights = 0.0
    for state, weight in pairs:
        weights += weight
        for name, (a_key, b_key) in layer_pairs(state).items():
            lefts.setdefault(name, []).append(state[b_key].to(torch.float64) * weight)
            rights.setdefault(name, []).append(state[a_key].to(torch.float64))
    return {name: _decompose(torch.cat(lefts[name], dim=1) / weights, torch.cat(rights[name])) for name in lefts}


def truncation_error(spectra: Mapping[str, Tensor], rank: Rank) -> float:
    """`||W - W_rank|| / ||W||` over all layers together, from their falling singular values; 0 where W is 0."""
    cut = sum(float(values[rank:].square().sum()) for values in spectra.values())
    whole = sum(float(values.square().sum()) for values in spectra.values())
    return math.sqrt(cut / whole) if whole else 0.0


def split_svd(svd: Svd, a: Tensor, b: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """The best A: (r, d_in) and B: (d_out, r) of the rank and type of `a` and `b`; directions of size zero keep `a`.

    Zero is what that type cannot tell from zero beside the largest singular value.
    """
    alive = int((svd.s > svd.s[0] * torch.finfo(a.dtype).eps).sum())
    rank = min(len(a), alive)
    left, right = torch.zeros_like(b), a.clone()
    sizes = svd.s[:rank]
    to_b, to_a = (sizes, torch.ones_like(sizes)) if split == "b" else (sizes.sqrt(), sizes.sqrt())
    left[:, :rank] = (svd.u[:, :rank] * to_b).to(b.dtype)
    right[:rank] = (svd.vh[:rank] * to_a[:, None]).to(a.dtype)
    return right, left


def _decompose(left: Tensor, right: Tensor) -> Svd:
    """The SVD of `left @ right` with signs fixed; left (d_out, n), right (n, d_in)."""
    u, s, vh = svd_of_product(left, right)
    signs = vh.gather(1, vh.abs().argmax(dim=1, keepdim=True)).sign()
    signs = torch.where(signs == 0, 1.0, signs)
    return Svd(u * signs[:, 0], s, vh * signs)
