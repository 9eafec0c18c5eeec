"""Robust servers with the faults of published code.

test_mutations.py expects a check to fail on every one of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fedlora.federated.adapters import zeros_like
from fedlora.methods.fedavg import FedAvg
from fedlora.methods.robust import CoordinateMedian, GeometricMedian, Krum, TrimmedMean


class ExampleWeightedKrum(Krum):
    def aggregate(self, state, updates, context):
        stack = {key: torch.stack([one.upload[key] for one in updates]) - value for key, value in state.adapter.items()}
        chosen = [list(updates)[index] for index in self.choose(stack)]
        return FedAvg().aggregate(state, chosen, context)


class GramInFloat32(Krum):
    def score(self, stack):
        flat = torch.cat([value.flatten(1) for _, value in stack.items()], dim=1).float()
        norms = flat.square().sum(1)
        squares = norms[:, None] + norms[None] - 2 * flat @ flat.T
        return squares.sort(dim=1).values[:, 1 : len(flat) - self.num_hostile - 1].sum(dim=1)


class CountsItself(Krum):
    def score(self, stack):
        distances = _distances(stack)
        return distances[:, : len(distances) - self.num_hostile - 2].sum(dim=1)


class OneNeighbourMore(Krum):
    def score(self, stack):
        distances = _distances(stack)
        return distances[:, 1 : len(distances) - self.num_hostile].sum(dim=1)


def _distances(stack) -> torch.Tensor:
    flat = torch.cat([value.flatten(1) for _, value in stack.items()], dim=1)
    return (flat[:, None] - flat[None]).square().sum(-1).sort(dim=1).values


class TrimsOneMore(TrimmedMean):
    def combine_changes(self, stack):
        cut = 2
        return {key: values.sort(dim=0).values[cut:-cut].mean(dim=0) for key, values in stack.items()}


class TrimsByFloor(TrimmedMean):
    def combine_changes(self, stack):
        def trim(values):
            cut = int(self.trimmed_share * len(values))
            return values.sort(dim=0).values[cut : len(values) - cut]

        return {key: trim(values).mean(dim=0) for key, values in stack.items()}


class LowerMedian(CoordinateMedian):
    def combine_changes(self, stack):
        return {key: values.median(dim=0).values for key, values in stack.items()}


class FourStepsFromTheMean(GeometricMedian):
    def combine_changes(self, stack):
        flat = torch.cat([value.flatten(1) for _, value in stack.items()], dim=1)
        place = flat.mean(dim=0)
        for _ in range(4):
            weights = 1 / (flat - place).norm(dim=1).clamp_min(1e-6)
            place = (weights[:, None] * flat).sum(0) / weights.sum()
        ((key, values),) = stack.items()
        return {key: place.view(values.shape[1:])}


class SpreadsSmallRanks(CoordinateMedian):
    def aggregate(self, state, updates, context):
        zero = zeros_like(state.adapter)
        wide = [replace(one, upload={key: zero[key] + value for key, value in one.upload.items()}) for one in updates]
        return super().aggregate(state, wide, context)
