"""How a run is written under `model_dir`: client updates and rounds, each committed as a whole.

A round is put together in `<round>.partial` and renamed to `<round>` once its manifest, written last,
names every file with its SHA-256: a round folder that exists is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch

from fedlora.errors import StorageError
from fedlora.federated.adapters import find_half, fingerprint
from fedlora.federated.ranks import rank_in, rank_of_adapter
from fedlora.files import sync_folder, write_bytes, write_json, write_text
from fedlora.llm.adapter_config import config_at_rank
from fedlora.llm.adapter_files import (
    BIN_NAME,
    CONFIG_NAME,
    GLOBAL_BIN_NAME,
    SAFETENSORS_NAME,
    to_bin,
    to_safetensors,
)
from fedlora.paths import client_name
from fedlora.runs.base_chain import BASE_NAME, increment_to_bytes
from fedlora.runs.checking import (
    MANIFEST_NAME,
    UPDATE_NAME,
    describe_files,
    read_kept_update,
    seal,
)
from fedlora.runs.metrics_log import MetricsLog
from fedlora.runs.reader import (
    EXTRA_NAME,
    MEMORY_NAME,
    OPTIMIZER_NAME,
    UPLOAD_NAME,
    RunReader,
    StoredUpdates,
    update_of,
)
from fedlora.runs.run_records import Manifest, RunRecord
from fedlora.runs.server_state import STATE_NAME, groups_to_bytes, state_to_bytes
from fedlora.typed_json import from_json, to_json
from fedlora.types import AdapterState, ClientId, ClientMemory, ClientUpdate, ServerState


class RunWriter:
    """Writes the run that `reader` reads; `peft_config` describes its adapters (those of the largest rank, where ranks
    differ), `header` begins every manifest, `parent_sha256` is the manifest of the round before the next one."""

    def __init__(
        self,
        reader: RunReader,
        *,
        peft_config: str,
        header: Mapping[str, Any],
        log: MetricsLog,
        parent_sha256: str | None = None,
    ) -> None:
        self.reader = reader
        self.paths = reader.paths
        self.peft_config = peft_config
        self.header = dict(header)
        self.log = log
        self._parent = parent_sha256

    def begin_round(self, round_number: int) -> None:
        """A working folder with nothing in it but the updates that an interrupted attempt committed there."""
        folder = self.paths.partial_folder(round_number)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for entry in sorted(folder.iterdir()):
                if not entry.is_dir() or entry.is_symlink():
                    entry.unlink()
                elif read_kept_update(entry) is None:
                    shutil.rmtree(entry)
        except OSError as error:
            raise StorageError(f"{folder}: {error.strerror}", hint="check space and permissions") from error

    def find_kept(self, round_number: int, client_id: ClientId) -> ClientUpdate | None:
        """The update that this client committed to the open round before an interruption, without its tensors."""
        facts = read_kept_update(self.paths.partial_folder(round_number) / client_name(client_id))
        if facts is None:
            return None
        update = update_of(facts, upload=None, memory=ClientMemory())
        seconds = self.log.seconds(round_number, client_id)
        return replace(update, metrics={**update.metrics, "seconds": seconds})

    def keep_update(self, update: ClientUpdate, adapter: AdapterState | None) -> None:
        """Write one client's update, its whole adapter and its memory into the open round; `update.json` last.

        Without a whole adapter, which then stays where the client is, what the client sent is written alone.
        """
        folder = self.paths.partial_folder(update.round) / client_name(update.client_id)
        if adapter is None:
            folder.mkdir(parents=True, exist_ok=True)
            rank, is_apart = rank_in(self.reader.shapes), update.upload is not None
        else:
            rank, is_apart = rank_of_adapter(adapter), _is_apart(update)
            write_bytes(folder / BIN_NAME, to_bin(adapter))
            write_text(folder / CONFIG_NAME, config_at_rank(self.peft_config, rank))
        if is_apart:
            write_bytes(folder / UPLOAD_NAME, to_safetensors(update.upload or {}))
        if update.memory.optimizer:
            write_bytes(folder / OPTIMIZER_NAME, safetensors.torch.save(dict(update.memory.optimizer)))
        for name, groups in ((MEMORY_NAME, update.memory.slots), (EXTRA_NAME, update.extra)):
            if groups:
                write_bytes(folder / name, groups_to_bytes(groups))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        self.log.note_update(update.round, update.client_id, update.metrics.get("seconds", 0.0))
        record = {
            **({"adapter_stays": True} if update.adapter_stays else {}),
            "client_id": update.client_id,
            "files": describe_files(folder, files),
            "keeps_adapter": update.memory.adapter is not None,
            "keeps_optimizer": bool(update.memory.optimizer),
            "keeps_slots": sorted(update.memory.slots),
            # what the clock says differs from one training to the next, and these bytes must not
            "metrics": {name: value for name, value in update.metrics.items() if name != "seconds"},
            "num_examples": update.num_examples,
            "num_steps": update.num_steps,
            "num_tokens": update.num_tokens,
            "rank": rank,
            "round": update.round,
            "sends_apart": is_apart,
            "sends": None if update.upload is None else find_half(update.upload, self.reader.shapes),
            "sends_extra": sorted(update.extra),
            "started_from": update.started_from,
            "task_id": update.task_id,
        }
        if update.base_sha256 is not None:
            record["base_sha256"] = update.base_sha256
        write_json(folder / UPDATE_NAME, seal(record))

    def updates(self, round_number: int, clients: Sequence[ClientId]) -> StoredUpdates:
        """The kept updates of the open round, in client-id order."""
        return StoredUpdates(self.reader, self.paths.partial_folder(round_number), clients)

    def carry_forward(self, round_number: int, client_id: ClientId, accepted: int) -> None:
        """Put the adapter that a client keeps into the open round, as a hard link where the file system has them."""
        if not self.reader.keeps_adapter(client_id, accepted):
            return
        source = self.paths.round_folder(accepted) / client_name(client_id)
        target = self.paths.partial_folder(round_number) / client_name(client_id)
        target.mkdir(parents=True, exist_ok=True)
        for name in (BIN_NAME, CONFIG_NAME):
            try:
                os.link(source / name, target / name)
            except OSError:
                write_bytes(target / name, (source / name).read_bytes())

    def commit_round(
        self,
        round_number: int,
        global_adapter: AdapterState | None,
        state: ServerState | None,
        facts: Mapping[str, Any],
    ) -> Path:
        """Write the global adapter, the server's state, what it added to the base, and the manifest; then give the
        round its final name. The adapter's rank is that of `facts["export"]`, where there is one."""
        folder = self.paths.partial_folder(round_number)
        if global_adapter is not None:
            write_bytes(folder / GLOBAL_BIN_NAME, to_bin(global_adapter))
            write_bytes(folder / SAFETENSORS_NAME, to_safetensors(global_adapter))
            # where the method adds to the base, the round's adapter has a rank of its own
            rank = facts["export"]["rank"] if "export" in facts else None
            write_text(folder / CONFIG_NAME, config_at_rank(self.peft_config, rank) if rank else self.peft_config)
        if state is not None and (increment := increment_to_bytes(state.base, round_number)):
            write_bytes(folder / BASE_NAME, increment)
        if state is not None and (content := state_to_bytes(state, global_adapter)):
            write_bytes(folder / STATE_NAME, content)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        named = {"round": round_number, "parent_sha256": self._parent, "files": describe_files(folder, files)}
        manifest = from_json(Manifest, seal({**self.header, **facts, **named}))
        write_json(folder / MANIFEST_NAME, to_json(manifest))
        final = self.paths.round_folder(round_number)
        try:
            folder.rename(final)
            sync_folder(final.parent)
        except OSError as error:
            raise StorageError(f"{final}: {error.strerror}", hint="check the folder") from error
        self._parent = manifest.sha256
        return final

    def write_run(self, record: RunRecord) -> None:
        """Replace run.json."""
        write_json(self.paths.run_file, seal(to_json(record)))


def _is_apart(update: ClientUpdate) -> bool:
    """Whether a client sends what is no part of the adapter it keeps: all factors, or others than the kept ones."""
    if update.upload is None or update.memory.adapter is None:
        return False
    if update.upload.keys() == update.memory.adapter.keys():
        return True
    part = {key: value for key, value in update.memory.adapter.items() if key in update.upload}
    return fingerprint(part) != fingerprint(update.upload)
