"""A folder of silos written from rows in memory or from files: one file per client, as `find_client_files` reads it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedlora.console import say
from fedlora.data.client_files import check_client_names
from fedlora.data.fields import RowFields
from fedlora.data.raw_records import Number, Record, RecordError
from fedlora.data.streams import split_name
from fedlora.errors import DataError, StorageError, UsageError
from fedlora.files import json_lines, write_bytes
from fedlora.rows import STRICT

Rows = Iterable[Mapping[str, Any]]


def write_silos(clients: Mapping[str, str | os.PathLike[str] | Rows], folder: Path, *, overwrite: bool = False) -> Path:
    """Write each client's rows to `<name>.jsonl`, or copy its file under its name; everything is checked first.

    Only the fields that make a row are written. Raises UsageError, DataError, StorageError.
    """
    if not isinstance(clients, Mapping) or not clients:
        raise UsageError("no clients", hint="give a mapping from each client's name to its rows or its file")
    contents = {}
    for name, rows in clients.items():
        file, content = _content_of(name, rows)
        contents[folder / file] = content
    check_client_names(sorted(contents))
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file", hint="choose another folder")
    there = {entry for entry in folder.iterdir() if not entry.name.startswith(".")} if folder.is_dir() else set()
    if there == contents.keys() and all(file.read_bytes() == content for file, content in contents.items()):
        say(f"{folder} already holds exactly these rows; nothing written")
        return folder
    if there and not overwrite:
        raise UsageError(
            f"{folder}: holds other files ({', '.join(sorted(entry.name for entry in there)[:3])})",
            hint="choose another folder, or give --overwrite to replace its files of rows",
        )
    for file, content in contents.items():
        write_bytes(file, content)
    for stale in sorted(there - contents.keys()):
        if split_name(stale) is not None and stale.is_file():
            _remove(stale)
    return folder


def _content_of(name: str, rows: str | os.PathLike[str] | Rows) -> tuple[str, bytes]:
    """The name and the bytes of one client's file."""
    if not isinstance(name, str) or not name.isprintable() or not name or name[0] == "." or set(name) & set("/\\,"):
        raise UsageError(f"client {name!r}: not a name for a file", hint="use letters, digits, '.', '_', '-' or spaces")
    if isinstance(rows, str | os.PathLike):
        file = Path(rows)
        named = split_name(file)
        if named is None or not file.is_file():
            what = "no such file" if named else "not a file of rows by its name"
            raise UsageError(f"client {name!r}: {file}: {what}", hint="give a .json, .jsonl, .csv or .parquet file")
        return name + file.name[len(named[0]) :], file.read_bytes()
    if not isinstance(rows, Iterable):
        raise UsageError(f"client {name!r}: neither rows nor a file, but {type(rows).__name__}", hint="give a list")
    fields = RowFields(STRICT)
    kept = [_row_of(name, number, row, fields) for number, row in enumerate(rows, start=1)]
    if not kept:
        raise DataError(f"client {name!r}: no rows", hint="give at least one, or leave the client out")
    return f"{name}.jsonl", json_lines(kept).encode()


def _row_of(name: str, number: int, row: Any, fields: RowFields) -> dict[str, Any]:
    """The fields of a row that are used, as they were given."""
    place = f": row {number}"
    try:
        fields.make_row(Record(_as_read(row), place))
        return {key: _as_written(value, key, place) for key, value in row.items() if key in fields.names}
    except RecordError as error:
        raise error.make_error(Path(name)) from None


def _as_read(value: Any) -> Any:
    """Values as the reader of a file has them."""
    if isinstance(value, Mapping):
        return {str(key): _as_read(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_as_read(each) for each in value]
    if isinstance(value, str):
        return str(value)
    return Number(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _as_written(value: Any, called: str, place: str) -> Any:
    """Values as JSON has them; RecordError for what it has not."""
    if isinstance(value, Mapping):
        return {str(key): _as_written(each, f"{called}.{key}", place) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_as_written(each, f"{called}[{index}]", place) for index, each in enumerate(value)]
    if isinstance(value, str | int | float | None):
        return value
    raise RecordError(place, f"the field {called!r} is of the type {type(value).__name__}, which no file of rows holds")


def _remove(file: Path) -> None:
    try:
        file.unlink()
    except OSError as error:
        raise StorageError(f"{file}: {error.strerror}", hint="fix its permissions, then run again") from error
