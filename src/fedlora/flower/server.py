"""Train one federated method with clients on other machines: the server's side of `train`.

It is the same run: the same loop, the same files under `model_dir`, the same laws of resume. Only the pool differs,
and with it what is here to be read: no rows but those of `val_data_path`, and unless these are given no weights of the
base model either, for the server adds adapters up and never computes with them.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlora.config.target_names import REGULAR
from fedlora.config.train import TrainConfig
from fedlora.console import log_lines, put
from fedlora.data.client_facts import ClientFacts, ClientFile
from fedlora.data.held_out import read_validation_rows
from fedlora.engines.client_data import ClientExamples
from fedlora.engines.cohorts import resolve_method
from fedlora.engines.workbench import Workbench, make_workbench
from fedlora.errors import FedloraError, UsageError
from fedlora.files import read_json, sha256_of_json, write_json
from fedlora.flower.flower_config import check_installed
from fedlora.flower.owners import NodeOwners
from fedlora.flower.pool import FlowerClients, Patience
from fedlora.flower.request import exit_line
from fedlora.flower.roster import Roster
from fedlora.llm.base_identity import BaseIdentity
from fedlora.llm.layout import Layout
from fedlora.methods.choosing import LoadedMethod
from fedlora.paths import RunPaths
from fedlora.runs.base_chain import read_increment
from fedlora.runs.lock import hold_run
from fedlora.runs.run_folder import check_free, check_same, clear_run, read_run
from fedlora.runs.run_records import RunRecord
from fedlora.stopping import remember_signals
from fedlora.training.live_run import Training
from fedlora.training.run_progress import RunProgress
from fedlora.types import ClientId, ClientPool


@dataclass(frozen=True)
class Waits:
    """How long the server waits: for all clients at the start, in seconds, and in each wave."""

    start: float = 600.0
    wave: Patience = field(default_factory=Patience)


def serve(grid: Any, request: str) -> None:
    """Run the request of `make_request` in the server app; raises what `run` raises, after printing its exit code.

    Flower does not pass an app's exit code to the submitter, but its output, so the code is a line of the output.
    """
    try:
        asked = json.loads(request)
        if ":" in str(asked["config"].get("federation_mode", "")):
            raise UsageError("federation_mode names a file or module", hint="name an installed method")
        config, waits = TrainConfig.make(asked["config"]), asked["waits"]
        patience = Patience(absent=waits["absent"], wave=waits["wave"], again=waits["start"])
        with remember_signals(), log_lines("fedlora"):
            paths = run(grid, config, Waits(start=waits["start"], wave=patience))
    except FedloraError as error:
        _tell(exit_line(error.exit_code, str(error), error.hint))
        raise
    _tell(exit_line(0, str(paths.root)))


def _tell(line: str) -> None:
    # on a line of its own, whatever was printed last
    put(f"\n{line}\n")


def run(grid: Any, config: TrainConfig, waits: Waits | None = None) -> RunPaths:
    """Train all rounds, or those that are left, with the nodes of a Flower grid; returns where they lie."""
    if config.method.pools_rows:
        raise UsageError(
            f"federation_mode={config.federation_mode} brings rows together, and here they stay where they are"
        )
    if config.is_private:
        raise UsageError(
            "differential privacy needs a secret at every client, which nodes do not have yet",
            hint="leave the dp_ flags out, or train in one process with `fedlora train`",
        )
    check_installed(config)
    if config.devices:
        raise UsageError("devices are the nodes' own business", hint="leave --devices out")
    if any(target.startswith(REGULAR) for target in config.lora_target_modules):
        raise UsageError(
            "lora_target_modules: a node matches no regular expression of a server",
            hint="name the layers, or use wildcards such as *.mlp.*",
        )
    paths = RunPaths(config.model_dir, config.exp_name)
    check_free(paths)
    with hold_run(paths):
        recorded, place = None, ""
        if paths.run_file.exists() and not config.overwrite:
            recorded = read_run(paths)
            base = check_same(paths, config)
            config, place = config.model_copy(update={"base_model": base.name}), base.place
        _train(grid, config, paths, recorded, waits or Waits(), place)
    return paths


def _train(
    grid: Any, config: TrainConfig, paths: RunPaths, recorded: RunRecord | None, waits: Waits, place: str
) -> None:
    rules = config.read_rules
    held_out = read_validation_rows(config.val_data_path, rules)
    method = resolve_method(config, range(config.num_clients), recorded)
    bench = _open_bench(config, recorded, place, needs_weights=bool(held_out))
    shapes = bench.lora.shapes()
    digest = sha256_of_json({key: list(shape) for key, shape in shapes.items()})
    run_id = secrets.token_hex(16) if recorded is None else _read_run_id(paths)
    known = recorded.base_identity if recorded else None
    base = BaseIdentity.from_record(known) or bench.base.identity
    roster = Roster(grid, config, digest, _read_facts(recorded), base=base, run_id=run_id)
    roster.wait(config.num_clients, waits.start, waits.wave.poll)
    # what clients hold back is validated where it lies
    told = {client: replace(facts, num_validation=0) for client, facts in sorted(roster.facts.items())}
    clients = {client: ClientFile(Path(facts.file), facts) for client, facts in told.items()}
    # without weights the server knows their identity from the nodes
    base = replace(bench.base, identity=roster.base)
    bench = replace(bench, base=base, examples=ClientExamples(clients, bench.encoder, config, None))

    def open_pool(method: LoadedMethod, progress: RunProgress) -> ClientPool:
        return FlowerClients(
            grid,
            roster,
            config,
            method.client,
            shapes,
            patience=waits.wave,
            on_rows=progress.advance,
            on_begin=progress.begin,
            increment_of=lambda number: read_increment(paths, number),
        )

    owners = NodeOwners(grid, roster, config, waits.wave)
    training = Training(config, method, paths, bench, held_out, recorded, remote=open_pool, owners=owners)
    if recorded is None:
        clear_run(paths)
        write_json(paths.nodes_file, {"run_id": run_id})
    training.run()


def _open_bench(config: TrainConfig, recorded: RunRecord | None, place: str, *, needs_weights: bool) -> Workbench:
    """The base, or its outline; no client trains here, so without validation there is no layout to plan."""
    layout = Layout.from_record(recorded.layout) if recorded else None if needs_weights else Layout(1)
    return make_workbench(
        config, {}, device=config.device, place=place, layout=layout, outline=not needs_weights, weights_here=False
    )


def _read_run_id(paths: RunPaths) -> str:
    """The name by which the nodes know the run; none for one that was begun by a release without."""
    if not paths.nodes_file.is_file():
        return ""
    facts = read_json(paths.nodes_file)
    if not isinstance(facts, dict) or not isinstance(facts.get("run_id"), str):
        raise UsageError(
            f"{paths.nodes_file}: holds no run_id", hint="restore the file, or start again with --overwrite"
        )
    return facts["run_id"]


def _read_facts(recorded: RunRecord | None) -> dict[ClientId, ClientFacts] | None:
    """The clients of a recorded run; None for a new run."""
    if recorded is None:
        return None
    return {facts.client_id: facts for facts in recorded.clients}
