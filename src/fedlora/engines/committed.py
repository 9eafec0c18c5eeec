"""A committed round as the loop once handed it on, for what was not yet measured when the run was interrupted."""

from __future__ import annotations

from fedlora.engines.rounds import record_of
from fedlora.errors import StorageError
from fedlora.federated.adapters import Shapes
from fedlora.llm.adapter_files import SAFETENSORS_NAME, load_adapter
from fedlora.paths import RunPaths
from fedlora.runs.base_chain import FIELD, BaseChain, measure_additions
from fedlora.runs.checking import find_round_fault, read_manifest
from fedlora.runs.metrics_log import MetricsLog
from fedlora.runs.server_state import load_server
from fedlora.runs.standing import read_committed
from fedlora.types import ClientFailure, RoundResult


def read_result(paths: RunPaths, round_number: int, log: MetricsLog, shapes: Shapes) -> RoundResult:
    """The result of a committed round; StorageError when one of its files is not what was written."""
    folder = paths.round_folder(round_number)
    manifest = read_manifest(folder)
    fault = find_round_fault(folder, round_number)
    if fault or manifest is None:
        raise StorageError(
            f"{fault}, and the metrics of round {round_number} are lost too",
            hint="restore the file or metrics.jsonl, or train anew with --overwrite",
        )
    limited = {entry["client_id"]: entry for entry in manifest["limited"]}
    updates = read_committed(paths, round_number, log)
    records = [{**record_of(update, update.metrics["wave"]), **limited.get(update.client_id, {})} for update in updates]
    failures = [ClientFailure(**entry) for entry in manifest["quarantined"]]
    if FIELD in manifest:
        state = load_server(BaseChain(paths), paths, round_number, shapes)
        if state is not None:
            measures = measure_additions(manifest)
            return RoundResult(round_number, state.adapter, records, failures, state.base, measures)
    file = folder / SAFETENSORS_NAME
    return RoundResult(round_number, load_adapter(file, shapes) if file.is_file() else None, records, failures)
