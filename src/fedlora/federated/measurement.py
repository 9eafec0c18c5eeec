"""The numbers of the error meter: from inner products of the clients' changes to the lines of metrics.jsonl.

What does not exist is absent, never zero: a client alone has no cosine, and an error relative to nothing is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedlora.types import ClientId

COMMON = "base_model.model."
"""Begins every PEFT key, and is left out of the names of layers."""


@dataclass(frozen=True)
class Measurement:
    """What is known about one wave; `layers`: layer -> `error`, `cosine`, `norm`; `clients`: id -> its own numbers."""

    overall: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    clients: Mapping[ClientId, Mapping[str, float]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The fields of a round's line."""
        return {**self.overall, **({"by_layer": self.layers} if self.layers else {})}


def merge_waves(waves: Sequence[Measurement]) -> tuple[dict[str, Any], dict[ClientId, Mapping[str, float]]]:
    """The fields of a round's line, and those of its clients; of several waves only what needs no common start."""
    clients = {client: numbers for wave in waves for client, numbers in wave.clients.items()}
    if len(waves) == 1:
        return waves[0].record(), clients
    norms = [numbers["drift_norm"] for numbers in clients.values()]
    return {"drift_norm_mean": _short(sum(norms) / len(norms))} if norms else {}, clients


@dataclass(frozen=True)
class Layer:
    """One layer: inner products of the clients' changes (clients, clients), squares of total and error."""

    changes: Tensor
    total: float
    error: float | None


@dataclass(frozen=True)
class Wave:
    """Who takes part, with what weights (sum 1), and s."""

    clients: Sequence[ClientId]
    weights: Tensor
    scaling: float

    def summarise(self, layers: Mapping[str, Layer]) -> Measurement:
        ordered = {name: layers[name] for name in sorted(layers)}
        every = list(ordered.values())
        known = [layer.error for layer in every if layer.error is not None]
        whole = Layer(
            torch.stack([layer.changes for layer in every]).sum(dim=0),
            sum(layer.total for layer in every),
            sum(known) if known else None,
        )
        names = {"error": "aggregation_error", "norm": "drift_norm_mean", "cosine": "drift_cosine_mean"}
        overall = {names[name]: value for name, value in self._describe(whole, 9).items()}
        if (pairwise := _mean_pairwise(whole.changes)) is not None:
            overall["drift_cosine_pairwise"] = _short(pairwise)
        cosines, norms = self._cosines(whole.changes), self._norms(whole.changes)
        clients = {}
        for client, norm, cosine in zip(self.clients, norms, cosines, strict=True):
            clients[client] = {"drift_norm": _short(norm)} | (
                {"cosine_to_mean": _short(cosine)} if cosine is not None else {}
            )
        by_layer = {name.removeprefix(COMMON): self._describe(layer, 4) for name, layer in ordered.items()}
        return Measurement(overall, by_layer if len(self.clients) > 1 else {}, clients)

    def _describe(self, layer: Layer, digits: int) -> dict[str, float]:
        """`error`, `norm` (mean over clients) and `cosine` (mean of those to the mean), as far as they exist."""
        found: dict[str, float] = {}
        if layer.error is not None and layer.total > 0:
            found["error"] = _short(math.sqrt(layer.error / layer.total), digits)
        norms = self._norms(layer.changes)
        found["norm"] = _short(sum(norms) / len(norms), digits)
        cosines = [cosine for cosine in self._cosines(layer.changes) if cosine is not None]
        if cosines:
            found["cosine"] = _short(sum(cosines) / len(cosines), digits)
        return found

    def _norms(self, changes: Tensor) -> list[float]:
        return [self.scaling * math.sqrt(max(value, 0.0)) for value in changes.diagonal().tolist()]

    def _cosines(self, changes: Tensor) -> list[float | None]:
        """Of each client's change to the weighted mean; None for a client alone, or where one of the two is zero."""
        to_mean = changes @ self.weights
        mean = float(self.weights @ to_mean)
        pairs = zip(to_mean.tolist(), changes.diagonal().tolist(), strict=True)
        alone = len(self.clients) < 2
        return [
            None if alone or mean <= 0 or own <= 0 else max(-1.0, min(1.0, inner / math.sqrt(mean * own)))
            for inner, own in pairs
        ]


def _mean_pairwise(changes: Tensor) -> float | None:
    """Mean cosine of two clients' changes, by `(||sum u_k||^2 - K) / (K (K - 1))` of unit vectors u_k."""
    own = changes.diagonal()
    moved = own > 0
    count = int(moved.sum())
    if count < 2:
        return None
    unit = own[moved].rsqrt()
    return float((unit @ changes[moved][:, moved] @ unit - count) / (count * (count - 1)))


def _short(value: float, digits: int = 9) -> float:
    """To so many significant digits: lines stay short, and equal where sums differ in their last bits."""
    return float(f"{value:.{digits}g}")
