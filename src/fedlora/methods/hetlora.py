"""HetLoRA: zero-padding with weights by norm, and clients that prune their rank.

Cho et al., EMNLP 2024 (arXiv 2401.06432): clients get the first r_k directions, the server pads what they send to the
largest rank and averages it with weights `||B_k A_k||_F` (here over all layers together); clients train with
`lambda ||B[:, gamma r:]|| ||A[gamma r:]||` and give up that tail when it has shrunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.federated.adapters import layer_pairs
from fedlora.federated.ranks import (
    Rank,
    cut_rank,
    padded_mean,
    product_norm,
    rank_of,
    rank_of_adapter,
    tail_norm,
)
from fedlora.methods.fedavg import TrainAndSend
from fedlora.methods.zero_padding import ZeroPadding
from fedlora.types import (
    AdapterState,
    ClientId,
    ClientMemory,
    ClientUpdate,
    Download,
    LocalResult,
    Phase,
    RoundContext,
    ServerState,
    Updates,
    Upload,
)

RANKS = "ranks"
"""Slot of the ranks that are left to the clients, by client number."""


@dataclass(frozen=True)
class HetLora(ZeroPadding):
    """Server half of HetLoRA: norms weigh instead of rows; slot `ranks` holds what pruning has left to every client.

    Where every product is zero all clients weigh the same.
    """

    def weight_of(self, update: ClientUpdate) -> float:
        return product_norm(update.upload or {})

    def init(self, adapter: AdapterState, clients: Sequence[ClientId]) -> ServerState:
        largest = rank_of_adapter(adapter)
        ranks = [rank_of(client, self.client_ranks, largest) for client in range(max(clients) + 1)]
        return ServerState(adapter, {RANKS: {"clients": torch.tensor(ranks)}})

    def broadcast(self, state: ServerState, client_id: ClientId, round_number: int) -> Download:
        return Download(cut_rank(state.adapter, int(state.slots[RANKS]["clients"][client_id])))

    def aggregate(self, state: ServerState, updates: Updates, context: RoundContext) -> ServerState:
        ranks = state.slots[RANKS]["clients"].clone()

        def weigh(update: ClientUpdate) -> tuple[AdapterState, float]:
            sent = update.upload or {}
            ranks[update.client_id] = min(int(ranks[update.client_id]), rank_of_adapter(sent))
            return sent, self.weight_of(update)

        participants = self.rank_normalisation == "participants"
        mean = padded_mean(map(weigh, updates), state.adapter, participants=participants)
        if mean is None:
            same = ((update.upload or {}, 1.0) for update in updates)
            mean = padded_mean(same, state.adapter, participants=participants)
        notes = {"mean_client_rank": float(ranks.double().mean())}
        return ServerState(mean or state.adapter, {RANKS: {"clients": ranks}}, notes)


@dataclass(frozen=True)
class TailPenalty:
    """`strength * ||B[:, first:]|| * ||A[first:]||` of every layer, as a term of a phase's gradient."""

    strength: float
    first: Rank

    def add_gradient(self, factors: Mapping[str, Tensor]) -> None:
        """Add the gradient of the penalty to that of the factors; of a norm that is zero it is zero."""
        for a_key, b_key in layer_pairs(factors).values():
            a, b = factors[a_key], factors[b_key]
            if a.grad is None or b.grad is None:
                raise ValueError("a penalty on the tail needs both factors to be trained")
            rows, columns, tiny = a[self.first :], b[:, self.first :], torch.finfo(a.dtype).tiny
            a_norm, b_norm = rows.norm(), columns.norm()
            a.grad[self.first :] += rows / a_norm.clamp_min(tiny) * (self.strength * b_norm)
            b.grad[:, self.first :] += columns / b_norm.clamp_min(tiny) * (self.strength * a_norm)


@dataclass(frozen=True)
class PruneAndSend(TrainAndSend):
    """Client half of HetLoRA: the last directions, from `prune_to` of the rank on, are held down and given up.

    They are given up when their norms' product, summed over layers, is smaller after training than before it. With
    `prune_to` 1, or rank 1, there is no tail.
    """

    sends_smaller: ClassVar[bool] = True

    prune_to: float = 0.99
    tail_penalty: float = 1e-3

    def phases(self, download: Download, memory: ClientMemory) -> tuple[Phase, ...]:
        start = download.adapter
        tail = TailPenalty(self.tail_penalty, self.kept_rank(rank_of_adapter(start)))
        return (Phase(start, terms=(tail,) if self.tail_penalty else ()),)

    def upload(
        self, results: Sequence[LocalResult], download: Download, memory: ClientMemory
    ) -> tuple[Upload | None, ClientMemory]:
        trained = results[0].adapter
        kept = self.kept_rank(rank_of_adapter(trained))
        if tail_norm(trained, kept) < tail_norm(download.adapter, kept):
            cut = cut_rank(trained, kept)
            trained = {key: value.clone(memory_format=torch.contiguous_format) for key, value in cut.items()}
            # moments of what is gone would move what is no longer there
            memory = replace(memory, optimizer=None)
        return Upload(trained), replace(memory, adapter=None)

    def kept_rank(self, rank: Rank) -> Rank:
        """The rank that pruning leaves: at least one direction."""
        # 0.9 * 10 may be a hair below 9
        return max(1, int(self.prune_to * rank + 1e-9))
