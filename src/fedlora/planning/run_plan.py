"""The plan of a run as JSON values: its costs, and the faults of its data.

It goes the way of `train` up to the first round, through the same functions, so that what `train` would refuse is
refused here with the same words. Nothing is written; the token cache is neither read nor filled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedlora.config.judge_models import judges_at_endpoint
from fedlora.config.names import spell
from fedlora.config.plan import PlanConfig
from fedlora.config.train import TrainConfig
from fedlora.console import say
from fedlora.data.client_facts import read_client_files
from fedlora.data.client_files import client_files_of
from fedlora.data.client_names import shown_client
from fedlora.data.doctor import Finding, Silo, examine_rows, examine_shortened, examine_skew
from fedlora.data.held_out import read_validation_rows
from fedlora.engines.cohorts import find_cohort_doubts, resolve_method
from fedlora.errors import FedloraError, TrainingError
from fedlora.evaluation.judge.judge_forecast import forecast_judging
from fedlora.evaluation.judge.judge_statistics import smallest_difference
from fedlora.evaluation.judge.spending import judge_prices
from fedlora.federated.adapters import num_bytes
from fedlora.federated.partition import label_skew
from fedlora.federated.privacy.budget import make_budget
from fedlora.llm.adapter_files import to_bin, to_safetensors
from fedlora.llm.examples import encode_rows
from fedlora.llm.footprint import Footprint, count_room, count_weights, estimate_footprint, read_program
from fedlora.paths import RunPaths
from fedlora.planning.forecast import RunForecast, Work, count_run_units, draw_waves, forecast_run, measure_epoch
from fedlora.planning.plan_tests import find_tests
from fedlora.planning.probe import Probe, run_probe
from fedlora.planning.run_warnings import examine_cohorts, examine_probe, examine_run, free_bytes
from fedlora.planning.shown_rows import describe_template, show_rows
from fedlora.rows import Row
from fedlora.runs.run_folder import check_free, check_same, read_run
from fedlora.training.live_run import Training, open_bench
from fedlora.types import ClientId

VALIDATION_COST = 1 / 3
"""What a token costs that is only looked at, of one that is trained on: no way back through the layers."""


@dataclass(frozen=True)
class _Clock:
    """What the probe gave: `seconds` of the whole run, or why there are none."""

    probe: Probe | None
    seconds: float | None
    fault: FedloraError | None = None


class Planning:
    """One plan, from the files of the clients to its record."""

    def __init__(self, config: PlanConfig) -> None:
        self.config = config
        self.outline = not config.probe
        paths = RunPaths(config.model_dir, config.exp_name)
        check_free(paths)
        files = client_files_of(config)
        # nothing is written: tokens neither
        train = config.training().model_copy(update={"num_clients": len(files), "token_cache": False})
        recorded, place = None, ""
        if paths.run_file.exists() and not config.overwrite:
            base = check_same(paths, train)
            train, place = train.model_copy(update={"base_model": base.name}), base.place
            recorded = read_run(paths)
            say(f"{paths.root} holds this run already: train resumes it, and this plan is for the whole run")
        rules = train.read_rules
        rows: defaultdict[ClientId, list[Row]] = defaultdict(list)
        clients = read_client_files(dict(enumerate(files)), train, on_row=lambda client, row: rows[client].append(row))
        self.names = {client: shown_client(client, {client: file.path.name}) for client, file in clients.items()}
        self.silos = [Silo(client, file.path, rows[client], self.names[client]) for client, file in clients.items()]
        held_out = read_validation_rows(train.val_data_path, rules)
        self.tests, self.test_rows = find_tests(config, train, files, self.silos)
        method = resolve_method(
            train, [client for client, file in clients.items() if file.facts.num_examples], recorded
        )
        self.bench = open_bench(train, clients, recorded, place=place, outline=self.outline)
        self.program = read_program(self.bench.base, outline=self.outline)
        self.room = count_room(self.bench.base, outline=self.outline)
        self.training = Training(train, method, paths, self.bench, held_out, recorded)
        self.train: TrainConfig = train

    def make_record(self) -> dict[str, Any]:
        """The whole plan, as JSON values."""
        bench, train = self.bench, self.train
        for client in bench.examples.facts:
            bench.examples.count_tokens(client)
        rounds = draw_waves(train, self.training.method, bench.examples.clients())
        tasks = {rows_of: client for waves in rounds for wave in waves for client, rows_of in wave}
        work = {rows_of: self._measure(client, rows_of) for rows_of, client in tasks.items()}
        forecast = forecast_run(train, self.training.method, rounds, work, self.training.adapter)
        footprint = self._estimate_memory(list(work.values()))
        clock = self._probe(forecast, work)
        skew = self._skew()
        free = free_bytes(train.model_dir)
        findings = [
            *self._examine_data(skew),
            *examine_run(train, {one: self.names[one] for one in bench.examples.clients()}, forecast, footprint, free),
            *examine_cohorts(find_cohort_doubts(train, self.training.method, bench.examples.clients())),
            *examine_probe(clock.probe, clock.fault, bench.book.layout),
        ]
        return {
            "format": 1,
            "exp_name": train.exp_name,
            "mode": train.federation_mode,
            "rounds": train.num_communication_rounds,
            "base_model": train.base_model,
            "device": str(bench.base.device),
            "base_dtype": bench.base.dtype_name,
            "layout": bench.book.layout.record(),
            "config": train.record(),
            "template": describe_template(bench.encoder),
            "clients": self._client_records(forecast),
            "test": self._test_record(),
            "label_skew": skew,
            "adapter": self._adapter_record(),
            "run": {key: value for key, value in asdict(forecast).items() if key != "waves"},
            "disk_free_bytes": free,
            "memory": {**asdict(footprint), "total": footprint.total},
            "probe": asdict(clock.probe) if clock.probe else None,
            "seconds": clock.seconds,
            "privacy": self._privacy_record(),
            "judge": self._judge_record(),
            "warnings": [_spelled(finding.record()) for finding in findings],
        }

    def _measure(self, client: ClientId, rows_of: Sequence[ClientId]) -> Work:
        examples = [example for each in rows_of for example in self.bench.examples.training(each)]
        return measure_epoch(examples, self.train, self.bench.book.layout, client, self.bench.base.can)

    def _estimate_memory(self, work: Sequence[Work]) -> Footprint:
        heaviest = max(work, key=lambda one: (one.pass_tokens, one.pass_length))
        quantization = self.train.quantization if self.outline else "none"
        return estimate_footprint(
            self.bench.base,
            self.bench.lora,
            self.bench.book.layout,
            pass_tokens=heaviest.pass_tokens,
            pass_length=heaviest.pass_length,
            pass_labels=heaviest.pass_labels,
            weights=count_weights(self.bench.base, quantization),
            program=self.program,
            available=self.room,
            background=self.training.growth.held,
        )

    def _probe(self, forecast: RunForecast, work: dict[tuple[ClientId, ...], Work]) -> _Clock:
        if self.outline:
            return _Clock(None, None)
        facts = self.bench.examples.facts
        largest = max(facts, key=lambda client: facts[client].num_tokens)
        say(f"probe: two steps of {self.names[largest]}, the largest")
        try:
            probe = run_probe(self.bench, self.train, largest, self.training.adapter)
        except TrainingError as error:
            return _Clock(None, None, error)
        parallel = self.train.method.order == "parallel"
        devices = len(self.train.devices) if parallel else 1
        units = count_run_units(self.train, forecast.waves, work, devices)
        units += VALIDATION_COST * self._validation_tokens(forecast)
        return _Clock(probe, probe.seconds / probe.units * units)

    def _validation_tokens(self, forecast: RunForecast) -> int:
        """Tokens that are looked at before the first round and after each."""
        shared = sum(len(example.ids) for example in self.training.held_out)
        examples = self.bench.examples
        own = {client: sum(len(one.ids) for one in examples.own_validation(client)) for client in examples.facts}
        rounds = self.train.num_communication_rounds
        method = self.training.method
        if method.has_global_model:
            total = (rounds + 1) * (shared or sum(own.values()))
            if method.keeps_personal_model:
                alone = sum(method.server.asks_everybody(number) for number in range(1, rounds + 1))
                total += sum((alone or count) * (own[client] + shared) for client, count in forecast.rounds_of.items())
            return total
        return (shared or sum(own.values())) + sum(
            count * (shared or own[client]) for client, count in forecast.rounds_of.items()
        )

    def _examine_data(self, skew: float | None) -> Iterator[Finding]:
        yield from examine_rows([*self.silos, *self.tests], self.bench.encoder.marks())
        yield from self._shortened()
        if skew is not None and (finding := examine_skew(skew)) is not None:
            yield finding

    def _skew(self) -> float | None:
        """How far the clients' categories are from the pool's; None where rows have none, or one client is all."""
        parts, categories = [], []
        for silo in self.silos:
            names = [row.category for row in silo.rows if row.output.strip()]
            if names:
                parts.append(list(range(len(categories), len(categories) + len(names))))
                categories += names
        return label_skew(categories, parts) if len(parts) > 1 and any(categories) else None

    def _shortened(self) -> Iterator[Finding]:
        cutoff = self.train.cutoff_len
        for silo, facts in zip(self.silos, self.bench.examples.facts.values(), strict=True):
            if facts.num_shortened:
                rows = (number for number, row in enumerate(silo.rows) if self._is_shortened(row))
                yield examine_shortened(silo, facts.num_shortened, rows, cutoff)

    def _is_shortened(self, row: Row) -> bool:
        return encode_rows([row], self.bench.encoder, cutoff=self.train.cutoff_len).counts.num_shortened > 0

    def _client_records(self, forecast: RunForecast) -> list[dict[str, Any]]:
        return [
            {
                **facts.record(),
                "num_rows": len(silo.rows),
                "num_rounds": forecast.rounds_of.get(facts.client_id, 0),
                "num_steps": forecast.steps_of.get(facts.client_id, 0),
                "rows_shown": show_rows(silo, self.bench.encoder, self.train),
            }
            for silo, facts in zip(self.silos, self.bench.examples.facts.values(), strict=True)
        ]

    def _test_record(self) -> dict[str, Any] | None:
        if not self.test_rows:
            return None
        file = self.config.test_file_path or self.config.data_path
        labelled = sum(bool(row.output.strip()) for row in self.test_rows)
        return {"file": str(file), "num_rows": len(self.test_rows), "num_labelled": labelled}

    def _adapter_record(self) -> dict[str, int]:
        adapter = self.training.adapter
        return {
            "num_parameters": sum(value.numel() for value in adapter.values()),
            "num_bytes": num_bytes(adapter),
            "bin_bytes": len(to_bin(adapter)),
            "safetensors_bytes": len(to_safetensors(adapter)),
        }

    def _privacy_record(self) -> dict[str, Any] | None:
        """What the whole run spends; None for a run without privacy."""
        sizes = {client: self.bench.examples.facts[client].num_examples for client in self.bench.examples.clients()}
        budget = make_budget(self.train, sizes)
        if budget is None:
            return None
        spent = budget.forecast(self.train.num_communication_rounds, list(sizes))
        return {**spent, "max_epsilon": self.train.max_epsilon}

    def _judge_record(self) -> dict[str, Any] | None:
        """For one comparison of two sets of answers to the test file."""
        config = self.config
        asking = [row for row in self.test_rows if row.kind != "text"]
        if not asking:
            return None
        tokenizer = self.bench.base.tokenizer
        judging = forecast_judging(
            asking,
            batch_size=config.judge_batch_size,
            judge=config.gpt_model,
            seed=config.seed,
            count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
        ).times(config.judge_repeats)
        judges = judges_at_endpoint(config.gpt_model)
        cost = None
        if config.judge_price_in is not None and config.judge_price_out is not None:
            cost = judging.cost(judge_prices(config.judge_price_in, config.judge_price_out, len(judges)))
        shown = smallest_difference(len({row.prompt for row in asking}))
        whole = asdict(judging.times(len(judges)))
        return {**whole, "model": config.gpt_model, "cost": cost, "smallest_difference": shown}


def _spelled(warning: dict[str, Any]) -> dict[str, Any]:
    """A warning in the names that the user typed."""
    return {**warning, **{name: spell(warning[name]) for name in ("what", "advice")}}
