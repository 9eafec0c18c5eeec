"""The owners of test rows on the nodes of a Grid: each is asked for its private metrics, each reply is checked.

Where a client gives nothing, the reason stands in the place of its numbers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.config.train import TrainConfig
from fedlora.console import say
from fedlora.engines.private_metrics import Asked
from fedlora.evaluation.private_numbers import withheld
from fedlora.federated.validation import one_line
from fedlora.flower.codec import from_content
from fedlora.flower.pool import Patience
from fedlora.flower.post import pull, push
from fedlora.flower.private_numbers import ask_numbers, read_reply
from fedlora.flower.roster import Roster
from fedlora.stopping import stop_if_asked
from fedlora.types import ClientId

MOST_BYTES = 1 << 16


class NodeOwners:
    """The owners whose nodes a Grid connects."""

    def __init__(self, grid: Grid, roster: Roster, config: TrainConfig, patience: Patience) -> None:
        self._grid = grid
        self._roster = roster
        self._config = config
        self._patience = patience

    def measure(self, asked: Asked) -> dict[ClientId, dict[str, Any]]:
        """All nodes at once; those that are away or late give nothing, and the round says so."""
        self._roster.gather(max(self._patience.again, self._patience.absent), self._patience.poll)
        nodes = self._roster.look() or {}
        found = {client: withheld("its node is not connected") for client in asked.clients if client not in nodes}
        sent: dict[str, ClientId] = {}
        for client in [client for client in asked.clients if client in nodes]:
            request = ask_numbers(client, asked, self._config, self._roster.run_id)
            message_id = push(self._grid, nodes[client], request, "query", self._patience.wave)
            if message_id is None:
                found[client] = withheld("its node took no message")
            else:
                sent[message_id] = client
        return found | self._collect(sent)

    def _collect(self, sent: Mapping[str, ClientId]) -> dict[ClientId, dict[str, Any]]:
        waiting, found = dict(sent), {}
        until = time.monotonic() + self._patience.wave
        while waiting and time.monotonic() < until:
            for message_id, message in pull(self._grid, list(waiting)):
                client = waiting.pop(message_id)
                found[client] = self._read(client, message)
            if waiting:
                time.sleep(self._patience.poll)
        return found | {client: withheld("its node gave no answer in time") for client in waiting.values()}

    def _read(self, client: ClientId, message: Message | None) -> dict[str, Any]:
        if message is None or message.has_error():
            return withheld("its node gave no answer that can be read")
        try:
            return read_reply(from_content(message.content, MOST_BYTES), self._config)
        except Exception as error:  # whatever a node sends, it is that node's fault
            stop_if_asked()
            say(f"client {client}: private metrics that cannot be used: {one_line(str(error))}")
            return withheld("its node's numbers are not what was asked for")
