"""The one federated loop: cohort, waves, aggregation, commit; a generator of finished rounds.

It knows neither how clients train nor where: a pool does that, and a store keeps what they send. A
client without a usable update is left out of its round; a round without any update ends the run and
leaves the rounds before it as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fedlora.config.train import TrainConfig
from fedlora.errors import TrainingError
from fedlora.federated.modes import Mode, Wave
from fedlora.federated.sampling import draw_cohort
from fedlora.types import (
    AdapterState,
    ClientFailure,
    ClientId,
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
    def updates(self, round_number: int, clients: Sequence[ClientId]) -> Updates: ...
    def carry_forward(self, round_number: int, client_id: ClientId, accepted: int) -> None: ...
    def commit_round(
        self, round_number: int, global_adapter: AdapterState | None, facts: Mapping[str, Any]
    ) -> Path: ...


class FederatedRun:
    """State of one run between its rounds."""

    def __init__(
        self, mode: Mode, pool: ClientPool, store: UpdateStore, config: TrainConfig, adapter: AdapterState
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

    def rounds(self) -> Iterator[RoundResult]:
        """Every round of the run, each committed before it is yielded."""
        for number in range(1, self.config.num_communication_rounds + 1):
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
            done = self._run_wave(number, index, wave, records, failures)
            context = RoundContext(number, index, self.clients, cohort)
            self.state = self.mode.strategy.aggregate(self.state, self.store.updates(number, done), context)
        if not records:
            reasons = "; ".join(f"client {failure.client_id}: {failure.reason}" for failure in failures)
            raise TrainingError(
                f"round {number}: no client gave a usable update: {reasons}",
                hint="the rounds before it are intact; fix the cause and start again under another exp_name",
            )
        global_adapter = self.mode.strategy.global_adapter(self.state)
        self._commit(number, cohort, global_adapter, records, failures)
        return RoundResult(number, global_adapter, records, failures)

    def _run_wave(
        self,
        number: int,
        index: int,
        wave: Wave,
        records: list[Mapping[str, Any]],
        failures: list[ClientFailure],
    ) -> list[ClientId]:
        tasks = [
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
        done = []
        for outcome in self.pool.train(tasks):
            if isinstance(outcome, ClientFailure):
                failures.append(outcome)
                continue
            self.store.keep_update(outcome)
            records.append(_record(outcome, index))
            done.append(outcome.client_id)
        return done

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


def _record(update: ClientUpdate, wave: int) -> dict[str, Any]:
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
