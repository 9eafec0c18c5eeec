"""The error meter: how far a round's global adapter is from the mean of its clients' products, and how far they drift.

Aggregation error is `||sum w_k B_k A_k - B A|| / ||sum w_k B_k A_k||`, with `B A` what the strategy made of the wave
and w_k the weights it used; for a plain mean of factors that is the cross-term `sum w_k (B_k - mean B)(A_k - mean A)`
(Sun et al., arXiv 2403.12313; Singhal et al., arXiv 2410.09432). For robust methods and server optimizers it
includes what they do on purpose. Drift is `D_k = s (B_k A_k - B_0 A_0)` from the client's own start, and its cosine to
the weighted mean of all D_k. What does not exist is absent, never zero: a single update has no cosine and nothing that
is averaged, and of a client that keeps half of its adapter the server cannot know the product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedlora.federated.adapters import compact, layer_pairs
from fedlora.federated.measurement import Layer, Measurement, Wave
from fedlora.federated.products import DOUBTFUL, delta_inner, mean_rows, norm_of_sum, stack_rows
from fedlora.types import AdapterState, ClientId, ClientUpdate, Download, Updates

MOST_BYTES = 256 << 20
"""Most bytes of updates that are held at once; of larger waves some layers are read once more from the store."""

WORK_BYTES = 8 << 20
"""About so many bytes of float64 factors are computed with at once."""


class ErrorMeter:
    """Measures one wave: `watch` looks at the updates while a strategy uses them, `measure` compares with the result.

    `scaling` is s of `dW = s B A`, `weight_of` what an update weighs; where all weights are zero, all weigh the same.
    Factors are held as they came, in float32, up to `most_bytes`.
    """

    def __init__(
        self,
        downloads: Mapping[ClientId, Download],
        *,
        weight_of: Callable[[ClientUpdate], float],
        scaling: float,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.downloads = downloads
        self.weight_of = weight_of
        self.scaling = scaling
        self._groups = _group_layers(downloads, most_bytes)
        self._updates: Updates | None = None
        self._held: dict[ClientId, AdapterState] = {}
        self._weights: dict[ClientId, float] = {}

    def watch(self, updates: Updates) -> Updates:
        """The same updates, looked at while they pass for the first time."""
        self._updates = updates
        return _Watched(updates, self._hold) if self._groups else updates

    def measure(self, made: AdapterState | None) -> Measurement:
        """The measurement of the wave, once the strategy has made `made` of it; None where the clients share
        nothing."""
        if not self._held or self._updates is None:
            return Measurement()
        clients = sorted(self._held)
        weights = torch.tensor([self._weights[client] for client in clients], dtype=torch.float64)
        if not bool(weights.any()):
            weights = torch.ones_like(weights)
        wave = Wave(clients, weights / weights.sum(), self.scaling)
        found: dict[str, Layer] = {}
        for number, group in enumerate(self._groups):
            if number:
                self._held = {update.client_id: self._pick(update, group) for update in self._updates}
            found |= self._measure_layers(wave, group, made)
        self._held = {}
        return wave.summarise(found)

    def _hold(self, update: ClientUpdate) -> None:
        if update.upload is not None:
            self._held[update.client_id] = self._pick(update, self._groups[0])
            self._weights[update.client_id] = self.weight_of(update)

    def _pick(self, update: ClientUpdate, layers: Sequence[str]) -> AdapterState:
        """The client's whole factors of some layers: what it sent, and what it left as it was sent to it."""
        start, sent = self.downloads[update.client_id].adapter, update.upload or {}
        keys = [key for layer in layers for key in _keys(layer)]
        return {key: compact(sent[key]) if key in sent else start[key] for key in keys}

    def _measure_layers(self, wave: Wave, layers: Sequence[str], made: AdapterState | None) -> dict[str, Layer]:
        """Layers of one shape together, as many as fit into WORK_BYTES."""
        by_shape: dict[Any, list[str]] = {}
        for layer in layers:
            shape = tuple(tuple(held[key].shape) for held in self._held.values() for key in _keys(layer))
            by_shape.setdefault(shape, []).append(layer)
        found: dict[str, Layer] = {}
        for shape, names in by_shape.items():
            step = max(1, WORK_BYTES // (8 * sum(map(math.prod, shape))))
            for begin in range(0, len(names), step):
                part = names[begin : begin + step]
                found |= dict(zip(part, self._measure_shape(wave, part, made), strict=True))
        return found

    def _measure_shape(self, wave: Wave, layers: Sequence[str], made: AdapterState | None) -> list[Layer]:
        starts = {id(self.downloads[client].adapter): self.downloads[client].adapter for client in wave.clients}
        order, count = list(starts), len(wave.clients)
        start_of = [order.index(id(self.downloads[client].adapter)) for client in wave.clients]
        made = None if count < 2 else made
        # of all clients' ranks together: padding the clients to as many would cost more than all the rest
        highest = max(_rank_of(self._held[client], layers) for client in wave.clients)
        is_stack = made is not None and _rank_of(made, layers) > highest
        results = [] if made is None or is_stack else [made]
        # in one stack, so that all are padded to one rank; the result stands behind the clients, as one more of them
        states = [*starts.values(), *(self._held[client] for client in wave.clients), *results]
        b, a = (_stack(layers, half, states) for half in ("B", "A"))
        first = len(order)
        changes, products = delta_inner(
            (b[:, :first], a[:, :first]), (b[:, first:], a[:, first:]), [*start_of, *(0 for _ in results)]
        )
        totals = torch.einsum("k,nkj,j->n", wave.weights, products[:, :count, :count], wave.weights).clamp_min(0)
        errors: list[float] | list[None] = [None] * len(layers)
        if results:
            squares, sizes = _difference_squares(changes, wave.weights)
            # from other starts the changes do not tell the difference of the products
            doubtful = squares < DOUBTFUL * sizes if first == 1 else torch.ones_like(squares, dtype=torch.bool)
            if bool(doubtful.any()):
                b, a = b[doubtful, first:], a[doubtful, first:]
                norms = error_norms(b[:, :count], a[:, :count], wave.weights, b[:, count], a[:, count])
                squares[doubtful] = norms.square()
            errors = squares.tolist()
        elif made is not None:
            made_b, made_a = (_stack(layers, half, [made]) for half in ("B", "A"))
            errors = _stack_errors(b[:, first:], a[:, first:], wave.weights, made_b, made_a)
        return [Layer(*each) for each in zip(changes[:, :count, :count], totals.tolist(), errors, strict=True)]


def _difference_squares(changes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(layers,) `||sum w_k D_k - D||^2` for the result's change D, the last of `changes`; and the square of the largest
    sum that its terms allow."""
    signed = torch.cat([weights, weights.new_tensor([-1.0])])
    squares = torch.einsum("k,nkj,j->n", signed, changes, signed)
    norms = changes.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    return squares, (norms @ signed.abs()).square()


def _stack_errors(b: Tensor, a: Tensor, weights: Tensor, made_b: Tensor, made_a: Tensor) -> list[float]:
    """Squares of the norms of `sum w_k B_k A_k - B A` for a result of another rank than the clients'."""
    left = torch.cat([(weights[:, None, None] * b).flatten(1, 2), -made_b.flatten(1, 2)], dim=1)
    right = torch.cat([a.flatten(1, 2), made_a.flatten(1, 2)], dim=1)
    return norm_of_sum(left, right).square().tolist()


def error_norms(b: Tensor, a: Tensor, weights: Tensor, made_b: Tensor, made_a: Tensor) -> Tensor:
    """(layers,) norms of `sum w_k B_k A_k - B A`; stacks of rows (layers, clients, r, d), made: (layers, r, d).

    As `sum w_k (B_k - Bm)(A_k - Am) + (Bm - B) Am + B (Am - A)` with the means Bm and Am, which is small term by term
    where the result is small.
    """
    mean_b, mean_a = mean_rows(b, weights), mean_rows(a, weights)
    left = [(weights[:, None, None] * (b - mean_b[:, None])).flatten(1, 2)]
    right = [(a - mean_a[:, None]).flatten(1, 2)]
    left += [mean_b - made_b, made_b]
    right += [mean_a, mean_a - made_a]
    return norm_of_sum(torch.cat(left, dim=1), torch.cat(right, dim=1))


@dataclass(frozen=True)
class _Watched:
    """Updates that are looked at when they first pass."""

    updates: Updates
    look: Callable[[ClientUpdate], None]
    seen: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.updates)

    def __iter__(self) -> Iterator[ClientUpdate]:
        if self.seen:
            yield from self.updates
            return
        self.seen.append(True)
        for update in self.updates:
            self.look(update)
            yield update


def _group_layers(downloads: Mapping[ClientId, Download], most_bytes: int) -> list[list[str]]:
    """Layers whose factors, of all clients, are at most `most_bytes` together; none where a product is not known."""
    if not all(one.shared in ("both", one.trainable) for one in downloads.values()):
        return []
    sizes: dict[str, int] = {}
    for download in downloads.values():
        for layer in layer_pairs(download.adapter):
            sizes[layer] = sizes.get(layer, 0) + sum(4 * download.adapter[key].numel() for key in _keys(layer))
    groups: list[list[str]] = []
    held = 0
    for layer in sorted(sizes):
        if not groups or held + sizes[layer] > most_bytes:
            groups.append([])
            held = 0
        groups[-1].append(layer)
        held += sizes[layer]
    return groups


def _stack(layers: Sequence[str], half: str, states: Sequence[AdapterState]) -> Tensor:
    key = f".lora_{half}.weight"
    return stack_rows([[state[layer + key] for state in states] for layer in layers], transpose=half == "B")


def _rank_of(state: AdapterState, layers: Sequence[str]) -> int:
    return max(len(state[_keys(layer)[0]]) for layer in layers)


def _keys(layer: str) -> tuple[str, str]:
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
