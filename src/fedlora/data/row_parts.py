"""What is read as one file of rows: a file, a folder of files, or a folder that `Dataset.save_to_disk` wrote.

The files of a folder are its parts: they are read in natural order, each in its own format. Nested folders are not
read. The hash of a folder is that of its parts' names and hashes, so it changes with a part that comes or goes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from fedlora.data.streams import READABLE, find_format, split_name
from fedlora.errors import DataError, UsageError
from fedlora.files import SAVED_INFO, SAVED_STATE, is_saved_dataset, json_line, sha256_of
from fedlora.plain_text import natural_key

_SPLITS = "dataset_dict.json"
"""What `DatasetDict.save_to_disk` writes beside the folders of its splits."""
_SAVE_AGAIN = "save the data set again with save_to_disk, or write its rows as JSON lines"


class Part(NamedTuple):
    """A file of rows: its format (json, csv, parquet or arrow) and its packing (gzip, zstd or none)."""

    path: Path
    kind: str
    packing: str = ""


def find_parts(path: Path) -> list[Part]:
    """The files whose rows are those of `path`, in the order in which they are read; a file is its only part.

    Raises UsageError where no rows are there, DataError for a folder with the splits of a DatasetDict.
    """
    if not path.is_dir():
        return [Part(path, *find_format(path))]
    refuse_splits(path)
    if is_saved_dataset(path):
        return [Part(path / name, "arrow") for name in _saved_files(path)]
    files = sorted((file for file in path.iterdir() if is_rows_file(file)), key=natural)
    if not files:
        raise UsageError(f"{path}: a folder without a file of rows", hint=READABLE)
    return [Part(file, *find_format(file)) for file in files]


def needed_files(folder: Path) -> list[Path]:
    """The files without which a folder's rows cannot be read; raises what `find_parts` raises."""
    parts = [part.path for part in find_parts(folder)]
    return [folder / SAVED_STATE, folder / SAVED_INFO, *parts] if is_saved_dataset(folder) else parts


def is_rows_file(path: Path) -> bool:
    """Whether a file holds rows by its name; allocation's manifest does not, and no hidden file does."""
    return split_name(path) is not None and not is_hidden(path) and path.is_file()


def holds_rows(path: Path) -> bool:
    """Whether `path` is read as one file of rows: by its name, or as a folder that directly holds such files."""
    if not path.is_dir():
        return is_rows_file(path)
    return not is_hidden(path) and (is_saved_dataset(path) or any(map(is_rows_file, path.iterdir())))


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is never rows, and never worth a word."""
    return path.name.startswith(".") or path.name == "manifest.json"


def unread_in(path: Path) -> list[str]:
    """What a folder of files holds beside its parts: nested folders and files of other formats."""
    if not path.is_dir() or is_saved_dataset(path):
        return []
    return sorted(entry.name for entry in path.iterdir() if not is_rows_file(entry) and not is_hidden(entry))


def refuse_splits(path: Path) -> None:
    """DataError where a folder holds the splits of a DatasetDict: which one is meant is not known."""
    if not (path / _SPLITS).is_file():
        return
    splits = _read(path / _SPLITS, "splits")
    if not all(isinstance(name, str) for name in splits):
        raise _not_saved(path / _SPLITS, "its splits are not names")
    raise DataError(
        f"{path}: a DatasetDict with the splits {', '.join(splits)}, where the rows of one are expected",
        hint=f"name one split, for example {path / splits[0]}" if splits else _SAVE_AGAIN,
    )


def refuse_folder(path: Path, field: str) -> None:
    """UsageError where the field takes one file of rows, or a saved data set, and names another folder."""
    if path.is_dir() and not is_saved_dataset(path):
        refuse_splits(path)
        raise UsageError(f"{field}={path}: a folder, and one file of rows is read here", hint="name a file in it")


def sha256_of_rows(path: Path) -> str:
    """The hash of everything that is read for `path`: of a file that of its bytes, of a folder that of its parts."""
    if not path.is_dir():
        return sha256_of(path)
    parts = [part_line(part.path.name, sha256_of(part.path)) for part in find_parts(path)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def part_line(name: str, sha256: str) -> bytes:
    """What a part adds to the hash of its folder."""
    return json_line([name, sha256]).encode()


def natural(path: Path) -> tuple[Any, str]:
    """Sorts files by name, 2 before 10; the full path breaks ties."""
    return natural_key(path.name), str(path)


def _saved_files(folder: Path) -> list[str]:
    """The names of a saved data set's files in its order."""
    state = folder / SAVED_STATE
    if not state.is_file():
        raise _not_saved(state, "no such file, beside files that end in .arrow")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in _read(state, "_data_files")]
    # a name with a folder in it would lead out of what the user named
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise _not_saved(state, "its _data_files are not names of files in the folder")
    if missing := next((name for name in names if not (folder / str(name)).is_file()), None):
        raise _not_saved(folder / str(missing), "no such file, but state.json names it")
    return [str(name) for name in names]


def _read(file: Path, field: str) -> list[Any]:
    """The list that a small JSON file of `datasets` has in a field."""
    try:
        found = json.loads(file.read_bytes())[field]
    except (ValueError, LookupError, TypeError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise _not_saved(file, f"has no list {field}")
    return found


def _not_saved(file: Path, what: str) -> DataError:
    return DataError(f"{file}: {what}", hint=_SAVE_AGAIN)
