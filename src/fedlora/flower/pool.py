"""Clients on other machines as a ClientPool: tasks go out over Flower's Grid, and replies are checked before they are
used.

The loop is ours: Flower's own waits for ever for nodes, looks for replies every three seconds and calls a run completed
whose rounds all ran out of time. Here every wait ends, and a client that is silent, sends an error or something that is
no message of ours is a ClientFailure like any other. Nothing a node says of itself is believed that the server knows
better: who it is, what its message may weigh, which metrics there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.config.train import TrainConfig
from fedlora.console import say
from fedlora.federated.adapters import Shapes
from fedlora.federated.base_delta import count_held, layer_sizes
from fedlora.federated.validation import one_line
from fedlora.flower.codec import from_content
from fedlora.flower.node_replies import Answer, ask_update, expect_answer, read_update
from fedlora.flower.post import pull, push
from fedlora.flower.roster import Roster
from fedlora.methods.strategy import ClientRule
from fedlora.stopping import stop_if_asked
from fedlora.types import AdapterState, ClientFailure, ClientId, ClientUpdate, TrainTask

CRASHED = 8
"""Flower's code of an app process that died; another code of an error reply is 2, an exception in the app."""
RAISED = (1, 2, 7)
"""Codes that a repetition does not change: the app could not be loaded, raised, or its bundle was refused."""

LONGEST_PAUSE, LATE_SHARE, LOOKING_SHARE = 2.0, 0.01, 0.2
"""Every look is a request per open task to a server that may share its cores with nodes. So pauses grow with a wave, up
to so many seconds, by which no more than this share of the wave is lost; and no more than that share goes into looking
in vain."""


@dataclass(frozen=True)
class Patience:
    """Seconds to wait."""

    poll: float = 0.2
    """Between two looks for replies, at least."""
    absent: float = 10.0
    """For a node that is away when its task goes out."""
    wave: float = 3600.0
    """For a wave's answers."""
    again: float = 0.0
    """For all nodes, before the first wave of a resumed run."""


class FlowerClients:
    """A ClientPool over the nodes of a Grid; `roster` knows which node is which client."""

    def __init__(
        self,
        grid: Grid,
        roster: Roster,
        config: TrainConfig,
        rule: ClientRule,
        shapes: Shapes,
        *,
        patience: Patience | None = None,
        on_rows: Callable[[int], None] = lambda rows: None,
        on_begin: Callable[[TrainTask], None] = lambda task: None,
        increment_of: Callable[[int], AdapterState] | None = None,
    ) -> None:
        self.grid = grid
        self.roster = roster
        self.config = config
        self.rule = rule
        self.shapes = shapes
        self.patience = patience or Patience()
        self.on_rows = on_rows
        self.on_begin = on_begin
        self.increment_of = increment_of
        self._expected: Answer | None = None
        # who may have lost what was added to the base before, and is sent all of it
        self._is_behind: set[ClientId] = set()
        self._has_begun = False
        self._wave: tuple[tuple[int, int], float] | None = None

    def clients(self) -> Sequence[ClientId]:
        """Clients that have something to train on."""
        return self.roster.clients()

    def train(self, tasks: Sequence[TrainTask]) -> Iterator[ClientUpdate | ClientFailure]:
        """One update or failure per task, as they arrive; the last one no later than the wave's deadline."""
        self._expected = expect_answer(self.rule, tasks[0].download)
        if not self._has_begun:
            self.roster.gather(self.patience.again, self.patience.poll)
            self._has_begun = True
        wave, began = _Wave(tasks), self._begin(tasks[0])
        if time.monotonic() - began > self.patience.wave:
            # asked again when no time is left
            yield from self._end(wave)
        while wave.waiting or wave.sent:
            yield from self._send(wave)
            looked, has_arrived = time.monotonic(), False
            for message_id, message in pull(self.grid, wave.sent):
                has_arrived = True
                yield self._receive(wave.sent.pop(message_id), message)
            now = time.monotonic()
            passed, looking = now - began, now - looked
            if passed > self.patience.wave:
                yield from self._end(wave)
            if wave.waiting or wave.sent:
                pause = 0.0 if has_arrived else max(LATE_SHARE * passed, looking / LOOKING_SHARE)
                time.sleep(max(self.patience.poll, min(LONGEST_PAUSE, pause)))

    def _begin(self, task: TrainTask) -> float:
        """When the wave of a task began; a client that is asked again has the rest of its time."""
        place = (task.round, task.wave)
        if self._wave is None or self._wave[0] != place:
            self._wave = (place, time.monotonic())
        return self._wave[1]

    def _end(self, wave: _Wave) -> Iterator[ClientFailure]:
        reason = f"no answer within {self.patience.wave:g} s"
        yield from (ClientFailure(task.client_id, "late", reason) for task in wave.end())

    def _send(self, wave: _Wave) -> Iterator[ClientFailure]:
        """Hand the tasks of connected nodes to Flower; a node that has been away too long is excluded."""
        nodes = self.roster.look() if wave.waiting else None
        if nodes is None:
            return
        for client, task in list(wave.waiting.items()):
            node = nodes.get(client)
            if node is None and client not in self.roster.awaited:
                if wave.seconds_away(client) > self.patience.absent:
                    yield wave.give_up(client, "its node is not connected")
                continue
            wave.away.pop(client, None)
            if node is None:
                continue
            message_id = push(self.grid, node, self._ask(task), "train", self.patience.wave)
            if message_id is not None:
                wave.sent[message_id] = wave.waiting.pop(client)
                self.on_begin(task)

    def _ask(self, task: TrainTask) -> bytes:
        """A task with what its client misses of the additions to the base: since it took part last, or all of it."""
        base, accepted = task.download.base, task.accepted
        if base is None or accepted is None or self.increment_of is None or task.client_id in self._is_behind:
            return ask_update(task, self.config, run_id=self.roster.run_id)
        sizes = layer_sizes(self.shapes)
        missed = [link for link in base.links if link.version >= accepted]
        numbers = sum(
            rank * (sizes[name].d_out + sizes[name].d_in) for link in missed for name, rank in link.ranks.items()
        )
        if numbers > count_held(base.links, sizes):
            return ask_update(task, self.config, run_id=self.roster.run_id)
        increments = {link.version: self.increment_of(link.version) for link in missed}
        return ask_update(task, self.config, increments, run_id=self.roster.run_id)

    def _receive(self, task: TrainTask, message: Message | None) -> ClientUpdate | ClientFailure:
        client = task.client_id
        self._is_behind.add(client)
        if message is None:
            return ClientFailure(client, "invalid", "its reply cannot be unpacked")
        if message.has_error():
            return ClientFailure(client, *fault_of(message))
        try:
            payload = from_content(message.content, self._most_bytes(task))
            outcome = read_update(payload, task, self._expected or expect_answer(self.rule, task.download))
        except Exception as error:  # whatever a node sends, it is that node's fault
            stop_if_asked()
            say(f"client {client}: a reply that cannot be read: {type(error).__name__}: {one_line(str(error))}")
            return ClientFailure(client, "invalid", f"its reply cannot be read ({type(error).__name__})")
        if isinstance(outcome, ClientUpdate):
            self._is_behind.discard(client)
            self.on_rows(outcome.num_examples * self.config.local_num_epochs * self.config.method.num_trainings)
        return outcome

    def _most_bytes(self, task: TrainTask) -> int:
        """What an honest reply can hold: the adapter, each further group, the client's own if it is let out, names."""
        numbers = sum(_product(shape) for shape in self.shapes.values())
        groups = 1 + len(self.rule.sends) + max(1, self.rule.own_ranks)
        return 4 * numbers * groups + (1 << 20) + 1024 * len(self.shapes)


class _Wave:
    """Which tasks have no node yet, and which are on their way, by message."""

    def __init__(self, tasks: Sequence[TrainTask]) -> None:
        self.waiting: dict[ClientId, TrainTask] = {task.client_id: task for task in tasks}
        self.sent: dict[str, TrainTask] = {}
        self.away: dict[ClientId, float] = {}

    def seconds_away(self, client: ClientId) -> float:
        """For how long a client has been found missing, from the first time on."""
        now = time.monotonic()
        return now - self.away.setdefault(client, now)

    def give_up(self, client: ClientId, reason: str) -> ClientFailure:
        """Wait no longer for a node that never came."""
        del self.waiting[client]
        return ClientFailure(client, "lost", reason)

    def end(self) -> list[TrainTask]:
        """Close and return everything that is still open."""
        late = [*self.waiting.values(), *self.sent.values()]
        self.waiting, self.sent = {}, {}
        return late


def fault_of(message: Message) -> tuple[Any, str]:
    """Kind and reason of an error reply. Its text is Flower's or a node's, so only its code is reported."""
    code = message.error.code
    if code in RAISED:
        return "crashed", f"the node's app failed (Flower's code {code}); the log of the node has the details"
    what = "the node's app process died" if code == CRASHED else "the node is not available"
    return "lost", f"{what} (Flower's code {code})"


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
