"""Adaptive optimizers on the server: FedAdagrad, FedAdam, FedYogi.

Reddi et al., ICLR 2021 (arXiv 2003.00295), Algorithm 2: `m <- b1 m + (1 - b1) delta`, `v` per method from `delta **
2`, `x <- x + eta m / (sqrt(v) + tau)`, with v beginning at tau ** 2. Their m and v are not corrected for bias.
LoRA's B moves by 1e-4 to 1e-3 a round: with the papers' eta of 0.1 the step is several times FedAvg's and training
collapses, so the default here is 1e-3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.federated.adapters import combine, weighted_mean, zeros_like
from fedlora.methods.fedavg import FedAvg
from fedlora.types import RoundContext, ServerState, Updates


@dataclass(frozen=True)
class AdaptiveServer(FedAvg, ABC):
    """What the three share. Slots `mean` and `variance`; a zero change of everybody from rest moves nothing."""

    server_learning_rate: float = 1e-3
    server_beta1: float = 0.9
    server_beta2: float = 0.99
    server_tau: float = 1e-3

    @abstractmethod
    def grow_variance(self, variance: Tensor, square: Tensor) -> Tensor:
        """The next v from the last one and the square of the change, both float64."""

    def aggregate(self, state: ServerState, updates: Updates, context: RoundContext) -> ServerState:
        mean = weighted_mean(((update.upload or {}, update.num_examples) for update in updates), dtype=torch.float64)
        if mean is None:
            return state
        beta, eta, tau = self.server_beta1, self.server_learning_rate, self.server_tau
        zeros = zeros_like(state.adapter)
        old_mean = state.slots.get("mean") or zeros
        old_variance = state.slots.get("variance") or {key: value + tau**2 for key, value in zeros.items()}
        change = combine(lambda x, m: m - x, state.adapter, mean)
        new_mean = combine(lambda d, m: beta * m + (1 - beta) * d, change, old_mean)
        new_variance = combine(lambda d, v: self.grow_variance(v, d**2), change, old_variance)
        adapter = combine(lambda x, m, v: x + eta * m / (v.sqrt() + tau), state.adapter, new_mean, new_variance)
        return ServerState(adapter, {"mean": new_mean, "variance": new_variance})


@dataclass(frozen=True)
class FedAdagrad(AdaptiveServer):
    """`v <- v + delta ** 2`; the paper runs it without momentum (server_beta1 0)."""

    server_beta1: float = 0.0

    def grow_variance(self, variance: Tensor, square: Tensor) -> Tensor:
        return variance + square


@dataclass(frozen=True)
class FedAdam(AdaptiveServer):
    """`v <- b2 v + (1 - b2) delta ** 2`."""

    def grow_variance(self, variance: Tensor, square: Tensor) -> Tensor:
        return self.server_beta2 * variance + (1 - self.server_beta2) * square


@dataclass(frozen=True)
class FedYogi(AdaptiveServer):
    """`v <- v - (1 - b2) delta ** 2 sign(v - delta ** 2)`."""

    def grow_variance(self, variance: Tensor, square: Tensor) -> Tensor:
        return variance - (1 - self.server_beta2) * square * torch.sign(variance - square)
