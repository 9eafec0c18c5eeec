"""Aggregation that a minority of hostile clients cannot move at will.

Coordinate median and trimmed mean, Yin et al., ICML 2018 (arXiv 1803.01498); Krum and Multi-Krum, Blanchard et al.,
NeurIPS 2017 (arXiv 1703.02757); geometric median, Pillutla et al. 2022 (arXiv 1912.13445). All work on changes from
the common start, in float64 and tensor by tensor, and give every client the same weight: a weight that a client reports
would be its lever. Honest clients with unusual data look hostile to each of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.federated.client_stacks import HELD_BYTES, ClientStacks, Stack
from fedlora.methods.fedavg import FedAvg
from fedlora.plain_text import counted
from fedlora.types import ClientUpdate, RoundContext, ServerState, Updates


@dataclass(frozen=True)
class RobustServer(FedAvg, ABC):
    """What they share: look at the changes, combine them, move the global adapter.

    Of three clients one may be hostile; of two it is unknown which. `is_guarded` is False for runs that were started
    before the smallest cohorts, the smallest trim and the largest Multi-Krum were enforced: they continue without these
    limits.
    """

    held_bytes: ClassVar[float] = HELD_BYTES

    is_guarded: bool = field(default=True, kw_only=True)

    @property
    def fewest_clients(self) -> int:
        return 3 if self.is_guarded else 1

    def weight_of(self, update: ClientUpdate) -> float:
        return 1.0

    @abstractmethod
    def combine_changes(self, stack: Stack) -> Mapping[str, Tensor]:
        """Key -> the combined change, from those of at least `fewest_clients`."""

    def aggregate(self, state: ServerState, updates: Updates, context: RoundContext) -> ServerState:
        stack = ClientStacks(updates, state.adapter, most_clients=len(context.cohort), held_bytes=self.held_bytes)
        if len(stack) < self.fewest_clients:
            return state
        moved = self.combine_changes(stack)
        adapter = {key: (state.adapter[key] + change).to(state.adapter[key].dtype) for key, change in moved.items()}
        return replace(state, adapter={**state.adapter, **adapter})


@dataclass(frozen=True)
class CoordinateMedian(RobustServer):
    """The median of every coordinate; for an even number of clients the mean of the middle two."""

    def combine_changes(self, stack: Stack) -> Mapping[str, Tensor]:
        return {key: _median(values) for key, values in stack.items()}


@dataclass(frozen=True)
class TrimmedMean(RobustServer):
    """The mean of every coordinate without its smallest and largest values, `floor(trimmed_share * n)` of each.

    At least one of each is left out. Without a share it is 0.2.
    """

    trimmed_share: float | None = None

    def find_cohort_fault(self, size: int) -> str | None:
        if self.trimmed_share is None or self._cut(size) > 0 or not self.is_guarded:
            return None
        return f"trimmed_share={self.trimmed_share:g} leaves out no client of {size}"

    def combine_changes(self, stack: Stack) -> Mapping[str, Tensor]:
        return {key: self._trim(values).mean(dim=0) for key, values in stack.items()}

    def _trim(self, values: Tensor) -> Tensor:
        count = len(values)
        cut = max(int(self.is_guarded), self._cut(count))
        return values.sort(dim=0).values[cut : count - cut]

    def _cut(self, count: int) -> int:
        # 0.2 * 5 is a hair below 1 for some shares
        return int((0.2 if self.trimmed_share is None else self.trimmed_share) * count + 1e-9)


@dataclass(frozen=True)
class Krum(RobustServer):
    """The mean of the `krum_selected` clients whose nearest neighbours are nearest; 1 is Krum.

    A score is the sum of the `n - f - 2` smallest squared distances to others, f being `num_hostile`; n >= 2 f + 3.
    At most `n - f` are selected. Then no client is selected that is farther from all honest clients than
    `sqrt((n - f - 2) / (n - 2 f - 1))` times their diameter: one such has a score above all of theirs.
    """

    num_hostile: int = 1
    krum_selected: int | None = 1

    @property
    def fewest_clients(self) -> int:
        return 2 * self.num_hostile + 3

    def find_cohort_fault(self, size: int) -> str | None:
        most = size - self.num_hostile
        if self.krum_selected is None or self.krum_selected <= most or not self.is_guarded:
            return None
        return (
            f"krum_selected={self.krum_selected} of {counted(size, 'client')} is more than the {most} "
            f"that are not hostile"
        )

    def combine_changes(self, stack: Stack) -> Mapping[str, Tensor]:
        chosen = self.choose(stack)
        return {key: values[chosen].mean(dim=0) for key, values in stack.items()}

    def choose(self, stack: Stack) -> list[int]:
        """Positions of the chosen clients, lowest score first; ties go to the lower position."""
        scores = self.score(stack)
        count = len(scores)
        selected = count - self.num_hostile - 2 if self.krum_selected is None else self.krum_selected
        most = count - self.num_hostile if self.is_guarded else count
        return sorted(range(count), key=lambda index: (float(scores[index]), index))[: min(selected, most)]

    def score(self, stack: Stack) -> Tensor:
        """(clients,) Krum scores."""
        distances = squared_distances(stack)
        near = len(distances) - self.num_hostile - 2
        return distances.sort(dim=1).values[:, 1 : near + 1].sum(dim=1)


@dataclass(frozen=True)
class MultiKrum(Krum):
    """The same for several clients: without `krum_selected` for `n - num_hostile - 2`, as in the paper."""

    krum_selected: int | None = None


@dataclass(frozen=True)
class GeometricMedian(RobustServer):
    """The point with the smallest sum of distances to all, by Weiszfeld steps from the coordinate median.

    From the mean, as published, a far outlier is still felt after the usual four steps. Where the way comes within
    `weiszfeld_smoothing` of a client, which the published steps leave a millionth at a time, the step is Vardi and
    Zhang's (PNAS 2000): it stays only as far as the others pull less than that client holds.

    With h hostile clients of n the point lies within C D of every honest client, where D is the honest diameter and
    C = (n - h) / sqrt(n (n - 2 h)): 1.16 for one of three (Minsker, Bernoulli 2015, arXiv 1308.1334). Seen from R > D
    away of an honest client, all honest ones are within arcsin(D / R) of its direction. So the honest pull there with
    at least (n - h) sqrt(1 - D^2 / R^2), the hostile with at most h, and both are equal only where R <= C D.

    A step needs the distances over all tensors, so all updates are held, in the type in which they were sent.
    """

    held_bytes: ClassVar[float] = math.inf

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
            if stays == 1.0:
                # the goal may be as far as a hostile client, and the way there and back loses the point
                break
            point = {key: goal[key] + stays * (point[key] - goal[key]) for key in goal}
        return point


def squared_distances(stack: Stack) -> Tensor:
    """(clients, clients) squared distances over all keys; by differences, for products of large values cancel."""
    total = torch.zeros((), dtype=torch.float64)
    for _, values in stack.items():
        flat = values.flatten(1)
        # one piece of memory for all differences: a new one for each costs more than the arithmetic
        apart = torch.empty_like(flat)
        total = total + torch.stack([torch.sub(flat, row, out=apart).square_().sum(dim=1) for row in flat])
    return total


def _distances(stack: Stack, point: Mapping[str, Tensor]) -> Tensor:
    """(clients,) distances of all clients from a point."""
    parts = [(values - point[key]).square_().flatten(1).sum(dim=1) for key, values in stack.items()]
    return torch.stack(parts).sum(dim=0).sqrt()


def _median(values: Tensor) -> Tensor:
    """Median over the first axis; the mean of the middle two where there are two."""
    ordered, count = values.sort(dim=0).values, len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
