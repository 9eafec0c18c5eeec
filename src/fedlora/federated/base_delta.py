"""What exact methods add to the base, kept beside it: a chain of increments, folded from the left.

An increment holds factors per layer, B: (d_out, R) and A: (R, d_in), with the scaling in B. Increments are folded one
after another, and a layer becomes one dense matrix at the increment that makes its factors the larger of the two. So
every client that folds the same chain holds the same bytes, whether round by round or all at once. Nothing is added
into the base's own weights: in bfloat16 or in fewer bits most of it would be lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.federated.adapters import Shapes, fingerprint, layer_pairs
from fedlora.types import AdapterState, BaseDelta, BaseLink


def append(base: BaseDelta, version: int, factors: AdapterState, *, truncation_error: float = 0.0) -> BaseDelta:
    """`base` and one increment more, made in round `version`; without a factor it is `base` itself.

    Layers that get nothing are left out of `factors`. Raises ValueError when `version` is not after the last one.
    """
    if not factors:
        return base
    if base.links and version <= base.links[-1].version:
        raise ValueError(f"version {version} is not after version {base.links[-1].version}")
    sha256 = hashlib.sha256(f"{base.sha256}:{version}:{fingerprint(factors)}".encode()).hexdigest()
    ranks = {layer: factors[a_key].shape[0] for layer, (a_key, _) in layer_pairs(factors).items()}
    link = BaseLink(version, base.sha256, sha256, ranks, truncation_error)
    return BaseDelta((*base.links, link), _fold(base.background, factors), factors)


def add_increment(
    adapter: AdapterState, before: BaseDelta | None, after: BaseDelta | None, scaling: float
) -> AdapterState:
    """What a round made, as one adapter on the base that its clients trained on: `adapter` and, stacked before it, the
    factors by which `after` is more than `before`. The same object where nothing was added."""
    if before is None or after is None or before.sha256 == after.sha256:
        return adapter
    made = dict(adapter)
    for a_key, b_key in layer_pairs(after.newest).values():
        made[a_key] = torch.cat([after.newest[a_key], adapter[a_key]])
        made[b_key] = torch.cat([after.newest[b_key] / scaling, adapter[b_key]], dim=1)
    return made


def background_of(base: BaseDelta | None) -> AdapterState | None:
    """The background of an adapter: the sum of all additions to the base, or None."""
    return base.background if base is not None and base.links else None


def is_dense(rank: int, d_out: int, d_in: int) -> bool:
    """Whether factors of this rank are larger than the matrix of their product."""
    return rank * (d_out + d_in) > d_out * d_in


def dense_key(layer: str) -> str:
    """Key of a layer's dense matrix."""
    return f"{layer}.delta.weight"


def _fold(background: AdapterState, factors: AdapterState) -> AdapterState:
    """The sum of both, in the form that `is_dense` says; tensors that do not change are those of `background`."""
    result = dict(background)
    for layer, (a_key, b_key) in layer_pairs(factors).items():
        a, b = factors[a_key], factors[b_key]
        if (sum_key := dense_key(layer)) in result:
            result[sum_key] = (result[sum_key].to(torch.float64) + _multiply(b, a)).to(b.dtype)
            continue
        if a_key in result:
            a, b = torch.cat([result[a_key], a]), torch.cat([result[b_key], b], dim=1)
        if is_dense(a.shape[0], b.shape[0], a.shape[1]):
            result[sum_key] = _multiply(b, a).to(b.dtype)
            result.pop(a_key, None)
            result.pop(b_key, None)
        else:
            result[a_key], result[b_key] = a, b
    return result


def _multiply(b: Tensor, a: Tensor) -> Tensor:
    return b.to(torch.float64) @ a.to(torch.float64)


@dataclass(frozen=True)
class LayerSize:
    """Outputs and inputs of a layer."""

    d_out: int
    d_in: int


def layer_sizes(shapes: Shapes) -> dict[str, LayerSize]:
    """Every layer's size, from the shapes of an adapter."""
    names = [key.removesuffix(".lora_A.weight") for key in shapes if key.endswith(".lora_A.weight")]
    return {
        name: LayerSize(shapes[f"{name}.lora_B.weight"][0], shapes[f"{name}.lora_A.weight"][1])
        for name in sorted(names)
    }


def count_held(links: Sequence[BaseLink], sizes: Mapping[str, LayerSize]) -> int:
    """Numbers in the background that a chain folds to."""
    return sum(_count_held(_sum_ranks(links, layer), size) for layer, size in sizes.items())


def count_missed(links: Sequence[BaseLink], sizes: Mapping[str, LayerSize], accepted: int | None) -> int:
    """Numbers that a client has to be sent that last trained in round `accepted`, or never.

    It had then what was made in earlier rounds. Of each layer it gets the factors that it misses, or the whole of what
    the chain has folded to, whichever is smaller: both leave it with the same bytes.
    """
    missed = [link for link in links if accepted is None or link.version >= accepted]
    total = 0
    for layer, size in sizes.items():
        factors = _sum_ranks(missed, layer) * (size.d_out + size.d_in)
        total += min(factors, _count_held(_sum_ranks(links, layer), size))
    return total


def _sum_ranks(links: Sequence[BaseLink], layer: str) -> int:
    return sum(link.ranks.get(layer, 0) for link in links)


def _count_held(rank: int, size: LayerSize) -> int:
    return size.d_out * size.d_in if is_dense(rank, size.d_out, size.d_in) else rank * (size.d_out + size.d_in)
