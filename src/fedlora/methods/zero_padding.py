"""Averaging adapters of different ranks by padding them with zeros: the baseline of Cho et al. (arXiv 2401.06432).

Padding dilutes: a direction that half of the clients have is divided by all of them; `rank_normalisation=participants`
divides it by the clients whose rank includes it. In both, a direction that no client of a round has stays unchanged:
with zeros in both factors it would never learn again. The mean of factors is not the mean of products, as in FedAvg.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fedlora.federated.ranks import padded_mean
from fedlora.methods.fedavg import RankedServer
from fedlora.types import RoundContext, ServerState, Updates


@dataclass(frozen=True)
class ZeroPadding(RankedServer):
    """Server half: the mean of the padded adapters, weighted by rows. With equal ranks it is FedAvg."""

    rank_normalisation: Literal["all", "participants"] = "all"

    def aggregate(self, state: ServerState, updates: Updates, context: RoundContext) -> ServerState:
        pairs = ((update.upload or {}, float(update.num_examples)) for update in updates)
        mean = padded_mean(pairs, state.adapter, participants=self.rank_normalisation == "participants")
        return replace(state, adapter=mean or state.adapter)
