"""FedAvg whose clients send a change of bounded length: one client cannot move the mean far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedlora.methods import FedAvg, Method, Option, TrainAndSend, combine
from fedlora.types import ClientMemory, Download, LocalResult, Upload


@dataclass(frozen=True)
class ClipAndSend(TrainAndSend):
    """The client: it trains as FedAvg's, and sends `start + share * (trained - start)`."""

    longest: float = 1.0

    def upload(
        self, results: Sequence[LocalResult], download: Download, memory: ClientMemory
    ) -> tuple[Upload | None, ClientMemory]:
        sent, memory = super().upload(results, download, memory)
        if sent is None:
            return None, memory
        start = {key: download.adapter[key] for key in sent.adapter}
        # in a fixed order: an adapter from a file has its keys in another, and a sum other last bits
        square = sum(float((sent.adapter[key] - start[key]).double().square().sum()) for key in sorted(start))
        share = min(1.0, self.longest / math.sqrt(square)) if square else 1.0
        return replace(sent, adapter=combine(lambda x, s: s + share * (x - s), sent.adapter, start)), memory


clipped = Method(
    "clipped",
    server=FedAvg(),
    client=ClipAndSend(),
    summary="clients send a change of at most this length",
    options=(Option("longest", 1.0, "longest change that a client sends (Euclidean norm)", gt=0),),
    server_sees="mean",
    rows_weigh=True,
    trains="once",
    rewrites_factors=False,
    changes_client_training=True,
    asks_everybody=False,
    adds_to_base=False,
    ranks_may_differ=False,
    keeps_personal_model=False,
    has_global_model=True,
    bound_to_length=False,
)
