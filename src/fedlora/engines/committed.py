"""The result of a committed round, for measurements that an interruption prevented."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.config.train import TrainConfig
from fedlora.console import say
from fedlora.engines.private_run import PrivateRun
from fedlora.engines.replay import measure_again
from fedlora.engines.rounds import record_of
from fedlora.errors import FedloraError, StorageError
from fedlora.llm.adapter_files import SAFETENSORS_NAME, load_adapter
from fedlora.methods.choosing import LoadedMethod
from fedlora.runs.base_chain import BaseChain, measure_additions
from fedlora.runs.checking import find_round_fault, read_manifest
from fedlora.runs.metrics_log import MetricsLog
from fedlora.runs.reader import RunReader
from fedlora.runs.run_records import Manifest
from fedlora.runs.server_state import load_server
from fedlora.typed_json import to_json
from fedlora.types import ClientFailure, ClientId, RoundResult


def read_result(
    config: TrainConfig,
    method: LoadedMethod,
    reader: RunReader,
    round_number: int,
    log: MetricsLog,
    ids: Sequence[ClientId],
    private: PrivateRun | None = None,
) -> RoundResult:
    """The result of a committed round of a run over the clients `ids`; StorageError when one of its files is
    damaged. The error meter needs the round before it too: without that its numbers are left out with a warning."""
    paths, shapes = reader.paths, reader.shapes
    folder = paths.round_folder(round_number)
    manifest = read_manifest(folder)
    fault = find_round_fault(folder, round_number)
    if fault or manifest is None:
        raise StorageError(
            f"{fault}, and the metrics of round {round_number} are lost too",
            hint="restore the file or metrics.jsonl, or train again with --overwrite",
        )
    limited = {entry["client_id"]: entry for entry in manifest.limited}
    records = [
        {
            **record_of(update, update.metrics["wave"]),
            "seconds": log.seconds(round_number, update.client_id),
            **limited.get(update.client_id, {}),
        }
        for update in reader.describe_updates(round_number)
    ]
    measured = _measure(config, method, reader, ids, manifest, private)
    if measured is not None:
        known = {record["client_id"]: record for record in measured.records}
        records = [{**known[record["client_id"]], **record} for record in records]
    failures = [ClientFailure(**entry) for entry in manifest.quarantined]
    file = folder / SAFETENSORS_NAME
    adds = manifest.base_delta is not None
    state = load_server(BaseChain(paths), paths, round_number, shapes) if adds else None
    if state is not None:
        adapter, base = state.adapter, state.base
    else:
        adapter, base = (load_adapter(file, shapes) if file.is_file() else None), None
    found = measured.metrics if measured else {}
    metrics = {**found, **manifest.notes, **measure_additions(to_json(manifest))}
    return RoundResult(round_number, adapter, records, failures, metrics, manifest.privacy, base)


def _measure(
    config: TrainConfig,
    method: LoadedMethod,
    reader: RunReader,
    ids: Sequence[ClientId],
    manifest: Manifest,
    private: PrivateRun | None,
) -> RoundResult | None:
    try:
        return measure_again(config, method, reader, ids, manifest, private)
    except FedloraError as error:
        say(f"warning: round {manifest.round} has no aggregation error and no drift in the metrics: {error}")
        return None
