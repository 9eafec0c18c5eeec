"""How far a run is, counted in the examples that it trains on: for the bar, and for who watches from elsewhere."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from fedlora.config.train import TrainConfig
from fedlora.console import Progress
from fedlora.federated.sampling import cohort_size
from fedlora.methods.choosing import LoadedMethod
from fedlora.runs.progress_file import ProgressFile
from fedlora.runs.step_log import StepLog
from fedlora.types import ClientFailure, ClientId, ClientPool, ClientUpdate, Step, TrainTask

EVERY_SECONDS = 1.0
"""How often the file is written."""
PACE_SECONDS = 60.0
"""Tokens per second are those of so long a time."""


@dataclass(frozen=True)
class _Work:
    """A client that trains; without steps it does so on another machine."""

    round: int
    step: int = 0
    steps: int = 0
    tokens: int = 0


class RunProgress(Progress):
    """Progress of a run whose rounds up to `done` are committed; `rows` are their lines in metrics.jsonl.

    An example counts as often as it is trained on. `sizes` are the examples of the clients that have some. `file` is
    where the progress is written for watchers, with the bytes that `memory` says; `steps` takes every step.
    """

    def __init__(
        self,
        config: TrainConfig,
        method: LoadedMethod,
        sizes: Sequence[int],
        *,
        done: int,
        rows: Iterable[Mapping[str, Any]],
        file: ProgressFile,
        memory: Callable[[], Mapping[str, int]],
        steps: StepLog | None = None,
    ) -> None:
        self._passes = config.local_num_epochs * method.num_trainings
        before = self._passes * sum(row["num_examples"] for row in rows if row["kind"] == "client")
        ahead = self._passes * round(sum(sizes) * _shares_ahead(config, method, len(sizes), done))
        label = f"train {config.exp_name} ({config.federation_mode})"
        super().__init__(label, before + max(1, ahead), "examples", done=before)
        self._file, self._memory, self._steps = file, memory, steps
        # workers of further devices report from threads of their own
        self._lock = threading.Lock()
        self._work: dict[ClientId, _Work] = {}
        self._tokens = 0
        self._pace: deque[tuple[float, int]] = deque()
        self._written = 0.0

    def __enter__(self) -> Self:
        super().__enter__()
        self._publish()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._steps:
            self._steps.close()
        super().__exit__(kind, error, trace)

    def step(self, step: Step) -> None:
        """Count a step of a client that trains on this machine."""
        if self._steps:
            self._steps.add(step)
        with self._lock:
            before = self._work.get(step.client_id, _Work(step.round))
            tokens = before.tokens + step.num_tokens
            self._work[step.client_id] = _Work(step.round, step.step, step.steps, tokens)
            self._tokens += step.num_tokens
            self.advance(step.num_examples)
            self._publish()

    def begin(self, task: TrainTask) -> None:
        """A client was given its task."""
        with self._lock:
            self._work[task.client_id] = _Work(task.round)
            self._publish()

    def count(self, update: ClientUpdate, is_kept: bool) -> None:
        """Show the loss of an update; one that was kept from before an interruption counts as done by then."""
        self.note = f"loss {update.metrics['loss']:.3f}"
        if is_kept:
            self.skip(update.num_examples * self._passes)

    def watched(self, pool: ClientPool) -> ClientPool:
        """The same pool, whose clients count as at work until their outcome is there."""
        return _WatchedPool(pool, self._end)

    def _end(self, outcome: ClientUpdate | ClientFailure) -> None:
        with self._lock:
            work = self._work.pop(outcome.client_id, _Work(0))
            if isinstance(outcome, ClientUpdate):
                # of a client elsewhere no steps were heard of
                self._tokens += max(0, outcome.num_tokens - work.tokens)
            self._publish()

    def _publish(self) -> None:
        """Write the file, unless that was done a moment ago."""
        now = time.monotonic()
        if now - self._written < EVERY_SECONDS:
            return
        self._written = now
        self._pace.append((now, self._tokens))
        while now - self._pace[0][0] > PACE_SECONDS:
            self._pace.popleft()
        began, before = self._pace[0]
        passed = now - began
        facts = {
            "done": self.done,
            "total": self.total,
            "seconds_left": self.seconds_left(),
            "tokens_per_second": (self._tokens - before) / passed if passed and self._tokens > before else None,
            "at_work": [
                {"client_id": client, "round": work.round, "step": work.step, "steps": work.steps}
                for client, work in sorted(self._work.items())
            ],
            "memory": dict(self._memory()),
            "written": time.time(),
        }
        self._file.write(facts)


class _WatchedPool:
    """A ClientPool that reports every outcome before it is passed on."""

    def __init__(self, pool: ClientPool, on_end: Callable[[ClientUpdate | ClientFailure], None]) -> None:
        self.pool = pool
        self.on_end = on_end

    def clients(self) -> Sequence[ClientId]:
        return self.pool.clients()

    def train(self, tasks: Sequence[TrainTask]) -> Iterator[ClientUpdate | ClientFailure]:
        for outcome in self.pool.train(tasks):
            self.on_end(outcome)
            yield outcome


def _shares_ahead(config: TrainConfig, method: LoadedMethod, clients: int, done: int) -> float:
    """How often the remaining rounds train on everybody's examples, about: cohorts are drawn round by round."""
    share = 1.0
    if clients and config.client_selection_strategy != "all":
        share = cohort_size(config.client_selection_frac, clients) / clients
    ahead = range(done + 1, config.num_communication_rounds + 1)
    return sum(1.0 if method.server.asks_everybody(number) else share for number in ahead)
