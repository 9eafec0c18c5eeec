"""The one writer of files: a temporary name in the same folder, flushed to disk, then renamed.

A reader therefore sees the old file or the new one, never half of one. Nothing is written once a signal has asked the
process to stop, for what that interrupted may be wrong. File modes follow the umask (libraries that write temporary
files leave 0600, which locks out the group).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedlora.errors import StorageError, UsageError
from fedlora.stopping import stop_if_asked

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
SAVED_STATE, SAVED_INFO = "state.json", "dataset_info.json"
"""What `save_to_disk` of the library `datasets` writes beside a data set's files."""


def write_bytes(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Replace `path` by `content` atomically; makes the folder. Raises StorageError and leaves the old file."""
    stop_if_asked()
    with _storage_errors(path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        try:
            # what lies there under this name is not ours: a link would be followed, an old file would keep its mode
            temporary.unlink(missing_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_text(path: Path, content: str, *, mode: int = 0o666) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, content.encode("utf-8"), mode=mode)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, so that equal values give equal bytes."""
    write_text(path, json_text(value))


def json_text(value: Any, *, only_ascii: bool = False) -> str:
    """Indented JSON with sorted keys and a newline at the end; NaN and infinity are refused."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=only_ascii, allow_nan=False) + "\n"


def json_lines(rows: Any) -> str:
    """One compact JSON object per line, keys in the rows' own order."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def json_line(value: Any) -> str:
    """One compact JSON object with sorted keys and a newline: a line of a log."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True) + "\n"


def append_line(path: Path, value: Any) -> None:
    """Append one JSON line and flush it to disk: for logs that must survive a kill."""
    stop_if_asked()
    line = json_line(value)
    with _storage_errors(path, len(line)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as handle:
            handle.write(line)
            handle.flush()
            os.fsync(handle.fileno())


def read_text(path: Path) -> str:
    """UTF-8 text of a file; a missing file is a UsageError that names it."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file", hint="check the path, or run the stage that writes it")
    with _storage_errors(path):
        return path.read_text(encoding="utf-8")


def read_json(path: Path) -> Any:
    """Parse a JSON file that fedlora wrote itself; anything else is a UsageError with the position."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON ({error})", hint="restore or regenerate the file") from error


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder is one that `datasets.Dataset.save_to_disk` wrote; such a folder counts as one file of rows."""
    return ((path / SAVED_STATE).is_file() and (path / SAVED_INFO).is_file()) or any(path.glob("*.arrow"))


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks of a mebibyte."""
    digest = hashlib.sha256()
    with _storage_errors(path), path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hex SHA-256 of a value as one line of JSON with sorted keys."""
    return hashlib.sha256(json_line(value).encode()).hexdigest()


def make_folder(folder: Path, *, mode: int = 0o777) -> None:
    """Make a folder with these permissions, and the folders above it; StorageError when the file system refuses."""
    with _storage_errors(folder):
        folder.mkdir(mode, parents=True, exist_ok=True)


@contextlib.contextmanager
def new_folder(target: Path, *, needed: int = 0) -> Iterator[Path]:
    """A working folder beside `target`, which becomes `target` at the end; after an error neither is there.

    Raises UsageError where `target` holds something, StorageError where it needs more bytes than are free or cannot be
    written.
    """
    stop_if_asked()
    if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UsageError(f"{target}: is not an empty folder", hint="name a new folder, or remove this one")
    working = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    with _storage_errors(target, needed):
        target.parent.mkdir(parents=True, exist_ok=True)
        if needed > (free := shutil.disk_usage(target.parent).free):
            raise StorageError(
                f"{target}: needs {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free",
                hint="free space, or name a folder on another disk",
            )
        shutil.rmtree(working, ignore_errors=True)
        try:
            working.mkdir()
            yield working
            stop_if_asked()
            if target.is_dir():
                target.rmdir()
            working.rename(target)
        finally:
            shutil.rmtree(working, ignore_errors=True)
        sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename inside it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _storage_errors(path: Path, size: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "free space or fix permissions, then run again"
        if error.errno in NO_SPACE:
            hint = f"free space, {max(size / 1e6, 0.01):.2f} MB for this file alone, then run again"
        raise StorageError(f"{path}: {error.strerror or error}", hint=hint) from error
