"""Servers with the faults of published code, each as small as the fault.

test_mutations.py expects a check to fail on every one of them.
"""

from __future__ import annotations

from dataclasses import replace

from fedlora.federated.adapters import combine, weighted_mean, zeros_like
from fedlora.methods.fedavg import FedAvg
from fedlora.methods.one_factor import FfaLora
from fedlora.methods.server_adaptive import AdaptiveServer, FedAdagrad, FedAdam, FedYogi
from fedlora.methods.server_momentum import DiLoCo, FedAvgM
from fedlora.types import ServerState


def mean_with(weigh, state, updates):
    """FedAvg with weights of one's own: (position, update, number of updates) -> share; not normalised."""
    updates = list(updates)
    shares = [weigh(index, one, updates) for index, one in enumerate(updates)]
    keys = updates[0].upload
    mean = {key: sum(share * one.upload[key] for share, one in zip(shares, updates, strict=True)) for key in keys}
    return replace(state, adapter={**state.adapter, **mean})


def share_of(one, updates) -> float:
    return one.num_examples / sum(other.num_examples for other in updates)


class FirstClientOnly(FedAvg):
    def aggregate(self, state, updates, context):
        return mean_with(lambda index, one, all_: float(index == 0), state, updates)


class LaterCountsMore(FedAvg):
    def aggregate(self, state, updates, context):
        return mean_with(lambda index, one, all_: 2 * (index + 1) / (len(all_) * (len(all_) + 1)), state, updates)


class EvenMean(FedAvg):
    def aggregate(self, state, updates, context):
        return mean_with(lambda index, one, all_: 1 / len(all_), state, updates)


class SquaredShares(FfaLora):
    def aggregate(self, state, updates, context):
        return mean_with(lambda index, one, all_: share_of(one, all_) ** 2, state, updates)


class FixedDenominator(FedAvg):
    def aggregate(self, state, updates, context):
        return mean_with(lambda index, one, all_: one.num_examples / 31, state, updates)


class SumOfKeys(FedAvg):
    """A weight from a float32 sum over all tensors, in whatever order they come."""

    def aggregate(self, state, updates, context):
        def weigh(index, one, all_):
            return float(sum(value.float().sum() for value in one.upload.values()))

        total = sum(weigh(0, one, updates) for one in updates)
        return mean_with(lambda index, one, all_: weigh(index, one, all_) / total, state, updates)


class MeanOfBfloat16(FedAvg):
    def aggregate(self, state, updates, context):
        narrow = ({key: value.bfloat16() for key, value in one.upload.items()} for one in updates)
        mean = weighted_mean((one, rows.num_examples) for one, rows in zip(narrow, updates, strict=True))
        wide = {key: value.to(state.adapter[key].dtype) for key, value in (mean or {}).items()}
        return replace(state, adapter={**state.adapter, **wide})


class AddsInPlace(FedAvg):
    def aggregate(self, state, updates, context):
        mean = super().aggregate(state, updates, context).adapter
        for key, value in state.adapter.items():
            value.copy_(mean[key])
        return state


class RoundedFirst(DiLoCo):
    def aggregate(self, state, updates, context):
        mean = weighted_mean((one.upload or {}, 1.0) for one in updates)
        return super().aggregate(state, [replace(one, upload=mean) for one in updates], context)


class Velocity:
    kept = None


class RemembersItself(FedAvgM):
    def aggregate(self, state, updates, context):
        state = ServerState(state.adapter, {"velocity": Velocity.kept} if Velocity.kept else {})
        state = super().aggregate(state, updates, context)
        Velocity.kept = state.slots["velocity"]
        return state


class ExponentialAverage(FedAvgM):
    def aggregate(self, state, updates, context):
        mean = weighted_mean((one.upload or {}, one.num_examples) for one in updates)
        change = combine(lambda x, m: m - x, state.adapter, mean or {})
        old = state.slots.get("velocity")
        velocity = change if old is None else combine(lambda v, d: 0.9 * v + 0.1 * d, old, change)
        return ServerState(combine(lambda x, v: x + v, state.adapter, velocity), {"velocity": velocity})


class PlainMomentum(DiLoCo):
    def aggregate(self, state, updates, context):
        after = super().aggregate(state, updates, context)
        adapter = combine(lambda x, b: x - self.server_learning_rate * b, state.adapter, after.slots["momentum"])
        return replace(after, adapter=adapter)


class WeightedDiLoCo(DiLoCo):
    def aggregate(self, state, updates, context):
        mean = FedAvg().aggregate(state, updates, context).adapter
        return super().aggregate(state, [replace(one, upload=mean) for one in updates], context)


class FromZero(AdaptiveServer):
    def aggregate(self, state, updates, context):
        return super().aggregate(_from_zero(state), updates, context)


class AdagradFromZero(FromZero, FedAdagrad):
    pass


class AdamFromZero(FromZero, FedAdam):
    pass


class YogiFromZero(FromZero, FedYogi):
    pass


class BiasCorrected(AdamFromZero):
    def aggregate(self, state, updates, context):
        t = context.round + 1
        rate = self.server_learning_rate * (1 - self.server_beta2**t) ** 0.5 / (1 - self.server_beta1**t)
        plain = AdamFromZero(rate, self.server_beta1, self.server_beta2, self.server_tau)
        return AdamFromZero.aggregate(plain, state, updates, context)


class VarianceOfMean(FedAdam):
    def aggregate(self, state, updates, context):
        beta, second, eta, tau = self.server_beta1, self.server_beta2, self.server_learning_rate, self.server_tau
        mean = weighted_mean((one.upload or {}, one.num_examples) for one in updates)
        change = combine(lambda x, m: m - x, state.adapter, mean or {})
        old = state.slots.get("mean")
        new = change if old is None else combine(lambda m, d: beta * m + (1 - beta) * d, old, change)
        spread = state.slots.get("variance") or {key: value + tau**2 for key, value in zeros_like(new).items()}
        spread = combine(lambda v, m: second * v + (1 - second) * m**2, spread, new)
        adapter = combine(lambda x, m, v: x + eta * m / (v.sqrt() + tau), state.adapter, new, spread)
        return ServerState(adapter, {"mean": new, "variance": spread})


def _from_zero(state: ServerState) -> ServerState:
    return state if state.slots else ServerState(state.adapter, {"variance": zeros_like(state.adapter)})
