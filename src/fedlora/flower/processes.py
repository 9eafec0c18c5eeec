"""The processes of a federation across machines: a server's, a node's, and a node's worker.

Each command runs until it is stopped, and restarts processes that end.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from fedlora.console import log_lines, say
from fedlora.data.row_parts import holds_rows
from fedlora.errors import LockedError, StorageError, UsageError
from fedlora.files import json_text, write_json, write_text
from fedlora.flower.command_lines import (
    CONNECTION,
    make_node_environment,
    superexec_command,
    superlink_command,
    supernode_command,
    worker_command,
    write_connection,
)
from fedlora.flower.control import call_json, nothing_to_check, read_names, wait_for_server
from fedlora.flower.flower_config import ServerConfig
from fedlora.flower.folders import NodeFolder, ServerFolder, node_socket
from fedlora.flower.guard import own_bundle_sha256
from fedlora.flower.node_config import NodeConfig
from fedlora.flower.programs import Program, running, supervise
from fedlora.flower.worker import serve

START_SECONDS = 60.0
PORT_SECONDS = 5.0
Keys = Mapping[int, Path]
"""Client -> the file of its node's public key."""


def run_server(config: ServerConfig) -> None:
    """Run the SuperLink and the process that starts server apps, and register the nodes whose keys are here."""
    folder = ServerFolder(config.folder.resolve())
    if not folder.secret.is_file():
        raise UsageError(f"{folder.root}: no server's folder", hint="make one with `fedlora flower init`")
    with contextlib.ExitStack() as stack:
        stack.enter_context(log_lines("fedlora"))
        # one that is refused leaves the settings of the one that runs as they are
        stack.enter_context(_alone(folder.lock_file, "this server"))
        check_port("port", config.host, config.port)
        environment = write_connection(config)
        programs = [
            Program("superlink", superlink_command(config), environment),
            Program("superexec", superexec_command(config), environment),
        ]
        crew = stack.enter_context(running(programs))
        keys = folder.public_keys()
        check = crew.check if config.trial else crew.look
        _register(folder, keys, environment, START_SECONDS, check)
        say(f"the server listens on {config.host}:{config.port}")
        while True:
            check()
            keys = _register_new(folder, keys, environment)
            time.sleep(0.5)


def run_node(config: NodeConfig) -> None:
    """Run a node: the worker with the model, and the process that speaks with the server."""
    folder = NodeFolder(config.folder.resolve())
    for path in (folder.key, folder.ca_certificate, config.data_path):
        if not (path.is_file() or holds_rows(path)):
            raise UsageError(f"{path}: no such file", hint="see folder and data_path in the node's configuration")
    if not config.base_models:
        raise UsageError("base_models is empty: no run could use this node", hint="name the models you allow")
    with _alone(folder.lock_file, "this node"), log_lines("fedlora"):
        check_port("runtime_port", "127.0.0.1", config.runtime_port)
        # the worker reads what this process was told, flags included, and again when it is started anew
        settings = folder.root / "worker.yaml"
        write_text(settings, json_text(config.model_dump(mode="json")), mode=0o600)
        allowed = ",".join([own_bundle_sha256(), *config.bundles])
        programs = [
            Program("worker", worker_command(settings), os.environ),
            Program("supernode", supernode_command(config), make_node_environment(config, allowed)),
        ]
        say(f"client {config.client_id} speaks with {config.server}, and tries again for as long as it is not let in")
        supervise(programs, restarts=not config.trial)


def run_worker(config: NodeConfig) -> None:
    """Answer requests until the process that started this one is gone."""
    from fedlora.flower.node import Node

    parent = os.getppid()
    node = Node(config)
    socket = node_socket(config.state_dir.resolve())
    with log_lines("fedlora worker"):
        say(f"the worker of client {config.client_id} listens on {socket}")
        serve(socket, node.answer, config.max_message_mb << 20, until=lambda: os.getppid() != parent)


def check_port(name: str, host: str, port: int) -> None:
    """UsageError when something else listens there; what has just been stopped is given some seconds to go."""
    until = time.monotonic() + PORT_SECONDS
    while True:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return
            except OSError as error:
                if time.monotonic() > until:
                    raise UsageError(
                        f"{name}={port}: cannot listen on {host}: {error.strerror}",
                        hint=f"stop what has it (ss -ltnp shows), or choose another --{name}",
                    ) from None
        time.sleep(0.2)


@contextlib.contextmanager
def _alone(lock_file: Path, what: str) -> Iterator[None]:
    """LockedError when another process has this folder already."""
    lock = FileLock(lock_file, timeout=0.2)
    try:
        lock.acquire()
    except Timeout:
        raise LockedError(f"{lock_file.parent}: {what} is running already", hint="stop it first") from None
    try:
        yield
    finally:
        lock.release()


def _register_new(folder: ServerFolder, known: Keys, environment: dict[str, str]) -> Keys:
    """Register keys that were put into the server's folder since, while runs continue; returns all that were seen."""
    keys = folder.public_keys()
    new = {client: key for client, key in keys.items() if client not in known}
    try:
        if new:
            _register(folder, new, environment, 0.0, nothing_to_check)
    except StorageError as error:
        say(f"new keys wait for the SuperLink: {error}")
        return known
    return keys


def _register(
    folder: ServerFolder, keys: Keys, environment: dict[str, str], seconds: float, check: Callable[[], None]
) -> None:
    """Make keys known to the SuperLink, under the names that tell which client a node is.

    A key that it refuses excludes only its node. StorageError when there is no SuperLink for so many seconds; meanwhile
    `check` is called.
    """
    names = read_names(folder)
    nodes = wait_for_server(environment, seconds, check)
    known = {names[number] for node in nodes if (number := str(node.get("node-id"))) in names}
    for client, key in keys.items():
        name = f"client-{client}"
        if name in known:
            continue
        try:
            answer = call_json(["supernode", "register", str(key), CONNECTION, "--name", name], environment)
        except StorageError as error:
            if "already in use" in str(error):
                say(f"{name} is registered, under a number that is not noted here")
            else:
                say(f"{key}: this key cannot be registered, and {name} takes no part: {error}")
            continue
        names[str(answer["node-id"])] = name
        write_json(folder.names_file, names)
        say(f"registered {name}")
