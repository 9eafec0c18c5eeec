"""The command lines of Flower's programs: with TLS and node keys, without installations or telemetry.

Flower's defaults are others: it reports usage and looks for updates over the network, installs what a bundle asks for,
and keeps the state of runs in memory only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from fedlora.files import make_folder, write_text
from fedlora.flower.flower_config import ServerConfig
from fedlora.flower.folders import NodeFolder, ServerFolder, node_socket
from fedlora.flower.guard import ALLOWED_VARIABLE
from fedlora.flower.node_config import NodeConfig

CONNECTION = "fedlora"
"""Name of the server in Flower's own configuration."""
_PROGRAMS = Path(sys.executable).parent


def make_environment(home: Path, *, first: Path | None = None, **more: str) -> dict[str, str]:
    """The environment of Flower's processes: a home of their own, no telemetry, our programs first."""
    make_folder(home)
    places = [str(first)] if first else []
    path = os.pathsep.join([*places, str(_PROGRAMS), os.environ.get("PATH", os.defpath)])
    silent = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    }
    return {**os.environ, **silent, "FLWR_HOME": str(home.resolve()), "PATH": path, **more}


def superlink_command(config: ServerConfig) -> list[str]:
    """The process that nodes connect to."""
    folder = ServerFolder(config.folder.resolve())
    return [
        str(_PROGRAMS / "flower-superlink"),
        *("--host", config.host, "--port", str(config.port)),
        *("--ssl-ca-certfile", str(folder.ca_certificate)),
        *("--ssl-certfile", str(folder.certificate), "--ssl-keyfile", str(folder.key)),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        # in memory otherwise: no trial meets nodes and tasks of another
        *(() if config.trial else ("--database", str(folder.database))),
        *("--isolation", "process", "--superexec-auth-secret-file", str(folder.secret)),
    ]


def superexec_command(config: ServerConfig) -> list[str]:
    """The process that starts server apps; on its own, so that a run outlives the SuperLink."""
    folder = ServerFolder(config.folder.resolve())
    return [
        str(_PROGRAMS / "flower-superexec"),
        *("--runtime-api-address", f"{config.host}:{config.port}"),
        *("--root-certificates", str(folder.ca_certificate)),
        *("--superexec-auth-secret-file", str(folder.secret)),
    ]


def supernode_command(config: NodeConfig) -> list[str]:
    """The process of a node that speaks with the server."""
    folder = NodeFolder(config.folder.resolve())
    socket = node_socket(config.state_dir.resolve())
    return [
        str(_PROGRAMS / "flower-supernode"),
        *("--superlink", config.server),
        *("--root-certificates", str(folder.ca_certificate)),
        *("--auth-supernode-private-key", str(folder.key)),
        *("--host", "127.0.0.1", "--port", str(config.runtime_port)),
        *("--node-config", f'socket="{socket}" max-message-mb={config.max_message_mb}'),
    ]


def worker_command(settings: Path) -> list[str]:
    """The process of a node that holds the model."""
    return [sys.executable, "-m", "fedlora", "flower", "worker", str(settings.resolve())]


def flwr_command(*arguments: str) -> list[str]:
    """Flower's own command line."""
    return [str(_PROGRAMS / "flwr"), *arguments]


def make_node_environment(config: NodeConfig, allowed: str) -> Mapping[str, str]:
    """The environment of a node's Flower processes: `flwr-clientapp` is the guarded one, and no other app starts.

    Which kind of app a run is, the server says; Flower would run an agent app on a node too, past the guard.
    """
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

    folder = NodeFolder(config.folder.resolve())
    guarded = folder.guarded_command
    for name in TASK_TYPE_TO_COMMAND.values():
        refusal = f"import sys\n\nsys.exit('fedlora: this node runs no {name}')\n"
        write_text(guarded.with_name(name), f"#!{sys.executable}\n{refusal}", mode=0o700)
    write_text(guarded, f"#!{sys.executable}\nfrom fedlora.flower.guard import main\n\nmain()\n", mode=0o700)
    return make_environment(folder.home, first=guarded.parent, **{ALLOWED_VARIABLE: allowed})


def write_connection(config: ServerConfig) -> dict[str, str]:
    """Tell Flower's command line where the server is; returns the environment to call it in."""
    folder = ServerFolder(config.folder.resolve())
    text = (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "{config.host}:{config.port}"\nroot-certificates = "{folder.ca_certificate}"\n'
    )
    write_text(folder.home / "config.toml", text)
    return make_environment(folder.home)
