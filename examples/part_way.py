"""A method of your own in one file: FedAvg whose server moves a part of the way to the clients' mean.

It is SGD on the server (Reddi et al., arXiv 2003.00295); with step 1 it is FedAvg.

    fedlora methods check examples/part_way.py:part_way --combines factors --plain step=1
    fedlora train run.yaml --method examples/part_way.py:part_way --set step=0.3
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fedlora.methods import FedAvg, Method, TrainAndSend, combine, weighted_mean
from fedlora.types import RoundContext, ServerState, Updates


@dataclass(frozen=True)
class PartWay(FedAvg):
    """The server: its dataclass fields are the method's options."""

    step: float = 0.5

    def aggregate(self, state: ServerState, updates: Updates, context: RoundContext) -> ServerState:
        # float64, because the step is computed from it: a mean in float32 would have been rounded already
        mean = weighted_mean(((update.upload or {}, update.num_examples) for update in updates), dtype=torch.float64)
        if mean is None:  # nobody took part
            return state
        return replace(state, adapter=combine(lambda x, m: x + self.step * (m - x), state.adapter, mean))


part_way = Method(
    "part_way",
    server=PartWay(),
    client=TrainAndSend(),
    summary="the server moves a part of the way to the mean",
    paper="Reddi et al. 2021, arXiv 2003.00295",
    # Facts on which other features depend: what is not stated here is refused. `fedlora methods check` tries them.
    server_sees="mean",  # noise on the mean hides a client: privacy by client
    rows_weigh=True,  # a client counts by its examples: max_client_weight
    trains="once",  # privacy by example
    rewrites_factors=False,  # optimizer_state=keep
    changes_client_training=False,  # reaggregate with this server
    asks_everybody=False,
    adds_to_base=False,
    ranks_may_differ=False,
    keeps_personal_model=False,
    has_global_model=True,
    bound_to_length=False,  # the run can be extended by more rounds
)
