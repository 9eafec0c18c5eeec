"""A federation across machines on one machine: server, nodes and a run, with the keys and TLS of a real one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fedlora.console import say
from fedlora.data.client_files import check_test_share, find_client_files
from fedlora.errors import UsageError
from fedlora.flower import init
from fedlora.flower.control import connect, wait_for_server
from fedlora.flower.flower_config import InitConfig, LocalConfig, SubmitConfig
from fedlora.flower.folders import NodeFolder, ServerFolder, client_folder
from fedlora.flower.following import EndedRun
from fedlora.flower.processes import check_port
from fedlora.flower.programs import Program, running
from fedlora.flower.submit import submit
from fedlora.home import path_at_home
from fedlora.plain_text import counted

START_SECONDS = 120.0


def run(config: LocalConfig) -> EndedRun:
    """Make the folders if they are not there, start everything, train, stop everything.

    The state of the server is in memory, so no earlier call has left a task or a node there. A process that ends before
    the run does ends this command with the last lines of its log.
    """
    files = find_client_files(config.data_path, config.nodes, chosen=config.chosen("nodes"))
    check_test_share(config.test_share, files)
    if len(files) != config.nodes:
        raise UsageError(
            f"{config.data_path}: {counted(len(files), 'client')}, where there are {counted(config.nodes, 'node')}"
        )
    if not config.folder.exists():
        model = config.base_model
        models = (str(place.resolve()),) if (place := path_at_home(model)).is_dir() else (model,)
        options = {"folder": config.folder, "nodes": config.nodes, "port": config.port, "base_models": models}
        say(init.run(InitConfig.of(**options)).text())
    for port in range(config.port, config.port + 1 + config.nodes):
        check_port("port", "127.0.0.1", port)
    server = ServerFolder(config.folder / "server")
    logs = config.folder / "logs"
    watched = Program("server", _command("server", server.settings), os.environ, logs / "server.log")
    nodes = []
    for client, file in enumerate(files):
        settings = NodeFolder(client_folder(config.folder, client)).settings
        listed = ["--federation_modes", config.federation_mode] if config.method.source else []
        more = [*listed, "--data_path", str(file.resolve()), "--runtime_port", str(config.port + 1 + client)]
        command = _command("node", settings, *more)
        nodes.append(Program(f"node {client}", command, os.environ, logs / f"node-{client}.log"))
    say(f"server and {counted(config.nodes, 'node')} are started; their logs lie in {logs}")
    with running([watched]) as crew:
        # a node whose key is not registered is sent away, and would end
        wait_for_server(connect(server.root), START_SECONDS, crew.check, nodes=config.nodes)
        crew.add(nodes)
        fields = config.model_fields_set & SubmitConfig.model_fields.keys()
        values = {name: getattr(config, name) for name in fields}
        submitted = SubmitConfig.of(**{**values, "server": server.root, "num_clients": config.nodes})
        return submit(submitted, stays=False, check=crew.check)


def _command(name: str, settings: Path, *flags: str) -> list[str]:
    given = ["--config", str(settings.resolve()), "--trial", "true", *flags]
    return [sys.executable, "-m", "fedlora", "flower", name, *given]
