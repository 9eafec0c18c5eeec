"""FedProx: clients are held near the global adapter (Li et al., MLSys 2020, arXiv 1812.06127).

The client's loss gains `mu / 2 * ||x - x_global||^2` over the trained factors; the server is FedAvg's. The term is
on the factors, not on their product, and AdamW rescales it with the rest of the gradient: mu has much less effect
than under SGD.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedlora.methods.fedavg import TrainAndSend
from fedlora.types import ClientMemory, Download, Phase


@dataclass(frozen=True)
class ProximalTraining(TrainAndSend):
    """Client half; with proximal_mu 0 it is TrainAndSend."""

    proximal_mu: float = 0.01

    def phases(self, download: Download, memory: ClientMemory) -> tuple[Phase, ...]:
        start = download.adapter
        return (Phase(start, download.trainable, proximal_mu=self.proximal_mu, anchor=start),)
