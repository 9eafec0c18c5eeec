"""Aggregate the committed rounds of a run otherwise: without a client, with other weights, by another server.

Every round starts from what the round before it really left, since that is what its updates were trained from: an
answer holds for one round, not for a run that would have gone another way. A server that the run did not have keeps the
state that it computed from the rounds before, along the actual path; the run's own server starts from its stored state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedlora.config.train import TrainConfig
from fedlora.engines.arriving import LimitedUpdates
from fedlora.errors import StorageError, UsageError
from fedlora.federated.adapters import layer_pairs
from fedlora.federated.limits import Limits
from fedlora.federated.products import norm_of_sum, stack_rows
from fedlora.llm.adapter_files import SAFETENSORS_NAME, load_adapter
from fedlora.methods.choosing import choose_method
from fedlora.methods.combinations import why_not_reaggregated, why_not_server_of
from fedlora.methods.row import Method
from fedlora.methods.table import METHODS
from fedlora.paths import client_name
from fedlora.plain_text import counted
from fedlora.runs.checking import find_round_fault, read_manifest
from fedlora.runs.reader import RunReader
from fedlora.runs.run_records import Manifest
from fedlora.runs.server_state import load_state
from fedlora.runs.start_adapter import read_start
from fedlora.types import AdapterState, ClientId, ClientMemory, ClientUpdate, RoundContext, ServerState, Updates


@dataclass(frozen=True)
class Change:
    """Clients to leave out, and weights: by client, or `examples`, `tokens`, `uniform`; None: those of the run."""

    leave_out: frozenset[ClientId]
    weights: Mapping[ClientId, int] | str | None

    def count(self, update: ClientUpdate) -> int:
        """What an update weighs."""
        if isinstance(self.weights, Mapping):
            return self.weights[update.client_id]
        return {"uniform": 1, "tokens": update.num_tokens}.get(self.weights or "examples", update.num_examples)


@dataclass(frozen=True)
class Outcome:
    """One round: what it really made, what it would have made, and of what; `distance` is the length of the
    difference of the two products in lengths of the actual round's step, None where that step is zero."""

    round: int
    actual: AdapterState
    adapter: AdapterState
    counts: Mapping[ClientId, int]
    distance: float | None
    source: Mapping[str, Any]


class WhatIf:
    """The rounds of one run under one or more changes; the server of `target` aggregates. `recorded` are the
    hyper-parameters of the run."""

    def __init__(
        self,
        source: TrainConfig,
        target: TrainConfig,
        changes: Sequence[Change],
        reader: RunReader,
        recorded: Mapping[str, Any] | None = None,
    ) -> None:
        check_methods(source.method, target.method)
        # a server that the run had goes on from its own memory
        self.is_own = source.federation_mode == target.federation_mode
        self.actual = choose_method(source, recorded)
        self.method = choose_method(target, recorded if self.is_own else None)
        self.strategy = self.method.server
        weights = changes[0].weights
        if weights is not None and not self.method.weighs_rows:
            raise UsageError(
                f"federation_mode={target.federation_mode} gives every client the same weight",
                hint="leave --weights out",
            )
        if isinstance(weights, Mapping) and target.max_client_weight < 1:
            raise UsageError(
                "weights of single clients and the run's max_client_weight contradict each other",
                hint="give examples, tokens or uniform",
            )
        self.source, self.target, self.changes, self.reader = source, target, changes, reader
        self.check_rounds()

    def check_rounds(self) -> None:
        """UsageError for a round with fewer updates than the server needs."""
        for number in self.reader.paths.committed_rounds():
            sent = {update.client_id for update in self.reader.describe_updates(number)}
            for change in self.changes:
                left = len(sent - change.leave_out)
                fault = self.strategy.find_cohort_fault(left) if left else None
                if left < self.strategy.fewest_clients > 1:
                    fault = f"it needs {counted(self.strategy.fewest_clients, 'update')} and has {left}"
                if fault:
                    without = f" without client {', '.join(map(str, sorted(change.leave_out)))}"
                    raise UsageError(
                        f"federation_mode={self.target.federation_mode}, round {number}"
                        f"{without if change.leave_out else ''}: {fault}",
                        hint="leave fewer clients out, change the method's own flags, or choose another method",
                    )

    def rounds(self, ids: Sequence[ClientId]) -> Iterator[tuple[Outcome, ...]]:
        """The outcome of every change, round by round; StorageError when a file that a round needs is damaged."""
        slots: list[Mapping[str, AdapterState]] = []
        before: Manifest | None = None
        for number in self.reader.paths.committed_rounds():
            folder = self.reader.paths.round_folder(number)
            manifest = read_manifest(folder)
            if (fault := find_round_fault(folder, number)) or manifest is None:
                raise StorageError(str(fault), hint="restore the file from a copy; `fedlora verify` finds all faults")
            if manifest.parent_sha256 != (before.sha256 if before else None):
                raise StorageError(
                    f"{folder} does not stand on the round before it", hint="`fedlora verify` finds all faults"
                )
            start = self._read_start(number, ids)
            actual = load_adapter(folder / SAFETENSORS_NAME, self.reader.shapes)
            slots = slots or [self.strategy.init(start.adapter, ids).slots] * len(self.changes)
            outcomes, before = [], manifest
            for index, change in enumerate(self.changes):
                state = start if self.is_own else replace(start, slots=slots[index])
                outcome, slots[index] = self._run(change, state, actual, ids, manifest)
                outcomes.append(outcome)
            yield tuple(outcomes)

    def _read_start(self, number: int, ids: Sequence[ClientId]) -> ServerState:
        """What the round before left in the run itself."""
        left = load_state(self.reader.paths.round_folder(number - 1), self.reader.shapes) if number > 1 else None
        return left or self.actual.server.init(read_start(self.reader.paths, self.reader.shapes, self.source), ids)

    def _run(
        self, change: Change, state: ServerState, actual: AdapterState, ids: Sequence[ClientId], manifest: Manifest
    ) -> tuple[Outcome, Mapping[str, AdapterState]]:
        """One round under one change, and the state of the server after it."""
        number = manifest.round
        chosen = ChosenUpdates(self.reader, number, change, None if self.is_own else state.adapter)
        updates: Updates = chosen
        if self.target.limits_clients and self.target.norm_action == "clip":
            limits = Limits(
                self.target.max_update_norm, self.target.max_update_norm_ratio, self.target.max_client_weight
            )
            updates = LimitedUpdates(chosen, {update.client_id: state.adapter for update in chosen.done}, limits)
        cohort = [client for client in manifest.cohort if client not in change.leave_out]
        after = self.strategy.aggregate(state, updates, RoundContext(number, 0, ids, cohort))
        made = self.strategy.global_adapter(after)
        if made is None:
            raise UsageError(f"federation_mode={self.target.federation_mode} leaves no global model")
        step = product_distance(actual, state.adapter)
        counts = {update.client_id: update.num_examples for update in chosen.done}
        if not self.method.weighs_rows:
            counts = dict.fromkeys(counts, 1)
        files = {name: facts["sha256"] for name, facts in manifest.files.items()}
        source = {
            "manifest_sha256": manifest.sha256,
            "actual_adapter_sha256": files[SAFETENSORS_NAME],
            "updates_sha256": {
                name: sha256
                for client in sorted(counts)
                for name, sha256 in sorted(files.items())
                if name.startswith((f"{client_name(client)}/adapter_model", f"{client_name(client)}/upload"))
            },
        }
        distance = product_distance(made, actual) / step if step else None
        return Outcome(number, actual, made, counts, distance, source), after.slots


class ChosenUpdates:
    """The updates of a committed round that are used, each with the count it weighs by, in client-id order.

    With `complete_by` an update of one factor is given the other from there: a server that sums both gets both.
    """

    def __init__(self, reader: RunReader, number: int, change: Change, complete_by: AdapterState | None) -> None:
        self._complete_by = complete_by
        used = [update for update in reader.describe_updates(number) if update.client_id not in change.leave_out]
        self.done = [replace(update, num_examples=change.count(update)) for update in used]
        self._counts = {update.client_id: update.num_examples for update in self.done}
        self._stored = reader.updates(number, list(self._counts))

    def finish(self) -> None:
        """All are there."""

    def __len__(self) -> int:
        return len(self.done)

    def __iter__(self) -> Iterator[ClientUpdate]:
        for update in self._stored:
            upload = update.upload or {}
            if self._complete_by is not None:
                upload = {**self._complete_by, **upload}
            yield replace(update, upload=upload, memory=ClientMemory(), num_examples=self._counts[update.client_id])


def check_methods(source: Method, target: Method) -> None:
    """UsageError with the reason when the updates of `source` cannot be given to the server of `target`."""
    if reason := why_not_reaggregated(source):
        raise UsageError(f"the run's federation_mode={source.name} cannot be aggregated otherwise: {reason}")
    if reason := why_not_server_of(target, source):
        able = ", ".join(row.name for row in METHODS.values() if row.is_server_side)
        raise UsageError(
            f"federation_mode={target.name} cannot take the updates of {source.name}: {reason}",
            hint=f"name one with --federation_mode: {able}",
        )


def product_distance(one: AdapterState, other: AdapterState) -> float:
    """`||B A - B' A'||` over all layers, from factors."""
    total = 0.0
    for a_key, b_key in layer_pairs(one).values():
        b = stack_rows([[one[b_key], other[b_key]]], transpose=True)
        a = stack_rows([[one[a_key], other[a_key]]], transpose=False)
        left = torch.cat([b[:, 0] - b[:, 1], b[:, 1]], dim=1)
        right = torch.cat([a[:, 0], a[:, 0] - a[:, 1]], dim=1)
        total += float(norm_of_sum(left, right)) ** 2
    return total**0.5
