"""The one federated loop, a generator of finished rounds: in each wave `aggregate` pulls the clients' training.

A strategy iterates over the updates of its wave, and each client trains when its update is asked for. The loop knows
neither how clients train nor where: a pool does that, and a store keeps what they send. A client without a usable
update is left out of its round, with the reason in the manifest; a round with fewer than `min_clients` updates ends
the run and leaves the rounds before it as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from fedlora.config.train import TrainConfig
from fedlora.data.client_names import shown_client
from fedlora.engines.aggregates import check_finite
from fedlora.engines.arriving import ArrivingUpdates, LimitedUpdates, WaveStore
from fedlora.engines.cohorts import check_clients, choose_cohort, count_fewest
from fedlora.engines.private_run import PrivateRun
from fedlora.errors import TrainingError
from fedlora.federated.adapters import fingerprint, shapes_of
from fedlora.federated.base_delta import add_increment
from fedlora.federated.error_meter import ErrorMeter
from fedlora.federated.limits import Limits
from fedlora.federated.measurement import Measurement, merge_waves
from fedlora.federated.ranks import rank_in, shapes_at
from fedlora.files import sha256_of_json
from fedlora.methods.choosing import LoadedMethod, Wave
from fedlora.plain_text import counted
from fedlora.runs.base_chain import describe_additions, measure_additions
from fedlora.runs.standing import Standing
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


class FederatedRun:
    """State of one run between its rounds.

    `on_update` is called with every usable update, and with whether it was stored before an interruption.
    """

    def __init__(
        self,
        method: LoadedMethod,
        pool: ClientPool,
        store: UpdateStore,
        config: TrainConfig,
        adapter: AdapterState,
        *,
        start: Standing | None = None,
        private: PrivateRun | None = None,
        files: Mapping[ClientId, str] = MappingProxyType({}),
        on_update: Callable[[ClientUpdate, bool], None] = lambda update, is_kept: None,
    ) -> None:
        if config.is_private != (private is not None):
            raise ValueError("a run is private exactly when its configuration is")
        self.method = method
        self.on_update = on_update
        self.pool = pool
        self.store = store
        self.config = config
        self.files = files
        self.clients = tuple(pool.clients())
        self.expected = shapes_of(adapter)
        times = method.client.own_ranks
        self.keeps = shapes_at(self.expected, times * rank_in(self.expected)) if times > 1 else None
        self.limits = Limits(config.max_update_norm, config.max_update_norm_ratio, config.max_client_weight)
        # what a task's id begins with: an update of another run answers none of this one's
        self._run_id = sha256_of_json(config.identity())
        check_clients(config, method, self.clients)
        self._untrained = adapter
        self.state = method.server.init(adapter, self.clients)
        if self.state.base is not None and not method.adds_to_base:
            raise ValueError(f"{method.name} adds to the base, and its row does not say so")
        self.accepted: dict[ClientId, int] = {}
        self.done = 0
        self.private = private
        self.spent: Mapping[str, Any] | None = None
        if start is not None:
            self.spent = start.manifest.privacy
            self.state = start.state or self.state
            self.accepted = dict(start.accepted)
            self.done = start.number

    def rounds(self) -> Iterator[RoundResult]:
        """Every round of the run, each committed before it is yielded."""
        for number in range(self.done + 1, self.config.num_communication_rounds + 1):
            yield self._run_round(number)

    def _draw_cohort(self, number: int) -> tuple[ClientId, ...]:
        drawn = self.private.draw_cohort(self.clients, number) if self.private else None
        return choose_cohort(self.config, self.method, self.clients, number) if drawn is None else drawn

    def _describe(self, number: int, wave: int, cohort: Sequence[ClientId]) -> RoundContext:
        config = self.config
        return RoundContext(number, wave, self.clients, cohort, config.seed, config.lora_scaling)

    def _run_round(self, number: int) -> RoundResult:
        config, cohort = self.config, self._draw_cohort(number)
        if self.private:
            self.private.check(self.spent, cohort, number)
        before = self.state.base
        self.store.begin_round(number)
        done = _Done()
        waves = self.method.waves(cohort, shuffle=config.seq_order == "shuffled", seed=config.seed, round_number=number)
        for index, wave in enumerate(waves):
            self._run_wave(self._describe(number, index, cohort), wave, done)
        self._check_quorum(number, done)
        export = self.method.server.export(self.state, config.lora_scaling)
        check_finite(number, export.adapter or {}, self.state)
        base_facts = describe_additions(before, self.state.base, export)
        self._commit(number, cohort, export.adapter, done, base_facts)
        global_adapter = self.method.server.global_adapter(self.state)
        measured, by_client = merge_waves(done.measured)
        records = [{**record, **by_client.get(record["client_id"], {})} for record in done.records]
        metrics = {**measured, **self.state.notes, **measure_additions(base_facts)}
        return RoundResult(number, global_adapter, records, done.failures, metrics, self.spent, self.state.base)

    def _run_wave(self, context: RoundContext, wave: Wave, done: _Done) -> None:
        """Train one wave and aggregate what is usable of it; the outcome of each client is added to `done`."""
        config = self.config
        if not wave:
            # a Poisson cohort of nobody is a round of noise
            self.state = self.method.server.aggregate(self.state, self._hide([], context), context)
            return
        tasks = self._make_tasks(context, wave)
        kept = {task.client_id: update for task in tasks if (update := self._find_kept(task)) is not None}
        for update in kept.values():
            self.on_update(update, True)
        refuses_long = config.norm_action == "quarantine"
        # what nobody sends needs no limit
        clips = config.limits_clients and not refuses_long and tasks[0].download.shared is not None
        arriving = ArrivingUpdates(
            self.pool,
            tasks,
            self.store,
            self.expected,
            kept,
            sends=self.method.client.sends,
            may_be_smaller=self.method.client.sends_smaller,
            retries=config.client_retries,
            longest=config.max_update_norm if refuses_long else None,
            keeps=self.keeps,
            is_clipped=clips and bool(config.max_update_norm or config.max_update_norm_ratio),
            files=self.files,
            on_update=lambda update: self.on_update(update, False),
        )
        limited = None
        if clips:
            starts = {task.client_id: task.download.adapter for task in tasks}
            limited = LimitedUpdates(arriving, starts, self.limits)
        meter, before = self._make_meter(tasks), self.state.base
        updates = meter.watch(limited or arriving)
        self.state = self.method.server.aggregate(self.state, self._hide(updates, context), context)
        arriving.finish()
        made = self.method.server.global_adapter(self.state)
        if made is not None:
            made = add_increment(made, before, self.state.base, config.lora_scaling)
        done.measured.append(meter.measure(made))
        changes = limited.changes if limited else {}
        for update in arriving.done:
            done.records.append({**record_of(update, context.wave), **changes.get(update.client_id, {})})
        done.limited.extend({"client_id": client, **change} for client, change in sorted(changes.items()))
        done.failures.extend(arriving.failures)

    def _hide(self, updates: Updates, context: RoundContext) -> Updates:
        if self.private is None:
            return updates
        download = self.method.server.broadcast(self.state, self.clients[0], context.round)
        return self.private.hide(updates, download, context)

    def _make_meter(self, tasks: Sequence[TrainTask]) -> ErrorMeter:
        """Clients weigh in it as in the aggregate: all the same in a run with client-level privacy."""
        is_hidden = self.config.dp_noise_multiplier is not None
        weight_of = (lambda update: 1.0) if is_hidden else self.method.server.weight_of
        downloads = {task.client_id: task.download for task in tasks}
        return ErrorMeter(downloads, weight_of=weight_of, scaling=self.config.lora_scaling)

    def _check_quorum(self, number: int, done: _Done) -> None:
        fewest = count_fewest(self.config, self.method)
        if len(done.records) >= fewest or not (done.records or done.failures):
            # nobody was asked: only a private cohort can be empty
            return
        reasons = "; ".join(f"{shown_client(one.client_id, self.files)}: {one.reason}" for one in done.failures)
        what = (
            f"{counted(len(done.records), 'usable update')} of the {fewest} that a round needs"
            if fewest > 1
            else ("no client gave a usable update")
        )
        raise TrainingError(
            f"round {number}: {what}: {reasons}",
            hint="the rounds before it are intact: fix the cause and give the same command again, or lower "
            "--min_clients; a loss that is not a number recurs until --local_learning_rate is lower, in a new run",
        )

    def _make_tasks(self, context: RoundContext, wave: Wave) -> list[TrainTask]:
        """One task per member; its id stands for the run, the place in it, the rows and what is sent."""
        tasks = []
        known: dict[int, str] = {}
        for client, rows_of in wave:
            download = self.method.server.broadcast(self.state, client, context.round)
            accepted = self.accepted.get(client)
            # the same tensors mostly go to everybody, and are hashed once
            sent: list[str | None] = [download.travels, download.trainable, download.shared]
            for name, group in {"": download.adapter, **download.extra}.items():
                if id(group) not in known:
                    known[id(group)] = fingerprint(group)
                sent.append(f"{name}:{known[id(group)]}")
            if download.base is not None and download.base.links:
                sent.append(f"base:{download.base.sha256}")
            facts = [self._run_id, context.round, context.wave, client, rows_of, accepted, sent]
            tasks.append(
                TrainTask(sha256_of_json(facts), context.round, context.wave, client, rows_of, download, accepted)
            )
        return tasks

    def _find_kept(self, task: TrainTask) -> ClientUpdate | None:
        """The update that this client committed to the open round before an interruption, if it answers this task."""
        kept = self.store.find_kept(task.round, task.client_id)
        return kept if kept is not None and kept.task_id == task.id else None

    def _commit(
        self,
        number: int,
        cohort: Sequence[ClientId],
        adapter: AdapterState | None,
        done: _Done,
        base_facts: Mapping[str, Any],
    ) -> None:
        fresh = {int(record["client_id"]) for record in done.records}
        if self.method.keeps_personal_model:
            for client, accepted in sorted(self.accepted.items()):
                if client not in fresh:
                    self.store.carry_forward(number, client, accepted)
        facts = {
            "cohort": list(cohort),
            "limited": done.limited,
            "quarantined": [failure.record() for failure in done.failures],
            **({"notes": dict(self.state.notes)} if self.state.notes else {}),
            **base_facts,
        }
        if self.private:
            self.spent = self.private.spend(self.spent, fresh, done.failures)
            facts["privacy"] = self.spent
        # a state that nothing has changed is where every run begins, and not kept
        is_new = bool(self.state.slots) or self.state.adapter is not self._untrained
        self.store.commit_round(number, adapter, self.state if is_new else None, facts)
        self.accepted.update(dict.fromkeys(fresh, number))


@dataclass
class _Done:
    """The outcomes of a round's clients so far."""

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
