"""Train one federated mode: read the clients' data, run the rounds, leave adapters and metrics.

A call with the configuration of a run that is there goes on where it stopped, at the granularity of one client's
update, and ends with the bytes of a run that was never interrupted.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedlora.config.train import TrainConfig
from fedlora.console import Progress, say
from fedlora.data.client_files import find_client_files
from fedlora.data.records import read_rows
from fedlora.engines.devices import DeviceClients
from fedlora.engines.rounds import FederatedRun, record_of
from fedlora.engines.simulation import SimulatedClients
from fedlora.engines.workbench import Workbench, make_workbench
from fedlora.engines.worker import Worker
from fedlora.errors import DataError, LockedError
from fedlora.federated.adapters import num_bytes
from fedlora.federated.modes import MODES, Mode
from fedlora.federated.sampling import cohort_size
from fedlora.files import make_folder
from fedlora.llm.adapter_files import make_peft_config
from fedlora.llm.examples import encode_rows
from fedlora.llm.layout import Layout
from fedlora.llm.lora import is_fan_in_fan_out, make_adapter
from fedlora.paths import RunPaths
from fedlora.runs.metrics_log import MetricsLog
from fedlora.runs.round_store import RoundStore
from fedlora.runs.run_folder import check_free, check_same, clear_run, read_run
from fedlora.runs.standing import Standing, find_standing, read_committed
from fedlora.stages.environment import check_environment, describe_environment, library_versions
from fedlora.stages.round_metrics import RoundMetrics
from fedlora.types import AdapterState, ClientFailure, ClientPool, RoundResult, Row


def run(config: TrainConfig) -> RunPaths:
    """Train all rounds of one experiment, or those that are left of it; returns where they lie."""
    paths = RunPaths(config.model_dir, config.exp_name)
    check_free(paths)
    files = find_client_files(config.data_path, config.num_clients, chosen=config.chosen("num_clients"))
    config = config.model_copy(update={"num_clients": len(files)})
    recorded = None
    if paths.run_file.exists() and not config.overwrite:
        check_same(paths, config)
        recorded = read_run(paths)
    # a bad row is found before the model is loaded; the rows themselves are read again when a client's turn comes
    for file in files:
        read_rows(file, may_be_empty=True)
    held_out = read_rows(Path(config.val_data_path)) if config.val_data_path else []
    layout = Layout.from_record(recorded["layout"]) if recorded else None
    bench = make_workbench(config, files, device=config.devices[0] if config.devices else config.device, layout=layout)
    training = Training(config, paths, bench, held_out, recorded)
    lock = FileLock(paths.lock_file, timeout=0)
    make_folder(paths.root)
    try:
        with lock:
            check_free(paths)
            if recorded is None:
                clear_run(paths)
            training.run()
    except Timeout:
        raise LockedError(f"{paths.root}: another process trains this run", hint="wait, or use another name") from None
    return paths


class Training:
    """One run from its clients' files, or from where it was interrupted, to its last round."""

    def __init__(
        self,
        config: TrainConfig,
        paths: RunPaths,
        bench: Workbench,
        held_out: Sequence[Row],
        recorded: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.paths = paths
        self.bench = bench
        self.lora = bench.lora
        self.trainer = bench.trainer
        self.clients = bench.examples
        self.held_out = encode_rows(held_out, bench.encoder, cutoff=config.cutoff_len).examples
        if held_out and not self.held_out:
            raise DataError(f"{config.val_data_path}: every response is empty", hint="give rows with answers")
        self.adapter = make_adapter(self.lora.shapes(), config.seed)
        self.run_facts = self._describe()
        if recorded is not None:
            self._check_unchanged(recorded)
        self.is_resumed = recorded is not None

    def run(self) -> None:
        """The rounds that are left, with progress; run.json says at the end which round validated best."""
        config, mode = self.config, MODES[self.config.federation_mode]
        standing = find_standing(self.paths, self.lora.shapes()) if self.is_resumed else None
        done = standing.number if standing else 0
        log = MetricsLog(self.paths.metrics_file)
        rows = log.go_on(done)
        store = self._make_store(log, standing)
        store.write_run(self.run_facts)
        self.bench.book.on_change = lambda layout: self._record_layout(store, layout)
        self._warn()
        metrics = RoundMetrics(self.trainer, self.clients, self.held_out, store, log)
        self._catch_up(metrics, standing, rows)
        with (
            Progress(f"train {config.exp_name} ({config.federation_mode})", self._rows_ahead(done)) as progress,
            self._open_pool(mode, store, progress.advance) as pool,
        ):
            federated = FederatedRun(mode, pool, store, config, self.adapter, start=standing)
            began = time.monotonic()
            for result in federated.rounds():
                _say_round(metrics.record(result, time.monotonic() - began), config.num_communication_rounds)
                began = time.monotonic()
        store.write_run({**self.run_facts, "state": "finished", "best_round": metrics.best})

    def _check_unchanged(self, recorded: Mapping[str, Any]) -> None:
        """The clients' files and the environment are those the run was begun with."""
        files = {client["client_id"]: client["sha256"] for client in recorded["clients"]}
        for client, facts in self.clients.facts.items():
            if files.get(client) != facts.sha256:
                raise DataError(
                    f"{self.clients.files[client]}: not the file that this run was begun with",
                    hint="restore it, or start the run anew with --overwrite",
                )
        then, now = ({**facts["environment"], **facts["versions"]} for facts in (recorded, self.run_facts))
        for change in check_environment(then, now, allow_drift=self.config.allow_drift):
            say(f"going on in another environment: {change}")

    def _catch_up(self, metrics: RoundMetrics, standing: Standing | None, rows: Sequence[Mapping[str, Any]]) -> None:
        """What an interrupted run had measured, and what it had not come to measure."""
        closed = [row for row in rows if row["kind"] == "round"]
        for row in closed:
            metrics.remember(row)
        if not any(row["round"] == 0 for row in closed):
            metrics.start()
        if standing is None:
            return
        say(f"going on behind round {standing.number} of {self.config.num_communication_rounds}")
        if not any(row["round"] == standing.number for row in closed):
            records = [record_of(update, 0) for update in read_committed(self.paths, standing.number, metrics.log)]
            failures = [
                ClientFailure(entry["client_id"], "diverged", entry["reason"])
                for entry in standing.manifest["quarantined"]
            ]
            result = RoundResult(standing.number, standing.global_adapter, records, failures)
            metrics.record(result, sum(record["seconds"] for record in records))

    @contextlib.contextmanager
    def _open_pool(self, mode: Mode, store: RoundStore, on_rows: Callable[[int], None]) -> Iterator[ClientPool]:
        """The clients of this process, and those of a worker process per further device."""
        local = SimulatedClients(self.trainer, mode.rule, self.clients, store, on_rows=on_rows)
        if len(self.config.devices) < 2:
            yield local
            return
        if mode.order != "parallel":
            say(f"{self.config.federation_mode} trains one client after another: only {self.config.devices[0]} is used")
            yield local
            return
        layout, facts, files = self.bench.book.layout, self.clients.facts, self.clients.files
        workers = [Worker(device, self.config, files, facts, layout) for device in self.config.devices[1:]]
        try:
            yield DeviceClients(local, workers, on_rows)
        finally:
            for worker in workers:
                worker.close()

    def _record_layout(self, store: RoundStore, layout: Layout) -> None:
        self.run_facts = {**self.run_facts, "layout": layout.record()}
        store.write_run(self.run_facts)

    def _make_store(self, log: MetricsLog, standing: Standing | None) -> RoundStore:
        peft_config = make_peft_config(
            self.lora.spec,
            self.config.base_model,
            fan_in_fan_out=is_fan_in_fan_out(self.bench.base.model),
            layers=list(self.lora.layers),
        )
        header = {key: self.run_facts[key] for key in ("exp_name", "mode", "base_model", "base_dtype", "versions")}
        return RoundStore(
            self.paths,
            shapes=self.lora.shapes(),
            peft_config=peft_config,
            header=header,
            log=log,
            parent_sha256=standing.manifest_sha256 if standing else None,
        )

    def _rows_ahead(self, done: int) -> int:
        """Rows the run will train on, about: cohorts are drawn round by round."""
        sizes = [facts.num_examples for facts in self.clients.facts.values() if facts.num_examples]
        config = self.config
        share = 1.0
        if sizes and config.client_selection_strategy != "all":
            share = cohort_size(config.client_selection_frac, len(sizes)) / len(sizes)
        return max(1, round(sum(sizes) * share * config.local_num_epochs * (config.num_communication_rounds - done)))

    def _describe(self) -> dict[str, Any]:
        return {
            "format": 1,
            "exp_name": self.config.exp_name,
            "mode": self.config.federation_mode,
            "state": "training",
            "base_model": self.config.base_model,
            "config": self.config.record(),
            "versions": library_versions(self.config.quantization),
            "environment": describe_environment(self.bench.base),
            "device": str(self.bench.base.device),
            "base_dtype": self.bench.base.dtype_name,
            "layout": self.bench.book.layout.record(),
            "lora_scaling": self.config.lora_scaling,
            "adapter": _size(self.adapter),
            "clients": [facts.record() for facts in self.clients.facts.values()],
        }

    def _warn(self) -> None:
        for client, facts in self.clients.facts.items():
            if not facts.num_examples:
                say(f"warning: client {client} ({facts.file}) has no row to train on and is never selected")
            elif facts.num_empty:
                say(f"client {client}: {facts.num_empty} rows with an empty response are left out")


def _size(adapter: AdapterState) -> dict[str, int]:
    return {"num_parameters": sum(value.numel() for value in adapter.values()), "num_bytes": num_bytes(adapter)}


def _say_round(row: Mapping[str, Any], rounds: int) -> None:
    held_out = f", held-out loss {row['val_loss']:.3f}" if "val_loss" in row else ""
    say(f"round {row['round']} of {rounds}: training loss {row['loss']:.3f}{held_out}, {row['seconds']:.0f} s")
    for failure in row["quarantined"]:
        say(f"  left out of the round: {failure['reason']}")
