"""Methods with the faults of published code, each as small as the fault; test_mutations.py expects a check to fail."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedlora.federated.adapters import combine, pick_half, weighted_mean, zeros_like
from fedlora.federated.strategies.fedavg import FedAvg, TrainAndSend
from fedlora.federated.strategies.fedprox import ProximalTraining
from fedlora.federated.strategies.fedrot import RotateAndSend
from fedlora.federated.strategies.fedsa import KeepB
from fedlora.federated.strategies.one_factor import FedSvd, FfaLora, RoLora, split_products
from fedlora.federated.strategies.robust import CoordinateMedian, GeometricMedian, Krum, TrimmedMean
from fedlora.federated.strategies.scaffold import ControlledTraining, Scaffold
from fedlora.federated.strategies.server_adaptive import AdaptiveServer, FedAdagrad, FedAdam, FedYogi
from fedlora.federated.strategies.server_momentum import DiLoCo, FedAvgM
from fedlora.types import ClientMemory, LocalResult, Phase, ServerState, Upload


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


class OverTheCohort(Scaffold):
    def aggregate(self, state, updates, context):
        return super().aggregate(state, updates, replace(context, clients=tuple(range(len(updates)))))


class MostStepsAsE(ControlledTraining):
    def upload(self, results, download, memory):
        short = {key: value * 3 / 10 for key, value in results[0].mean_gradient.items()}
        return super().upload([LocalResult(results[0].adapter, short)], download, memory)


class CorrectsBackwards(ControlledTraining):
    def phases(self, download, memory):
        (phase,) = super().phases(download, memory)
        return (replace(phase, correction={key: -value for key, value in phase.correction.items()}),)


class ForgetsControl(ControlledTraining):
    def phases(self, download, memory):
        return super().phases(download, ClientMemory())


class PullsNothing(ProximalTraining):
    def phases(self, download, memory):
        (phase,) = super().phases(download, memory)
        return (replace(phase, anchor=None),)


class PullsToZero(ProximalTraining):
    def phases(self, download, memory):
        (phase,) = super().phases(download, memory)
        return (replace(phase, anchor=zeros_like(phase.start)),)


class OwnA(FfaLora):
    def broadcast(self, state, client_id, round_number):
        download = super().broadcast(state, client_id, round_number)
        own = {key: value * (1 + 0.1 * client_id) for key, value in pick_half(state.adapter, "A").items()}
        return replace(download, adapter={**download.adapter, **own})


class BeginsWithA(RoLora):
    def broadcast(self, state, client_id, round_number):
        return super().broadcast(state, client_id, round_number + 1)


class Shelf:
    last = None


class GoesOnFromTheLast(TrainAndSend):
    def phases(self, download, memory):
        return (Phase(Shelf.last or download.adapter, download.trainable),)

    def upload(self, results, download, memory):
        Shelf.last = {**download.adapter, **pick_half(results[0].adapter, download.trainable)}
        return super().upload(results, download, memory)


class FactorByShape(TrainAndSend):
    """What has as many columns as the rank is B."""

    def upload(self, results, download, memory):
        return Upload({key: value for key, value in results[0].adapter.items() if value.shape[1] == 2}), memory


class TransposedProduct(FedSvd):
    """The product the wrong way round, which only square layers let pass."""

    def aggregate(self, state, updates, context):
        adapter = dict(FfaLora().aggregate(state, updates, context).adapter)
        for layer in {key.split(".")[0] for key in adapter}:
            a, b = (adapter[f"{layer}.lora_{half}.weight"] for half in "AB")
            if a.shape[1] == b.shape[0]:
                adapter[f"{layer}.lora_A.weight"], adapter[f"{layer}.lora_B.weight"] = b.T, a.T
        return ServerState(split_products(adapter))


class SendsBToo(KeepB):
    def upload(self, results, download, memory):
        _, memory = super().upload(results, download, memory)
        return Upload(results[0].adapter), memory


class ForgetsB(KeepB):
    def phases(self, download, memory):
        return (Phase(download.adapter),)


class OneBForAll(KeepB):
    def phases(self, download, memory):
        return super().phases(download, ClientMemory(Shelf.last))

    def upload(self, results, download, memory):
        Shelf.last = results[0].adapter
        return super().upload(results, download, memory)


class TurnsAOnly(RotateAndSend):
    def upload(self, results, download, memory):
        upload, memory = super().upload(results, download, memory)
        return Upload({**upload.adapter, **pick_half(results[0].adapter, "B")}), memory


class ExampleWeightedKrum(Krum):
    def aggregate(self, state, updates, context):
        stack = {key: torch.stack([one.upload[key] for one in updates]) - value for key, value in state.adapter.items()}
        chosen = [list(updates)[index] for index in self.choose(stack)]
        return FedAvg().aggregate(state, chosen, context)


class GramInFloat32(Krum):
    def score(self, stack):
        flat = torch.cat([value.flatten(1) for value in stack.values()], dim=1).float()
        norms = flat.square().sum(1)
        squares = norms[:, None] + norms[None] - 2 * flat @ flat.T
        return squares.sort(dim=1).values[:, 1 : len(flat) - self.num_hostile - 1].sum(dim=1)


class CountsItself(Krum):
    def score(self, stack):
        near = len(next(iter(stack.values()))) - self.num_hostile - 2
        return _distances(stack)[:, :near].sum(dim=1)


class OneNeighbourMore(Krum):
    def score(self, stack):
        near = len(next(iter(stack.values()))) - self.num_hostile - 1
        return _distances(stack)[:, 1 : near + 1].sum(dim=1)


def _distances(stack) -> torch.Tensor:
    flat = torch.cat([value.flatten(1) for value in stack.values()], dim=1)
    return (flat[:, None] - flat[None]).square().sum(-1).sort(dim=1).values


class TrimsOneMore(TrimmedMean):
    def combine_changes(self, stack):
        cut = int(self.trimmed_share * 5) + 1
        return {key: values.sort(dim=0).values[cut:-cut].mean(dim=0) for key, values in stack.items()}


class TrimsByFloor(TrimmedMean):
    def combine_changes(self, stack):
        count = len(next(iter(stack.values())))
        cut = int(self.trimmed_share * count)
        return {key: values.sort(dim=0).values[cut : count - cut].mean(dim=0) for key, values in stack.items()}


class LowerMedian(CoordinateMedian):
    def combine_changes(self, stack):
        return {key: values.median(dim=0).values for key, values in stack.items()}


class FourStepsFromTheMean(GeometricMedian):
    def combine_changes(self, stack):
        flat = torch.cat([value.flatten(1) for value in stack.values()], dim=1)
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


class SendsItsOwn(TrainAndSend):
    """`none` that sends what it should keep."""

    def upload(self, results, download, memory):
        return Upload(results[0].adapter), replace(memory, adapter=results[0].adapter)
