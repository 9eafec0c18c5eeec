"""Simulated clients: one resident base model, adapters swapped in and out, one client after another.

A client that diverges is a failure of that client, not of the run. Failures of the machine (no
memory, no disk) are not caught here: they end the run, which keeps every committed round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from fedlora.errors import TrainingError
from fedlora.federated.adapters import difference_norm, fingerprint, num_bytes
from fedlora.federated.strategy import ClientRule
from fedlora.federated.validation import find_fault
from fedlora.llm.examples import Example
from fedlora.llm.local_training import Trained, Trainer
from fedlora.paths import POOLED
from fedlora.types import (
    AdapterState,
    ClientFailure,
    ClientId,
    ClientMemory,
    ClientUpdate,
    TrainTask,
)


class MemoryReader(Protocol):
    """Where a client's memory lies between its tasks."""

    def read_memory(self, client_id: ClientId, accepted: int | None) -> ClientMemory: ...


class ExampleReader(Protocol):
    """Who has something to train on, and a client's examples when its turn comes."""

    def clients(self) -> Sequence[ClientId]: ...
    def training(self, client_id: ClientId) -> list[Example]: ...


class SimulatedClients:
    """A ClientPool in this process; `data` gives a client's tokenised examples, which are held while it trains."""

    def __init__(
        self,
        trainer: Trainer,
        rule: ClientRule,
        data: ExampleReader,
        memories: MemoryReader,
        *,
        on_rows: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self.trainer = trainer
        self.rule = rule
        self.data = data
        self.memories = memories
        self.on_rows = on_rows

    def clients(self) -> Sequence[ClientId]:
        """Clients that have something to train on."""
        return self.data.clients()

    def train(self, tasks: Sequence[TrainTask]) -> Iterator[ClientUpdate | ClientFailure]:
        """One update or failure per task, in task order."""
        for task in tasks:
            yield self.train_one(task)

    def train_one(self, task: TrainTask) -> ClientUpdate | ClientFailure:
        """One client's update, or why there is none."""
        try:
            return self._train_one(task)
        except TrainingError as error:
            return ClientFailure(task.client_id, "diverged", f"{error} ({error.hint})")

    def _train_one(self, task: TrainTask) -> ClientUpdate | ClientFailure:
        examples = [example for client in task.rows_of for example in self.data.training(client)]
        memory = self.memories.read_memory(task.client_id, task.accepted)
        adapter: AdapterState = task.download.adapter
        trained: Trained | None = None
        start = adapter
        for phase in self.rule.phases(task.download, memory):
            start = phase.start
            trained = self.trainer.train(
                phase.start,
                examples,
                round_number=task.round,
                client_id=task.client_id,
                moments=memory.optimizer,
                on_rows=self.on_rows,
            )
            adapter = trained.adapter
            memory = replace(memory, optimizer=trained.moments or None)
        if trained is None:
            raise ValueError("a client rule without a phase trains nothing")
        if fault := find_fault(adapter, self.trainer.lora.shapes()):
            return ClientFailure(task.client_id, "diverged", f"client {task.client_id}: {fault}")
        upload, memory = self.rule.upload(adapter, memory)
        travels = task.client_id != POOLED and upload is not None
        return ClientUpdate(
            round=task.round,
            client_id=task.client_id,
            upload=upload,
            memory=memory,
            num_examples=len(examples),
            num_tokens=trained.num_tokens,
            num_steps=trained.num_steps,
            started_from=fingerprint(start),
            metrics={
                "loss": trained.loss,
                "num_response_tokens": trained.num_labels,
                "seconds": trained.seconds,
                "bytes_down": num_bytes(task.download.adapter) if travels else 0,
                "bytes_up": num_bytes(upload) if travels else 0,
                "update_norm": difference_norm(adapter, start),
                "wave": task.wave,
            },
        )
