"""Clients, and what servers hand them, with the faults of published code.

test_mutations.py expects a check to fail on every one of them.
"""

from __future__ import annotations

from dataclasses import replace

from fedlora.federated.adapters import pick_half, zeros_like
from fedlora.methods.ditto import TrainBoth
from fedlora.methods.fedavg import TrainAndSend
from fedlora.methods.feddpa import TrainLocalBeside
from fedlora.methods.fedprox import ProximalTraining
from fedlora.methods.fedrot import RotateAndSend
from fedlora.methods.fedsa import KeepB
from fedlora.methods.one_factor import FedSvd, FfaLora, RoLora, split_products
from fedlora.methods.scaffold import ControlledTraining, Scaffold
from fedlora.types import ClientMemory, LocalResult, Phase, ServerState, Upload


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


class SendsItsOwn(TrainAndSend):
    """`none` that sends what it should keep."""

    def upload(self, results, download, memory):
        return Upload(results[0].adapter), replace(memory, adapter=results[0].adapter)


class SendsItsOwnModel(TrainBoth):
    def upload(self, results, download, memory):
        sent, memory = super().upload(results, download, memory)
        return replace(sent, adapter=memory.adapter), memory


class PulledToItself(TrainBoth):
    def phases(self, download, memory):
        shared, personal = super().phases(download, memory)
        return shared, replace(personal, anchor=personal.start)


class MixesFactors(TrainLocalBeside):
    def upload(self, results, download, memory):
        sent, memory = super().upload(results, download, memory)
        local, share = results[1].adapter, self.personal_weight
        mixed = {key: (1 - share) * value + share * local[key] for key, value in download.adapter.items()}
        return sent, replace(memory, adapter=mixed)
