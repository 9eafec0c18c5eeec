"""Ditto: a personal model beside the global one, held near it (Li et al., ICML 2021, arXiv 2012.04221).

A client takes part in FedAvg as under `homo`, and also trains a personal model v, whose loss gains
`lambda / 2 * ||v - x_global||^2` with the global adapter it was sent. The server never receives v. With lambda 0 it is
local training, with a large one the global adapter; the term is on the factors, not on their product, and AdamW
rescales it with the rest of the gradient, as in FedProx.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.methods.fedavg import TrainAndSend
from fedlora.types import ClientMemory, Download, LocalResult, Phase, Upload


@dataclass(frozen=True)
class TrainBoth(TrainAndSend):
    """Client half: FedAvg's training, then that of the personal model, which starts as the first download."""

    own_ranks: ClassVar[int] = 1

    ditto_lambda: float = 0.1

    def phases(self, download: Download, memory: ClientMemory) -> tuple[Phase, ...]:
        own = memory.adapter if memory.adapter is not None else download.adapter
        personal = Phase(own, proximal_mu=self.ditto_lambda, anchor=download.adapter)
        return (*super().phases(download, memory), personal)

    def upload(
        self, results: Sequence[LocalResult], download: Download, memory: ClientMemory
    ) -> tuple[Upload | None, ClientMemory]:
        shared, personal = results
        sent, memory = super().upload([shared], download, memory)
        return sent, replace(memory, adapter=personal.adapter)
