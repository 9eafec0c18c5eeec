"""A global model that is an adapter on a base with additions, as one standard adapter on the base alone.

Sums of updates are stacks of factors, so nothing is lost until the rank passes the limit; beyond it every layer gets
the best approximation of that rank (Eckart and Young 1936), and the error is recorded. A layer whose stack is higher
than the layer itself needs no singular values to be exact: its matrix times the identity is a product of full rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.federated.adapters import layer_pairs
from fedlora.federated.base_delta import dense_key
from fedlora.federated.low_rank_svd import square_norm, svd_of_product
from fedlora.types import AdapterState, BaseDelta, Export


def export_model(adapter: AdapterState, base: BaseDelta, *, scaling: float, most_rank: int) -> Export:
    """One adapter whose `scaling * B @ A` is that of `adapter` plus the background, of one rank for all layers.

    Layers of a smaller rank are filled up with zeros. Computed in float64, given in the adapter's type.
    """
    pairs = layer_pairs(adapter)
    if not base.links:
        return Export(adapter, max(adapter[a_key].shape[0] for a_key, _ in pairs.values()))
    layers = {layer: _join(layer, adapter, base.background, scaling) for layer in pairs}
    rank = min(most_rank, max(1, *(min(one.b.shape[1], one.a.shape[0]) for one in layers.values())))
    exported, cut, total = {}, 0.0, 0.0
    for layer, (a_key, b_key) in pairs.items():
        one = layers[layer]
        if one.rank > rank:
            one, lost = _truncate(one, rank)
            cut += lost
        exported[a_key] = _pad(one.a, rank, 0).to(adapter[a_key].dtype)
        exported[b_key] = _pad(one.b, rank, 1).to(adapter[b_key].dtype)
    if cut:
        total = cut + sum(square_norm(exported[b_key], exported[a_key]) for a_key, b_key in pairs.values())
    return Export(exported, rank, math.sqrt(cut / total) if total else 0.0)


@dataclass(frozen=True)
class _Product:
    """A layer's update over the scaling, as `b @ a` in float64."""

    b: Tensor
    a: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def _join(layer: str, adapter: AdapterState, background: AdapterState, scaling: float) -> _Product:
    """The background over the scaling, and the adapter, as factors of the lowest rank that needs no rounding."""
    a_key, b_key = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
    own_a, own_b = adapter[a_key].to(torch.float64), adapter[b_key].to(torch.float64)
    d_out, d_in = own_b.shape[0], own_a.shape[1]
    # an adapter that was only drawn adds nothing but rank
    parts = [(own_b, own_a)] if bool(own_b.any()) else []
    if a_key in background:
        parts.insert(0, (background[b_key].to(torch.float64) / scaling, background[a_key].to(torch.float64)))
    b = torch.cat([own_b[:, :0], *(part[0] for part in parts)], dim=1)
    a = torch.cat([own_a[:0], *(part[1] for part in parts)])
    matrix = background.get(dense_key(layer))
    if matrix is None and a.shape[0] <= min(d_out, d_in):
        return _Product(b, a)
    whole = b @ a if matrix is None else b @ a + matrix.to(torch.float64) / scaling
    if d_in <= d_out:
        return _Product(whole, torch.eye(d_in, dtype=torch.float64))
    return _Product(torch.eye(d_out, dtype=torch.float64), whole)


def _truncate(product: _Product, rank: int) -> tuple[_Product, float]:
    """The best product of a lower rank, and the square of what it lacks."""
    if product.rank == min(product.b.shape[0], product.a.shape[1]):
        return _project(product.b @ product.a, rank)
    u, s, vh = svd_of_product(product.b, product.a)
    return _Product(u[:, :rank] * s[:rank], vh[:rank]), float(s[rank:].square().sum())


def _project(matrix: Tensor, rank: int) -> tuple[_Product, float]:
    """The same of a matrix of full rank, from its smaller Gram matrix: a tenth of the time of its singular values."""
    is_wide = matrix.shape[0] <= matrix.shape[1]
    rows = matrix if is_wide else matrix.T
    # ascending
    directions = torch.linalg.eigh(rows @ rows.T).eigenvectors[:, -rank:]
    kept = directions.T @ rows
    lost = float(rows.square().sum() - kept.square().sum())
    return (_Product(directions, kept) if is_wide else _Product(kept.T, directions.T)), max(0.0, lost)


def _pad(factor: Tensor, rank: int, dim: int) -> Tensor:
    shape = list(factor.shape)
    shape[dim] = rank - factor.shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim).contiguous()
