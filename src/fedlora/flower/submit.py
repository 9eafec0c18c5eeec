"""Submit a run to a server, and follow it to its end.

The run belongs to the server: ending this command does not end it, and its files lie on the server's machine.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlora.config.train import TrainConfig
from fedlora.console import say
from fedlora.errors import StorageError
from fedlora.files import write_json, write_text
from fedlora.flower.command_lines import CONNECTION
from fedlora.flower.control import call_json, connect, nothing_to_check, wait_for_server
from fedlora.flower.flower_config import SubmitConfig
from fedlora.flower.folders import ServerFolder
from fedlora.flower.following import EndedRun, follow_to_end
from fedlora.flower.guard import bundle_folder
from fedlora.flower.request import make_request
from fedlora.home import path_at_home

SERVER_SECONDS = 20.0
"""How long a server that is being started is waited for."""


def run(config: SubmitConfig) -> EndedRun:
    """Train on the connected nodes, to the end. Raises what the run ended with."""
    return submit(config, stays=True)


def submit(config: SubmitConfig, *, stays: bool, check: Callable[[], None] = nothing_to_check) -> EndedRun:
    """`run`; `stays` is whether server and run outlive this command. Raises what `check` raises meanwhile."""
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
        wait_for_server(environment, SERVER_SECONDS, check)
        run_id = _submit(request, environment)
    say(f"run {run_id} is submitted")
    if stays:
        again = f"`fedlora flower follow {run_id}` shows it again, `fedlora flower stop {run_id}` ends it"
        say(f"it continues when this command is interrupted: {again}")
    file = ServerFolder(config.server).run_file(run_id)
    write_json(file, {"exp_name": train.exp_name, "model_dir": str(train.model_dir)})
    return follow_to_end(run_id, environment, check)


def _absolute(train: TrainConfig) -> dict[str, Any]:
    paths = {"model_dir": str(train.model_dir.resolve())}
    if train.track:
        paths["track_dir"] = str(train.track_dir.resolve())
    if train.val_data_path:
        paths["val_data_path"] = str(Path(train.val_data_path).resolve())
    if (base := path_at_home(train.base_model)).is_dir():
        paths["base_model"] = str(base.resolve())
    return paths


def _submit(request: str, environment: dict[str, str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "request.toml"
        # a JSON string is a TOML string
        write_text(file, f"request = {json.dumps(request)}\n")
        arguments = ["run", str(bundle_folder()), CONNECTION, "--run-config", str(file)]
        return str(call_json(arguments, environment)["run-id"])
