"""Verify a run: every hash of every round, and every aggregate once more from the clients' files.

Neither the base model nor the clients' rows are needed, and nothing is written. A round that cannot be computed again,
because a file it stands on is damaged, is told of as such; the rounds behind it are still looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.config.runs import VerifyConfig
from fedlora.config.train import TrainConfig
from fedlora.console import printable
from fedlora.engines.replay import replay_round
from fedlora.errors import StorageError
from fedlora.federated.adapters import Shapes
from fedlora.files import sha256_of_json
from fedlora.llm.adapter_files import BIN_NAME
from fedlora.llm.adapter_shapes import read_shapes
from fedlora.paths import RunPaths
from fedlora.runs.audit import describe_open_round, find_metrics_faults, find_round_faults
from fedlora.runs.checking import read_manifest
from fedlora.runs.metrics_log import MetricsLog
from fedlora.runs.round_store import RoundStore
from fedlora.runs.run_folder import read_run


def run(config: VerifyConfig) -> None:
    """Print one line per round and fault; StorageError with the first fault when there is one."""
    paths = RunPaths(config.model_dir, config.exp_name)
    recorded = read_run(paths)
    faults: list[str] = []
    for line, found in _look(paths, recorded):
        print(printable(line), *(printable(f"  {fault}") for fault in found), sep="\n")
        faults += found
    if faults:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise StorageError(
            f"{faults[0]}{more}",
            hint="restore the file from a copy; the same train command trains again, to the same bytes, what the run "
            "has to go on from: its last round and what clients keep; --overwrite trains everything anew",
        )


def _look(paths: RunPaths, recorded: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """What is found, round by round, then in the files beside the rounds."""
    train = TrainConfig.of(**recorded["config"])
    identity = sha256_of_json(train.identity())
    ids = [client["client_id"] for client in recorded["clients"] if client["num_examples"]]
    rounds = paths.committed_rounds()
    missing = sorted(set(range(1, max(rounds, default=0) + 1)) - set(rounds))
    if missing:
        yield "rounds", [f"{paths.round_folder(number)} is missing" for number in missing]
    damaged = set(missing)
    for number in rounds:
        faults = find_round_faults(paths, number, identity)
        if faults:
            damaged.add(number)
            yield f"round {number}: damaged", faults
        elif damaged:
            first = min(damaged)
            yield f"round {number}: its files are whole; not computed again, since round {first} is damaged", []
        else:
            faults = _compute_again(paths, train, ids, number)
            damaged |= {number} if faults else set()
            yield _describe_round(paths, number, faults), faults
    faults = find_metrics_faults(paths)
    yield f"metrics.jsonl: {'damaged' if faults else 'ok'}", faults
    for folder in sorted(paths.root.glob("*.partial")):
        yield f"{folder.name}: open, {describe_open_round(folder)}", []


def _compute_again(paths: RunPaths, config: TrainConfig, ids: Sequence[int], number: int) -> list[str]:
    manifest = read_manifest(paths.round_folder(number)) or {}
    shapes = _find_shapes(paths.round_folder(number), manifest)
    store = RoundStore(paths, shapes=shapes, peft_config="", header={}, log=MetricsLog(paths.metrics_file))
    return replay_round(config, store, ids, manifest)


def _find_shapes(folder: Path, manifest: Mapping[str, Any]) -> Shapes:
    if "shapes" in manifest:
        return {key: tuple(shape) for key, shape in manifest["shapes"].items()}
    name = min(name for name in manifest["files"] if Path(name).name == BIN_NAME)
    return read_shapes(folder / name)


def _describe_round(paths: RunPaths, number: int, faults: Sequence[str]) -> str:
    if faults:
        return f"round {number}: its files are whole, but they are not what the run computes"
    manifest = read_manifest(paths.round_folder(number)) or {}
    left_out = f", {len(manifest['quarantined'])} clients left out" if manifest["quarantined"] else ""
    return f"round {number}: ok, {len(manifest['files'])} files, recomputed to the same bytes{left_out}"
