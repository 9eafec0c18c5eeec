"""One run in the process that trains it: its standing, the pool, the rounds, the measurements.

It is a module apart because it imports torch: a start that is refused, or finds that another process trains the run,
ends before that.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from fedlora.config.train import TrainConfig
from fedlora.console import say
from fedlora.data.client_facts import ClientFile
from fedlora.data.client_names import shown_client
from fedlora.engines.cohorts import choose_cohort, find_cohort_doubts
from fedlora.engines.committed import read_result
from fedlora.engines.pools import open_pool
from fedlora.engines.private_metrics import Owners, SimulatedOwners
from fedlora.engines.private_run import find_doubts, make_private_run
from fedlora.engines.rounds import FederatedRun
from fedlora.engines.workbench import Workbench, make_workbench
from fedlora.errors import DataError, UsageError
from fedlora.federated.privacy.budget import describe_spent
from fedlora.federated.privacy.randomness import Secret
from fedlora.federated.ranks import rank_of
from fedlora.files import sha256_of_json
from fedlora.llm.adapter_config import make_peft_config
from fedlora.llm.base_model import BaseModel, load_base_model
from fedlora.llm.examples import encode_rows
from fedlora.llm.layout import Layout
from fedlora.llm.lora import is_fan_in_fan_out
from fedlora.llm.memory import held_memory
from fedlora.methods.choosing import LoadedMethod
from fedlora.paths import RunPaths
from fedlora.plain_text import counted
from fedlora.planning.forecast import draw_waves, measure_traffic
from fedlora.planning.growth import forecast_growth
from fedlora.rows import Row
from fedlora.runs.environment import check_environment
from fedlora.runs.metrics_log import MetricsLog
from fedlora.runs.progress_file import ProgressFile
from fedlora.runs.reader import RunReader
from fedlora.runs.recorded_base import check_identity
from fedlora.runs.run_records import RunRecord
from fedlora.runs.secret_file import load_secret, save_secret
from fedlora.runs.space import SpaceNeed, estimate_round_bytes
from fedlora.runs.standing import Standing, find_standing
from fedlora.runs.step_log import StepLog
from fedlora.runs.writer import RunWriter
from fedlora.tracking.sending import LiveTracking
from fedlora.training.round_metrics import RoundMetrics
from fedlora.training.round_text import say_round
from fedlora.training.run_description import make_record
from fedlora.training.run_progress import RunProgress
from fedlora.training.taken_start import open_start
from fedlora.types import ClientId, ClientPool


def open_bench(
    config: TrainConfig,
    clients: Mapping[ClientId, ClientFile],
    recorded: RunRecord | None,
    *,
    place: str = "",
    outline: bool = False,
    on_layout: Callable[[Layout], None] = lambda layout: None,
    load: Callable[..., BaseModel] = load_base_model,
) -> Workbench:
    """Load the model, or its outline, from `place` onto the run's first device, with the layout and the secret that the
    run was started with; `on_layout` is called with every reduction."""
    device = config.devices[0] if config.devices else config.device
    layout = Layout.from_record(recorded.layout) if recorded else None
    secret = _find_secret(config, recorded)
    how = {"layout": layout, "outline": outline, "secret": secret, "on_layout": on_layout, "load": load}
    return make_workbench(config, clients, device=device, place=place, **how)


class Training:
    """One run from its clients' files, or from where it was interrupted, to its last round."""

    def __init__(
        self,
        config: TrainConfig,
        method: LoadedMethod,
        paths: RunPaths,
        bench: Workbench,
        held_out: Sequence[Row],
        recorded: RunRecord | None = None,
        *,
        remote: Callable[[LoadedMethod, RunProgress], ClientPool] | None = None,
        owners: Owners | None = None,
    ) -> None:
        self.remote = remote
        self.owners = owners
        self.config = config
        self.paths = paths
        self.bench = bench
        self.lora = bench.lora
        self.trainer = bench.trainer
        self.clients = bench.examples
        options = {"cutoff": config.cutoff_len, "train_on": config.measured_tokens}
        self.held_out = encode_rows(held_out, bench.encoder, **options).examples
        if held_out and not self.held_out:
            raise DataError(f"{config.val_data_path}: every response is empty", hint="give rows with answers")
        self.method = method
        if remote is not None and config.init_from:
            raise UsageError(
                "init_from is not supported across machines", hint="train in a simulation, or leave it out"
            )
        resumed = {"is_resumed": recorded is not None}
        self.start = open_start(config, method, paths, bench.base, self.lora.shapes(), **resumed)
        self.adapter = self.start.adapter
        self.secret = bench.trainer.secret
        self.sizes = {client: clients.num_examples for client, clients in bench.examples.facts.items()}
        self.sizes = {client: size for client, size in self.sizes.items() if size}
        self.private = make_private_run(config, self.sizes, self.secret)
        self.record = make_record(config, method, bench, self.start, recorded)
        if recorded is not None:
            self._check_unchanged(recorded)
        self.is_resumed = recorded is not None
        waves = draw_waves(config, method, self.clients.clients())
        self.growth = forecast_growth(config, method, waves, self.lora.shapes())
        self.space = self._estimate_space(method)

    def run(self) -> None:
        """All rounds that are left."""
        for _ in self.rounds():
            pass

    def rounds(self) -> Iterator[int]:
        """Train the rounds that are left, with progress; each is yielded once it is committed and measured.

        run.json says at the end which round validated best.
        """
        with self.space.told():
            yield from self._rounds()

    def _rounds(self) -> Iterator[int]:
        config, method = self.config, self.method
        reader = RunReader(self.paths, self.lora.shapes())
        standing = find_standing(reader) if self.is_resumed else None
        done = standing.number if standing else 0
        log = MetricsLog(self.paths.metrics_file)
        rows = log.go_on(done)
        writer = self._make_writer(reader, log, standing)
        if self.secret and not self.is_resumed:
            save_secret(self.secret)
        if not self.is_resumed:
            self.start.write(self.paths)
        writer.write_run(self.record)
        self._warn()
        own = method.keeps_personal_model
        owners = self.owners or SimulatedOwners(self.bench, config, reader)
        measuring: dict[str, Any] = {"has_personal": own, "config": config, "owners": owners}
        metrics = RoundMetrics(self.trainer, self.clients, self.held_out, reader, log, **measuring)
        self._catch_up(metrics, standing, rows)
        with LiveTracking(self.paths, config) as tracking:
            with (
                self._open_progress(done, rows) as progress,
                self._open_pool(method, reader, progress) as pool,
            ):
                how: dict[str, Any] = {"start": standing, "private": self.private, "files": self.clients.names}
                federated = FederatedRun(
                    method, progress.watched(pool), writer, config, self.adapter, **how, on_update=progress.count
                )
                self.space.check(done)
                began = time.monotonic()
                for result in federated.rounds():
                    row = metrics.record(result, time.monotonic() - began)
                    say_round(row, result.records, config.num_communication_rounds, self.clients.names)
                    tracking.send()
                    self.space.check(result.round)
                    yield result.round
                    began = time.monotonic()
            self.clients.count_all_tokens()
            # memory may have run out since: the layout in force is the record's
            layout = self.bench.book.layout.record()
            writer.write_run(self.record.finish(list(self.clients.facts.values()), layout, metrics.best))
            tracking.finish()

    def _check_unchanged(self, recorded: RunRecord) -> None:
        """Check that the clients' files and the environment are those of the run's start."""
        files = {facts.client_id: facts.sha256 for facts in recorded.clients}
        for client, facts in self.clients.facts.items():
            if files.get(client) != facts.sha256:
                raise DataError(
                    f"{self.clients.files[client].path}: not the file that this run was started with",
                    hint="restore it, or start the run again with --overwrite",
                )
        check_identity(recorded, self.bench.base, every_byte=self.config.verify_base)
        then, now = ({**one.environment, **one.versions} for one in (recorded, self.record))
        for change in check_environment(then, now, allow_drift=self.config.allow_drift):
            say(f"resuming in another environment: {change}")

    def _catch_up(self, metrics: RoundMetrics, standing: Standing | None, rows: Sequence[Mapping[str, Any]]) -> None:
        """Read the measurements of an interrupted run, and make the missing ones."""
        closed = [row for row in rows if row["kind"] == "round"]
        for row in closed:
            metrics.remember(row)
        if not any(row["round"] == 0 for row in closed):
            metrics.start()
        if standing is None:
            return
        rounds = self.config.num_communication_rounds
        say(f"resumes after round {standing.number} of {rounds}" if standing.number < rounds else "all rounds are done")
        for number in sorted(set(range(1, standing.number + 1)) - {row["round"] for row in closed}):
            ids = self.clients.clients()
            result = read_result(self.config, self.method, metrics.reader, number, metrics.log, ids, self.private)
            metrics.record(result, sum(record["seconds"] for record in result.records))

    def _open_progress(self, done: int, rows: Sequence[Mapping[str, Any]]) -> RunProgress:
        return RunProgress(
            self.config,
            self.method,
            list(self.sizes.values()),
            done=done,
            rows=rows,
            file=ProgressFile(self.paths.beside(".progress.json")),
            memory=partial(held_memory, self.bench.base.device),
            steps=StepLog(self.paths.beside("steps.jsonl")) if self.config.logs_steps and not self.remote else None,
        )

    def _open_pool(
        self, method: LoadedMethod, reader: RunReader, progress: RunProgress
    ) -> contextlib.AbstractContextManager[ClientPool]:
        if self.remote is not None:
            return contextlib.nullcontext(self.remote(method, progress))
        return open_pool(self.bench, self.config, method, reader, progress.step, self.secret)

    def _make_writer(self, reader: RunReader, log: MetricsLog, standing: Standing | None) -> RunWriter:
        peft_config = make_peft_config(
            self.lora.spec,
            self.config.base_model,
            fan_in_fan_out=is_fan_in_fan_out(self.bench.base.model),
            targets=self.lora.peft_names,
        )
        header = {**self.record.header, "config_sha256": sha256_of_json(self.config.identity())}
        if self.remote is not None:
            # a round may then hold no whole adapter from which its shapes could be read
            header["shapes"] = {key: list(shape) for key, shape in self.lora.shapes().items()}
        return RunWriter(
            reader,
            peft_config=peft_config,
            header=header,
            log=log,
            parent_sha256=standing.manifest.sha256 if standing else None,
        )

    def _estimate_space(self, method: LoadedMethod) -> SpaceNeed:
        clients, rounds = self.clients.clients(), self.config.num_communication_rounds
        members = max((choose_cohort(self.config, method, clients, number) for number in (1, rounds)), key=len)
        # who will be drawn is not asked: the largest ranks, together
        ranks = sorted(rank_of(client, self.config.client_ranks, self.config.lora_r) for client in clients)
        needed = estimate_round_bytes(
            self.lora.shapes(),
            updates=1 if method.pools_rows else len(members),
            keeps_optimizer=self.config.optimizer_state == "keep",
            has_global=method.has_global_model,
            ranks=ranks[-len(members) :] if self.config.client_ranks else (),
        )
        traffic = measure_traffic(method, self.adapter)
        needed += traffic.state_bytes + len(members) * traffic.extra_bytes
        return SpaceNeed(self.paths, self.config.num_communication_rounds, needed, self.growth.disk)

    def _warn(self) -> None:
        for doubt in find_cohort_doubts(self.config, self.method, self.clients.clients()):
            say("warning: " + "; ".join(doubt))
        if self.private:
            rounds = self.config.num_communication_rounds
            planned = self.private.budget.forecast(rounds, list(self.sizes))
            say(f"privacy after {counted(rounds, 'round')}: at most {describe_spent(planned)}")
            for doubt in find_doubts(self.config, self.sizes):
                say(doubt)
            if self.config.private_metrics:
                say("warning: private metrics carry no noise: what they reveal is not in epsilon")
        for client, facts in self.clients.facts.items():
            name = shown_client(client, self.clients.names)
            if not facts.num_examples:
                say(f"warning: {name} ({facts.file}) has no row to train on and is never selected")
            elif facts.num_empty:
                say(f"{name}: {counted(facts.num_empty, 'row')} left out, with an empty response")


def _find_secret(config: TrainConfig, recorded: RunRecord | None) -> Secret | None:
    """The secret of a private run: a new one for a new run, the recorded one for a resumed run."""
    if not config.is_private:
        return None
    return load_secret(recorded.secret_id) if recorded else Secret.draw()
