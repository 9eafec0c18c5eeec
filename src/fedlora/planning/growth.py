"""Count what the rounds of a run will add to its base: bytes that travel, bytes on disk, memory.

Every round's increment and exported adapter is larger than the one before, up to the layers' own size. Counted for the
cohorts as the run will draw them, at the most ranks that a method can add, and as if every update were usable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlora.config.train import TrainConfig
from fedlora.federated.adapters import Shapes
from fedlora.federated.base_delta import LayerSize, count_held, count_missed, is_dense, layer_sizes
from fedlora.federated.ranks import rank_of
from fedlora.methods.choosing import LoadedMethod, Wave
from fedlora.runs.space import BLOCK_BYTES
from fedlora.types import BaseLink, ClientId

WIDTH = 4
"""Bytes of a number as it is kept and sent."""


@dataclass(frozen=True)
class Growth:
    """Per round, in bytes: `down` to all clients together, `disk` beside what a round of FedAvg leaves. `held` is the
    size of the background, in numbers, when the run ends."""

    down: tuple[int, ...] = ()
    disk: tuple[int, ...] = ()
    held: int = 0


def forecast_growth(
    config: TrainConfig, method: LoadedMethod, rounds: Sequence[Sequence[Wave]], shapes: Shapes
) -> Growth:
    """For the waves of every round and the shapes of an adapter of the largest rank; empty for methods that add
    nothing."""
    if not method.adds_to_base:
        return Growth()
    kinds = _count_kinds(shapes)
    accepted: dict[ClientId, int] = {}
    links: list[BaseLink] = []
    down, disk = [], []
    for number, waves in enumerate(rounds, start=1):
        cohort = [client for wave in waves for client, _ in wave]
        own = [rank_of(client, config.client_ranks, config.lora_r) for client in cohort]
        ranks = {kind.name: method.server.increment_rank(own, *kind.dims) for kind in kinds}
        for since, count in Counter(accepted.get(client) for client in cohort).items():
            per_client = sum(copies * count_missed(links, kind.sizes, since) for kind, copies in kinds.items())
            down.append((number, count * WIDTH * per_client))
        links.append(BaseLink(number, None, "", ranks))
        disk.append(_count_disk(method, links, kinds))
        accepted |= dict.fromkeys(cohort, number)
    per_round = [sum(size for at, size in down if at == number) for number in range(1, len(rounds) + 1)]
    held = sum(copies * count_held(links, kind.sizes) for kind, copies in kinds.items())
    return Growth(tuple(per_round), tuple(disk), held)


@dataclass(frozen=True)
class _Kind:
    """Layers of one size, adapted with one rank."""

    size: LayerSize
    rank: int

    @property
    def name(self) -> str:
        return f"{self.size.d_out}x{self.size.d_in}:{self.rank}"

    @property
    def dims(self) -> tuple[int, int]:
        return self.size.d_out, self.size.d_in

    @property
    def sizes(self) -> dict[str, LayerSize]:
        return {self.name: self.size}


def _count_kinds(shapes: Shapes) -> Counter[_Kind]:
    sizes = layer_sizes(shapes)
    return Counter(_Kind(size, shapes[f"{layer}.lora_A.weight"][0]) for layer, size in sizes.items())


def _count_disk(method: LoadedMethod, links: Sequence[BaseLink], kinds: Mapping[_Kind, int]) -> int:
    """The increment, the server's adapter, and what the two files of the exported one are larger than a client's."""
    own = sum(copies * kind.rank * sum(kind.dims) for kind, copies in kinds.items())
    increment = sum(copies * links[-1].ranks[kind.name] * sum(kind.dims) for kind, copies in kinds.items())
    rank = min(method.hyperparameters["export_rank"], max(_export_rank(links, kind) for kind in kinds))
    export = sum(copies * rank * sum(kind.dims) for kind, copies in kinds.items())
    return WIDTH * (increment + own + 2 * max(0, export - own)) + 3 * BLOCK_BYTES


def _export_rank(links: Sequence[BaseLink], kind: _Kind) -> int:
    """Ranks that the layer needs to be exported as it is: all of its own once its additions are one matrix."""
    added = sum(link.ranks[kind.name] for link in links)
    return min(kind.dims) if is_dense(added, *kind.dims) else min(*kind.dims, kind.rank + added)
