"""The map from clients to nodes: every node that connects is asked once.

A node's name, if the SuperLink knows one of the form `client-<i>`, was given with its key when it was registered, and
wins over the node's own claim. One node takes a client's place; another that claims it is reported and left out as long
as the first is connected.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.config.train import TrainConfig
from fedlora.console import say
from fedlora.data.client_facts import ClientFacts
from fedlora.errors import TrainingError
from fedlora.flower.codec import from_content
from fedlora.flower.node_replies import NodeFacts, ask_facts, read_facts
from fedlora.flower.post import NodeId, connected, pull, push
from fedlora.llm.base_identity import BaseIdentity
from fedlora.plain_text import counted
from fedlora.stopping import stop_if_asked
from fedlora.types import ClientFailure, ClientId

MOST_FACTS_BYTES = 1 << 16
FACTS_SECONDS = 3600.0
"""How long a node may take to load its model before its facts are asked for again."""
AGAIN_SECONDS = 30.0
"""After how long a node that gave no usable answer is asked once more."""
_NAME = re.compile(r"client-(\d{1,5})")


class Roster:
    """The nodes of a Grid and the clients that they are; `known` are the recorded facts of a run that resumes.

    `run_id` is sent with every request: a node's memory of one run is not for another that computes the same.
    """

    def __init__(
        self,
        grid: Grid,
        config: TrainConfig,
        shapes_sha256: str,
        known: Mapping[ClientId, ClientFacts] | None = None,
        *,
        base: BaseIdentity | None = None,
        run_id: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.grid = grid
        self.config = config
        self.shapes_sha256 = shapes_sha256
        self.base = base
        """The run's base model as the server, or else the first node, knows it."""
        self.run_id = run_id
        self.facts: dict[ClientId, ClientFacts] = dict(known or {})
        self._is_open = known is None
        self._clock = clock
        self._client_of: dict[NodeId, ClientId] = {}
        self._asked: dict[str, NodeId] = {}
        self._not_before: dict[NodeId, float] = {}
        self._refused: list[str] = []
        self.awaited: frozenset[ClientId] = frozenset()
        """Clients whose nodes are connected, by the names of their keys, and have been asked and not answered yet."""

    def clients(self) -> list[ClientId]:
        """Clients that have something to train on, ascending."""
        return sorted(client for client, facts in self.facts.items() if facts.num_examples)

    def wait(self, count: int, seconds: float, poll: float) -> None:
        """Until `count` clients have sent their facts; TrainingError with the missing ones after `seconds`."""
        until = self._clock() + seconds
        while self._is_open:
            # what has arrived by then counts, however long this look takes
            is_late = self._clock() > until
            self.look()
            if len(self.facts) >= count:
                self._is_open = False
            elif self._refused:
                # it would say the same until its owner has changed something
                raise TrainingError(
                    f"a node refuses this run: {'; '.join(self._refused)}",
                    hint="ask for less, ask its owner for another bound, or take fewer clients with --num_clients",
                )
            elif is_late:
                missing = sorted(set(range(count)) - self.facts.keys())
                raise TrainingError(
                    f"{len(self.facts)} of {counted(count, 'client')} are there after {seconds:g} s; "
                    f"missing: {missing}",
                    hint="start their nodes (their own logs say what they wait for), or lower --num_clients",
                )
            else:
                time.sleep(poll)

    def gather(self, seconds: float, poll: float) -> None:
        """Until all clients of a resumed run are connected, or for `seconds`: some may have left for good."""
        until = self._clock() + seconds
        while True:
            is_late = self._clock() > until
            missing = sorted(set(self.clients()) - (self.look() or {}).keys())
            if not missing:
                return
            if is_late:
                say(f"clients {missing} are not connected after {seconds:g} s; the run continues without them")
                return
            time.sleep(poll)

    def look(self) -> dict[ClientId, NodeId] | None:
        """The connected node of each known client; a new node is asked, and answers at a later look.

        None while the server does not say who is connected.
        """
        names = connected(self.grid)
        if names is None:
            return None
        for message_id, message in pull(self.grid, self._asked):
            self._admit(self._asked.pop(message_id), names, message)
        asked = set(self._asked.values())
        for node in sorted(names.keys() - self._client_of.keys() - asked):
            if self._clock() >= self._not_before.get(node, 0.0):
                self._ask(node)
        answering = [_NAME.fullmatch(names.get(node, "")) for node in self._asked.values()]
        self.awaited = frozenset(int(name[1]) for name in answering if name)
        return {client: node for node, client in self._client_of.items() if node in names}

    def _ask(self, node: NodeId) -> None:
        message_id = push(self.grid, node, ask_facts(self.config, self.run_id), "query", FACTS_SECONDS)
        if message_id is not None:
            self._not_before[node] = self._clock() + AGAIN_SECONDS
            self._asked[message_id] = node

    def _admit(self, node: NodeId, names: Mapping[NodeId, str], message: Message | None) -> None:
        reason = self._find_fault(node, names, message)
        if reason is not None:
            say(f"{self._called(node, names)} takes no part: {reason}")

    @staticmethod
    def _called(node: NodeId, names: Mapping[NodeId, str]) -> str:
        return names.get(node) or f"node {node}"

    def _find_fault(self, node: NodeId, names: Mapping[NodeId, str], message: Message | None) -> str | None:
        """Why a node is not accepted as the client that it claims to be; None once it is on the list."""
        if message is None:
            return "its answer cannot be unpacked"
        if message.has_error():
            return f"it answered with Flower's error {message.error.code}"
        try:
            told: Any = read_facts(from_content(message.content, MOST_FACTS_BYTES))
        except Exception as error:  # whatever a node sends, it is that node's fault
            stop_if_asked()
            return f"its answer cannot be read ({type(error).__name__})"
        if isinstance(told, ClientFailure):
            named = _NAME.fullmatch(names.get(node, ""))
            # a node that is not one of this run's clients may refuse what it likes
            if told.kind == "refused" and (int(named[1]) if named else told.client_id) < self.config.num_clients:
                self._refused.append(f"{self._called(node, names)}: {told.reason}")
            return told.reason
        return self._find_conflict(node, names, told)

    def _find_conflict(self, node: NodeId, names: Mapping[NodeId, str], told: NodeFacts) -> str | None:
        client = told.facts.client_id
        named = _NAME.fullmatch(names.get(node, ""))
        if named and int(named[1]) != client:
            return f"it says that it is client {client}, and is registered as {names[node]}"
        if client >= self.config.num_clients or (not self._is_open and client not in self.facts):
            return f"client {client} is not part of this run"
        holder = next((other for other, taken in self._client_of.items() if taken == client), None)
        if holder is not None and holder in names:
            return f"client {client} is node {holder} already"
        if told.shapes != self.shapes_sha256:
            return f"client {client} has another base model: the shapes of its adapter differ"
        if told.base and self.base and (parts := self.base.differences(told.base)):
            what = f"its identity is {told.base}, not {self.base} (different: {', '.join(parts)})"
            return f"client {client} has another base model: {what}"
        if client in self.facts and self.facts[client].sha256 != told.facts.sha256:
            return f"client {client} has other rows than at the start of this run, or a new state_dir"
        if holder is not None:
            del self._client_of[holder]
        self._client_of[node] = client
        self.base = told.base.completed_by(self.base) if told.base else self.base
        self.facts[client] = told.facts
        return None
