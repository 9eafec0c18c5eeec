"""Simulated clients: one resident base model, adapters swapped in and out, one client after another.

A fault of one client is a failure of that client, not of the run: a loss that is not a number, a file
that has changed, an unexpected exception, memory that ran out. Only the file system's refusal ends the run,
which keeps what it has committed.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from fedlora.console import say
from fedlora.data.client_names import shown_client
from fedlora.errors import FedloraError, OutOfMemoryError, StorageError, TrainingError
from fedlora.federated.adapters import difference_norm, fingerprint, num_bytes, pick_half, shapes_of
from fedlora.federated.base_delta import count_missed, layer_sizes
from fedlora.federated.validation import find_fault
from fedlora.llm.examples import Example
from fedlora.llm.local_training import Trained, Trainer
from fedlora.llm.memory import is_out_of_memory
from fedlora.methods.strategy import ClientRule
from fedlora.paths import POOLED
from fedlora.stopping import stop_if_asked
from fedlora.types import (
    ClientFailure,
    ClientId,
    ClientMemory,
    ClientUpdate,
    Download,
    FailureKind,
    LocalResult,
    Step,
    TrainTask,
    Upload,
    no_step,
)


class MemoryReader(Protocol):
    """The place of a client's memory between its tasks."""

    def read_memory(self, client_id: ClientId, accepted: int | None) -> ClientMemory: ...


class ExampleReader(Protocol):
    """The clients that have examples, their files, and a client's examples when its turn comes."""

    @property
    def names(self) -> Mapping[ClientId, str]: ...
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
        on_step: Callable[[Step], None] = no_step,
    ) -> None:
        self.trainer = trainer
        self.rule = rule
        self.data = data
        self.memories = memories
        self.on_step = on_step

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
        except (StorageError, OSError):
            raise
        except Exception as error:  # whatever it is, it is this client's: the others go on
            stop_if_asked()
            kind = _kind_of(error)
            if kind == "crashed":
                say(f"{shown_client(task.client_id, self.data.names)} failed:\n{traceback.format_exc()}")
            hint = f" ({error.hint})" if isinstance(error, FedloraError) and error.hint else ""
            return ClientFailure(task.client_id, kind, f"{_describe(error)}{hint}")

    def _train_one(self, task: TrainTask) -> ClientUpdate | ClientFailure:
        examples = [example for client in task.rows_of for example in self.data.training(client)]
        memory = self.memories.read_memory(task.client_id, task.accepted)
        phases = self.rule.phases(task.download, memory)
        parts: list[Trained] = []
        for part, phase in enumerate(phases, start=1):
            trained = self.trainer.train(
                phase,
                examples,
                round_number=task.round,
                client_id=task.client_id,
                moments=memory.optimizer,
                needs_gradient=self.rule.needs_gradient,
                on_step=lambda step, part=part: self.on_step(replace(step, part=part)),
            )
            if fault := find_fault(trained.adapter, shapes_of(phase.start)):
                return ClientFailure(task.client_id, "diverged", fault)
            parts.append(trained)
            memory = replace(memory, optimizer=trained.moments or None)
        results = [LocalResult(trained.adapter, trained.mean_gradient) for trained in parts]
        upload, memory = self.rule.upload(results, task.download, memory)
        # in `pooled` rows travel, and no adapters
        down, up = count_bytes(task.download, upload, task.accepted) if task.client_id != POOLED else (0, 0)
        return ClientUpdate(
            task_id=task.id,
            round=task.round,
            client_id=task.client_id,
            upload=upload.adapter if upload else None,
            extra=upload.extra if upload else {},
            memory=memory,
            num_examples=len(examples),
            # the budget is that of all phases, the rest is told of the one that the server hears of
            num_tokens=sum(trained.num_tokens for trained in parts),
            num_steps=sum(trained.num_steps for trained in parts),
            started_from=fingerprint(phases[0].start),
            base_sha256=task.download.base.sha256 if task.download.base is not None else None,
            metrics={
                "loss": parts[0].loss,
                "num_response_tokens": parts[0].num_labels,
                "seconds": sum(trained.seconds for trained in parts),
                "bytes_down": down,
                "bytes_up": up,
                "update_norm": difference_norm(parts[0].adapter, phases[0].start),
                "wave": task.wave,
                **({"loss_personal": parts[-1].loss} if len(parts) > 1 else {}),
            },
        )


def count_bytes(download: Download, upload: Upload | None, accepted: int | None = None) -> tuple[int, int]:
    """Bytes of tensors down and up.

    Of what was added to the base a client is sent what is new since round `accepted`, in which it took part last.
    """
    sent = upload or Upload({})
    down = num_bytes(pick_half(download.adapter, download.travels))
    if download.base is not None:
        sizes = layer_sizes(shapes_of(download.adapter))
        width = next(iter(download.adapter.values())).element_size()
        down += width * count_missed(download.base.links, sizes, accepted)
    extra_down, extra_up = (sum(map(num_bytes, part.extra.values())) for part in (download, sent))
    return down + extra_down, num_bytes(sent.adapter) + extra_up


def _kind_of(error: Exception) -> FailureKind:
    if isinstance(error, OutOfMemoryError) or is_out_of_memory(error):
        return "out_of_memory"
    if isinstance(error, TrainingError):
        return "diverged"
    return "data" if isinstance(error, FedloraError) else "crashed"


def _describe(error: Exception) -> str:
    if isinstance(error, FedloraError):
        return str(error)
    return f"{type(error).__name__}: {error}"
