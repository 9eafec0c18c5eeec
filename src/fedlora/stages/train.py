"""Train one federated method: read the clients' data, run the rounds, leave adapters and metrics.

A call with the configuration of an existing run resumes it, loses at most one client's update, and ends with the bytes
of an unbroken run. What can be refused without the model is, before torch is imported: a second start on the same run
ends within a second and has changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedlora.config.command_line import command_line
from fedlora.config.generate import GenerateConfig
from fedlora.config.train import TrainConfig
from fedlora.data.client_facts import read_client_files
from fedlora.data.client_files import client_files_of, known_test_rows
from fedlora.data.held_out import read_validation_rows
from fedlora.data.own_tests import check_own_tests
from fedlora.errors import DataError
from fedlora.paths import RunPaths
from fedlora.results import Result
from fedlora.runs.lock import hold_run
from fedlora.runs.metrics_log import MetricsLog
from fedlora.runs.run_folder import check_free, check_same, clear_run, read_run, record_layout
from fedlora.runs.run_records import RunRecord


@dataclass(frozen=True, repr=False)
class TrainedRun(Result):
    """A run whose rounds are all done."""

    paths: RunPaths
    config: TrainConfig

    @property
    def root(self) -> Path:
        """The folder of the run."""
        return self.paths.root

    @property
    def next_command(self) -> str:
        """How the run answers the test rows that lie with its data; FILE where none is known."""
        config = self.config
        tests = known_test_rows(config.data_path, config.num_clients, has_share=bool(config.test_share))
        recorded = read_run(self.paths)
        asked = {
            "exp_name": config.exp_name,
            "of_subjects": ("all",) if recorded.has_global_model is False else None,
            "base_model": config.base_model if config.base_model != recorded.base_model else None,
            "test_file_path": tests or config.val_data_path or "FILE",
            "model_dir": config.model_dir,
            **config.read_rules.record(),
        }
        return command_line("generate", GenerateConfig, asked, positional="exp_name")

    def text(self) -> str:
        """The folder; every round was reported when it was done."""
        return str(self.root)

    def as_dict(self) -> dict[str, Any]:
        """The folder, and every round's line of metrics.jsonl."""
        rows = MetricsLog(self.paths.metrics_file).rows()
        return {"folder": str(self.root), "rounds": [row for row in rows if row["kind"] == "round"]}


def run(config: TrainConfig, *, load: Callable[..., Any] | None = None) -> TrainedRun:
    """Train all rounds of one experiment, or those that are left of it.

    `load` takes the place of `load_base_model` where one base serves several runs.
    """
    for _ in rounds(config, load=load):
        pass
    return TrainedRun(RunPaths(config.model_dir, config.exp_name), config)


def rounds(config: TrainConfig, *, load: Callable[..., Any] | None = None, place: str = "") -> Generator[int]:
    """As `run`, round by round: the number of each once it is committed and measured.

    `place` is where the base lies, when that is not its name.

    The run is held from the first step until the generator is exhausted or closed.
    """
    paths = RunPaths(config.model_dir, config.exp_name)
    check_free(paths)
    files = client_files_of(config)
    with hold_run(paths):
        options = {"load": load} if load else {}
        yield from _train(config.model_copy(update={"num_clients": len(files)}), paths, files, place, options)


def _train(
    config: TrainConfig, paths: RunPaths, files: list[Path], place: str, options: Mapping[str, Any]
) -> Iterator[int]:
    check_free(paths)
    recorded = None
    if paths.run_file.exists() and not config.overwrite:
        recorded = read_run(paths)
        _check_there(config, recorded, files)
        base = check_same(paths, config, place)
        config, place = config.model_copy(update={"base_model": base.name}), base.place
    # a bad row is found before the model is loaded; the rows themselves are read again when a client is first drawn
    clients = read_client_files(dict(enumerate(files)), config)
    check_own_tests(clients, config)
    held_out = read_validation_rows(config.val_data_path, config.read_rules)
    from fedlora.engines.cohorts import resolve_method
    from fedlora.training.live_run import Training, open_bench

    trained = [client for client, file in clients.items() if file.facts.num_examples]
    method = resolve_method(config, trained, recorded)
    bench = open_bench(config, clients, recorded, place=place, on_layout=partial(record_layout, paths), **options)
    training = Training(config, method, paths, bench, held_out, recorded)
    if recorded is None:
        clear_run(paths)
    yield from training.rounds()


def _check_there(config: TrainConfig, recorded: RunRecord, files: list[Path]) -> None:
    """DataError with the name of a client's file that is missing since the start of the run."""
    gone = sorted({client.file for client in recorded.clients} - {file.name for file in files})
    if gone and len(files) < len(recorded.clients):
        raise DataError(
            f"{files[0].with_name(gone[0])}: gone since this run was begun",
            hint="restore it, or choose another --exp_name",
        )
