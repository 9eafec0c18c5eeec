"""Make the folders of a federation across machines: one for the server, one for each node's owner."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import UsageError
from fedlora.files import make_folder, write_bytes, write_text
from fedlora.flower.certificates import (
    PrivateKey,
    certificate_pem,
    make_authority,
    make_certificate,
    make_key,
    private_pem,
    private_ssh,
    public_ssh,
)
from fedlora.flower.flower_config import InitConfig
from fedlora.flower.folders import NodeFolder, ServerFolder, client_folder
from fedlora.results import Result

OWNER_ONLY, OWNERS_FOLDER = 0o600, 0o700
OWN_HOSTS = ("127.0.0.1", "localhost")
"""Names by which the server's own processes reach each other."""


@dataclass(frozen=True, repr=False)
class FederationFolders(Result):
    """The folders of a new federation: the server's, and one for each client's owner."""

    folder: Path
    nodes: int

    def text(self) -> str:
        """One folder a line, with whom it is for."""
        server = ServerFolder(self.folder / "server")
        lines = [f"{server.root}: for the server; put {server.ca_key.name} into a safe, nothing here needs it again"]
        lines += [
            f"{client_folder(self.folder, client)}: for the owner of client {client}; edit node.yaml there"
            for client in range(self.nodes)
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        clients = [str(client_folder(self.folder, client)) for client in range(self.nodes)]
        return {"server": str(ServerFolder(self.folder / "server").root), "clients": clients}


def run(config: InitConfig) -> FederationFolders:
    """Write everything below a new folder; UsageError when it is there, for keys are never written over."""
    if config.folder.exists():
        raise UsageError(
            f"folder={config.folder}: is there already", hint="choose another folder; keys are never written over"
        )
    if not config.hosts:
        raise UsageError("hosts: the server needs a name or an address", hint="give --hosts server.example.org")
    server = ServerFolder(config.folder / "server")
    key = make_key()
    authority = _write_server(config, server, key)
    for client in range(config.nodes):
        _write_node(config, server, client, authority)
    return FederationFolders(config.folder, config.nodes)


def _write_server(config: InitConfig, folder: ServerFolder, key: PrivateKey) -> bytes:
    """The server's files; returns the authority's certificate."""
    # Flower's database there holds what clients send
    make_folder(folder.root, mode=OWNERS_FOLDER)
    authority_key = make_key()
    authority = make_authority(authority_key, config.days)
    hosts = list(dict.fromkeys([*config.hosts, *OWN_HOSTS]))
    certificate = make_certificate(key, hosts, authority, authority_key, config.days)
    write_bytes(folder.ca_key, private_pem(authority_key), mode=OWNER_ONLY)
    write_bytes(folder.ca_certificate, certificate_pem(authority))
    write_bytes(folder.key, private_pem(key), mode=OWNER_ONLY)
    write_bytes(folder.certificate, certificate_pem(certificate))
    write_bytes(folder.secret, secrets.token_hex(32).encode(), mode=OWNER_ONLY)
    text = (
        "# The server: fedlora flower server server.yaml\n"
        f"folder: {_quote(folder.root.resolve())}\n"
        "# loopback: anyone who reaches this port controls the federation; nodes connect through a proxy that\n"
        "# forwards only /v1/fleet/ (docs/how-to/three-hospitals.md)\n"
        "host: 127.0.0.1\n"
        f"port: {config.listen_port or config.port}\n"
    )
    write_text(folder.settings, text)
    return certificate_pem(authority)


def _write_node(config: InitConfig, server: ServerFolder, client: int, authority: bytes) -> None:
    folder, key = NodeFolder(client_folder(config.folder, client)), make_key()
    make_folder(folder.root, mode=OWNERS_FOLDER)
    write_bytes(folder.key, private_ssh(key), mode=OWNER_ONLY)
    write_bytes(server.public_key(client), public_ssh(key))
    write_bytes(folder.ca_certificate, authority)
    root = folder.root.resolve()
    models = "\n".join(f"  - {_quote(name)}" for name in config.base_models)
    text = (
        "# One owner's node: fedlora flower node node.yaml. What a run asks beyond these bounds is refused here.\n"
        f"folder: {_quote(root)}\n"
        f"server: {_quote(f'{config.hosts[0]}:{config.port}')}\n"
        f"client_id: {client}\n"
        f"data_path: {_quote(root / 'train.json')}\n"
        f"state_dir: {_quote(root / 'state')}\n"
        f"runtime_port: {9094 + client}\n"
        f"base_models:\n{models}\n"
        "max_lora_r: 64\n"
        "max_local_epochs: 10\n"
        "min_examples: 1\n"
        "share_own_adapter: false\n"
    )
    write_text(folder.settings, text, mode=OWNER_ONLY)


def _quote(value: object) -> str:
    """A YAML string: JSON's form is one."""
    return json.dumps(str(value))
