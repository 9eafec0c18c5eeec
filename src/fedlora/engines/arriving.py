"""The updates of one wave on their way from the clients to the strategy: checked, kept, handed on in order.

Nothing a client sends is used before `find_update_fault` has looked at it, and one bad answer costs only that client
its round. Only failures of the infrastructure are retried, because a seeded client
repeats all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Protocol

from fedlora.console import say
from fedlora.data.client_names import shown_client
from fedlora.federated.adapters import Shapes, difference_norm
from fedlora.federated.limits import Limits, cap_counts, clip_update
from fedlora.federated.ranks import cut_like
from fedlora.federated.validation import find_update_fault, one_line
from fedlora.types import (
    AdapterState,
    ClientFailure,
    ClientId,
    ClientMemory,
    ClientPool,
    ClientUpdate,
    TrainTask,
    Updates,
)


class WaveStore(Protocol):
    """Where the updates of an open round lie."""

    def keep_update(self, update: ClientUpdate, adapter: AdapterState | None) -> None: ...
    def updates(self, round_number: int, clients: Sequence[ClientId]) -> Updates: ...


class ArrivingUpdates:
    """The updates of one wave, trained as they are asked for: `aggregate` sees each one while it is in memory.

    The first iteration pulls the pool, keeps every update in the store and hands it on in client-id order, so a
    strategy that sums holds one adapter and its sum and no file is read back. An update that arrives before its turn is
    read from the store when its turn comes; so are all of them in later iterations. What was `kept` before an
    interruption is not trained again. An update longer than `longest` is refused, and unless the caller clips it
    (`is_clipped`), one whose products could overflow.
    """

    def __init__(
        self,
        pool: ClientPool,
        tasks: Sequence[TrainTask],
        store: WaveStore,
        expected: Shapes,
        kept: Mapping[ClientId, ClientUpdate] | None = None,
        *,
        sends: Sequence[str] = (),
        may_be_smaller: bool = False,
        retries: int = 0,
        longest: float | None = None,
        keeps: Shapes | None = None,
        is_clipped: bool = False,
        files: Mapping[ClientId, str] = MappingProxyType({}),
        on_update: Callable[[ClientUpdate], None] = lambda update: None,
    ) -> None:
        self._kept: dict[ClientId, ClientUpdate] = dict(kept or {})
        self._downloads = {task.client_id: task.download.adapter for task in tasks}
        self._open = {task.client_id: task for task in tasks if task.client_id not in self._kept}
        self._outcomes = self._ask(pool, retries)
        self._store = store
        self._expected = expected
        self._sends = sends
        self._may_be_smaller = may_be_smaller
        self._longest = longest
        self._keeps = keeps
        self._is_clipped = is_clipped
        self._files = files
        self._on_update = on_update
        self._round = tasks[0].round
        self._ahead = sorted(task.client_id for task in tasks)
        self._is_begun = False
        # why an open task has no update so far
        self._faults: dict[ClientId, ClientFailure] = {}
        self._failures: dict[ClientId, ClientFailure] = {}

    @property
    def done(self) -> list[ClientUpdate]:
        """What has arrived so far, without tensors, in client-id order."""
        return [update for _, update in sorted(self._kept.items())]

    @property
    def failures(self) -> list[ClientFailure]:
        """Who is left out so far, in client-id order."""
        return [failure for _, failure in sorted(self._failures.items())]

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
        """Train the clients that have not been asked yet."""
        self._is_begun = True
        for _ in self._arrive():
            pass

    def _arrive(self) -> Iterator[ClientUpdate]:
        yield from self._hand_on_stored()
        for outcome in self._outcomes:
            update = self._admit(outcome)
            del outcome
            if update is not None:
                self._store.keep_update(update, self._complete(update))
                # without its tensors: those of the update that is handed on are the only ones held
                self._kept[update.client_id] = replace(update, upload=None, memory=ClientMemory(), extra={})
                self._on_update(self._kept[update.client_id])
                if self._ahead[0] == update.client_id:
                    self._ahead.pop(0)
                    yield update
            del update
            yield from self._hand_on_stored()
        yield from self._hand_on_stored()

    def _complete(self, update: ClientUpdate) -> AdapterState | None:
        """The client's whole adapter: what it keeps, or what it was sent with what it sends in its place; None when it
        is another machine's and stays there."""
        if update.adapter_stays:
            return None
        if update.memory.adapter is not None:
            return update.memory.adapter
        return {**self._downloads[update.client_id], **(update.upload or {})}

    def _hand_on_stored(self) -> Iterator[ClientUpdate]:
        """The kept updates whose turn has come."""
        while self._ahead and self._ahead[0] in self._kept:
            yield from self._store.updates(self._round, [self._ahead.pop(0)])

    def _ask(self, pool: ClientPool, retries: int) -> Iterator[ClientUpdate | ClientFailure]:
        """The pool's answers; a lost client is asked again, then excluded."""
        for attempt in range(retries + 1):
            tasks = list(self._open.values())
            if attempt:
                tasks = [task for task in tasks if self._fault_of(task).is_retryable]
                for task in tasks:
                    say(f"{shown_client(task.client_id, self._files)} is asked again: {self._fault_of(task).reason}")
            if tasks:
                yield from pool.train(tasks)
        for task in list(self._open.values()):
            self._give_up(self._fault_of(task))

    def _admit(self, outcome: ClientUpdate | ClientFailure) -> ClientUpdate | None:
        """The update if it answers an open task and can be used; what cannot is recorded as the client's failure."""
        task = self._open.get(outcome.client_id)
        if task is None:
            say(f"round {self._round}: an answer of client {outcome.client_id!r} that was not asked for is ignored")
            return None
        if isinstance(outcome, ClientFailure):
            self._faults[task.client_id] = outcome
            if not outcome.is_retryable:
                self._give_up(outcome)
            return None
        reason = self._find_fault(outcome, task)
        if reason is None:
            outcome = _measure(outcome, task)
            reason = self._find_length_fault(outcome)
        if reason is None:
            del self._open[task.client_id]
            return outcome
        failure = ClientFailure(task.client_id, "invalid", reason)
        if outcome.task_id == task.id:
            self._give_up(failure)
        else:
            # an old or repeated message: the client's own answer may still come
            self._faults[task.client_id] = failure
        return None

    def _find_fault(self, update: ClientUpdate, task: TrainTask) -> str | None:
        try:
            fault = find_update_fault(
                update,
                task,
                self._expected,
                self._sends,
                may_be_smaller=self._may_be_smaller,
                keeps=self._keeps,
                is_clipped=self._is_clipped,
            )
        except Exception as error:  # whatever an update is, it costs its client the round and nobody else anything
            return f"it cannot be checked ({type(error).__name__})"
        return one_line(fault) if fault else None

    def _find_length_fault(self, update: ClientUpdate) -> str | None:
        if self._longest is None or update.upload is None:
            return None
        norm = update.metrics["update_norm"]
        return f"its norm {norm:.6g} is above max_update_norm={self._longest:g}" if norm > self._longest else None

    def _fault_of(self, task: TrainTask) -> ClientFailure:
        return self._faults.get(task.client_id) or ClientFailure(task.client_id, "lost", "it did not answer")

    def _give_up(self, failure: ClientFailure) -> None:
        self._failures[failure.client_id] = failure
        self._ahead.remove(failure.client_id)
        del self._open[failure.client_id]


class MeasuredUpdates(Updates, Protocol):
    """Updates whose counts and norms are known before they are handed on."""

    @property
    def done(self) -> list[ClientUpdate]: ...
    def finish(self) -> None: ...


class LimitedUpdates:
    """The same updates as a strategy may use them: none longer and none heavier than the limits allow.

    What lies in the store stays as the client sent it; `changes` says what was done to whom.
    """

    def __init__(self, updates: MeasuredUpdates, starts: Mapping[ClientId, AdapterState], limits: Limits) -> None:
        self._updates = updates
        self._starts = starts
        self._limits = limits
        self.changes: dict[ClientId, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._updates)

    def __iter__(self) -> Iterator[ClientUpdate]:
        if self._limits.norm_ratio is not None or self._limits.weight < 1:
            # what is allowed depends on everybody
            self._updates.finish()
        done = self._updates.done
        counts = cap_counts({update.client_id: update.num_examples for update in done}, self._limits.weight)
        longest = self._limits.longest([update.metrics["update_norm"] for update in done])
        for update in self._updates:
            yield self._limit(update, longest, counts.get(update.client_id, update.num_examples))

    def _limit(self, update: ClientUpdate, longest: float, counted_as: int) -> ClientUpdate:
        sent = update.upload or {}
        upload, norm = clip_update(cut_like(self._starts[update.client_id], sent), sent, longest)
        change: dict[str, Any] = {}
        if norm > longest:
            change |= {"norm": norm, "clipped_to": longest}
        if counted_as != update.num_examples:
            change |= {"num_examples": update.num_examples, "counted_as": counted_as}
        if change:
            self.changes[update.client_id] = change
        return replace(update, upload=upload, num_examples=counted_as)


def _measure(update: ClientUpdate, task: TrainTask) -> ClientUpdate:
    """The update with the norm of what it sends measured here: a norm that the client reports would bound nothing."""
    if update.upload is None:
        return update
    # of a client that gave directions up, how far the others moved
    norm = difference_norm(update.upload, cut_like(task.download.adapter, update.upload))
    return replace(update, metrics={**update.metrics, "update_norm": norm})
