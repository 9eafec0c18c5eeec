"""What a run has left under `model_dir`, read back: updates with their tensors, and what clients keep.

Updates are read one after another, so memory does not grow with the number of clients. A caller that reads a
committed round has compared its files with its manifest (`checking`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch

from fedlora.errors import StorageError
from fedlora.federated.adapters import Shapes, pick_half
from fedlora.federated.ranks import rank_in, shapes_at
from fedlora.files import read_json
from fedlora.llm.adapter_files import BIN_NAME, load_adapter
from fedlora.paths import RunPaths, client_name
from fedlora.runs.checking import UPDATE_NAME, read_kept_update
from fedlora.runs.server_state import load_groups
from fedlora.types import AdapterState, ClientId, ClientMemory, ClientUpdate

OPTIMIZER_NAME = "private/optimizer.safetensors"
MEMORY_NAME = "private/memory.safetensors"
EXTRA_NAME = "extra.safetensors"
UPLOAD_NAME = "upload.safetensors"


class RunReader:
    """The files of one run; `shapes` are those of its adapters, of the largest rank where ranks differ."""

    def __init__(self, paths: RunPaths, shapes: Shapes) -> None:
        self.paths = paths
        self.shapes = shapes

    def read_update(self, folder: Path, client_id: ClientId) -> ClientUpdate:
        """One update with its tensors, from the folder of a round, open or committed."""
        place = folder / client_name(client_id)
        facts = read_json(place / UPDATE_NAME)
        extra = load_groups(place / EXTRA_NAME) if facts["sends_extra"] else {}
        if facts.get("adapter_stays"):
            apart = self._read_apart(place, facts) if facts["sends_apart"] else None
            return replace(update_of(facts, upload=apart, memory=ClientMemory()), extra=extra, adapter_stays=True)
        # the rank and where an upload lies are younger than the record
        rank = facts.get("rank", rank_in(self.shapes))
        if type(rank) is not int or rank < 1:
            raise StorageError(f"{place / UPDATE_NAME}: rank {rank!r} is not a rank", hint="restore the file")
        adapter = load_adapter(place / BIN_NAME, shapes_at(self.shapes, rank))
        optimizer = safetensors.torch.load_file(place / OPTIMIZER_NAME) if facts["keeps_optimizer"] else None
        slots = load_groups(place / MEMORY_NAME) if facts["keeps_slots"] else {}
        memory = ClientMemory(adapter if facts["keeps_adapter"] else None, optimizer, slots)
        upload = None if facts["sends"] is None else pick_half(adapter, facts["sends"])
        if facts.get("sends_apart"):
            upload = self._read_apart(place, facts)
        return replace(update_of(facts, upload=upload, memory=memory), extra=extra)

    def updates(self, round_number: int, clients: Sequence[ClientId]) -> StoredUpdates:
        """The updates of a committed round, in client-id order."""
        return StoredUpdates(self, self.paths.round_folder(round_number), clients)

    def describe_updates(self, round_number: int) -> list[ClientUpdate]:
        """The updates of a committed round without their tensors, wave by wave in client-id order."""
        found = [read_json(path) for path in self.paths.round_folder(round_number).glob(f"*/{UPDATE_NAME}")]
        updates = [update_of(facts, upload=None, memory=ClientMemory()) for facts in found]
        return sorted(updates, key=lambda update: (update.metrics["wave"], update.client_id))

    def read_memory(self, client_id: ClientId, accepted: int | None) -> ClientMemory:
        """A client's memory after its last committed update; empty before its first."""
        return ClientMemory() if accepted is None else self.read_accepted(client_id, accepted).memory

    def read_accepted(self, client_id: ClientId, accepted: int) -> ClientUpdate:
        """A client's committed update of a round. Raises StorageError where it is not the one that was committed."""
        folder = self.paths.round_folder(accepted)
        place = folder / client_name(client_id)
        if read_kept_update(place) is None:
            raise StorageError(
                f"{place}: the client's memory of round {accepted} does not match its hashes",
                hint="give the same command again: the round is then trained again",
            )
        return self.read_update(folder, client_id)

    def keeps_adapter(self, client_id: ClientId, accepted: int) -> bool:
        """Whether a client's folder of a round holds its personal model instead of what it sent."""
        return read_json(self.paths.round_folder(accepted) / client_name(client_id) / UPDATE_NAME)["keeps_adapter"]

    def _read_apart(self, place: Path, facts: Mapping[str, Any]) -> AdapterState:
        return load_adapter(place / UPLOAD_NAME, pick_half(self.shapes, facts["sends"]))


class StoredUpdates:
    """Re-iterable updates in the folder of a round, in client-id order; each iteration reads them one by one."""

    def __init__(self, reader: RunReader, folder: Path, clients: Sequence[ClientId]) -> None:
        self._reader = reader
        self._folder = folder
        self._clients = sorted(clients)

    def __len__(self) -> int:
        return len(self._clients)

    def __iter__(self) -> Iterator[ClientUpdate]:
        # not one ahead in a thread: reading and summing then fight for the same cores, and both are slower
        for client_id in self._clients:
            yield self._reader.read_update(self._folder, client_id)


def update_of(facts: Mapping[str, Any], *, upload: AdapterState | None, memory: ClientMemory) -> ClientUpdate:
    """An update from its record and its tensors."""
    counts = {name: facts[name] for name in ("round", "client_id", "num_examples", "num_tokens", "num_steps")}
    return ClientUpdate(
        **counts,
        task_id=facts["task_id"],
        upload=upload,
        memory=memory,
        started_from=facts["started_from"],
        metrics=facts["metrics"],
        base_sha256=facts.get("base_sha256"),
    )
