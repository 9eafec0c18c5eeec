"""Which file belongs to which client: the tree that allocation leaves, or a folder of own silos.

A silo's folder holds `<client>.<format>` and, where the client has test rows, `<client>.test.<format>` beside it. In
the place of a file there may be a folder of files (`row_parts`), `<client>` or `<client>.test`.
A folder that holds an allocation for another number of clients is never mistaken for silos: its
loose files are the test set or the raw rows, and training on those would go unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedlora.config.train import TrainConfig
from fedlora.console import say
from fedlora.data.client_names import RESERVED, name_of_file
from fedlora.data.row_parts import holds_rows, is_hidden, natural, refuse_splits, unread_in
from fedlora.data.streams import split_name
from fedlora.errors import UsageError
from fedlora.files import is_saved_dataset
from fedlora.plain_text import counted
from fedlora.types import ClientId

TEST = ".test"
"""Ends the stem of a client's file of test rows: `library.test.csv`."""

_TEST_FILES = ("dolly_test_*.jsonl", "test_rows.jsonl")
"""What allocation calls its test file."""

SHOWN = 12
"""Files that a message lists."""
_MAKE_DATA = (
    "make rows with `fedlora data skills` (or `fedlora data dolly`) and split them with `fedlora allocate`, "
    "or give a folder with a file or a folder of files per client "
    "(.json, .jsonl, .csv, also as .gz or .zst, or .parquet)"
)


def client_files_of(config: TrainConfig) -> list[Path]:
    """`find_client_files` of a training; UsageError too where its other fields do not fit these files."""
    files = find_client_files(config.data_path, config.num_clients, chosen=config.chosen("num_clients"))
    if config.val_data_path:
        check_no_client(Path(config.val_data_path), files, "val_data_path")
    check_test_share(config.test_share, files)
    return files


def check_test_share(test_share: float, files: Sequence[Path]) -> None:
    """UsageError where a share of the rows would be held out of clients that have files of test rows."""
    if test_share and (tests := find_test_files(files)):
        named = ", ".join(file.name for file in tests.values())
        raise UsageError(
            f"test_share={test_share:g}, but {files[0].parent} holds test rows already: {named}",
            hint="leave test_share out, or move these files away",
        )


def find_test_files(files: Sequence[Path]) -> dict[ClientId, Path]:
    """The file of test rows beside each client's file, of the clients that have one."""
    found: dict[str, Path] = {}
    for folder in {file.parent for file in files}:
        found |= {name_of_file(file.name): file for file in sorted(folder.iterdir()) if _is_test(file)}
    return {
        client: found[name]
        for client, file in enumerate(files)
        if (name := f"{name_of_file(file.name)}{TEST}") in found
    }


def known_test_rows(data_path: Path, num_clients: int, *, has_share: bool) -> Path | None:
    """Where the test rows for a folder of clients lie: an allocation's test file, or the folder of silos itself.

    None where there are none, or several; `has_share` says whether training held out a share of the silos' rows.
    """
    if not data_path.is_dir():
        return None
    allocated = _allocated_folders(data_path)
    if not allocated:
        own = has_share or any(map(_is_test, data_path.iterdir()))
        return data_path if own else None
    folders = {folder.parent for folder in allocated if folder.name == str(num_clients)}
    files = [file for folder in folders for name in _TEST_FILES for file in folder.glob(name)]
    return files[0] if len(files) == 1 else None


def check_no_client(file: Path, files: Sequence[Path], field: str) -> None:
    """UsageError when the file that `field` names is one on which a client trains, or part of one."""
    if file.exists() and any(file.samefile(each) or file.resolve().is_relative_to(each.resolve()) for each in files):
        raise UsageError(
            f"{field}={file}: its folder takes this file for a client, which would train on it",
            hint=f"move it to another folder; test rows of one client alone are named <client>{TEST}{file.suffix}",
        )


def find_client_files(data_path: Path, num_clients: int, *, chosen: bool) -> list[Path]:
    """The training file of every client, in client-id order.

    First `<data_path>/<num_clients>/local_training_<i>.json`, then the only `<data_path>/*/<num_clients>/`
    there is, then the files of rows directly in `data_path` in any format that is read, one client each, names in
    natural order (2 before 10). `chosen` says whether the user gave `num_clients`: silos set the count only when not.
    Raises UsageError.
    """
    _check_folder(data_path)
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
            f"{data_path} holds several data sets for {counted(num_clients, 'client')}: {names}",
            hint=f"name one, for example --data_path {matching[0].parent}",
        )
    if allocated:
        names = ", ".join(map(str, allocated))
        raise UsageError(
            f"{data_path} holds no data for {counted(num_clients, 'client')}, only {names}",
            hint="set num_clients to one of these, or allocate again with `fedlora allocate`",
        )
    return _silo_files(data_path, num_clients, chosen=chosen)


def find_counts(data_path: Path) -> list[Path]:
    """The folders of allocated data at or below a folder, each named by its number of clients."""
    return _allocated_folders(data_path) if data_path.is_dir() else []


def list_rows(folder: Path) -> list[Path]:
    """The files of rows directly in a folder, files of test rows left out; none where there is no folder."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((file for file in found if holds_rows(file) and not _is_test(file)), key=natural)


def _allocated_folders(data_path: Path) -> list[Path]:
    """Folders named by a count that hold client files, directly below `data_path` first."""
    return [
        folder
        for level in ("*", "*/*")
        for folder in sorted(data_path.glob(level), key=natural)
        if folder.is_dir() and folder.name.isdigit() and any(folder.glob("local_training_*.json"))
    ]


def _allocated_files(folder: Path, num_clients: int) -> list[Path]:
    files = [folder / f"local_training_{client_id}.json" for client_id in range(num_clients)]
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file}: no such file", hint="allocate again with `fedlora allocate`")
    return files


def is_silo_folder(path: Path) -> bool:
    """Whether a path names a folder of clients, and not one file of rows."""
    return path.is_dir() and not is_saved_dataset(path)


def _check_folder(folder: Path) -> None:
    """UsageError where there is no folder of clients but one file of rows or none, DataError for a DatasetDict."""
    if folder.is_file() or is_saved_dataset(folder):
        what = "file" if folder.is_file() else "data set"
        raise UsageError(
            f"{folder} is one {what}; training reads a folder with one file per client",
            hint=f"split it among clients; `fedlora init {folder}` prints the `fedlora allocate` command for it",
        )
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder", hint=_MAKE_DATA)
    refuse_splits(folder)


def find_silos(folder: Path) -> tuple[list[Path], list[Path]]:
    """The clients' files of a folder of silos in client-id order, and their files of test rows.

    UsageError where there are none, where the folder holds allocated data, and for names that no client can have.
    """
    _check_folder(folder)
    if _allocated_folders(folder):
        raise UsageError(
            f"{folder} holds allocated data, and no files of clients with names of their own",
            hint=f"its test rows are in one file for all clients, such as {folder}/dolly_test_200.jsonl",
        )
    rows = sorted((file for file in folder.iterdir() if holds_rows(file)), key=natural)
    files, tests = [file for file in rows if not _is_test(file)], [file for file in rows if _is_test(file)]
    if not files:
        raise UsageError(f"{folder} holds no client files", hint=_MAKE_DATA)
    _refuse_twice(rows)
    check_client_names(rows)
    return files, tests


def _silo_files(data_path: Path, num_clients: int, *, chosen: bool) -> list[Path]:
    files, tests = find_silos(data_path)
    if others := sorted(entry.name for entry in data_path.iterdir() if not holds_rows(entry) and not is_hidden(entry)):
        say(f"not clients, and ignored: {', '.join(others)}")
    if unread := [f"{folder.name}/{name}" for folder in (*files, *tests) for name in unread_in(folder)]:
        say(f"not rows, and ignored: {_first(unread)}")
    if chosen and len(files) != num_clients:
        raise UsageError(
            f"num_clients={num_clients}, but {data_path} holds {counted(len(files), 'client file')}",
            hint="leave num_clients out: own files set it by their count",
        )
    if not chosen and len(files) == 1:
        raise _only_one(files[0])
    say(
        f"taking the {_counted(files)} of {data_path} as one client each: {_first([file.name for file in files])}"
        + (f"; test rows: {_first([file.name for file in tests])}" if tests else "")
    )
    return files


def _only_one(file: Path) -> UsageError:
    split = f"split it among clients; `fedlora init {file}` prints the `fedlora allocate` command for it"
    if file.is_dir() and not is_saved_dataset(file):
        split = f"if each of its files is a client, give --data_path {file}"
    return UsageError(
        f"{file} is the only file of {file.parent}: a federation has at least two clients",
        hint=f"{split}; or set num_clients to 1",
    )


def _counted(files: Sequence[Path]) -> str:
    folders = sum(file.is_dir() for file in files)
    of_each = [(len(files) - folders, "file"), (folders, "folder")]
    return " and ".join(counted(number, what) for number, what in of_each if number)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def check_client_names(rows: Sequence[Path]) -> None:
    """UsageError for names of a folder's files of rows that would mean something else wherever a client is named."""
    tests = [file for file in rows if name_of_file(file.name).endswith(TEST)]
    files = sorted(set(rows) - set(tests), key=natural)
    for client, file in enumerate(files):
        name = name_of_file(file.name)
        if name in RESERVED:
            raise UsageError(f"{file}: no client can be called {name}", hint=f"rename the file; {RESERVED[name]}")
        if name.isdecimal() and name != str(client):
            raise UsageError(
                f"{file}: named by a number, but it is client {client} of this folder",
                hint="number the files from 0 on, or give them names",
            )
    names = {name_of_file(file.name) for file in files}
    for file in tests:
        if (name := name_of_file(file.name).removesuffix(TEST)) not in names:
            raise UsageError(
                f"{file}: test rows of {name!r}, but the folder has no client of this name",
                hint=f"its clients are {', '.join(sorted(names))}",
            )


def _is_test(file: Path) -> bool:
    """Whether a file of rows holds a client's test rows."""
    return name_of_file(file.name).endswith(TEST) and holds_rows(file)


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
