"""The one federated loop: cohort, waves, aggregation, commit; a generator of finished rounds.

It knows neither how clients train nor where: a pool does that, and a store keeps what they send. A
client without a usable update is left out of its round, with the reason in the manifest; a round with fewer than
`min_clients` updates ends the run and leaves the rounds before it as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedlora.config.train import TrainConfig
from fedlora.engines.arriving import ArrivingUpdates, LimitedUpdates, WaveStore
from fedlora.engines.cohorts import check_clients, choose_cohort, count_fewest
from fedlora.engines.private_run import PrivateRun
from fedlora.errors import TrainingError
from fedlora.federated.adapters import fingerprint, shapes_of
from fedlora.federated.error_meter import ErrorMeter
from fedlora.federated.limits import Limits
from fedlora.federated.measurement import Measurement, merge_waves
from fedlora.federated.modes import Mode, Wave
from fedlora.files import sha256_of_json
from fedlora.types import (
    AdapterState,
    ClientFailure,
    ClientId,
    ClientPool,
    ClientUpdate,
    RoundContext,
    RoundResult,
    ServerState,
    TrainTask,
    Updates,
)


class UpdateStore(WaveStore, Protocol):
    """Where updates and rounds are committed."""

    def begin_round(self, round_number: int) -> None: ...
    def find_kept(self, round_number: int, client_id: ClientId) -> ClientUpdate | None: ...
    def carry_forward(self, round_number: int, client_id: ClientId, accepted: int) -> None: ...
    def commit_round(
        self,
        round_number: int,
        global_adapter: AdapterState | None,
        state: ServerState | None,
        facts: Mapping[str, Any],
    ) -> Path: ...


class Standing(Protocol):
    """The last round of an interrupted run, and in which round each client was last accepted."""

    @property
    def number(self) -> int: ...
    @property
    def state(self) -> ServerState | None: ...
    @property
    def accepted(self) -> Mapping[ClientId, int]: ...
    @property
    def manifest(self) -> Mapping[str, Any]: ...


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
        private: PrivateRun | None = None,
    ) -> None:
        if config.is_private != (private is not None):
            raise ValueError("a run is private exactly when its configuration is")
        self.mode = mode
        self.pool = pool
        self.store = store
        self.config = config
        self.clients = tuple(pool.clients())
        self.expected = shapes_of(adapter)
        self.limits = Limits(config.max_update_norm, config.max_update_norm_ratio, config.max_client_weight)
        # what a task's id begins with: an update of another run answers none of this one's
        self._run_id = sha256_of_json(config.identity())
        check_clients(config, mode, self.clients)
        self._untrained = adapter
        self.state = mode.strategy.init(adapter, self.clients)
        self.accepted: dict[ClientId, int] = {}
        self.done = 0
        self.private = private
        self.spent: Mapping[str, Any] | None = None
        if start is not None:
            self.spent = start.manifest.get("privacy")
            self.state = start.state or self.state
            self.accepted = dict(start.accepted)
            self.done = start.number

    def rounds(self) -> Iterator[RoundResult]:
        """Every round of the run, each committed before it is yielded."""
        for number in range(self.done + 1, self.config.num_communication_rounds + 1):
            yield self._run_round(number)

    def _draw_cohort(self, number: int) -> tuple[ClientId, ...]:
        drawn = self.private.draw_cohort(self.clients, number) if self.private else None
        return choose_cohort(self.config, self.clients, number) if drawn is None else drawn

    def _run_round(self, number: int) -> RoundResult:
        config, cohort = self.config, self._draw_cohort(number)
        if self.private:
            self.private.check(self.spent, cohort, number)
        self.store.begin_round(number)
        done = _Done()
        waves = self.mode.waves(cohort, shuffle=config.seq_order == "shuffled", seed=config.seed, round_number=number)
        for index, wave in enumerate(waves):
            self._run_wave(RoundContext(number, index, self.clients, cohort), wave, done)
        self._check_quorum(number, done)
        global_adapter = self.mode.strategy.global_adapter(self.state)
        self._commit(number, cohort, global_adapter, done)
        measured, by_client = merge_waves(done.measured)
        records = [{**record, **by_client.get(record["client_id"], {})} for record in done.records]
        return RoundResult(number, global_adapter, records, done.failures, measured, self.spent)

    def _run_wave(self, context: RoundContext, wave: Wave, done: _Done) -> None:
        """Train one wave and aggregate what is usable of it; what became of everybody is added to `done`."""
        config = self.config
        if not wave:
            # a Poisson cohort of nobody is a round of noise
            self.state = self.mode.strategy.aggregate(self.state, self._hide([], context), context)
            return
        tasks = self._make_tasks(context, wave)
        kept = {task.client_id: update for task in tasks if (update := self._find_kept(task)) is not None}
        refuses_long = config.norm_action == "quarantine"
        arriving = ArrivingUpdates(
            self.pool,
            tasks,
            self.store,
            self.expected,
            kept,
            sends=self.mode.rule.sends,
            retries=config.client_retries,
            longest=config.max_update_norm if refuses_long else None,
        )
        limited = None
        if config.limits_clients and not refuses_long:
            starts = {task.client_id: task.download.adapter for task in tasks}
            limited = LimitedUpdates(arriving, starts, self.limits)
        meter = self._make_meter(tasks)
        updates = meter.watch(limited or arriving)
        self.state = self.mode.strategy.aggregate(self.state, self._hide(updates, context), context)
        arriving.finish()
        done.measured.append(meter.measure(self.mode.strategy.global_adapter(self.state)))
        changes = limited.changes if limited else {}
        for update in arriving.done:
            done.records.append({**record_of(update, context.wave), **changes.get(update.client_id, {})})
        done.limited.extend({"client_id": client, **change} for client, change in sorted(changes.items()))
        done.failures.extend(arriving.failures)

    def _hide(self, updates: Updates, context: RoundContext) -> Updates:
        if self.private is None:
            return updates
        download = self.mode.strategy.broadcast(self.state, self.clients[0], context.round)
        return self.private.hide(updates, download, context)

    def _make_meter(self, tasks: Sequence[TrainTask]) -> ErrorMeter:
        """Clients weigh in it as they do in what it measures: all the same where they are hidden behind noise."""
        is_weighted = self.mode.strategy.is_weighted and self.config.dp_noise_multiplier is None
        downloads = {task.client_id: task.download for task in tasks}
        return ErrorMeter(downloads, is_weighted=is_weighted, scaling=self.config.lora_scaling)

    def _check_quorum(self, number: int, done: _Done) -> None:
        fewest = count_fewest(self.config, self.mode)
        if len(done.records) >= fewest or not (done.records or done.failures):
            # nobody was asked: only a private cohort can be empty
            return
        reasons = "; ".join(f"client {failure.client_id}: {failure.reason}" for failure in done.failures)
        what = (
            f"{len(done.records)} usable updates of the {fewest} that a round needs"
            if fewest > 1
            else ("no client gave a usable update")
        )
        raise TrainingError(
            f"round {number}: {what}: {reasons}",
            hint="the rounds before it are intact: mend the cause and give the same command again, or lower "
            "--min_clients; a loss that is no number comes back until --local_learning_rate is lower, in a new run",
        )

    def _make_tasks(self, context: RoundContext, wave: Wave) -> list[TrainTask]:
        """One task per member; its id stands for the run, the place in it, the rows and what is sent."""
        tasks = []
        known: dict[int, str] = {}
        for client, rows_of in wave:
            download = self.mode.strategy.broadcast(self.state, client, context.round)
            accepted = self.accepted.get(client)
            # the same tensors mostly go to everybody, and are hashed once
            sent = [download.travels, download.trainable, download.shared]
            for name, group in {"": download.adapter, **download.extra}.items():
                if id(group) not in known:
                    known[id(group)] = fingerprint(group)
                sent.append(f"{name}:{known[id(group)]}")
            facts = [self._run_id, context.round, context.wave, client, rows_of, accepted, sent]
            tasks.append(
                TrainTask(sha256_of_json(facts), context.round, context.wave, client, rows_of, download, accepted)
            )
        return tasks

    def _find_kept(self, task: TrainTask) -> ClientUpdate | None:
        """What this client committed to the open round before an interruption, if it answers this very task."""
        kept = self.store.find_kept(task.round, task.client_id)
        return kept if kept is not None and kept.task_id == task.id else None

    def _commit(
        self,
        number: int,
        cohort: Sequence[ClientId],
        global_adapter: AdapterState | None,
        done: _Done,
    ) -> None:
        fresh = {int(record["client_id"]) for record in done.records}
        if global_adapter is None:
            for client, accepted in sorted(self.accepted.items()):
                if client not in fresh:
                    self.store.carry_forward(number, client, accepted)
        facts = {
            "cohort": list(cohort),
            "limited": done.limited,
            "quarantined": [failure.record() for failure in done.failures],
        }
        if self.private:
            self.spent = self.private.budget.spend(self.spent, sorted(fresh))
            facts["privacy"] = self.spent
        # a state that nothing has changed is where every run begins, and not kept
        is_new = bool(self.state.slots) or self.state.adapter is not self._untrained
        self.store.commit_round(number, global_adapter, self.state if is_new else None, facts)
        self.accepted.update(dict.fromkeys(fresh, number))


@dataclass
class _Done:
    """What has become of the members of a round so far."""

    records: list[Mapping[str, Any]] = field(default_factory=list)
    failures: list[ClientFailure] = field(default_factory=list)
    limited: list[Mapping[str, Any]] = field(default_factory=list)
    measured: list[Measurement] = field(default_factory=list)


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
