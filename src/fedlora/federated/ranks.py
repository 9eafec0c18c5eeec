"""Adapters of different ranks: which client has which, and how one becomes the other.

A smaller rank is the first rows of A and the first columns of B. The scaling s is one for all clients, so a cut
adapter is a part of the same update and a padded one is the same update: a client of rank r_k has alpha_k = s r_k.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedlora.federated.adapters import Shapes, layer_pairs, shapes_of
from fedlora.federated.low_rank_svd import square_norm
from fedlora.types import AdapterState, ClientId

Rank = int


def rank_of(client_id: ClientId, client_ranks: Sequence[Rank] | None, largest: Rank) -> Rank:
    """A client's rank by its number; `largest` where none are given."""
    return client_ranks[client_id] if client_ranks else largest


def rank_in(shapes: Shapes) -> Rank:
    """The rank of an adapter with these shapes; ValueError when it has no factor, or factors of different ranks."""
    ranks = {shape[_rank_axis(key)] for key, shape in shapes.items()}
    if len(ranks) != 1:
        raise ValueError(f"an adapter has one rank, these tensors have {sorted(ranks)}")
    return ranks.pop()


def rank_of_adapter(state: AdapterState) -> Rank:
    """The rank of an adapter."""
    return rank_in(shapes_of(state))


def shapes_at(shapes: Shapes, rank: Rank) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter for the same layers with another rank."""
    return {
        key: tuple(rank if axis == _rank_axis(key) else size for axis, size in enumerate(shape))
        for key, shape in shapes.items()
    }


def cut_rank(state: AdapterState, rank: Rank) -> AdapterState:
    """The first `rank` rows of A and columns of B, as views: a cohort's downloads take no memory of their own.

    The same object when nothing is cut.
    """
    if all(value.shape[_rank_axis(key)] <= rank for key, value in state.items()):
        return state
    return {key: value.narrow(_rank_axis(key), 0, rank) for key, value in state.items()}


def pad_like(state: AdapterState, like: AdapterState) -> AdapterState:
    """Tensors with the ranks that those of `like` have; what differs otherwise, or is larger, stays as it is."""
    return {
        key: value if value.shape == like[key].shape else _widen(value, like[key], _rank_axis(key))
        for key, value in state.items()
    }


def cut_like(state: AdapterState, like: AdapterState) -> AdapterState:
    """The part of `state` for the rank directions of `like`, which may be fewer."""
    if all(state[key].shape == value.shape for key, value in like.items()):
        return state
    return cut_rank(state, rank_of_adapter(like))


def padded_mean(
    pairs: Iterable[tuple[AdapterState, float]], like: AdapterState, *, participants: bool
) -> AdapterState | None:
    """Weighted mean of adapters of ranks up to that of `like`, smaller ones padded with zeros; None without weight.

    With `participants` a rank direction (a row of A, a column of B) is divided by the weights of the clients whose rank
    includes it, otherwise by all weights. A direction that no client with a weight has keeps its value in `like`: if
    its A and B were both zero it would never learn again. Summed in float64 in the order given, cast once; one adapter
    at a time is held. Raises ValueError on a negative weight and on keys or shapes that do not fit.
    """
    totals = {key: torch.zeros(value.shape, dtype=torch.float64) for key, value in like.items()}
    shares = torch.zeros(rank_of_adapter(like), dtype=torch.float64)
    weights = 0.0
    for state, weight in pairs:
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight {weight} is negative or no number")
        _check_keys(state, like)
        rank = rank_of_adapter(state)
        for key, total in totals.items():
            part = total.narrow(_rank_axis(key), 0, min(rank, len(shares)))
            if part.shape != state[key].shape:
                raise ValueError(f"{key}: shape {tuple(state[key].shape)} does not fit {tuple(total.shape)}")
            part.add_(state[key].to(torch.float64), alpha=weight)
        shares[:rank] += weight
        weights += weight
    if not weights:
        return None
    # numbers alone would make a float32 tensor
    divisor = shares.clone() if participants else torch.full_like(shares, weights)
    divisor[shares == 0] = 1
    return {key: _divide(key, total, divisor, shares > 0, like[key]) for key, total in totals.items()}


def product_norm(state: AdapterState) -> float:
    """Frobenius norm of `B A` over all layers together, in float64."""
    pairs = layer_pairs(state).values()
    return math.sqrt(max(sum(square_norm(state[b_key], state[a_key]) for a_key, b_key in pairs), 0.0))


def tail_norm(state: AdapterState, first: Rank) -> float:
    """Sum over layers of `||B[:, first:]|| ||A[first:]||`: how much the last directions hold."""
    total = 0.0
    for a_key, b_key in layer_pairs(state).values():
        a, b = state[a_key][first:].to(torch.float64), state[b_key][:, first:].to(torch.float64)
        total += float(a.norm() * b.norm())
    return total


def _divide(key: str, total: Tensor, divisor: Tensor, has: Tensor, own: Tensor) -> Tensor:
    """Each direction of `total` divided by its weight, or that of `own` where no client has it; in the type of
    `own`."""
    if _rank_axis(key) == 0:
        divisor, has = divisor[:, None], has[:, None]
    return torch.where(has, total / divisor, own.to(torch.float64)).to(own.dtype)


def _widen(value: Tensor, like: Tensor, axis: int) -> Tensor:
    sizes = list(value.shape)
    if len(sizes) != like.dim() or sizes[axis] > like.shape[axis]:
        return value
    sizes[axis] = like.shape[axis] - sizes[axis]
    return torch.cat([value, value.new_zeros(sizes)], dim=axis)


def _check_keys(state: AdapterState, like: AdapterState) -> None:
    if state.keys() != like.keys():
        raise ValueError("adapters with different keys cannot be averaged")


def _rank_axis(key: str) -> int:
    """A: (r, d_in), B: (d_out, r)."""
    return 1 if ".lora_B." in key else 0
