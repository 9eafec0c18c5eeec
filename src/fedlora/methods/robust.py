"""Aggregation that a minority of hostile clients cannot move at will.

Coordinate median and trimmed mean, Yin et al., ICML 2018 (arXiv 1803.01498); Krum and Multi-Krum, Blanchard et al.,
NeurIPS 2017 (arXiv 1703.02757); geometric median, Pillutla et al. 2022 (arXiv 1912.13445). All work on changes from
the common start, in float64, and give every client the same weight: a weight that a client tells of itself would be
its lever. All updates are in memory together. Honest clients with unusual data look hostile to each of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.methods.fedavg import FedAvg
from fedlora.types import RoundContext, ServerState, Updates

Stack = Mapping[str, Tensor]
"""Key -> changes of all clients, (clients, ...) in float64."""


@dataclass(frozen=True)
class RobustServer(FedAvg, ABC):
    """What they share: gather the changes, combine them, move the global adapter."""

    is_weighted: ClassVar[bool] = False

    @abstractmethod
    def combine_changes(self, stack: Stack) -> Mapping[str, Tensor]:
        """Key -> the combined change, from those of at least one client."""

    def aggregate(self, state: ServerState, updates: Updates, context: RoundContext) -> ServerState:
        sent = [update.upload or {} for update in updates]
        if len(sent) < self.fewest_clients:
            return state
        start = {key: state.adapter[key].to(torch.float64) for key in sent[0]}
        # stacked first, for a difference would spread a smaller update over a larger start
        stack = {key: torch.stack([one[key].to(torch.float64) for one in sent]) - value for key, value in start.items()}
        moved = self.combine_changes(stack)
        adapter = {key: (start[key] + moved[key]).to(state.adapter[key].dtype) for key in start}
        return replace(state, adapter={**state.adapter, **adapter})


@dataclass(frozen=True)
class CoordinateMedian(RobustServer):
    """The median of every coordinate; for an even number of clients the mean of the middle two."""

    def combine_changes(self, stack: Stack) -> Mapping[str, Tensor]:
        return {key: _median(values) for key, values in stack.items()}


@dataclass(frozen=True)
class TrimmedMean(RobustServer):
    """The mean of every coordinate without its `floor(trimmed_share * n)` smallest and largest values."""

    trimmed_share: float = 0.2

    def combine_changes(self, stack: Stack) -> Mapping[str, Tensor]:
        count = _count(stack)
        # 0.2 * 5 is a hair below 1 for some shares
        cut = int(self.trimmed_share * count + 1e-9)
        return {key: values.sort(dim=0).values[cut : count - cut].mean(dim=0) for key, values in stack.items()}


@dataclass(frozen=True)
class Krum(RobustServer):
    """The mean of the `krum_selected` clients whose nearest neighbours are nearest; 1 is Krum, more is Multi-Krum.

    A score is the sum of the `n - f - 2` smallest squared distances to others, f being `num_hostile`; n >= 2 f + 3.
    """

    num_hostile: int = 1
    krum_selected: int = 1

    @property
    def fewest_clients(self) -> int:
        return 2 * self.num_hostile + 3

    def combine_changes(self, stack: Stack) -> Mapping[str, Tensor]:
        chosen = self.choose(stack)
        return {key: values[chosen].mean(dim=0) for key, values in stack.items()}

    def choose(self, stack: Stack) -> list[int]:
        """Positions of the chosen clients, lowest score first; ties go to the lower position."""
        scores = self.score(stack)
        count = len(scores)
        return sorted(range(count), key=lambda index: (float(scores[index]), index))[: min(self.krum_selected, count)]

    def score(self, stack: Stack) -> Tensor:
        """(clients,) Krum scores."""
        near = _count(stack) - self.num_hostile - 2
        return squared_distances(stack).sort(dim=1).values[:, 1 : near + 1].sum(dim=1)


@dataclass(frozen=True)
class GeometricMedian(RobustServer):
    """The point with the smallest sum of distances to all, by Weiszfeld steps from the coordinate median.

    From the mean, as published, a far outlier is still felt after the usual four steps. Where the way comes within
    `weiszfeld_smoothing` of a client, which the published steps leave a millionth at a time, the step is Vardi and
    Zhang's (PNAS 2000): it stays only as far as the others pull less than that client holds.
    """

    weiszfeld_steps: int = 32
    weiszfeld_smoothing: float = 1e-6

    def combine_changes(self, stack: Stack) -> Mapping[str, Tensor]:
        point = {key: _median(values) for key, values in stack.items()}
        for _ in range(self.weiszfeld_steps):
            distances = _distances(stack, point)
            is_far = distances > self.weiszfeld_smoothing
            if not bool(is_far.any()):
                break
            weights = is_far / distances.clamp_min(self.weiszfeld_smoothing)
            shares = weights / weights.sum()
            goal = {key: torch.tensordot(shares, values, dims=1) for key, values in stack.items()}
            pull = float(weights.sum()) * _distances({key: goal[key][None] for key in goal}, point).item()
            stays = min(1.0, int((~is_far).sum()) / pull) if pull else 1.0
            point = {key: goal[key] + stays * (point[key] - goal[key]) for key in goal}
        return point


def squared_distances(stack: Stack) -> Tensor:
    """(clients, clients) squared distances over all keys; by differences, for products of large values cancel."""
    total = torch.zeros(_count(stack), _count(stack), dtype=torch.float64)
    for _, values in sorted(stack.items()):
        flat = values.flatten(1)
        total += torch.stack([(flat - row).square().sum(dim=1) for row in flat])
    return total


def _distances(stack: Stack, point: Mapping[str, Tensor]) -> Tensor:
    """(clients,) distances of all clients from a point."""
    parts = [(values - point[key]).flatten(1).square().sum(dim=1) for key, values in sorted(stack.items())]
    return torch.stack(parts).sum(dim=0).sqrt()


def _median(values: Tensor) -> Tensor:
    """Median over the first axis; the mean of the middle two where there are two."""
    ordered, count = values.sort(dim=0).values, len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def _count(stack: Stack) -> int:
    return len(next(iter(stack.values())))
