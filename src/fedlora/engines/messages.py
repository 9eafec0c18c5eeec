"""Tasks and updates as bytes: a line of JSON, then the tensors as safetensors. No pickle.

Both directions keep every bit, so an update is the same whether it was made in this process or elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import safetensors.torch
from torch import Tensor

from fedlora.federated.base_delta import append
from fedlora.types import (
    AdapterState,
    BaseDelta,
    BaseLink,
    ClientFailure,
    ClientMemory,
    ClientUpdate,
    Download,
    TrainTask,
)

Groups = Mapping[str, Mapping[str, Tensor] | None]


class MissingAdditionsError(ValueError):
    """A task needs additions to the base that this side does not have."""


def pack(header: Mapping[str, Any], groups: Groups) -> bytes:
    """A header and named groups of tensors; a group that is None stays None."""
    names = {name: group is not None for name, group in groups.items()}
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, group in groups.items():
        for key, value in (group or {}).items():
            # an adapter cut to a client's rank is a view of the server's
            value = value.contiguous()
            place = value.untyped_storage().data_ptr()
            # what a client sends and what it keeps may be the same tensor, which safetensors refuses to write twice
            tensors[f"{name}/{key}"] = value.clone() if place in seen else value
            seen.add(place)
    line = json.dumps({"header": header, "groups": names}, allow_nan=False).encode()
    return line + b"\n" + safetensors.torch.save(tensors)


def unpack(message: bytes) -> tuple[dict[str, Any], dict[str, dict[str, Tensor] | None]]:
    """The arguments of `pack`."""
    line, _, body = message.partition(b"\n")
    facts = json.loads(line)
    groups: dict[str, dict[str, Tensor] | None] = {
        name: {} if there else None for name, there in facts["groups"].items()
    }
    for key, value in safetensors.torch.load(body).items():
        name, _, rest = key.partition("/")
        group = groups[name]
        if group is None:
            raise ValueError(f"tensor {rest} belongs to a group that is not there")
        group[rest] = value
    return facts["header"], groups


def pack_task(
    task: TrainTask,
    memory: ClientMemory,
    more: Mapping[str, Any],
    *,
    held: str | None = None,
    increments: Mapping[int, AdapterState] | None = None,
) -> bytes:
    """One client's task with the memory it starts from; additions to the base that the other side has `held` since
    an earlier task, by their hash, are only named. With `increments`, by version, only these are sent."""
    base = task.download.base
    is_whole = base is not None and increments is None and base.sha256 != (held or "")
    header = {
        "id": task.id,
        "round": task.round,
        "wave": task.wave,
        "client_id": task.client_id,
        "rows_of": list(task.rows_of),
        "accepted": task.accepted,
        "halves": [task.download.travels, task.download.trainable, task.download.shared],
        "links": None if base is None else [asdict(link) for link in base.links],
        "more": dict(more),
    }
    groups = {
        "download": task.download.adapter,
        "base": base.background if base is not None and is_whole else None,
        **_name("increment", {str(version): factors for version, factors in (increments or {}).items()}),
        **_name("extra", task.download.extra),
        **_memory_groups(memory),
    }
    return pack(header, groups)


def unpack_task(message: bytes, held: BaseDelta | None = None) -> tuple[TrainTask, ClientMemory, dict[str, Any]]:
    """The task, the memory, and what came with them; `held` are the additions to the base of the last task."""
    header, groups = unpack(message)
    more = header.pop("more")
    header["rows_of"] = tuple(header["rows_of"])
    halves = header.pop("halves")
    base = _read_base(header.pop("links"), groups["base"], held, _named("increment", groups))
    download = Download(groups["download"] or {}, *halves, extra=_named("extra", groups), base=base)
    task = TrainTask(**header, download=download)
    return task, _read_memory(groups), more


def pack_outcome(outcome: ClientUpdate | ClientFailure, more: Mapping[str, Any]) -> bytes:
    """An update with its tensors, or a failure."""
    if isinstance(outcome, ClientFailure):
        return pack({"failure": asdict(outcome), "more": dict(more)}, {})
    plain = {
        field.name: getattr(outcome, field.name)
        for field in fields(outcome)
        if field.name not in ("upload", "memory", "extra")
    }
    plain["metrics"] = dict(outcome.metrics)
    groups = {"upload": outcome.upload, **_name("extra", outcome.extra), **_memory_groups(outcome.memory)}
    return pack({"update": plain, "more": dict(more)}, groups)


def unpack_outcome(message: bytes) -> tuple[ClientUpdate | ClientFailure, dict[str, Any]]:
    """The update or failure, and what came with it."""
    header, groups = unpack(message)
    if "failure" in header:
        return ClientFailure(**header["failure"]), header["more"]
    extra = _named("extra", groups)
    update = ClientUpdate(**header["update"], upload=groups["upload"], memory=_read_memory(groups), extra=extra)
    return update, header["more"]


def _read_base(
    links: list[dict[str, Any]] | None,
    background: AdapterState | None,
    held: BaseDelta | None,
    increments: Mapping[str, AdapterState],
) -> BaseDelta | None:
    if links is None:
        return None
    chain = tuple(BaseLink(**link) for link in links)
    if background is not None:
        return BaseDelta(chain, background)
    base = held or BaseDelta()
    known = [None, *(link.sha256 for link in chain)]
    if base.sha256 not in known:
        raise MissingAdditionsError("what is held is no beginning of the additions that a task names")
    for link in chain[known.index(base.sha256) :]:
        factors = increments.get(str(link.version), {})
        base = append(base, link.version, factors, truncation_error=link.truncation_error)
        if base.sha256 != link.sha256:
            raise MissingAdditionsError("a task names additions to the base that were never sent")
    return base


def _memory_groups(memory: ClientMemory) -> Groups:
    return {"adapter": memory.adapter, "optimizer": memory.optimizer, **_name("slot", memory.slots)}


def _read_memory(groups: Groups) -> ClientMemory:
    return ClientMemory(groups["adapter"], groups["optimizer"], _named("slot", groups))


def _name(kind: str, named: Mapping[str, AdapterState]) -> Groups:
    return {f"{kind}:{name}": group for name, group in named.items()}


def _named(kind: str, groups: Groups) -> dict[str, AdapterState]:
    return {name.removeprefix(f"{kind}:"): group or {} for name, group in groups.items() if name.startswith(f"{kind}:")}
