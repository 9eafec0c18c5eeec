"""What a run leaves under `model_dir`: client updates and rounds, each committed as a whole.

A round is put together in `<round>.partial` and renamed to `<round>` once its manifest, written last,
names every file with its SHA-256: a round folder that exists is complete. Updates are read back one after
another, so memory does not grow with the number of clients.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch

from fedlora.errors import StorageError, UsageError
from fedlora.federated.adapters import Shapes
from fedlora.files import append_line, json_text, read_json, sha256_of, sync_folder, write_bytes, write_json, write_text
from fedlora.llm.adapter_files import (
    BIN_NAME,
    CONFIG_NAME,
    GLOBAL_BIN_NAME,
    SAFETENSORS_NAME,
    load_adapter,
    to_bin,
    to_safetensors,
)
from fedlora.llm.bin_layout import BinLayout
from fedlora.paths import RunPaths, client_name
from fedlora.types import AdapterState, ClientId, ClientMemory, ClientUpdate

UPDATE_NAME = "update.json"
MANIFEST_NAME = "manifest.json"
OPTIMIZER_NAME = "private/optimizer.safetensors"


class RoundStore:
    """The files of one run; `shapes` and `peft_config` describe its adapters."""

    def __init__(self, paths: RunPaths, *, shapes: Shapes, peft_config: str, header: Mapping[str, Any]) -> None:
        self.paths = paths
        self.shapes = shapes
        self.peft_config = peft_config
        self.header = dict(header)
        self._parent: str | None = None
        self._layout: BinLayout | None = None

    def begin_round(self, round_number: int) -> None:
        """An empty working folder; what an interrupted attempt left there is removed."""
        folder = self.paths.partial_folder(round_number)
        try:
            shutil.rmtree(folder, ignore_errors=False) if folder.exists() else None
            folder.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"{folder}: {error.strerror}", hint="check space and permissions") from error

    def keep_update(self, update: ClientUpdate) -> None:
        """Write one client's update and memory into the open round; `update.json` last."""
        folder = self.paths.partial_folder(update.round) / client_name(update.client_id)
        adapter = update.upload if update.upload is not None else update.memory.adapter
        if adapter is None:
            raise ValueError(f"client {update.client_id} neither sent nor kept an adapter")
        write_bytes(folder / BIN_NAME, to_bin(adapter))
        write_text(folder / CONFIG_NAME, self.peft_config)
        if update.memory.optimizer:
            write_bytes(folder / OPTIMIZER_NAME, safetensors.torch.save(dict(update.memory.optimizer)))
        write_json(
            folder / UPDATE_NAME,
            {
                "client_id": update.client_id,
                "keeps_adapter": update.memory.adapter is not None,
                "keeps_optimizer": bool(update.memory.optimizer),
                "num_examples": update.num_examples,
                "num_steps": update.num_steps,
                "num_tokens": update.num_tokens,
                "round": update.round,
                "sends_adapter": update.upload is not None,
                "started_from": update.started_from,
            },
        )

    def updates(self, round_number: int, clients: Sequence[ClientId]) -> StoredUpdates:
        """The kept updates of the open round, in client-id order."""
        return StoredUpdates(self, round_number, sorted(clients))

    def read_update(self, round_number: int, client_id: ClientId, *, folder: Path | None = None) -> ClientUpdate:
        """One update with its tensors, from the open round unless a committed `folder` is given."""
        place = (folder or self.paths.partial_folder(round_number)) / client_name(client_id)
        facts = read_json(place / UPDATE_NAME)
        if self._layout is None:
            self._layout = BinLayout(self.shapes)
        adapter = load_adapter(place / BIN_NAME, self.shapes, layout=self._layout)
        optimizer = safetensors.torch.load_file(place / OPTIMIZER_NAME) if facts["keeps_optimizer"] else None
        return ClientUpdate(
            round=round_number,
            client_id=client_id,
            upload=adapter if facts["sends_adapter"] else None,
            memory=ClientMemory(adapter if facts["keeps_adapter"] else None, optimizer),
            num_examples=facts["num_examples"],
            num_tokens=facts["num_tokens"],
            num_steps=facts["num_steps"],
            started_from=facts["started_from"],
        )

    def read_memory(self, client_id: ClientId, accepted: int | None) -> ClientMemory:
        """What a client kept with its last committed update; empty before its first."""
        if accepted is None:
            return ClientMemory()
        return self.read_update(accepted, client_id, folder=self.paths.round_folder(accepted)).memory

    def carry_forward(self, round_number: int, client_id: ClientId, accepted: int) -> None:
        """Put a client's latest adapter into the open round, as a hard link where the file system has them."""
        source = self.paths.round_folder(accepted) / client_name(client_id)
        target = self.paths.partial_folder(round_number) / client_name(client_id)
        target.mkdir(parents=True, exist_ok=True)
        for name in (BIN_NAME, CONFIG_NAME):
            try:
                os.link(source / name, target / name)
            except OSError:
                write_bytes(target / name, (source / name).read_bytes())

    def commit_round(self, round_number: int, global_adapter: AdapterState | None, facts: Mapping[str, Any]) -> Path:
        """Write the global adapter and the manifest, then give the round its final name."""
        folder = self.paths.partial_folder(round_number)
        if global_adapter is not None:
            write_bytes(folder / GLOBAL_BIN_NAME, to_bin(global_adapter))
            write_bytes(folder / SAFETENSORS_NAME, to_safetensors(global_adapter))
            write_text(folder / CONFIG_NAME, self.peft_config)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        manifest = {
            **self.header,
            **facts,
            "round": round_number,
            "parent_sha256": self._parent,
            "files": {
                path.relative_to(folder).as_posix(): {"sha256": sha256_of(path), "bytes": path.stat().st_size}
                for path in files
            },
        }
        write_json(folder / MANIFEST_NAME, manifest)
        final = self.paths.round_folder(round_number)
        try:
            folder.rename(final)
            sync_folder(final.parent)
        except OSError as error:
            raise StorageError(f"{final}: {error.strerror}", hint="check the folder") from error
        self._parent = hashlib.sha256(json_text(manifest).encode()).hexdigest()
        return final

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """One line more in metrics.jsonl."""
        append_line(self.paths.metrics_file, dict(row))

    def write_run(self, value: Mapping[str, Any]) -> None:
        """Replace run.json."""
        write_json(self.paths.run_file, dict(value))


class StoredUpdates:
    """Re-iterable updates of one round; each iteration loads them from the store one after another."""

    def __init__(self, store: RoundStore, round_number: int, clients: Sequence[ClientId]) -> None:
        self._store = store
        self._round = round_number
        self._clients = list(clients)

    def __len__(self) -> int:
        return len(self._clients)

    def __iter__(self) -> Iterator[ClientUpdate]:
        # not one ahead in a thread: reading and summing then fight for the same cores, and both are slower
        for client_id in self._clients:
            yield self._store.read_update(self._round, client_id)


def read_run(paths: RunPaths) -> dict[str, Any]:
    """run.json of an experiment; UsageError when there is none."""
    if not paths.run_file.is_file():
        raise UsageError(
            f"{paths.root}: no run of this name", hint="check --model_dir and --exp_name, or run `fedlora train` first"
        )
    value = read_json(paths.run_file)
    wanted = {"base_model": str, "config": dict}
    if not isinstance(value, dict) or not all(isinstance(value.get(key), kind) for key, kind in wanted.items()):
        raise UsageError(f"{paths.run_file}: not the record of a run", hint="restore the file, or train again")
    return value


def check_free(paths: RunPaths, *, overwrite: bool) -> None:
    """UsageError when a run of this name exists and may not be replaced, or the folder is not a run's at all."""
    if not paths.root.is_dir():
        return
    foreign = sorted(entry.name for entry in paths.root.iterdir() if not _belongs_to_run(entry))
    if foreign or (paths.committed_rounds() and not paths.run_file.exists()):
        what = ", ".join(foreign[:3]) or "rounds without a run.json"
        raise UsageError(
            f"{paths.root}: holds what no run has written ({what})",
            hint="choose another --exp_name or --model_dir; nothing there is touched, with or without --overwrite",
        )
    if paths.run_file.exists() and not overwrite:
        raise UsageError(
            f"{paths.root}: a run of this name exists",
            hint="choose another --exp_name, or give --overwrite to delete it and start anew",
        )


def clear_run(paths: RunPaths) -> None:
    """Remove what an earlier run left in this folder, all but the lock."""
    for entry in sorted(paths.root.iterdir()):
        if entry == paths.lock_file or not _belongs_to_run(entry):
            continue
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _belongs_to_run(entry: Path) -> bool:
    """Whether a run writes something of this name: its own files, their temporary forms, rounds open or closed."""
    if entry.is_dir():
        return entry.name.removesuffix(".partial").isdigit()
    names = ("run.json", "metrics.jsonl", ".lock")
    return entry.name in names or any(entry.name.startswith(f".{name}.tmp-") for name in names)
