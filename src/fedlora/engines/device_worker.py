"""A separate process for one further device: it loads a base once and trains the tasks that it receives.

It reads the clients' files itself; tasks, memories and updates travel through a pipe as in `messages`.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from multiprocessing.connection import Connection

import torch

from fedlora import errors
from fedlora.config.train import TrainConfig
from fedlora.console import collect_lines
from fedlora.data.client_facts import ClientFile
from fedlora.engines.messages import pack, pack_outcome, pack_task, unpack, unpack_outcome, unpack_task
from fedlora.engines.simulation import SimulatedClients
from fedlora.engines.workbench import Workbench, make_workbench
from fedlora.federated.privacy.randomness import Secret
from fedlora.llm.layout import Layout, LayoutBook, Reduction
from fedlora.llm.local_training import Trainer
from fedlora.methods.choosing import choose_method
from fedlora.types import BaseDelta, ClientFailure, ClientId, ClientMemory, ClientUpdate, Step, TrainTask, no_step


class WorkerLostError(Exception):
    """A worker process is gone; its task can be done elsewhere, to the same bytes."""


class Worker:
    """One further device: a process that trains the tasks that it receives."""

    def __init__(
        self,
        device: str,
        config: TrainConfig,
        clients: Mapping[ClientId, ClientFile],
        layout: Layout,
        secret: Secret | None = None,
        place: str = "",
    ) -> None:
        self.device = device
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        options = (theirs, device, config, dict(clients), layout, torch.get_num_threads(), secret, place)
        self.process = context.Process(target=serve, args=options, daemon=True, name=f"fedlora {device}")
        # which additions to the base lie there already
        self._held: str | None = None
        self.process.start()
        theirs.close()

    def train(
        self, task: TrainTask, memory: ClientMemory, layout: Layout, on_step: Callable[[Step], None] = no_step
    ) -> tuple[ClientUpdate | ClientFailure, list[Reduction]]:
        """One task there, whose steps are passed on as they are heard of; WorkerLostError when the process ends; what
        went wrong in it is raised here."""
        base = task.download.base
        try:
            self.connection.send_bytes(pack_task(task, memory, {"layout": layout.record()}, held=self._held))
            self._held = base.sha256 if base is not None else self._held
            message = self._hear(on_step)
        except (EOFError, OSError) as error:
            self.process.join(5)
            raise WorkerLostError(
                f"the worker of device {self.device} ended (exit code {self.process.exitcode})"
            ) from error
        header, _ = unpack(message)
        if "error" in header:
            kind = getattr(errors, header["kind"], None)
            if kind is None:
                raise RuntimeError(f"device {self.device}: {header['kind']}: {header['error']}")
            raise kind(f"device {self.device}: {header['error']}", hint=header["hint"])
        outcome, more = unpack_outcome(message)
        return outcome, [Reduction(**reduction) for reduction in more["reductions"]]

    def _hear(self, on_step: Callable[[Step], None]) -> bytes:
        """The message that ends a task; those before it hold steps."""
        while True:
            message = self.connection.recv_bytes()
            header, _ = unpack(message)
            if "steps" not in header:
                return message
            for step in header["steps"]:
                on_step(Step(**step))

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.process.terminate()
        self.process.join()
        self.connection.close()


def serve(
    connection: Connection,
    device: str,
    config: TrainConfig,
    files: dict[ClientId, ClientFile],
    layout: Layout,
    threads: int,
    secret: Secret | None = None,
    place: str = "",
) -> None:
    """A worker's life: load, then train task by task until the pipe closes."""
    # an interrupt from the keyboard reaches every process; the first one decides what becomes of the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    bench: Workbench | None = None
    held: BaseDelta | None = None
    while True:
        try:
            task, memory, more = unpack_task(connection.recv_bytes(), held)
            held = task.download.base or held
        except (EOFError, OSError):
            return
        try:
            if bench is None:
                # the first process has said the same of the base
                with collect_lines():
                    bench = make_workbench(config, files, device=device, place=place, layout=layout)
            book = LayoutBook(Layout.from_record(more["layout"]))
            trainer = Trainer(bench.base, bench.lora, config, book, secret)
            rule, steps = choose_method(config).client, _StepMessages(connection)
            clients = SimulatedClients(trainer, rule, bench.examples, _Given(memory), on_step=steps.add)
            answer = _train(clients, task, book)
            steps.send()
        except Exception as error:  # whatever it is, the first process must hear of it
            if not isinstance(error, errors.FedloraError):
                traceback.print_exc()
            answer = pack({"error": str(error), "kind": type(error).__name__, "hint": getattr(error, "hint", "")}, {})
        connection.send_bytes(answer)


def _train(clients: SimulatedClients, task: TrainTask, book: LayoutBook) -> bytes:
    known = len(book.layout.reductions)
    outcome = clients.train_one(task)
    new = book.layout.reductions[known:]
    return pack_outcome(outcome, {"reductions": [vars(reduction) for reduction in new]})


class _StepMessages:
    """Steps on their way to the first process, at most a message a second."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._steps: list[Step] = []
        self._sent = time.monotonic()

    def add(self, step: Step) -> None:
        """One more; those of the last second are sent together."""
        self._steps.append(step)
        if time.monotonic() - self._sent > 1:
            self.send()

    def send(self) -> None:
        """Send what has gathered."""
        if self._steps:
            self.connection.send_bytes(pack({"steps": [asdict(step) for step in self._steps]}, {}))
        self._steps, self._sent = [], time.monotonic()


class _Given:
    """The memory that came with a task."""

    def __init__(self, memory: ClientMemory) -> None:
        self.memory = memory

    def read_memory(self, client_id: ClientId, accepted: int | None) -> ClientMemory:
        return self.memory
