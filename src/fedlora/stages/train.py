"""Train one federated mode: read the clients' data, run the rounds, leave adapters and metrics.

The held-out rows of `val_data_path` are only looked at, never trained on: their loss is measured
before the first round and after each, for the global adapter or, in `none`, for every client's.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import fedlora
from fedlora.config.train import Quantization, TrainConfig
from fedlora.console import Progress, say
from fedlora.data.client_files import find_client_files
from fedlora.data.records import read_rows
from fedlora.engines.devices import DeviceClients
from fedlora.engines.rounds import FederatedRun
from fedlora.engines.simulation import SimulatedClients
from fedlora.engines.workbench import Workbench, make_workbench
from fedlora.engines.worker import Worker
from fedlora.errors import DataError, LockedError
from fedlora.federated.adapters import num_bytes
from fedlora.federated.modes import MODES, Mode
from fedlora.federated.sampling import cohort_size
from fedlora.files import make_folder
from fedlora.llm.adapter_files import make_peft_config
from fedlora.llm.examples import Example, encode_rows
from fedlora.llm.layout import Layout
from fedlora.llm.lora import is_fan_in_fan_out, make_adapter
from fedlora.paths import RunPaths
from fedlora.runs.round_store import RoundStore, check_free, clear_run
from fedlora.types import AdapterState, ClientPool, RoundResult, Row


def run(config: TrainConfig) -> RunPaths:
    """Train all rounds of one experiment; returns where they lie."""
    paths = RunPaths(config.model_dir, config.exp_name)
    check_free(paths, overwrite=config.overwrite)
    files = find_client_files(config.data_path, config.num_clients, chosen=config.chosen("num_clients"))
    config = config.model_copy(update={"num_clients": len(files)})
    # a bad row is found before the model is loaded; the rows themselves are read again when a client's turn comes
    for file in files:
        read_rows(file, may_be_empty=True)
    held_out = read_rows(Path(config.val_data_path)) if config.val_data_path else []
    bench = make_workbench(config, files, device=config.devices[0] if config.devices else config.device)
    training = Training(config, paths, bench, held_out)
    lock = FileLock(paths.lock_file, timeout=0)
    make_folder(paths.root)
    try:
        with lock:
            check_free(paths, overwrite=config.overwrite)
            clear_run(paths)
            training.run()
    except Timeout:
        raise LockedError(f"{paths.root}: another process trains this run", hint="wait, or use another name") from None
    return paths


class Training:
    """One run from its clients' files to its last round."""

    def __init__(self, config: TrainConfig, paths: RunPaths, bench: Workbench, held_out: Sequence[Row]) -> None:
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

    def run(self) -> None:
        """All rounds with progress; run.json says at the end which round validated best."""
        config, mode = self.config, MODES[self.config.federation_mode]
        store = self._make_store()
        store.write_run(self.run_facts)
        self.bench.book.on_change = lambda layout: self._record_layout(store, layout)
        self._warn()
        started = self._validate_start()
        if started is not None:
            store.append_metrics({"kind": "round", "round": 0, "val_loss": started})
        best: dict[str, Any] | None = None
        with (
            Progress(f"train {config.exp_name} ({config.federation_mode})", self._rows_ahead()) as progress,
            self._open_pool(mode, store, progress.advance) as pool,
        ):
            federated = FederatedRun(mode, pool, store, config, self.adapter)
            began = time.monotonic()
            for result in federated.rounds():
                seconds = time.monotonic() - began
                row = self._record(store, result, seconds)
                if "val_loss" in row and (best is None or row["val_loss"] < best["val_loss"]):
                    best = {"round": result.round, "val_loss": row["val_loss"]}
                _say_round(row, config.num_communication_rounds)
                began = time.monotonic()
        store.write_run({**self.run_facts, "state": "finished", "best_round": best})

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

    def _make_store(self) -> RoundStore:
        peft_config = make_peft_config(
            self.lora.spec,
            self.config.base_model,
            fan_in_fan_out=is_fan_in_fan_out(self.bench.base.model),
            layers=list(self.lora.layers),
        )
        header = {key: self.run_facts[key] for key in ("exp_name", "mode", "base_model", "base_dtype", "versions")}
        return RoundStore(self.paths, shapes=self.lora.shapes(), peft_config=peft_config, header=header)

    def _record(self, store: RoundStore, result: RoundResult, seconds: float) -> dict[str, Any]:
        """Validate what the round left and write its lines of metrics; returns the round's line."""
        records = [dict(record) for record in result.records]
        row: dict[str, Any] = {
            "kind": "round",
            "round": result.round,
            "cohort": [record["client_id"] for record in records],
            "quarantined": [{"client_id": fail.client_id, "reason": fail.reason} for fail in result.failures],
            "loss": sum(r["loss"] * r["num_response_tokens"] for r in records)
            / sum(r["num_response_tokens"] for r in records),
            "seconds": seconds,
        }
        for name in ("num_steps", "num_tokens", "bytes_down", "bytes_up"):
            row[name] = sum(record[name] for record in records)
        if result.global_adapter is not None:
            if self._has_validation():
                row["val_loss"] = self.trainer.validate(result.global_adapter, self._shared_validation())
        else:
            self._validate_clients(store, result, records)
            losses = [record["val_loss"] for record in records if "val_loss" in record]
            if losses:
                row["val_loss"] = sum(losses) / len(losses)
        for record in records:
            store.append_metrics(record)
        store.append_metrics(row)
        return row

    def _validate_clients(self, store: RoundStore, result: RoundResult, records: list[dict[str, Any]]) -> None:
        """Without a global adapter every client of the cohort is validated on the held-out rows, or on its own."""
        for record in records:
            client = record["client_id"]
            examples = self.held_out or self.clients.own_validation(client)
            if examples:
                record["val_loss"] = self.trainer.validate(store.read_memory(client, result.round).adapter, [examples])

    def _validate_start(self) -> float | None:
        return self.trainer.validate(None, self._shared_validation()) if self._has_validation() else None

    def _has_validation(self) -> bool:
        return bool(self.held_out) or any(facts.num_validation for facts in self.clients.facts.values())

    def _shared_validation(self) -> Iterable[list[Example]]:
        """The held-out rows; without them what the clients held back, one client after another."""
        return [self.held_out] if self.held_out else self.clients.validation()

    def _rows_ahead(self) -> int:
        """Rows the run will train on, about: cohorts are drawn round by round."""
        sizes = [facts.num_examples for facts in self.clients.facts.values() if facts.num_examples]
        config = self.config
        share = 1.0
        if sizes and config.client_selection_strategy != "all":
            share = cohort_size(config.client_selection_frac, len(sizes)) / len(sizes)
        return max(1, round(sum(sizes) * share * config.local_num_epochs * config.num_communication_rounds))

    def _describe(self) -> dict[str, Any]:
        return {
            "format": 1,
            "exp_name": self.config.exp_name,
            "mode": self.config.federation_mode,
            "state": "training",
            "base_model": self.config.base_model,
            "config": self.config.record(),
            "versions": library_versions(self.config.quantization),
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


def library_versions(quantization: Quantization) -> dict[str, str]:
    """Versions that a result depends on."""
    names = ["torch", "transformers", "safetensors"]
    if quantization != "none":
        names.append("bitsandbytes")
    libraries = {name: metadata.version(name) for name in names}
    return {"fedlora": fedlora.__version__, "python": platform.python_version(), **libraries}


def _size(adapter: AdapterState) -> dict[str, int]:
    return {"num_parameters": sum(value.numel() for value in adapter.values()), "num_bytes": num_bytes(adapter)}


def _say_round(row: Mapping[str, Any], rounds: int) -> None:
    held_out = f", held-out loss {row['val_loss']:.3f}" if "val_loss" in row else ""
    say(f"round {row['round']} of {rounds}: training loss {row['loss']:.3f}{held_out}, {row['seconds']:.0f} s")
    for failure in row["quarantined"]:
        say(f"  left out of the round: {failure['reason']}")
