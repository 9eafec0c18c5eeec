"""A comparison at work: its data, the rounds that fit into the budget, the learning rates, the runs.

Everything is done in one order that the experiment alone decides, and every step finds what an earlier call has done.
So an interrupted comparison resumes and ends with the same result.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from fedlora.comparing.compared_run import FAILED, Laboratory, Record
from fedlora.comparing.data_sets import DataSets
from fedlora.comparing.experiment import Cell, DataSet, cells_of, train_config_of
from fedlora.comparing.round_budget import RowCount, Share, fit_rounds
from fedlora.config.train import TrainConfig
from fedlora.console import collect_lines
from fedlora.data.client_facts import ClientFile, read_client_files
from fedlora.data.client_files import find_client_files
from fedlora.engines.client_data import ClientExamples
from fedlora.engines.workbench import make_workbench
from fedlora.errors import FedloraError, StorageError, UsageError
from fedlora.evaluation.own_loss import mean_own_loss
from fedlora.federated.adapters import make_adapter
from fedlora.llm.examples import make_encoder
from fedlora.planning.probe import run_probe
from fedlora.types import ClientId

Advance = Callable[[int, str], None]


class Comparing:
    """One experiment and its data sets."""

    def __init__(self, laboratory: Laboratory, data: DataSets) -> None:
        self.laboratory = laboratory
        self.config = laboratory.config
        self._data = data
        self._counts: dict[tuple[str, str], dict[ClientId, RowCount]] = {}
        self._costs: dict[tuple[str, str], float] = {}
        self._refused: dict[tuple[str, str], FedloraError] = {}

    def make_plan(self) -> dict[str, Any]:
        """How many runs there are, how many are done, which cannot be, and what they should take."""
        config = self.config
        rows, names, known = [], set(), 0
        for cell in cells_of(config):
            try:
                shares = {seed: self._share(cell, seed) for seed in config.seeds}
                for candidates in self._names(cell):
                    known += candidates not in names and any(map(self.laboratory.find, candidates))
                    names.add(candidates)
            except StorageError:
                raise
            except FedloraError as error:
                self._refused[cell.key] = error
                continue
            rows.append(
                {
                    "setting": cell.setting.label,
                    "method": cell.contender.name,
                    "rounds": [share.rounds for share in shares.values()],
                    config.budget_unit: [share.expected for share in shares.values()],
                    "learning_rates": list(config.rates_of(cell.contender)),
                }
            )
        return {
            "name": config.name,
            "config": self._describe(),
            "rows": rows,
            "refused": [
                {"setting": setting, "method": method, "reason": str(error), "hint": error.hint}
                for (setting, method), error in self._refused.items()
            ],
            "runs": len(names),
            "done": known,
            "silos": self._describe_silos(),
            "seconds_per_run": self._estimate_seconds() if known < len(names) else None,
        }

    def do_runs(self, advance: Advance) -> list[dict[str, Any]]:
        """Every cell's runs, each counted with `advance` as it is done; what is known of them, cell by cell."""
        done: set[str] = set()

        def count(name: str, note: str) -> None:
            if name not in done:
                done.add(name)
                advance(1, note)

        return [self._do_cell(cell, count) for cell in cells_of(self.config)]

    def _do_cell(self, cell: Cell, count: Callable[[str, str], None]) -> dict[str, Any]:
        found: dict[str, Any] = {
            "setting": cell.setting.label,
            "values": dict(cell.setting.values),
            "method": cell.contender.name,
            "mode": cell.contender.mode,
            "learning_rate": None,
            "sweep": [],
            "runs": [],
            "base": [],
        }
        if cell.key in self._refused:
            return {**found, "refused": str(self._refused[cell.key])}
        rates = self.config.rates_of(cell.contender)
        rate = min(rates)
        if len(rates) > 1:
            found["sweep"] = [self._try_rate(cell, each, count) for each in rates]
            sound = [entry for entry in found["sweep"] if entry["loss"] is not None]
            if not sound:
                return {**found, "refused": "no learning rate gave a result: " + found["sweep"][0]["reason"]}
            rate = min(sound, key=lambda entry: (entry["loss"], entry["learning_rate"]))["learning_rate"]
        found["learning_rate"] = rate
        for seed in self.config.seeds:
            run, record = self._train_within(cell, seed, rate)
            data = self._data.find(cell.setting, seed)
            if record["state"] != FAILED:
                record = self.laboratory.test(run, data)
            if record["state"] != FAILED:
                found["base"].append(self.laboratory.test_base(run, data))
            found["runs"].append(record)
            count(run.exp_name, f"{cell.contender.name} {cell.setting.label}".strip())
        for seed in self.config.seeds:
            for each in rates:
                self.laboratory.forget(self._make_run(cell, seed, each).exp_name)
        return found

    def _try_rate(self, cell: Cell, rate: float, count: Callable[[str, str], None]) -> dict[str, Any]:
        """The validation loss of a learning rate, the mean over the seeds of the sweep; none when a run failed."""
        losses, reason = [], ""
        for seed in self.config.seeds[: self.config.sweep_seeds]:
            run, record = self._train_within(cell, seed, rate)
            if record["state"] == FAILED:
                reason = f"seed {seed}: {record['reason']}"
            else:
                losses.append(mean_own_loss(record["validation"], record.get("validation_shares", record["shares"])))
            count(run.exp_name, f"{cell.contender.name} {cell.setting.label}, learning rate {rate:g}")
        sound = not reason and all(map(math.isfinite, losses))
        mean = sum(losses) / len(losses) if sound else None
        return {"learning_rate": rate, "loss": mean, "reason": reason}

    def _train_within(self, cell: Cell, seed: int, rate: float) -> tuple[TrainConfig, Record]:
        """A run that took no more than the budget: when it took more than its rows say, the next has fewer rounds."""
        unit, budget = f"num_{self.config.budget_unit}", self.config.budget
        run = self._make_run(cell, seed, rate)
        while True:
            record = self.laboratory.train(run, self._data.find(cell.setting, seed))
            # private cohorts are drawn in secret: they take the budget on average
            if record["state"] == FAILED or run.is_private or record["spent"][unit] <= budget:
                return run, record
            self.laboratory.forget(run.exp_name)
            expected = self._share(cell, seed).expected
            self._costs[cell.key] = max(self._costs.get(cell.key, 1.0), record["spent"][unit] / expected)
            try:
                run = self._make_run(cell, seed, rate)
            except UsageError as error:
                # it costs so much more than its rows that not even one round fits
                return run, {"run": run.exp_name, "seed": seed, "state": FAILED, "reason": str(error)}

    def _make_run(self, cell: Cell, seed: int, rate: float) -> TrainConfig:
        rounds, data = self._share(cell, seed).rounds, self._data.find(cell.setting, seed)
        bases = self.laboratory.bases
        return train_config_of(self.config, cell, seed=seed, rate=rate, rounds=rounds, data=data, bases=bases)

    def _names(self, cell: Cell) -> list[tuple[str, ...]]:
        """The runs of a cell, each as the names it may have: the learning rate of the further seeds is chosen later."""
        rates = self.config.rates_of(cell.contender)
        swept = self.config.sweep_seeds if len(rates) > 1 else 0
        runs: list[tuple[str, ...]] = []
        for number, seed in enumerate(self.config.seeds):
            named = tuple(self._make_run(cell, seed, rate).exp_name for rate in rates)
            runs += [(name,) for name in named] if number < swept else [named]
        return runs

    def _share(self, cell: Cell, seed: int) -> Share:
        """The rounds of a cell under a seed."""
        data = self._data.find(cell.setting, seed)
        # of as many rounds as any method asks for: how many it will be is what is counted here
        rate = self.config.rates_of(cell.contender)[0]
        bases = self.laboratory.bases
        config = train_config_of(self.config, cell, seed=seed, rate=rate, rounds=sys.maxsize, data=data, bases=bases)
        return fit_rounds(
            config,
            self._count_rows(config, data),
            unit=self.config.budget_unit,
            budget=self.config.budget,
            cost=self._costs.get(cell.key, 1.0),
        )

    def _count_rows(self, config: TrainConfig, data: DataSet) -> dict[ClientId, RowCount]:
        key = (data.digest, f"{config.prompting.record()} {config.cutoff_len} {config.trained_tokens}")
        if key not in self._counts:
            encoder = make_encoder(self._load_base(config).tokenizer, config.prompting)
            examples = ClientExamples(_read_clients(config, data), encoder, config, None)
            counted = {client: examples.count_tokens(client) for client in examples.clients()}
            self._counts[key] = {
                client: RowCount(facts.num_examples, facts.num_tokens) for client, facts in counted.items()
            }
        return self._counts[key]

    def _load_base(self, config: TrainConfig) -> Any:
        return self.laboratory.base.load(
            config.base_model,
            quantization=config.quantization,
            device=config.devices[0] if config.devices else config.device,
            dtype=config.base_dtype,
            trust_remote_code=config.trust_remote_code,
        )

    def _estimate_seconds(self) -> float | None:
        """Seconds that a run trains, after two steps of the first one's first client; None when none can be tried."""
        for cell in cells_of(self.config):
            if cell.key in self._refused:
                continue
            seed = self.config.seeds[0]
            data = self._data.find(cell.setting, seed)
            config = self._make_run(cell, seed, self.config.rates_of(cell.contender)[0])
            counts = self._count_rows(config, data)
            clients = _read_clients(config, data)
            with collect_lines():
                quiet = config.model_copy(update={"token_cache": False})
                device = config.devices[0] if config.devices else config.device
                bench = make_workbench(quiet, clients, device=device, load=self.laboratory.base.load)
                probe = run_probe(bench, quiet, min(counts), make_adapter(bench.lora.shapes(), 0))
            per_step = sum(row.num_tokens for row in counts.values()) / sum(
                math.ceil(row.num_examples / config.local_batch_size) for row in counts.values()
            )
            tokens = self.config.budget * (per_step if self.config.budget_unit == "steps" else 1)
            return round(tokens * probe.seconds / probe.num_tokens, 1)
        return None

    def _describe_silos(self) -> dict[str, Any] | None:
        """The clients of a folder of silos and how their rows are divided under the first seed; None without one, and
        where nothing can be held out."""
        if self.config.silos is None or len(self._refused) == len(cells_of(self.config)):
            return None
        facts = self._data.find(self.config.settings()[0], self.config.seeds[0]).silos
        return asdict(facts) if facts is not None else None

    def _describe(self) -> Mapping[str, Any]:
        """The experiment as asked for, in JSON values; where it lies and what a call only shows is left out."""
        left_out = {"output_dir", "plan", "retry", "keep_runs", "modes", "federation_mode"}
        given = self.config.model_dump(mode="json", exclude=left_out)
        methods = [{"name": one.name, "mode": one.mode, **one.fields} for one in self.config.contenders()]
        for described, one in zip(methods, self.config.contenders(), strict=True):
            described |= {"source": one.method.source.record()} if one.method.source else {}
        given["data"] = given.pop("data_path")
        held_out = {name: value for name in ("test_share", "test_file_path") if (value := given.pop(name))}
        return {**given, **held_out, "modes": methods}


def _read_clients(config: TrainConfig, data: DataSet) -> dict[ClientId, ClientFile]:
    with collect_lines():
        files = find_client_files(data.folder, data.num_clients, chosen=True)
        return read_client_files(dict(enumerate(files)), config)
