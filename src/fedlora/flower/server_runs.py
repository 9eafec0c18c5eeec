"""The runs of a server: list them, follow one, stop one."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.console import printable, say
from fedlora.errors import FedloraError, TrainingError, UsageError
from fedlora.files import read_json
from fedlora.flower.command_lines import CONNECTION
from fedlora.flower.control import call_json, connect, list_runs, read_names
from fedlora.flower.flower_config import FollowConfig, OneRunConfig, StatusConfig, StopConfig
from fedlora.flower.folders import ServerFolder
from fedlora.flower.following import EndedRun, follow_to_end, read_status
from fedlora.paths import RunPaths
from fedlora.results import Result
from fedlora.runs.run_folder import read_run
from fedlora.watching.snapshot import Snapshot
from fedlora.watching.watcher import Watcher


@dataclass(frozen=True)
class ServerRun:
    """A run that was submitted; without an experiment it was submitted from elsewhere."""

    number: str
    status: str
    experiment: str = ""
    rounds_done: int = 0
    rounds: int = 0

    @property
    def is_open(self) -> bool:
        """Whether it has not ended."""
        return not self.status.startswith("finished")

    def text(self) -> str:
        """Number, experiment, state and rounds in a line."""
        named = f" ({printable(self.experiment)})" if self.experiment else ""
        rounds = f", round {self.rounds_done} of {self.rounds} is done" if self.rounds else ""
        return f"run {self.number}{named}: {self.status}{rounds}"


@dataclass(frozen=True, repr=False)
class ServerStatus(Result):
    """The nodes that are registered at a server, by name, with their state, and the runs that were submitted."""

    nodes: Sequence[tuple[str, str]]
    runs: Sequence[ServerRun]

    def as_dict(self) -> dict[str, Any]:
        nodes = [{"name": name, "status": status} for name, status in self.nodes]
        return {"nodes": nodes, "runs": [vars(run) for run in self.runs]}

    def text(self) -> str:
        """A line for each node and each run."""
        nodes = [f"{name}: {status}" for name, status in self.nodes] or ["no node is registered"]
        return "\n".join(nodes + ([run.text() for run in self.runs] or ["no run was submitted"]))


def run_status(config: StatusConfig) -> ServerStatus:
    """The nodes that are registered and the runs that were submitted."""
    environment = connect(config.server)
    nodes = call_json(["supernode", "list", CONNECTION], environment).get("nodes", [])
    names = read_names(ServerFolder(config.server))
    named = [(names.get(str(node.get("node-id")), str(node.get("node-id"))), str(node.get("status"))) for node in nodes]
    return ServerStatus(named, _read_runs(config.server, environment))


def run_follow(config: FollowConfig) -> Generator[Snapshot, None, EndedRun]:
    """Watch a run to its end, while its messages are passed on. Raises the error that it ended with, and StorageError
    for an unknown number."""
    environment = connect(config.server)
    number = _find_run(config, environment, may_have_ended=True)
    read_status(number, environment)
    file = ServerFolder(config.server).run_file(number)
    if not file.is_file():
        # of a run that was submitted from elsewhere the messages are all there is
        return follow_to_end(number, environment)
    watcher, left = Watcher(_paths_of(file), is_drawn_only=True), threading.Event()

    def check() -> None:
        if left.is_set():
            raise TrainingError(f"run {number} is no longer watched")

    with ThreadPoolExecutor(1) as threads:
        ended = threads.submit(copy_context().run, follow_to_end, number, environment, check)
        try:
            while not ended.done():
                yield watcher.look()
                wait([ended], timeout=config.interval)
        finally:
            left.set()
        return ended.result()


def run_stop(config: StopConfig) -> None:
    """End a run. Raises StorageError for an unknown number and for a run that has ended."""
    environment = connect(config.server)
    number = _find_run(config, environment, may_have_ended=False)
    call_json(["stop", number, CONNECTION], environment)
    say(f"run {number} is stopped; the same `fedlora flower run` resumes it after its last round")


def _find_run(config: OneRunConfig, environment: dict[str, str], *, may_have_ended: bool) -> str:
    """The number that was given, or that of the only run that is open; a run that has ended counts where no other does.
    UsageError names the runs there are."""
    if config.run:
        return config.run
    runs = _read_runs(config.server, environment)
    found = [run for run in runs if run.is_open]
    if may_have_ended and not found:
        found = runs
    if len(found) == 1:
        return found[0].number
    if not found:
        what = "no run is open" if runs else "no run was submitted"
        raise UsageError(f"{config.server}: {what}", hint="`fedlora flower status` lists the runs of a server")
    listed = "\n  ".join(run.text() for run in found)
    raise UsageError(f"{config.server}: there is more than one run:\n  {listed}", hint="give the number of one")


def _read_runs(server: Path, environment: dict[str, str]) -> list[ServerRun]:
    return [_describe(server, entry) for entry in list_runs(environment)]


def _paths_of(file: Path) -> RunPaths:
    """Where a run lies that was submitted from this machine."""
    submitted = read_json(file)
    return RunPaths(Path(submitted["model_dir"]), submitted["exp_name"])


def _describe(server: Path, entry: Mapping[str, Any]) -> ServerRun:
    number, status = str(entry.get("run-id")), str(entry.get("status"))
    file = ServerFolder(server).run_file(number)
    if not file.is_file():
        return ServerRun(number, status)
    paths = _paths_of(file)
    try:
        rounds = read_run(paths).num_rounds
    except FedloraError:
        # it waits for its nodes, or its folder is gone
        return ServerRun(number, status, paths.exp_name)
    return ServerRun(number, status, paths.exp_name, max(paths.committed_rounds(), default=0), rounds)
