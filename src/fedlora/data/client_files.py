"""Which file belongs to which client: the tree that allocation leaves, or a folder of own silos.

A folder that holds an allocation for another number of clients is never mistaken for silos: its
loose files are the test set or the raw rows, and training on those would go unnoticed.
"""

from __future__ import annotations

import re
from pathlib import Path

from fedlora.console import say
from fedlora.data.streams import split_name
from fedlora.errors import UsageError

_MAKE_DATA = (
    "make rows with `fedlora data skills` (or `fedlora data dolly`) and split them with client_data_allocation.py, "
    "or give a folder with one file per client (.json, .jsonl, .csv, also as .gz, or .parquet)"
)


def find_client_files(data_path: Path, num_clients: int, *, chosen: bool) -> list[Path]:
    """The training file of every client, in client-id order.

    First `<data_path>/<num_clients>/local_training_<i>.json`, then the only `<data_path>/*/<num_clients>/`
    there is, then the files of rows directly in `data_path` in any format that is read, one client each, names in
    natural order (2 before 10). `chosen` says whether the user gave `num_clients`: silos set the count only when not.
    Raises UsageError.
    """
    if not data_path.is_dir():
        raise UsageError(f"{data_path}: no such folder", hint=_MAKE_DATA)
    allocated = _allocated_folders(data_path)
    matching = [folder for folder in allocated if folder.name == str(num_clients)]
    if data_path / str(num_clients) in matching:
        return _allocated_files(data_path / str(num_clients), num_clients)
    if len(matching) == 1:
        say(f"reading the clients of {matching[0]}")
        return _allocated_files(matching[0], num_clients)
    if matching:
        names = ", ".join(map(str, matching))
        raise UsageError(
            f"{data_path} holds several data sets for {num_clients} clients: {names}",
            hint=f"name one, for example --data_path {matching[0].parent}",
        )
    if allocated:
        names = ", ".join(map(str, allocated))
        raise UsageError(
            f"{data_path} holds no data for {num_clients} clients, only {names}",
            hint="set num_clients to one of these, or allocate again with client_data_allocation.py",
        )
    return _silo_files(data_path, num_clients, chosen=chosen)


def _allocated_folders(data_path: Path) -> list[Path]:
    """Folders named by a count that hold client files, directly below `data_path` first."""
    return [
        folder
        for level in ("*", "*/*")
        for folder in sorted(data_path.glob(level), key=_natural)
        if folder.is_dir() and folder.name.isdigit() and any(folder.glob("local_training_*.json"))
    ]


def _allocated_files(folder: Path, num_clients: int) -> list[Path]:
    files = [folder / f"local_training_{client_id}.json" for client_id in range(num_clients)]
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file}: no such file", hint="allocate again with client_data_allocation.py")
    return files


def _silo_files(data_path: Path, num_clients: int, *, chosen: bool) -> list[Path]:
    files = sorted((file for file in data_path.iterdir() if _is_silo(file)), key=_natural)
    if not files:
        raise UsageError(f"{data_path} holds no client files", hint=_MAKE_DATA)
    _refuse_twice(files)
    if others := sorted(entry.name for entry in data_path.iterdir() if not _is_silo(entry) and not _is_hidden(entry)):
        say(f"not clients, and ignored: {', '.join(others)}")
    if chosen and len(files) != num_clients:
        raise UsageError(
            f"num_clients={num_clients}, but {data_path} holds {len(files)} client files",
            hint="leave num_clients out: own files set it by their count",
        )
    if not chosen and len(files) == 1:
        raise UsageError(
            f"{files[0]} is the only file of {data_path}: one client is no federation",
            hint="split it with client_data_allocation.py, or set num_clients to 1",
        )
    say(f"taking the {len(files)} files of {data_path} as one client each: {', '.join(file.name for file in files)}")
    return files


def _is_silo(file: Path) -> bool:
    return split_name(file) is not None and not _is_hidden(file) and file.is_file()


def _is_hidden(file: Path) -> bool:
    return file.name.startswith(".") or file.name == "manifest.json"


def _refuse_twice(files: list[Path]) -> None:
    """One client's rows in two formats would count twice."""
    by_stem: dict[str, list[Path]] = {}
    for file in files:
        named = split_name(file)
        by_stem.setdefault(named[0] if named else file.name, []).append(file)
    if twice := next((group for group in by_stem.values() if len(group) > 1), None):
        raise UsageError(
            f"one client in several formats: {', '.join(map(str, twice))}",
            hint="keep one of the files, or give them different names",
        )


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Sorts runs of digits as numbers; the full path breaks ties, so the order is total."""
    pieces = re.split(r"(\d+)", path.name)
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces], str(path)
