"""Clients on several devices: this process trains on the first, one worker process on each of the others.

A free device takes the next task, updates are passed on in task order, and no device works more than a few tasks
ahead, so memory does not grow with the cohort. A worker that dies gives its task back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextvars import copy_context

from fedlora.console import say
from fedlora.engines.device_worker import Worker, WorkerLostError
from fedlora.engines.simulation import SimulatedClients
from fedlora.types import ClientFailure, ClientId, ClientUpdate, TrainTask

AHEAD = 2
"""Tasks per device that may be under way or finished beyond the one that is handed on next."""


class DeviceClients:
    """A ClientPool over this process's device and the workers'."""

    def __init__(
        self,
        local: SimulatedClients,
        workers: Sequence[Worker],
    ) -> None:
        self.local = local
        self.workers = list(workers)

    def clients(self) -> Sequence[ClientId]:
        """Clients that have something to train on."""
        return self.local.clients()

    def train(self, tasks: Sequence[TrainTask]) -> Iterator[ClientUpdate | ClientFailure]:
        """One update or failure per task, in task order."""
        desk = _Desk(len(tasks), AHEAD * (1 + len(self.workers)))
        feeders = [
            # in a copy of this context: what a worker's thread says goes where this thread's messages go
            threading.Thread(target=copy_context().run, args=(self._feed, worker, desk, tasks), daemon=True)
            for worker in self.workers
        ]
        for feeder in feeders:
            feeder.start()
        try:
            for index in range(len(tasks)):
                while not desk.is_done(index):
                    own = desk.take()
                    if own is None:
                        desk.wait_for(index)
                    else:
                        desk.put(own, self.local.train_one(tasks[own]))
                yield desk.hand_on(index)
        finally:
            desk.close()
        for feeder in feeders:
            feeder.join()

    def _feed(self, worker: Worker, desk: _Desk, tasks: Sequence[TrainTask]) -> None:
        """Keep one worker busy until there is nothing left to take."""
        book = self.local.trainer.book
        while (index := desk.take_or_wait()) is not None:
            task = tasks[index]
            try:
                memory = self.local.memories.read_memory(task.client_id, task.accepted)
                outcome, reductions = worker.train(task, memory, book.layout, self.local.on_step)
            except WorkerLostError as error:
                say(f"{error}; continuing without it")
                self.workers.remove(worker)
                desk.give_back(index)
                return
            except Exception as error:  # raised in the thread that waits for the result
                desk.fail(error)
                return
            for reduction in reductions:
                book.add(reduction)
            desk.put(index, outcome)


class _Desk:
    """Which tasks are open, under way and done, for the threads of one wave."""

    def __init__(self, size: int, window: int) -> None:
        self._open = list(range(size))
        self._window = window
        self._results: dict[int, ClientUpdate | ClientFailure] = {}
        self._next = 0
        self._error: Exception | None = None
        self._is_closed = False
        self._changed = threading.Condition()

    def take(self) -> int | None:
        """The first open task, unless it lies too far ahead."""
        with self._changed:
            return self._take()

    def take_or_wait(self) -> int | None:
        """The first open task, as soon as it may be begun; None when the wave is over."""
        with self._changed:
            while not self._is_closed:
                if (index := self._take()) is not None:
                    return index
                self._changed.wait()
        return None

    def put(self, index: int, outcome: ClientUpdate | ClientFailure) -> None:
        """A task is done."""
        with self._changed:
            self._results[index] = outcome
            self._changed.notify_all()

    def give_back(self, index: int) -> None:
        """A task is open again."""
        with self._changed:
            self._open = sorted([*self._open, index])
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """The wave cannot be finished."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def is_done(self, index: int) -> bool:
        """Whether a task's outcome is there; raises what a worker failed with."""
        with self._changed:
            if self._error is not None:
                raise self._error
            return index in self._results

    def wait_for(self, index: int) -> None:
        """Until a task is done, or there may be something to do."""
        with self._changed:
            if index not in self._results and self._error is None and not self._may_take():
                self._changed.wait()

    def hand_on(self, index: int) -> ClientUpdate | ClientFailure:
        """The outcome, which is forgotten here; later tasks may begin."""
        with self._changed:
            self._next = index + 1
            self._changed.notify_all()
            return self._results.pop(index)

    def close(self) -> None:
        """End: no further item is taken."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _take(self) -> int | None:
        return self._open.pop(0) if self._may_take() else None

    def _may_take(self) -> bool:
        return bool(self._open) and self._open[0] < self._next + self._window
