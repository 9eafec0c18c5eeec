"""The requests of a server to a node, and the checked replies, in plain values: nothing here knows Flower.

A reply comes from another machine. Its fields are taken one by one, each of the type it must have; who the client is,
what travelled and in which wave are the server's own knowledge and overwrite whatever the reply says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from fedlora.config.train import TrainConfig
from fedlora.data.client_facts import ClientFacts
from fedlora.engines.messages import pack, pack_task, unpack, unpack_outcome
from fedlora.engines.simulation import count_bytes
from fedlora.federated.validation import one_line
from fedlora.llm.base_identity import BaseIdentity
from fedlora.methods.strategy import ClientRule
from fedlora.types import (
    AdapterState,
    ClientFailure,
    ClientId,
    ClientMemory,
    ClientUpdate,
    Download,
    FailureKind,
    LocalResult,
    TrainTask,
    Upload,
)

NEEDED = frozenset({"loss", "num_response_tokens", "seconds", "bytes_down", "bytes_up", "update_norm", "wave"})
OPTIONAL = frozenset({"val_loss_before", "val_loss_after", "loss_personal"})
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class NodeFacts:
    """A node's facts: its client's counts, the shapes of its adapter as a hash, its base's type and identity."""

    facts: ClientFacts
    shapes: str
    dtype: str
    base: BaseIdentity | None


@dataclass(frozen=True)
class Answer:
    """Whether a method's clients send factors, and whether they keep an adapter of their own."""

    sends: bool
    keeps: bool


def ask_facts(config: TrainConfig, run_id: str = "") -> bytes:
    """The request for a node's facts; `run_id` distinguishes runs that would compute the same."""
    return pack({"more": {"kind": "facts", **describe_run(config), "run_id": run_id}}, {})


def ask_update(
    task: TrainTask, config: TrainConfig, increments: Mapping[int, AdapterState] | None = None, *, run_id: str = ""
) -> bytes:
    """The request for an update; what the client keeps is with it already. With `increments` the client has all other
    additions to the base already."""
    more = {"kind": "train", **describe_run(config), "run_id": run_id}
    return pack_task(task, ClientMemory(), more, increments=increments)


def describe_run(config: TrainConfig) -> dict[str, Any]:
    """The run as a request names it."""
    source = config.method.source
    return {"config": config.record(), **({"method": source.record()} if source is not None else {})}


def expect_answer(rule: ClientRule, download: Download) -> Answer:
    """What a client of this rule sends and keeps: the rule itself, asked with training that changed nothing."""
    phases = rule.phases(download, ClientMemory())
    results = [LocalResult(phase.start, phase.start) for phase in phases]
    upload, memory = rule.upload(results, download, ClientMemory())
    return Answer(sends=upload is not None, keeps=memory.adapter is not None)


def read_update(payload: bytes, task: TrainTask, expected: Answer) -> ClientUpdate | ClientFailure:
    """The answer to `task`. Raises ValueError, or what a parser raises, for anything else."""
    outcome, _ = unpack_outcome(payload)
    if isinstance(outcome, ClientFailure):
        return _clean(outcome, task.client_id)
    # True and 1.0 are equal to 1, and would name other folders
    if type(outcome.client_id) is not int or type(outcome.round) is not int:
        raise ValueError("its client or its round is not a whole number")
    if outcome.client_id != task.client_id:
        raise ValueError("it answers for another client")
    names = set(outcome.metrics)
    if names - OPTIONAL != NEEDED:
        raise ValueError("its metrics are not those of an update")
    if (
        type(outcome.adapter_stays) is not bool
        or not _is_hash(outcome.started_from)
        or type(outcome.task_id) is not str
    ):
        raise ValueError("a field has another type than it must have")
    keeps = outcome.adapter_stays or outcome.memory.adapter is not None
    if (outcome.upload is not None, keeps) != (expected.sends, expected.keeps):
        raise ValueError("it sends or keeps something else than the method's clients do")
    if outcome.memory.optimizer or outcome.memory.slots:
        raise ValueError("it sends what stays with a client")
    if outcome.base_sha256 != (task.download.base.sha256 if task.download.base is not None else None):
        raise ValueError("it was trained on another base")
    upload = Upload(outcome.upload, outcome.extra) if outcome.upload is not None else None
    down, up = count_bytes(task.download, upload, task.accepted)
    known = {"bytes_down": down, "bytes_up": up, "wave": task.wave}
    return replace(outcome, metrics={**outcome.metrics, **known})


def read_facts(payload: bytes) -> NodeFacts | ClientFailure:
    """A node's facts, or why it does not take part; ValueError for anything else."""
    header, _ = unpack(payload)
    if "failure" in header:
        told = ClientFailure(**header["failure"])
        if type(told.client_id) is not int:
            raise ValueError("its client is not a whole number")
        return _clean(told, told.client_id)
    told = header["facts"]
    counts = [field for field in fields(ClientFacts) if field.name.startswith("num_")]
    # a record leaves out a count that is 0 where that is its default
    numbers = {one.name: told.get(one.name, one.default) if one.default == 0 else told[one.name] for one in counts}
    numbers["client_id"] = told["client_id"]
    if not all(type(value) is int and 0 <= value < 10**15 for value in numbers.values()):
        raise ValueError("a count is not a whole number")
    if not _is_hash(told["sha256"]) or not _is_hash(header["shapes"]) or type(header["dtype"]) is not str:
        raise ValueError("a field has another type than it must have")
    facts = ClientFacts(**numbers, file=f"node of client {numbers['client_id']}", sha256=told["sha256"], categories={})
    # a node of an older release tells nothing of its base
    base = header.get("base", {})
    if not isinstance(base, dict) or not all(map(_is_hash, base.values())):
        raise ValueError("the identity of its base is no hashes")
    return NodeFacts(facts, header["shapes"], header["dtype"][:20], BaseIdentity.from_record(base))


def _clean(failure: ClientFailure, client_id: ClientId) -> ClientFailure:
    """A failure as it may stand in a manifest: a kind we know, a short printable reason."""
    kind: Any = failure.kind if failure.kind in get_args(FailureKind) else "crashed"
    return ClientFailure(client_id, kind, one_line(str(failure.reason)))


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None
