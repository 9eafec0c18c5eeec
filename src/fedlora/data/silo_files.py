"""A folder of silos written from rows in memory or from files: a file or a folder per client, as
`find_client_files` reads it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedlora.console import say
from fedlora.data.client_facts import FieldsReport
from fedlora.data.client_files import check_client_names
from fedlora.data.fields import RowFields
from fedlora.data.raw_records import Number, Record, RecordError
from fedlora.data.row_parts import holds_rows, is_hidden, is_rows_file, needed_files
from fedlora.data.streams import split_name
from fedlora.errors import DataError, StorageError, UsageError
from fedlora.files import json_lines, write_bytes
from fedlora.home import path_at_home
from fedlora.rows import STRICT, ReadRules

Rows = Iterable[Mapping[str, Any]]
_SPLIT_DICTS = frozenset({"DatasetDict", "IterableDatasetDict"})
"""What the library `datasets` calls several splits; it need not be installed."""


def write_silos(
    clients: Mapping[str, str | os.PathLike[str] | Rows],
    folder: Path,
    *,
    rules: ReadRules = STRICT,
    overwrite: bool = False,
) -> Path:
    """Write each client's rows to `<name>.jsonl`, or copy its file or folder under its name; all is checked first.

    Only the fields that make a row are written, under their usual names where the rules name columns; the others are
    reported. Raises UsageError, DataError, StorageError.
    """
    if not isinstance(clients, Mapping) or not clients:
        raise UsageError("no clients", hint="give a mapping from each client's name to its rows or its file")
    _refuse_splits("clients", clients)
    contents: dict[Path, bytes] = {}
    report = FieldsReport()
    for name, rows in clients.items():
        for file, content in _contents_of(name, rows, rules, report).items():
            contents[folder / file] = content
    check_client_names(sorted({folder / file.relative_to(folder).parts[0] for file in contents}))
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file", hint="choose another folder")
    report.report(len(clients))
    there = set(_files_in(folder)) if folder.is_dir() else set()
    if there == contents.keys() and all(file.read_bytes() == content for file, content in contents.items()):
        say(f"{folder} already holds exactly these rows; nothing written")
        return folder
    if there and not overwrite:
        raise UsageError(
            f"{folder}: holds other files ({', '.join(sorted(str(file.relative_to(folder)) for file in there)[:3])})",
            hint="choose another folder, or give --overwrite to replace its files of rows",
        )
    for file, content in contents.items():
        write_bytes(file, content)
    for stale in sorted(there - contents.keys()):
        if is_rows_file(stale) or stale.suffix == ".arrow":
            _remove(stale)
    return folder


def _files_in(folder: Path) -> Iterator[Path]:
    """What a folder of silos holds: its entries, and the files of a client's folder in the place of that folder."""
    for entry in folder.iterdir():
        if entry.is_dir() and holds_rows(entry):
            yield from (file for file in entry.iterdir() if not is_hidden(file))
        elif not entry.name.startswith("."):
            yield entry


def _refuse_splits(what: str, rows: Any) -> None:
    """UsageError for what `load_dataset` returns without a split: it maps names of splits to rows."""
    if any(base.__name__ in _SPLIT_DICTS for base in type(rows).__mro__):
        names = ", ".join(map(str, rows))
        raise UsageError(
            f"{what}: a {type(rows).__name__} with the splits {names}, not rows",
            hint='give the rows of one split, such as {"north": dataset["train"]}',
        )


def _contents_of(
    name: str, rows: str | os.PathLike[str] | Rows, rules: ReadRules, report: FieldsReport
) -> dict[str, bytes]:
    """The names and the bytes of one client's files."""
    if not isinstance(name, str) or not name.isprintable() or not name or name[0] == "." or set(name) & set("/\\,"):
        raise UsageError(f"client {name!r}: not a name for a file", hint="use letters, digits, '.', '_', '-' or spaces")
    if isinstance(rows, str | os.PathLike):
        return _copied(name, path_at_home(rows))
    _refuse_splits(f"client {name!r}", rows)
    if hasattr(rows, "__arrow_c_stream__"):
        rows = _rows_of_table(name, rows)
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        what = f"client {name!r}: neither rows nor a file, but {type(rows).__name__}"
        raise UsageError(what, hint="give a list of dictionaries, a table, or the path of a file or a folder")
    fields = RowFields(rules)
    kept = [_row_of(name, number, row, fields) for number, row in enumerate(rows, start=1)]
    if not kept:
        raise DataError(f"client {name!r}: no rows", hint="give at least one, or leave the client out")
    _check_columns(name, fields)
    report.note(Path(name))(fields)
    return {f"{name}.jsonl": json_lines(kept).encode()}


def _copied(name: str, path: Path) -> dict[str, bytes]:
    """A client's file, or the files of its folder, under the client's name."""
    if not holds_rows(path):
        what = "no such file" if split_name(path) else "not a file of rows by its name"
        hint = "give a .json, .jsonl, .csv or .parquet file, or a folder of such files"
        raise UsageError(f"client {name!r}: {path}: {what}", hint=hint)
    if path.is_dir():
        return {f"{name}/{file.name}": file.read_bytes() for file in needed_files(path)}
    stem, _, _ = split_name(path) or (path.name, "", "")
    return {name + path.name[len(stem) :]: path.read_bytes()}


def _row_of(name: str, number: int, row: Any, fields: RowFields) -> dict[str, Any]:
    """The fields of a row that are used, as they were given."""
    place = f": row {number}"
    try:
        made = fields.make_row(Record(_as_read(row), place))
        if fields.rules.columns:
            return made.as_dict()
        return {key: _as_written(value, key, place) for key, value in row.items() if key in fields.names}
    except RecordError as error:
        raise error.make_error(Path(name)) from None


def _rows_of_table(name: str, table: Any) -> list[dict[str, Any]]:
    """The rows of a table of any library that speaks Arrow; what it calls missing is null."""
    import pyarrow

    try:
        return pyarrow.table(table).to_pylist()
    except pyarrow.ArrowException as error:
        what = f"client {name!r}: {type(table).__name__} is not a table that Arrow can hold: {error}"
        raise UsageError(what, hint="give a list of dictionaries") from error


def _check_columns(name: str, fields: RowFields) -> None:
    try:
        fields.check_columns()
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
