"""Submit a run to a server and follow it to its end; show what a server knows.

The run belongs to the server: ending this command does not end it, and its files lie on the server's machine.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fedlora.errors
from fedlora.config.train import TrainConfig
from fedlora.console import printable, say
from fedlora.errors import FedloraError, StorageError, TrainingError, UsageError
from fedlora.files import read_json, write_json, write_text
from fedlora.flower.command_lines import CONNECTION, flwr_command, write_connection
from fedlora.flower.flower_config import FollowConfig, ServerConfig, StatusConfig, StopConfig, SubmitConfig
from fedlora.flower.folders import ServerFolder
from fedlora.flower.guard import bundle_folder
from fedlora.flower.request import make_request, read_exit
from fedlora.results import Result

STATUS_SECONDS = 2.0
SERVER_SECONDS = 20.0
"""How long a server that is being started is waited for."""
AWAY_SECONDS = 90.0
"""For how long a server may be away while a run is followed: the run outlives its SuperLink."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, repr=False)
class EndedRun(Result):
    """A run on the nodes whose rounds are all done; `place` is where it lies on the server's machine."""

    place: str

    def text(self) -> str:
        """The place."""
        return printable(self.place)

    def as_dict(self) -> dict[str, Any]:
        return {"place": self.place}


@dataclass(frozen=True, repr=False)
class ServerStatus(Result):
    """What a server knows: its nodes and runs as Flower lists them, and their names here."""

    nodes: Sequence[Mapping[str, Any]]
    runs: Sequence[Mapping[str, Any]]
    names: Mapping[str, str]
    experiments: Mapping[str, str]

    def text(self) -> str:
        """A line for each node and each run."""
        lines = [f"{self.names.get(str(n.get('node-id')), n.get('node-id'))}: {n.get('status')}" for n in self.nodes]
        for entry in self.runs:
            number = str(entry.get("run-id"))
            named = f" ({self.experiments[number]})" if number in self.experiments else ""
            lines.append(f"run {number}{named}: {entry.get('status')}")
        if not self.nodes:
            lines.append("no node is registered")
        if not self.runs:
            lines.append("no run was submitted")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Nodes and runs as Flower lists them, each with its name here."""
        return {
            "nodes": [{**node, "name": self.names.get(str(node.get("node-id")))} for node in self.nodes],
            "runs": [{**run, "name": self.experiments.get(str(run.get("run-id")))} for run in self.runs],
        }


def run(config: SubmitConfig, *, stays: bool = True) -> EndedRun:
    """Train on the connected nodes, to the end. Raises what the run ended with.

    `stays` is whether server and run outlive this command.
    """
    train = config.training()
    # the server's process has another working directory
    train = TrainConfig.of(**{name: getattr(train, name) for name in train.model_fields_set} | _absolute(train))
    environment = connect(config.server)
    waits = {"start": config.start_seconds, "absent": config.absent_seconds, "wave": config.round_seconds}
    request = make_request(train, **waits)
    try:
        run_id = _submit(request, environment)
    except StorageError:
        # it may be starting
        wait_for_server(environment, SERVER_SECONDS)
        run_id = _submit(request, environment)
    say(f"run {run_id} is submitted")
    if stays:
        again = f"`fedlora flower follow {run_id}` shows it again, `fedlora flower stop {run_id}` ends it"
        say(f"it continues when this command is interrupted: {again}")
    file = ServerFolder(config.server).run_file(run_id)
    write_json(file, {"exp_name": train.exp_name, "model_dir": str(train.model_dir)})
    return _see_to_its_end(run_id, environment)


def run_status(config: StatusConfig) -> ServerStatus:
    """The nodes that are registered and the runs that were submitted."""
    environment = connect(config.server)
    nodes = call_json(["supernode", "list", CONNECTION], environment).get("nodes", [])
    runs = call_json(["list", CONNECTION], environment).get("runs", [])
    folder = ServerFolder(config.server)
    # a run that was submitted from elsewhere has no file here
    files = {number: folder.run_file(number) for number in (str(entry.get("run-id")) for entry in runs)}
    experiments = {number: read_json(file)["exp_name"] for number, file in files.items() if file.is_file()}
    return ServerStatus(nodes, runs, read_names(folder), experiments)


def run_follow(config: FollowConfig) -> EndedRun:
    """Show a run to its end; raises what it ended with, StorageError when there is none of this number."""
    environment = connect(config.server)
    _status(str(config.run), environment)
    return _see_to_its_end(str(config.run), environment)


def run_stop(config: StopConfig) -> None:
    """End a run; StorageError when there is none of this number, or it has ended."""
    call_json(["stop", str(config.run), CONNECTION], connect(config.server))
    say(f"run {config.run} is stopped; the same `fedlora flower run` resumes after its last round")


def connect(server: Path) -> dict[str, str]:
    """The environment in which Flower's command line speaks with a server of this machine."""
    folder = ServerFolder(server)
    if not folder.settings.is_file():
        raise UsageError(f"{folder.settings}: no such file", hint="give --server the folder that `flower init` made")
    return write_connection(ServerConfig.make({}, file=folder.settings))


def wait_for_server(environment: dict[str, str], seconds: float) -> list[dict[str, Any]]:
    """The registered nodes, as soon as the server answers; StorageError when it does not for so many seconds."""
    until = time.monotonic() + seconds
    while True:
        try:
            return call_json(["supernode", "list", CONNECTION], environment).get("nodes", [])
        except StorageError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def read_names(folder: ServerFolder) -> dict[str, str]:
    """Number of a node -> the name that it was registered under here."""
    return read_json(folder.names_file) if folder.names_file.is_file() else {}


def call_json(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """What a command of Flower's answers; StorageError when the server does not."""
    done = subprocess.run(  # noqa: S603 - a command of ours, no shell
        flwr_command(*arguments, "--format", "json"), env=environment, capture_output=True, text=True, check=False
    )
    try:
        # warnings may stand before the answer
        answer = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        answer = {}
    if not answer.get("success"):
        reason = str(answer.get("error-message") or (done.stdout + done.stderr).strip()[-300:])
        if "SuperLink is unavailable" in reason:
            reason = "the server does not answer"
        raise StorageError(
            f"flwr {' '.join(arguments[:2])}: {reason}", hint="if the server is not running: `fedlora flower server`"
        )
    return answer


def _absolute(train: TrainConfig) -> dict[str, Any]:
    paths = {"model_dir": str(train.model_dir.resolve())}
    if train.val_data_path:
        paths["val_data_path"] = str(Path(train.val_data_path).resolve())
    if Path(train.base_model).is_dir():
        paths["base_model"] = str(Path(train.base_model).resolve())
    return paths


def _submit(request: str, environment: dict[str, str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "request.toml"
        # a JSON string is a TOML string
        write_text(file, f"request = {json.dumps(request)}\n")
        arguments = ["run", str(bundle_folder()), CONNECTION, "--run-config", str(file)]
        return str(call_json(arguments, environment)["run-id"])


def _see_to_its_end(run_id: str, environment: dict[str, str]) -> EndedRun:
    """Follow a run to its end, or raise what it ended with."""
    code, message, hint = _follow(run_id, environment)
    if code:
        raise _error_of(code, message, hint)
    return EndedRun(message)


def _follow(run_id: str, environment: dict[str, str]) -> tuple[int, str, str]:
    """Pass on what the run prints until it has ended; exit code, message and hint.

    Flower repeats the output from the beginning when its stream is opened again; each line is shown once.
    """
    shown: set[str] = set()
    ended = None
    heard = time.monotonic()
    while True:
        for line in _lines(run_id, environment):
            if ended is not None:
                # Flower's account of an error
                continue
            ended = read_exit(line)
            if ended is None and line.strip() and line not in shown:
                shown.add(line)
                say(_COLOURS.sub("", line.rstrip()))
        if ended is not None:
            return ended
        try:
            status, heard = _status(run_id, environment), time.monotonic()
        except StorageError:
            if time.monotonic() - heard > AWAY_SECONDS:
                raise
            status = ""
        if status == "finished:stopped":
            hint = "the same `fedlora flower run` resumes after its last round"
            return TrainingError.exit_code, f"run {run_id} was stopped", hint
        if status.startswith("finished"):
            reason = f"run {run_id} ended without a word: {status}"
            return TrainingError.exit_code, reason, "submit it again: it resumes after its last round"
        time.sleep(STATUS_SECONDS)


def _lines(run_id: str, environment: dict[str, str]) -> Iterator[str]:
    """What the run has printed and prints, as long as Flower streams it."""
    command = flwr_command("log", run_id, CONNECTION, "--stream")
    with subprocess.Popen(  # noqa: S603 - a command of ours, no shell
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield from process.stdout or ()
        finally:
            process.terminate()


def _status(run_id: str, environment: dict[str, str]) -> str:
    runs = call_json(["list", CONNECTION, "--run-id", run_id], environment).get("runs", [])
    return str(runs[0].get("status", "")) if runs else ""


def _error_of(code: int, message: str, hint: str) -> FedloraError:
    """The kind of error that has this exit code."""
    kinds = [
        kind for kind in vars(fedlora.errors).values() if isinstance(kind, type) and issubclass(kind, FedloraError)
    ]
    chosen = next((kind for kind in kinds if kind.exit_code == code and kind is not FedloraError), FedloraError)
    return chosen(message, hint=hint)
