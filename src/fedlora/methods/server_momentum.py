"""Momentum on the server: FedAvgM and DiLoCo's outer optimizer.

FedAvgM, Hsu et al. 2019 (arXiv 1909.06335): `v <- beta v + delta`, `x <- x + eta v`, where `delta` is the weighted
mean of the clients' changes; not the exponential average `beta v + (1 - beta) delta`, whose steady step is ten times
smaller. DiLoCo, Douillard et al. 2023 (arXiv 2311.08105): Nesterov SGD on `g = x - mean x_k`; the mean is unweighted,
or weighted by examples, as in the paper's section 6.1 where data is not iid. On an adapter of few rounds its gain of
eta / (1 - beta) overshoots: lower the momentum below about twenty rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedlora.federated.adapters import combine, weighted_mean, zeros_like
from fedlora.methods.fedavg import FedAvg
from fedlora.types import ClientUpdate, RoundContext, ServerState, Updates


@dataclass(frozen=True)
class FedAvgM(FedAvg):
    """Slot `velocity`. With server_momentum 0 and server_learning_rate 1 it is FedAvg."""

    server_learning_rate: float = 1.0
    server_momentum: float = 0.9

    def aggregate(self, state: ServerState, updates: Updates, context: RoundContext) -> ServerState:
        mean = weighted_mean(((update.upload or {}, update.num_examples) for update in updates), dtype=torch.float64)
        if mean is None:
            return state
        beta, eta = self.server_momentum, self.server_learning_rate

        def accelerate(x: Tensor, velocity: Tensor, mean: Tensor) -> Tensor:
            return beta * velocity + (mean - x)

        old = state.slots.get("velocity") or zeros_like(state.adapter)
        velocity = combine(accelerate, state.adapter, old, mean)
        adapter = combine(lambda x, v: x + eta * v, state.adapter, velocity)
        return ServerState(adapter, {"velocity": velocity})


@dataclass(frozen=True)
class DiLoCo(FedAvg):
    """Slot `momentum`. With server_momentum 0 and server_learning_rate 1 it is the mean of the clients."""

    server_learning_rate: float = 0.7
    server_momentum: float = 0.9
    server_weights: Literal["uniform", "examples"] = "uniform"

    def weight_of(self, update: ClientUpdate) -> float:
        return float(update.num_examples) if self.server_weights == "examples" else 1.0

    def aggregate(self, state: ServerState, updates: Updates, context: RoundContext) -> ServerState:
        mean = weighted_mean(((update.upload or {}, self.weight_of(update)) for update in updates), dtype=torch.float64)
        if mean is None:
            return state
        mu, eta = self.server_momentum, self.server_learning_rate

        def accelerate(x: Tensor, momentum: Tensor, mean: Tensor) -> Tensor:
            return mu * momentum + (x - mean)

        old = state.slots.get("momentum") or zeros_like(state.adapter)
        momentum = combine(accelerate, state.adapter, old, mean)
        adapter = combine(lambda x, b, m: x - eta * ((x - m) + mu * b), state.adapter, momentum, mean)
        return ServerState(adapter, {"momentum": momentum})
