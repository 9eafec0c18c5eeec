"""Verify a run: every hash of every round, and every aggregate once more from the clients' files.

Neither the base model nor the clients' rows are needed, and nothing is written; a base model that is on this machine is
compared with the one that the run was trained on. A round that cannot be recomputed
because a file that it needs is damaged is reported; the later rounds are still checked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.config.runs import VerifyConfig
from fedlora.config.train import TrainConfig
from fedlora.console import Progress, printable
from fedlora.engines.private_run import make_private_run
from fedlora.engines.replay import replay_round
from fedlora.errors import StorageError, UsageError
from fedlora.federated.adapters import Shapes
from fedlora.federated.ranks import shapes_at
from fedlora.files import sha256_of_json
from fedlora.llm.adapter_files import BIN_NAME, GLOBAL_BIN_NAME, read_shapes
from fedlora.llm.base_identity import find_identity
from fedlora.methods.choosing import LoadedMethod, choose_method
from fedlora.paths import RunPaths
from fedlora.plain_text import counted
from fedlora.results import Result
from fedlora.runs.audit import describe_open_round, find_metrics_faults, find_round_faults
from fedlora.runs.base_chain import BaseChain
from fedlora.runs.checking import load_manifest
from fedlora.runs.reader import RunReader
from fedlora.runs.recorded_base import HINT, RecordedBase
from fedlora.runs.run_folder import check_trained, read_run, read_training
from fedlora.runs.run_records import Manifest, RunRecord
from fedlora.runs.secret_file import load_secret


@dataclass(frozen=True, repr=False)
class Verification(Result):
    """What was looked at, in order, each with the faults that were found there."""

    checked: tuple[tuple[str, tuple[str, ...]], ...]

    def text(self) -> str:
        """One line for each, its faults below it."""
        lines = [line for what, faults in self.checked for line in (what, *(f"  {fault}" for fault in faults))]
        return "\n".join(map(printable, lines))

    def as_dict(self) -> dict[str, Any]:
        return {"checked": [{"what": what, "faults": list(faults)} for what, faults in self.checked]}


def run(config: VerifyConfig) -> Verification:
    """Look at every round and at the files beside them.

    Raises StorageError with the first fault when there is one, UsageError when the secret of a private run is not
    here; the error's `result` is what was found.
    """
    paths = RunPaths(config.model_dir, config.exp_name)
    recorded = read_run(paths)
    check_trained(paths, recorded)
    train = read_training(recorded, config.method_row or config.federation_mode, allow_drift=config.allow_drift)
    missing = _find_missing_secret(recorded)
    checked = []
    with Progress(f"verify {config.exp_name}", len(paths.committed_rounds()) + 2, "checks") as progress:
        for what, found in itertools.chain(_look_at_base(config, recorded), _look(paths, recorded, train)):
            checked.append((what, tuple(found)))
            progress.advance(note=what)
    verification = Verification(tuple(checked))
    if faults := [fault for _, found in checked for fault in found]:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise StorageError(
            f"{faults[0]}{more}",
            hint="restore the file from a copy, or repeat the train command: it trains again, to the same bytes, what "
            "the run needs to resume; --overwrite trains everything again",
            result=verification,
        )
    if missing is not None:
        raise UsageError(
            f"all files match their hashes, but no round was recomputed: {missing}",
            hint=missing.hint,
            result=verification,
        )
    return verification


def _look(paths: RunPaths, recorded: RunRecord, train: TrainConfig) -> Iterator[tuple[str, list[str]]]:
    """What is found, round by round, then in the files beside the rounds."""
    identity = sha256_of_json(train.identity())
    method = choose_method(train, recorded.more.get("hyperparameters"))
    rounds = paths.committed_rounds()
    missing = sorted(set(range(1, max(rounds, default=0) + 1)) - set(rounds))
    if missing:
        yield "rounds", [f"{paths.round_folder(number)} is missing" for number in missing]
    damaged, chain = set(missing), BaseChain(paths)
    for number in rounds:
        faults = find_round_faults(paths, number, identity)
        if faults:
            damaged.add(number)
            yield f"round {number}: damaged", faults
        elif damaged:
            first = min(damaged)
            yield f"round {number}: its files are whole; not computed again, since round {first} is damaged", []
        elif _find_missing_secret(recorded) is not None:
            yield f"round {number}: its files are whole; not computed again without the run's secret", []
        else:
            faults = _compute_again(paths, train, method, recorded, number, chain)
            damaged |= {number} if faults else set()
            yield _describe_round(paths, number, faults), faults
    faults = find_metrics_faults(paths)
    yield f"metrics.jsonl: {'damaged' if faults else 'ok'}", faults
    for folder in sorted(paths.root.glob("*.partial")):
        yield f"{folder.name}: open, {describe_open_round(folder)}", []


def _look_at_base(config: VerifyConfig, recorded: RunRecord) -> Iterator[tuple[str, list[str]]]:
    """Whether the base model at its place is the one that the run was trained on."""
    base = RecordedBase.of(recorded, config.base_model)
    if config.verify_base:
        base.check_records_every_byte()
    if base.identity is None:
        yield "base model: not compared, since the run is older than identities of base models", []
    elif (found := find_identity(base.place, every_byte=config.verify_base)) is not None:
        fault = base.find_fault(found)
        yield f"base model: {'another one' if fault else 'ok'}", [fault] if fault else []
    elif config.base_model or config.verify_base:
        raise UsageError(f"base_model={base.place!r} is not on this machine", hint=HINT)
    else:
        yield "base model: not compared, since it is not on this machine", []


def _find_missing_secret(recorded: RunRecord) -> UsageError | None:
    """Why the noise of a run with client-level privacy cannot be drawn again, None when it can or there is none."""
    if recorded.config.get("dp_noise_multiplier") is None:
        return None
    try:
        load_secret(recorded.secret_id)
    except UsageError as error:
        return error
    return None


def _compute_again(
    paths: RunPaths,
    config: TrainConfig,
    method: LoadedMethod,
    recorded: RunRecord,
    number: int,
    chain: BaseChain,
) -> list[str]:
    manifest = load_manifest(paths.round_folder(number))
    # a client's own adapter may be of another rank
    shapes = shapes_at(_find_shapes(paths, manifest), config.lora_r)
    sizes = recorded.training_clients
    secret = load_secret(recorded.secret_id) if config.dp_noise_multiplier is not None else None
    private = make_private_run(config, sizes, secret)
    return replay_round(config, method, RunReader(paths, shapes), list(sizes), manifest, chain, private)


def _find_shapes(paths: RunPaths, manifest: Manifest) -> Shapes:
    """From any client's adapter of the round; a private round may have none, and then the nearest file that has."""
    if manifest.shapes:  # of clients on other machines, whose adapters may have stayed there
        return {key: tuple(shape) for key, shape in manifest.shapes.items()}
    for place in sorted(paths.committed_rounds(), key=lambda other: (other != manifest.round, other)):
        folder = paths.round_folder(place)
        for name in (f"*/{BIN_NAME}", GLOBAL_BIN_NAME):
            if found := min(folder.glob(name), default=None):
                return read_shapes(found)
    raise StorageError(f"{paths.root}: no round has an adapter", hint="train on: a later round will have one")


def _describe_round(paths: RunPaths, number: int, faults: Sequence[str]) -> str:
    if faults:
        return f"round {number}: its files are whole, but they are not what the run computes"
    manifest = load_manifest(paths.round_folder(number))
    left_out = f", {counted(len(manifest.quarantined), 'client')} left out" if manifest.quarantined else ""
    return f"round {number}: ok, {counted(len(manifest.files), 'file')}, recomputed to the same bytes{left_out}"
