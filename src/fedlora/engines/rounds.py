"""The one federated loop: cohort, waves, aggregation, commit; a generator of finished rounds.

It knows neither how clients train nor where: a pool does that, and a store keeps what they send. A
client without a usable update is left out of its round; a round without any update ends the run and
leaves the rounds before it as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from fedlora.config.train import TrainConfig
from fedlora.errors import TrainingError
from fedlora.federated.adapters import fingerprint
from fedlora.federated.modes import Mode, Wave
from fedlora.federated.sampling import draw_cohort
from fedlora.types import (
    AdapterState,
    ClientFailure,
    ClientId,
    ClientMemory,
    ClientPool,
    ClientUpdate,
    RoundContext,
    RoundResult,
    TrainTask,
    Updates,
)


class UpdateStore(Protocol):
    """Where updates and rounds are committed."""

    def begin_round(self, round_number: int) -> None: ...
    def keep_update(self, update: ClientUpdate) -> None: ...
    def find_kept(self, round_number: int, client_id: ClientId) -> ClientUpdate | None: ...
    def read_memory(self, client_id: ClientId, accepted: int | None) -> ClientMemory: ...
    def updates(self, round_number: int, clients: Sequence[ClientId]) -> Updates: ...
    def carry_forward(self, round_number: int, client_id: ClientId, accepted: int) -> None: ...
    def commit_round(
        self, round_number: int, global_adapter: AdapterState | None, facts: Mapping[str, Any]
    ) -> Path: ...


class Standing(Protocol):
    """The last round of an interrupted run, and in which round each client was last accepted."""

    @property
    def number(self) -> int: ...
    @property
    def global_adapter(self) -> AdapterState | None: ...
    @property
    def accepted(self) -> Mapping[ClientId, int]: ...


class FederatedRun:
    """State of one run between its rounds."""

    def __init__(
        self,
        mode: Mode,
        pool: ClientPool,
        store: UpdateStore,
        config: TrainConfig,
        adapter: AdapterState,
        *,
        start: Standing | None = None,
    ) -> None:
        self.mode = mode
        self.pool = pool
        self.store = store
        self.config = config
        self.clients = tuple(pool.clients())
        if not self.clients:
            raise TrainingError("no client has a row to train on", hint="check the client files")
        self.state = mode.strategy.init(adapter, self.clients)
        self.accepted: dict[ClientId, int] = {}
        self.done = 0
        if start is not None:
            self.state = mode.strategy.restore(self.state, start.global_adapter)
            self.accepted = dict(start.accepted)
            self.done = start.number

    def rounds(self) -> Iterator[RoundResult]:
        """Every round of the run, each committed before it is yielded."""
        for number in range(self.done + 1, self.config.num_communication_rounds + 1):
            yield self._run_round(number)

    def _run_round(self, number: int) -> RoundResult:
        config = self.config
        cohort = draw_cohort(
            self.clients,
            how=config.client_selection_strategy,
            fraction=config.client_selection_frac,
            seed=config.seed,
            round_number=number,
        )
        self.store.begin_round(number)
        records: list[Mapping[str, Any]] = []
        failures: list[ClientFailure] = []
        waves = self.mode.waves(cohort, shuffle=config.seq_order == "shuffled", seed=config.seed, round_number=number)
        for index, wave in enumerate(waves):
            tasks = self._make_tasks(number, index, wave)
            kept = {task.client_id: update for task in tasks if (update := self._find_kept(task)) is not None}
            updates = ArrivingUpdates(self.pool, tasks, self.store, kept)
            context = RoundContext(number, index, self.clients, cohort)
            self.state = self.mode.strategy.aggregate(self.state, updates, context)
            updates.finish()
            records.extend(record_of(update, index) for update in updates.done)
            failures.extend(updates.failures)
        if not records:
            reasons = "; ".join(f"client {failure.client_id}: {failure.reason}" for failure in failures)
            raise TrainingError(
                f"round {number}: no client gave a usable update: {reasons}",
                hint="the rounds before it are intact; fix the cause and start again under another exp_name",
            )
        global_adapter = self.mode.strategy.global_adapter(self.state)
        self._commit(number, cohort, global_adapter, records, failures)
        return RoundResult(number, global_adapter, records, failures)

    def _make_tasks(self, number: int, index: int, wave: Wave) -> list[TrainTask]:
        return [
            TrainTask(
                round=number,
                wave=index,
                client_id=client,
                rows_of=rows_of,
                download=self.mode.strategy.broadcast(self.state, client),
                accepted=self.accepted.get(client),
            )
            for client, rows_of in wave
        ]

    def _find_kept(self, task: TrainTask) -> ClientUpdate | None:
        """What this client committed to the open round before an interruption, if it answers this very task."""
        kept = self.store.find_kept(task.round, task.client_id)
        if kept is None:
            return None
        memory = self.store.read_memory(task.client_id, task.accepted)
        start = self.mode.rule.phases(task.download, memory)[-1].start
        return kept if kept.started_from == fingerprint(start) else None

    def _commit(
        self,
        number: int,
        cohort: Sequence[ClientId],
        global_adapter: AdapterState | None,
        records: Sequence[Mapping[str, Any]],
        failures: Sequence[ClientFailure],
    ) -> None:
        fresh = {int(record["client_id"]) for record in records}
        if global_adapter is None:
            for client, accepted in sorted(self.accepted.items()):
                if client not in fresh:
                    self.store.carry_forward(number, client, accepted)
        quarantined = [{"client_id": failure.client_id, "reason": failure.reason} for failure in failures]
        self.store.commit_round(number, global_adapter, {"cohort": list(cohort), "quarantined": quarantined})
        self.accepted.update(dict.fromkeys(fresh, number))


class ArrivingUpdates:
    """The updates of one wave, trained as they are asked for: `aggregate` sees each one while it is in memory.

    The first iteration pulls the pool, keeps every update in the store and hands it on in client-id order, so a
    strategy that sums holds one adapter and its sum and no file is read back. An update that arrives before its
    turn is read from the store when its turn comes; so are all of them in later iterations. What was `kept` before
    an interruption is not trained again.
    """

    def __init__(
        self,
        pool: ClientPool,
        tasks: Sequence[TrainTask],
        store: UpdateStore,
        kept: Mapping[ClientId, ClientUpdate] | None = None,
    ) -> None:
        self._kept: dict[ClientId, ClientUpdate] = dict(kept or {})
        self._outcomes = iter(pool.train([task for task in tasks if task.client_id not in self._kept]))
        self._store = store
        self._round = tasks[0].round
        self._ahead = sorted(task.client_id for task in tasks)
        self._is_begun = False
        self.failures: list[ClientFailure] = []

    @property
    def done(self) -> list[ClientUpdate]:
        """What has arrived so far, without tensors, in client-id order."""
        return [update for _, update in sorted(self._kept.items())]

    def __iter__(self) -> Iterator[ClientUpdate]:
        if not self._is_begun:
            self._is_begun = True
            return self._arrive()
        self.finish()
        return iter(self._store.updates(self._round, list(self._kept)))

    def __len__(self) -> int:
        self.finish()
        return len(self._kept)

    def finish(self) -> None:
        """Train whoever has not been asked for."""
        self._is_begun = True
        for _ in self._arrive():
            pass

    def _arrive(self) -> Iterator[ClientUpdate]:
        yield from self._hand_on_stored()
        for outcome in self._outcomes:
            if isinstance(outcome, ClientFailure):
                self.failures.append(outcome)
                self._ahead.remove(outcome.client_id)
            else:
                self._store.keep_update(outcome)
                # without its tensors: those of the update that is handed on are the only ones held
                self._kept[outcome.client_id] = replace(outcome, upload=None, memory=ClientMemory())
                if self._ahead[0] == outcome.client_id:
                    self._ahead.pop(0)
                    yield outcome
            del outcome
            yield from self._hand_on_stored()

    def _hand_on_stored(self) -> Iterator[ClientUpdate]:
        """Those that are there already and whose turn has come."""
        while self._ahead and self._ahead[0] in self._kept:
            yield from self._store.updates(self._round, [self._ahead.pop(0)])


def record_of(update: ClientUpdate, wave: int) -> dict[str, Any]:
    """An update without its tensors: the client's line in the metrics."""
    return {
        "kind": "client",
        "round": update.round,
        "wave": wave,
        "client_id": update.client_id,
        "num_examples": update.num_examples,
        "num_tokens": update.num_tokens,
        "num_steps": update.num_steps,
        **update.metrics,
    }
