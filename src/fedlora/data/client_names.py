"""What a client is called: by the name of its file or folder, so that tables speak of `library` and not of client 2."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from fedlora.data.streams import split_name
from fedlora.paths import POOLED, client_name, is_number

RESERVED = MappingProxyType(
    {
        **dict.fromkeys(("base", "global", "all"), "it names who answers, beside the clients"),
        "each": "`--leave_out each` means every client in turn",
        "test": "a client's test rows are named <client>.test.<format>, and rows for all lie in another folder",
    }
)
"""Names that no client can have, and why."""

_ON_NODE = "node of client "
"""Begins what a server records of the file on a node, of which it knows nothing."""
_NUMBERED = re.compile(rf"(?:local_training_|{_ON_NODE})(\d+)(?:\.json)?")
"""Files of allocated data, and of nodes."""


def name_of_file(file: str) -> str:
    """The name of the client whose rows a file holds: `library.csv.gz` is library, `local_training_3.json` is 3."""
    if numbered := _NUMBERED.fullmatch(file):
        return numbered[1]
    named = split_name(Path(file))
    return named[0] if named else file


def is_on_node(file: str) -> bool:
    """Whether a client's file is on another machine, so that a server knows neither its name nor its hash."""
    return file.startswith(_ON_NODE)


def client_numbers(files: Mapping[int, str]) -> dict[str, int]:
    """Name -> number of every client, from number -> file."""
    return {name_of_file(file): client for client, file in files.items()}


def shown_client(client: int, files: Mapping[int, str]) -> str:
    """How tables and messages call a client: its name, or `client 3` where the name is only a number."""
    if client == POOLED:
        return client_name(client)
    name = name_of_file(files[client]) if client in files else str(client)
    return f"client {name}" if is_number(name) else name
