"""The same tensor of every client as one stack, key by key, for methods that compare clients with each other.

A thousand updates do not fit into memory in float64. They are held as they were sent, as many keys at once as
`held_bytes` allow, and only the stack that is looked at is float64. The keys that do not fit are read again from the
store, which costs one reading of the updates per `held_bytes` and pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fedlora.federated.adapters import compact
from fedlora.types import AdapterState, Updates

HELD_BYTES = 1 << 30
"""Most bytes of updates that are held at once, and never less than one tensor of all clients: all of 150 clients'
adapters of Llama-3.2-1B at rank 16."""


class Stack(Protocol):
    """Key -> changes of all clients, (clients, ...) in float64; re-iterable. A dict of tensors is one."""

    def items(self) -> Iterable[tuple[str, Tensor]]: ...


class ClientStacks:
    """The clients' changes from `start` as a `Stack`, in key order; making it reads `updates` for the first time.

    `most_clients` is how many updates may come. `len()` is how many came.
    """

    def __init__(
        self, updates: Updates, start: AdapterState, *, most_clients: int, held_bytes: float = HELD_BYTES
    ) -> None:
        self._updates = updates
        self._start = start
        self._groups: list[list[str]] = []
        self._held: dict[str, list[Tensor]] = {}
        self._count = 0
        for update in updates:
            sent = update.upload or {}
            self._groups = self._groups or _group_keys(sent, held_bytes / max(1, most_clients))
            self._hold(sent, self._groups[0] if self._groups else [])
            self._count += 1

    def __len__(self) -> int:
        return self._count

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Every key with its stack, which is the caller's own."""
        for group in self._groups:
            if group[0] not in self._held:
                self._held = {}
                for update in self._updates:
                    self._hold(update.upload or {}, group)
            for key in group:
                # stacked first, for a difference would spread a smaller update over a larger start
                values = torch.empty(self._count, *self._held[key][0].shape, dtype=torch.float64)
                yield key, torch.stack(self._held[key], out=values).sub_(self._start[key])

    def _hold(self, sent: AdapterState, keys: Sequence[str]) -> None:
        for key in keys:
            self._held.setdefault(key, []).append(compact(sent[key]))


def _group_keys(sent: AdapterState, most_bytes: float) -> list[list[str]]:
    """Keys in their order, cut so that the tensors of one group have at most `most_bytes`, or are a single one."""
    groups: list[list[str]] = []
    held = 0
    for key in sorted(sent):
        if not groups or held + sent[key].nbytes > most_bytes:
            groups.append([])
            held = 0
        groups[-1].append(key)
        held += sent[key].nbytes
    return groups
