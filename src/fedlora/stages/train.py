"""Train one federated mode: read the clients' data, run the rounds, leave adapters and metrics.

The held-out rows of `val_data_path` are only looked at, never trained on: their loss is measured
before the first round and after each, for the global adapter or, in `none`, for every client's.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import fedlora
from fedlora.config.train import TrainConfig
from fedlora.console import Progress, say
from fedlora.data.client_files import find_client_files
from fedlora.data.records import read_rows
from fedlora.engines.client_data import ClientData, prepare_client
from fedlora.engines.rounds import FederatedRun
from fedlora.engines.simulation import SimulatedClients
from fedlora.errors import DataError, LockedError
from fedlora.federated.adapters import num_bytes
from fedlora.federated.modes import MODES
from fedlora.federated.sampling import cohort_size
from fedlora.files import make_folder
from fedlora.llm.adapter_files import make_peft_config
from fedlora.llm.base_model import BaseModel, load_base_model
from fedlora.llm.examples import Example, encode_rows
from fedlora.llm.local_training import Trainer
from fedlora.llm.lora import LoraModel, LoraSpec, is_fan_in_fan_out, make_adapter
from fedlora.llm.prompts import PromptEncoder
from fedlora.paths import RunPaths
from fedlora.runs.round_store import RoundStore, check_free, clear_run
from fedlora.types import AdapterState, ClientId, RoundResult, Row


def run(config: TrainConfig) -> RunPaths:
    """Train all rounds of one experiment; returns where they lie."""
    paths = RunPaths(config.model_dir, config.exp_name)
    check_free(paths, overwrite=config.overwrite)
    files = find_client_files(config.data_path, config.num_clients, chosen=config.chosen("num_clients"))
    config = config.model_copy(update={"num_clients": len(files)})
    rows = [read_rows(file, may_be_empty=True) for file in files]
    held_out = read_rows(Path(config.val_data_path)) if config.val_data_path else []
    base = load_base_model(
        config.base_model, device=config.device, dtype=config.base_dtype, trust_remote_code=config.trust_remote_code
    )
    training = Training(config, paths, base, files, rows, held_out)
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
    """One run from its clients' rows to its last round."""

    def __init__(
        self,
        config: TrainConfig,
        paths: RunPaths,
        base: BaseModel,
        files: Sequence[Path],
        rows: Sequence[Sequence[Row]],
        held_out: Sequence[Row],
    ) -> None:
        self.config = config
        self.paths = paths
        self.base = base
        encoder = PromptEncoder(base.tokenizer, config.prompt_template)
        spec = LoraSpec(
            config.lora_r,
            config.lora_alpha,
            config.lora_scaling,
            config.lora_dropout,
            config.lora_target_modules,
            config.use_rslora,
        )
        self.lora = LoraModel(base.model, spec)
        self.trainer = Trainer(base, self.lora, config)
        self.clients: dict[ClientId, ClientData] = {
            client: prepare_client(client, file, client_rows, encoder, config)
            for client, (file, client_rows) in enumerate(zip(files, rows, strict=True))
        }
        self.held_out = encode_rows(held_out, encoder, cutoff=config.cutoff_len).examples
        if held_out and not self.held_out:
            raise DataError(f"{config.val_data_path}: every response is empty", hint="give rows with answers")
        self.adapter = make_adapter(self.lora.shapes(), config.seed)
        self.run_facts = self._describe()

    def run(self) -> None:
        """All rounds with progress; run.json says at the end which round validated best."""
        config, mode = self.config, MODES[self.config.federation_mode]
        store = self._make_store()
        store.write_run(self.run_facts)
        self._warn()
        started = self._validate_start()
        if started is not None:
            store.append_metrics({"kind": "round", "round": 0, "val_loss": started})
        best: dict[str, Any] | None = None
        with Progress(f"train {config.exp_name} ({config.federation_mode})", self._rows_ahead()) as progress:
            data = {client: facts.training for client, facts in self.clients.items()}
            pool = SimulatedClients(self.trainer, mode.rule, data, store, on_rows=progress.advance)
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

    def _make_store(self) -> RoundStore:
        peft_config = make_peft_config(
            self.lora.spec,
            self.config.base_model,
            fan_in_fan_out=is_fan_in_fan_out(self.base.model),
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
            validation = self._shared_validation()
            if validation:
                row["val_loss"] = self.trainer.validate(result.global_adapter, validation)
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
            examples = self.held_out or self.clients[client].validation.examples
            if examples:
                record["val_loss"] = self.trainer.validate(store.read_memory(client, result.round).adapter, examples)

    def _validate_start(self) -> float | None:
        examples = self._shared_validation()
        return self.trainer.validate(None, examples) if examples else None

    def _shared_validation(self) -> list[Example]:
        """The held-out rows; without them what the clients held back, all together."""
        own = [example for data in self.clients.values() for example in data.validation.examples]
        return self.held_out or own

    def _rows_ahead(self) -> int:
        """Rows the run will train on, about: cohorts are drawn round by round."""
        sizes = [len(data.training.examples) for data in self.clients.values() if data.training.examples]
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
            "versions": library_versions(),
            "device": str(self.base.device),
            "base_dtype": self.base.dtype_name,
            "lora_scaling": self.config.lora_scaling,
            "adapter": _size(self.adapter),
            "clients": [data.facts for data in self.clients.values()],
        }

    def _warn(self) -> None:
        for client, data in self.clients.items():
            if not data.training.examples:
                say(f"warning: client {client} ({data.facts['file']}) has no row to train on and is never selected")
            elif data.training.num_empty:
                say(f"client {client}: {data.training.num_empty} rows with an empty response are left out")


def library_versions() -> dict[str, str]:
    """Versions that a result depends on."""
    names = ("torch", "transformers", "safetensors")
    libraries = {name: metadata.version(name) for name in names}
    return {"fedlora": fedlora.__version__, "python": platform.python_version(), **libraries}


def _size(adapter: AdapterState) -> dict[str, int]:
    return {"num_parameters": sum(value.numel() for value in adapter.values()), "num_bytes": num_bytes(adapter)}


def _say_round(row: Mapping[str, Any], rounds: int) -> None:
    held_out = f", held-out loss {row['val_loss']:.3f}" if "val_loss" in row else ""
    say(f"round {row['round']} of {rounds}: training loss {row['loss']:.3f}{held_out}, {row['seconds']:.0f} s")
    for failure in row["quarantined"]:
        say(f"  left out of the round: {failure['reason']}")
