"""FedAvg, then every client for itself: the baseline that personal methods have to beat.

The last `personal_rounds` of a run's rounds are for fine-tuning: all clients take part, drawn or not, start from the
final global adapter, then from their own, and send nothing. The global adapter then stays unchanged. The run has as
many rounds as were asked for, so that it can be compared with `homo`. Which rounds are the last depends on their
number, so such a run cannot be extended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.methods.fedavg import FedAvg, TrainAndSend
from fedlora.methods.local_only import KeepOwn
from fedlora.types import (
    ClientId,
    ClientMemory,
    Download,
    LocalResult,
    Phase,
    RoundContext,
    ServerState,
    Updates,
    Upload,
)


@dataclass(frozen=True)
class AverageThenPart(FedAvg):
    """Server half: FedAvg up to the last rounds, of which the first hands the final global adapter to everybody."""

    personal_rounds: int = 1
    num_communication_rounds: int = 20

    def broadcast(self, state: ServerState, client_id: ClientId, round_number: int) -> Download:
        if not self.asks_everybody(round_number):
            return super().broadcast(state, client_id, round_number)
        is_first = not self.asks_everybody(round_number - 1)
        return Download(state.adapter, travels="both" if is_first else None, shared=None)

    def aggregate(self, state: ServerState, updates: Updates, context: RoundContext) -> ServerState:
        return state if self.asks_everybody(context.round) else super().aggregate(state, updates, context)

    def asks_everybody(self, round_number: int) -> bool:
        return round_number > self.num_communication_rounds - self.personal_rounds


@dataclass(frozen=True)
class SendThenKeep(KeepOwn):
    """Client half: sends in the shared rounds, then continues from its personal model.

    Raises ValueError when it is to send after it has a model of its own: no such run asks for that.
    """

    def phases(self, download: Download, memory: ClientMemory) -> tuple[Phase, ...]:
        if download.shared is not None and memory.adapter is not None:
            raise ValueError("a model that belongs to this client alone is not sent")
        return super().phases(download, memory)

    def upload(
        self, results: Sequence[LocalResult], download: Download, memory: ClientMemory
    ) -> tuple[Upload | None, ClientMemory]:
        if download.shared is None:
            return super().upload(results, download, memory)
        return TrainAndSend.upload(self, results, download, memory)
