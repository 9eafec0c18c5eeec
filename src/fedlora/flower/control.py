"""A server of this machine, asked through Flower's own command line."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlora.errors import StorageError, UsageError
from fedlora.files import read_json
from fedlora.flower.command_lines import CONNECTION, flwr_command, write_connection
from fedlora.flower.flower_config import ServerConfig
from fedlora.flower.folders import ServerFolder
from fedlora.plain_text import counted


def nothing_to_check() -> None:
    """The check of a caller who has started no process that could end."""


def connect(server: Path) -> dict[str, str]:
    """The environment in which Flower's command line speaks with a server of this machine."""
    folder = ServerFolder(server)
    if not folder.settings.is_file():
        raise UsageError(f"{folder.settings}: no such file", hint="give --server the folder that `flower init` made")
    return write_connection(ServerConfig.make({}, file=folder.settings))


def wait_for_server(
    environment: dict[str, str], seconds: float, check: Callable[[], None] = nothing_to_check, *, nodes: int = 0
) -> list[dict[str, Any]]:
    """The registered nodes, as soon as the server answers and has registered so many; StorageError when it has not for
    so many seconds, and what `check` raises meanwhile."""
    until = time.monotonic() + seconds
    while True:
        check()
        try:
            found = call_json(["supernode", "list", CONNECTION], environment).get("nodes", [])
            if len(found) >= nodes:
                return found
            reason = StorageError(
                f"the server has registered {len(found)} of {counted(nodes, 'node')}", hint="see its log"
            )
        except StorageError as error:
            reason = error
        if time.monotonic() > until:
            raise reason
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


def list_runs(environment: dict[str, str], run_id: str = "") -> list[dict[str, Any]]:
    """The runs that were submitted, or the one of this number, as Flower describes them."""
    one = ["--run-id", run_id] if run_id else []
    return call_json(["list", CONNECTION, *one], environment).get("runs", [])
