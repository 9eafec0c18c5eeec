"""A committed round recomputed from its clients' updates, by the loop that trained it.

The pool answers each task with the update that lies in the round, and the store compares instead of writing, so no
rule of the federation is written down a second time. Tensors come from files whose hashes hold; a round starts from
what the round before it left. One update is in memory at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlora.config.train import TrainConfig
from fedlora.engines.private_run import PrivateRun
from fedlora.engines.rounds import FederatedRun
from fedlora.errors import FedloraError, StorageError
from fedlora.federated.adapters import fingerprint
from fedlora.files import read_json
from fedlora.llm.adapter_files import (
    BIN_NAME,
    CONFIG_NAME,
    GLOBAL_BIN_NAME,
    SAFETENSORS_NAME,
    to_bin,
    to_safetensors,
)
from fedlora.methods.choosing import LoadedMethod
from fedlora.paths import client_name
from fedlora.runs.base_chain import BASE_NAME, BaseChain, increment_to_bytes
from fedlora.runs.checking import UPDATE_NAME, find_round_fault
from fedlora.runs.reader import RunReader
from fedlora.runs.run_records import Manifest
from fedlora.runs.server_state import STATE_NAME, state_to_bytes
from fedlora.runs.standing import read_standing
from fedlora.runs.start_adapter import read_start
from fedlora.typed_json import to_json
from fedlora.types import (
    AdapterState,
    ClientFailure,
    ClientId,
    ClientUpdate,
    RoundResult,
    ServerState,
    TrainTask,
    Updates,
)


@dataclass
class Replay:
    """One round as a ClientPool and an UpdateStore at once; `faults` says in what it differs from the files."""

    reader: RunReader
    method: LoadedMethod
    ids: Sequence[ClientId]
    manifest: Manifest
    faults: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.reader.paths.round_folder(self.manifest.round)

    def clients(self) -> Sequence[ClientId]:
        """Those that had something to train on."""
        return self.ids

    def train(self, tasks: Sequence[TrainTask]) -> Iterator[ClientUpdate | ClientFailure]:
        """What each client answered then."""
        failures = {entry["client_id"]: entry for entry in self.manifest.quarantined}
        for task in tasks:
            if task.client_id in failures:
                yield ClientFailure(**failures[task.client_id])
                continue
            place = self.folder / client_name(task.client_id)
            if not (place / UPDATE_NAME).is_file():
                self.faults.append(f"{place}: the client was asked, but neither an update nor a failure is recorded")
                yield ClientFailure(task.client_id, "data", "no update is recorded")
                continue
            update = self.reader.read_update(self.folder, task.client_id)
            if update.task_id != task.id:
                self.faults.append(f"{place / UPDATE_NAME} answers another task than the run gives this client")
            memory = self.reader.read_memory(task.client_id, task.accepted)
            start = self.method.client.phases(task.download, memory)[0].start
            # from what a client has that did not leave it, nobody else can tell
            if not update.adapter_stays and update.started_from != fingerprint(start):
                self.faults.append(f"{place / UPDATE_NAME}: the client started from something else than it was given")
            if update.base_sha256 != (task.download.base.sha256 if task.download.base is not None else None):
                self.faults.append(f"{place / UPDATE_NAME}: the client trained on another base than it was given")
            yield update

    def begin_round(self, round_number: int) -> None:
        """Nothing to make room for."""

    def find_kept(self, round_number: int, client_id: ClientId) -> None:
        """None: every update is answered again, by `train`."""

    def keep_update(self, update: ClientUpdate, adapter: AdapterState | None) -> None:
        """Compare what the server measured of an update with what it noted then."""
        file = self.folder / client_name(update.client_id) / UPDATE_NAME
        if read_json(file)["metrics"] != dict(update.metrics):
            self.faults.append(f"{file}: the norm of the update is not the one that is noted")

    def updates(self, round_number: int, clients: Sequence[ClientId]) -> Updates:
        """The updates of the committed round, in client-id order."""
        return self.reader.updates(round_number, clients)

    def carry_forward(self, round_number: int, client_id: ClientId, accepted: int) -> None:
        """Compare a carried adapter with the one of the round it came from."""
        if not self.reader.keeps_adapter(client_id, accepted):
            return
        for name in (BIN_NAME, CONFIG_NAME):
            path = self.folder / client_name(client_id) / name
            source = self.reader.paths.round_folder(accepted) / client_name(client_id) / name
            if not path.is_file() or path.read_bytes() != source.read_bytes():
                self.faults.append(f"{path} is not the file of round {accepted}, from which it was carried forward")

    def commit_round(
        self,
        round_number: int,
        global_adapter: AdapterState | None,
        state: ServerState | None,
        facts: Mapping[str, Any],
    ) -> Path:
        """Compare the aggregate, and who took part, with the files."""
        noted = to_json(self.manifest)
        for name, value in facts.items():
            if noted.get(name) != value:
                self.faults.append(f"{self.folder / 'manifest.json'}: {name} is not what the run computes")
        expected: dict[str, str] = {}
        if global_adapter is not None:
            for name, write in ((GLOBAL_BIN_NAME, to_bin), (SAFETENSORS_NAME, to_safetensors)):
                expected[name] = hashlib.sha256(write(global_adapter)).hexdigest()
        if state is not None and (content := state_to_bytes(state, global_adapter)):
            expected[STATE_NAME] = hashlib.sha256(content).hexdigest()
        if state is not None and (increment := increment_to_bytes(state.base, round_number)):
            expected[BASE_NAME] = hashlib.sha256(increment).hexdigest()
        for name in (GLOBAL_BIN_NAME, SAFETENSORS_NAME, STATE_NAME, BASE_NAME):
            if self.manifest.files.get(name, {}).get("sha256") != expected.get(name):
                self.faults.append(f"{self.folder / name} is not the aggregate of the clients' files")
        return self.folder


def replay_round(
    config: TrainConfig,
    method: LoadedMethod,
    reader: RunReader,
    ids: Sequence[ClientId],
    manifest: Manifest,
    chain: BaseChain,
    private: PrivateRun | None = None,
) -> list[str]:
    """The differences between a committed round, whose files are intact, and its recomputation.

    `chain` reads what the rounds before it added to the base; one for all rounds reads each only once.
    """
    replay = Replay(reader, method, ids, manifest)
    try:
        _run_again(config, replay, chain, private)
    except FedloraError as error:
        replay.faults.append(f"round {manifest.round} cannot be computed again: {error}")
    return replay.faults


def measure_again(
    config: TrainConfig,
    method: LoadedMethod,
    reader: RunReader,
    ids: Sequence[ClientId],
    manifest: Manifest,
    private: PrivateRun | None = None,
) -> RoundResult:
    """A committed round as the loop hands it on, with the numbers of the error meter and without what the clock said.

    StorageError when it is not what the run computes, or what it stands on is damaged.
    """
    replay = Replay(reader, method, ids, manifest)
    number = manifest.round
    before = find_round_fault(reader.paths.round_folder(number - 1), number - 1) if number > 1 else None
    if before is None:
        result = _run_again(config, replay, BaseChain(reader.paths), private)
        if not replay.faults:
            return result
    raise StorageError(before or replay.faults[0], hint="restore the file from a copy, or train again with --overwrite")


def _run_again(config: TrainConfig, replay: Replay, chain: BaseChain, private: PrivateRun | None) -> RoundResult:
    reader, number = replay.reader, replay.manifest.round
    start = read_standing(reader, chain, number - 1) if number > 1 else None
    adapter = read_start(reader.paths, reader.shapes, config)
    config = config.model_copy(update={"num_communication_rounds": max(number, config.num_communication_rounds)})
    if private is not None:
        private = replace(private, counts_refused="refused" in (replay.manifest.privacy or {}))
    run = FederatedRun(replay.method, replay, replay, config, adapter, start=start, private=private)
    return next(run.rounds())
