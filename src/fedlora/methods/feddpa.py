"""FedDPA: a global and a local adapter whose outputs are mixed (Yang et al., NeurIPS 2024, arXiv 2403.19211).

A layer gives `W x + (1 - a) s B_g A_g x + a s B_l A_l x`. The outputs are mixed, not the factors: those would give the
cross terms `B_g A_l` and `B_l A_g`. This is the paper's FedDPA-T: in every round a client trains the global adapter,
which is FedAvg's, and then its local one with the global adapter it was sent frozen beside it. The local adapter stays
with the client and begins as its first download, so that the mix begins as the global model. As one LoRA the mix is a
stack of twice the rank. The server's mean is weighted by rows, where the authors' code takes the plain one, so that the
global adapter is `homo`'s; and `a` is one number, not computed for each prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.federated.adapters import combine, layer_pairs
from fedlora.methods.fedavg import TrainAndSend
from fedlora.types import AdapterState, ClientMemory, Download, LocalResult, Phase, Upload

LOCAL = "local"


@dataclass(frozen=True)
class TrainLocalBeside(TrainAndSend):
    """Client half; `personal_weight` is the `a` above, `lora_scaling` the run's `s`."""

    own_ranks: ClassVar[int] = 2

    personal_weight: float = 0.5
    lora_scaling: float = 1.0

    def phases(self, download: Download, memory: ClientMemory) -> tuple[Phase, ...]:
        share = (1 - self.personal_weight) * self.lora_scaling
        # without a share the layers have nothing to add, and train as if they were alone
        background = scale_b(download.adapter, share) if share else None
        own = memory.slots.get(LOCAL, download.adapter)
        local = Phase(own, background=background, weight=self.personal_weight)
        return (*super().phases(download, memory), local)

    def upload(
        self, results: Sequence[LocalResult], download: Download, memory: ClientMemory
    ) -> tuple[Upload | None, ClientMemory]:
        shared, local = results
        sent, memory = super().upload([shared], download, memory)
        mix = mix_outputs(download.adapter, local.adapter, self.personal_weight)
        return sent, replace(memory, adapter=mix, slots={LOCAL: local.adapter})


def mix_outputs(shared: AdapterState, own: AdapterState, weight: float) -> dict[str, Tensor]:
    """The adapter of rank r_1 + r_2 whose product is `(1 - weight) B_1 A_1 + weight B_2 A_2`, at the same scaling."""
    mixed: dict[str, Tensor] = {}
    first, second = scale_b(shared, 1 - weight), scale_b(own, weight)
    for a_key, b_key in layer_pairs(shared).values():
        mixed[a_key] = torch.cat([shared[a_key], own[a_key]], dim=0)
        mixed[b_key] = torch.cat([first[b_key], second[b_key]], dim=1)
    return mixed


def scale_b(state: AdapterState, factor: float) -> Mapping[str, Tensor]:
    """The same adapter with `factor` times its product."""
    part = {b_key: state[b_key] for _, b_key in layer_pairs(state).values()}
    return {**state, **combine(lambda b: b * factor, part)}
