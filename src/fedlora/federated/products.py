"""Norms and inner products of sums of low-rank products, from their factors alone.

`<B A, B' A'> = sum((B^T B') * (A A'^T))`: an r x r product on each side stands for one of d_out x d_in, which is never
formed. Stacks hold several clients' factors of several layers of one shape, in float64 and as rows: A as it is, B
transposed, so both are (layers, clients, r, d). Zero rows change no product: clients of lower rank are padded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DOUBTFUL = 1e-5
"""Below this share of what its terms could add up to, the square of a norm has lost too many digits to cancellation."""


def stack_rows(factors: Sequence[Sequence[Tensor]], *, transpose: bool) -> Tensor:
    """(layers, clients, r, d) in float64 from one sequence of factors per layer, padded to the largest rank."""
    rows = [[factor.T if transpose else factor for factor in layer] for layer in factors]
    rank = max(factor.shape[0] for layer in rows for factor in layer)
    first = rows[0][0]
    stack = torch.zeros(len(rows), len(rows[0]), rank, first.shape[1], dtype=torch.float64)
    for number, layer in enumerate(rows):
        for client, factor in enumerate(layer):
            stack[number, client, : factor.shape[0]] = factor
    return stack


def mean_rows(stack: Tensor, weights: Tensor) -> Tensor:
    """(layers, r, d): the weighted mean over clients; exactly the common value where all clients have one."""
    first = stack[:, 0]
    return first + torch.einsum("k,nkrd->nrd", weights, stack - first[:, None])


def delta_inner(
    starts: tuple[Tensor, Tensor], ends: tuple[Tensor, Tensor], start_of: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Inner products of the clients' changes `B_k A_k - B_0 A_0`, and of their products `B_k A_k`.

    `starts` and `ends` are stacks of B^T and of A, `start_of` says from which of the starts each client set out. Both
    results: (layers, clients, clients). A change is `dB A_k + B_0 dA`, so small changes of large factors keep their
    digits.
    """
    origin = torch.tensor(list(start_of))
    change = torch.arange(len(start_of)) + starts[0].shape[1]
    parts = []
    for start, end in zip(starts, ends, strict=True):
        gram = _gram(torch.cat([start, end - start[:, origin]], dim=1))
        parts.append(
            [
                gram.index_select(1, rows).index_select(3, columns)
                for rows, columns in ((origin, origin), (origin, change), (change, origin), (change, change))
            ]
        )
    (b_ss, b_sc, b_cs, b_cc), (a_ss, a_sc, a_cs, a_cc) = parts
    a_ee = a_ss + a_sc + a_cs + a_cc
    changes = b_cc * a_ee + b_cs * (a_sc + a_cc) + b_sc * (a_cs + a_cc) + b_ss * a_cc
    products = (b_ss + b_sc + b_cs + b_cc) * a_ee
    return changes.sum((2, 4)), products.sum((2, 4))


def norm_of_sum(left: Tensor, right: Tensor) -> Tensor:
    """(layers,) Frobenius norms of `left^T right` for rows (layers, m, d_out) and (layers, m, d_in).

    From two m x m Gram matrices; where the terms cancel so far that squares would not do, from two QR decompositions.
    """
    sizes = left.norm(dim=2) * right.norm(dim=2)
    used = sizes.amax(dim=0) > 0
    if not bool(used.any()):
        return sizes.new_zeros(len(left))
    left, right, sizes = left[:, used], right[:, used], sizes[:, used]
    square = ((left @ left.mT) * (right @ right.mT)).sum((1, 2))
    norms = square.clamp_min(0).sqrt()
    for layer in torch.nonzero(square < DOUBTFUL * sizes.sum(dim=1).square()).flatten().tolist():
        upper, lower = (torch.linalg.qr(side[layer].T, mode="r").R for side in (left, right))
        norms[layer] = (upper @ lower.T).norm()
    return norms


def _gram(stack: Tensor) -> Tensor:
    """(layers, clients, r, clients, r) inner products of all rows of a layer."""
    layers, clients, rank, _ = stack.shape
    flat = stack.flatten(1, 2)
    return (flat @ flat.mT).view(layers, clients, rank, clients, rank)
