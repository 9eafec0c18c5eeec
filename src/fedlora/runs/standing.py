"""Where an interrupted run resumes: its last intact round, and the clients' memories.

Rounds are tried newest first. A round is intact if every file matches its manifest, the manifests before it are the
ones it was built on, and its clients' memories from earlier rounds are complete. A damaged round is moved aside,
reported, and trained again to the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedlora.console import say
from fedlora.errors import StorageError
from fedlora.paths import RunPaths, client_name, client_number
from fedlora.runs.base_chain import BaseChain
from fedlora.runs.checking import UPDATE_NAME, find_round_fault, load_manifest, read_kept_update, read_manifest
from fedlora.runs.reader import RunReader
from fedlora.runs.run_folder import remove_entry
from fedlora.runs.run_records import Manifest
from fedlora.runs.server_state import load_server
from fedlora.types import ClientId, ServerState


@dataclass(frozen=True)
class Standing:
    """A round from which a run resumes: its server's state, and each client's last accepted round."""

    number: int
    manifest: Manifest
    state: ServerState | None
    accepted: Mapping[ClientId, int]


def read_standing(reader: RunReader, chain: BaseChain, number: int) -> Standing:
    """The standing after an intact round; `chain` reads what the rounds up to it added to the base."""
    paths = reader.paths
    manifest = load_manifest(paths.round_folder(number))
    return Standing(number, manifest, load_server(chain, paths, number, reader.shapes), find_accepted(paths, number))


def find_standing(reader: RunReader) -> Standing | None:
    """The last intact round, None when there is none; rounds after it are moved aside."""
    paths, found = reader.paths, None
    chain = BaseChain(paths)
    for number in reversed(paths.committed_rounds()):
        folder = paths.round_folder(number)
        fault = find_round_fault(folder, number) or _find_chain_fault(paths, number) or _find_base_fault(chain, number)
        if fault is None:
            found = read_standing(reader, chain, number)
            break
        say(f"round {number} is not used and trained again: {fault}")
        _move_aside(folder, paths.damaged_folder(number))
    for number in paths.committed_rounds():
        if (
            found is not None
            and number < found.number
            and (fault := find_round_fault(paths.round_folder(number), number))
        ):
            say(f"warning: {fault}; later rounds do not need it, so it is not trained again")
    coming = paths.partial_folder(found.number + 1 if found else 1)
    for entry in sorted(paths.root.glob("*.partial")):
        if entry.name != coming.name:
            remove_entry(entry)
    return found


def find_accepted(paths: RunPaths, round_number: int) -> dict[ClientId, int]:
    """Client -> the last round, up to this one, in which its update was accepted."""
    accepted: dict[ClientId, int] = {}
    for number in paths.committed_rounds():
        if number <= round_number:
            for path in paths.round_folder(number).glob(f"*/{UPDATE_NAME}"):
                accepted[client_number(path.parent.name)] = number
    return accepted


def _find_chain_fault(paths: RunPaths, round_number: int) -> str | None:
    for number in range(round_number, 1, -1):
        manifest, parent = (read_manifest(paths.round_folder(each)) for each in (number, number - 1))
        if manifest is None or parent is None or manifest.parent_sha256 != parent.sha256:
            return f"round {number} was not made from the present round {number - 1}"
    for client, number in find_accepted(paths, round_number).items():
        folder = paths.round_folder(number) / client_name(client)
        if read_kept_update(folder) is None:
            return f"{folder} is damaged"
    return None


def _find_base_fault(chain: BaseChain, round_number: int) -> str | None:
    try:
        chain.up_to(round_number)
    except StorageError as error:
        return str(error)
    return None


def _move_aside(folder: Path, aside: Path) -> None:
    try:
        if aside.exists():
            remove_entry(aside)
        folder.rename(aside)
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror}", hint="check the folder") from error
