"""Check the files of a run: manifests and update records against their hashes.

A bit that flips in a tensor loads silently, so nothing is used again, neither to resume nor to verify, before
its SHA-256 has been compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedlora.errors import StorageError
from fedlora.files import json_text, sha256_of, sha256_of_json
from fedlora.runs.run_records import Manifest
from fedlora.typed_json import from_json

MANIFEST_NAME = "manifest.json"
UPDATE_NAME = "update.json"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a round; None when there is none or it is not one."""
    record = _read_sealed(folder / MANIFEST_NAME, {})
    try:
        return None if record is None else from_json(Manifest, record)
    except ValueError:
        return None


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a round; StorageError when there is none or it is not one."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise StorageError(
            f"{folder / MANIFEST_NAME} is missing or damaged",
            hint="restore the file from a copy; `fedlora verify` finds all faults",
        )
    return manifest


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` with the SHA-256 of all its other fields, for a file that no manifest names, or not yet."""
    return {**record, "sha256": sha256_of_json({name: value for name, value in record.items() if name != "sha256"})}


def is_whole(record: Mapping[str, Any]) -> bool:
    """Whether a sealed record matches its hash; a record without a seal, from an early release, is accepted."""
    return "sha256" not in record or seal(record) == record


def find_round_fault(folder: Path, round_number: int) -> str | None:
    """The first reason why a committed round cannot be used, or None: manifest, then every file it names."""
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{folder / MANIFEST_NAME} is missing or damaged"
    if manifest.round != round_number:
        return f"{folder / MANIFEST_NAME} is of round {manifest.round}"
    return _find_file_fault(folder, manifest.files)


def find_listed_fault(folder: Path, paths: list[Path]) -> str | None:
    """The first reason why one of these files of a committed round cannot be used, or None."""
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{folder / MANIFEST_NAME} is missing or damaged"
    listed = {name: facts for name, facts in manifest.files.items() if folder / name in paths}
    if missing := [path for path in paths if path.relative_to(folder).as_posix() not in listed]:
        return f"{missing[0]} is not a file of its round: {folder / MANIFEST_NAME} does not name it"
    return _find_file_fault(folder, listed)


def read_kept_update(folder: Path) -> dict[str, Any] | None:
    """The record of a client's update if all its files match their hashes; None otherwise."""
    facts = _read_sealed(folder / UPDATE_NAME, {"client_id": int, "files": dict, "metrics": dict, "task_id": str})
    if facts is None or _find_file_fault(folder, facts["files"]):
        return None
    return facts


def describe_files(folder: Path, files: list[Path]) -> dict[str, dict[str, Any]]:
    """Path below `folder` -> SHA-256 and bytes of each file."""
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in files
    }


def find_file_faults(folder: Path, files: Mapping[str, Any]) -> Iterator[str]:
    """Every listed file that does not match its hash, in the order of the names; read one at a time."""
    for name, facts in sorted(files.items()):
        path = folder / name
        if not isinstance(facts, dict) or not _is_path_below(name):
            yield f"{folder}: the record of {name[:100]!r} is damaged"
        elif path.is_symlink() or not path.is_file():
            yield f"{path} is missing"
        elif path.stat().st_size != facts.get("bytes") or sha256_of(path) != facts.get("sha256"):
            yield f"{path} does not match its hash"


def _find_file_fault(folder: Path, files: Mapping[str, Any]) -> str | None:
    return next(find_file_faults(folder, files), None)


def _is_path_below(name: str) -> bool:
    """Whether `name` is a path as `describe_files` writes it: plain parts, of a length that file systems have."""
    parts = name.split("/")
    return name.isprintable() and all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in parts)


def _read_sealed(path: Path, wanted: Mapping[str, type]) -> dict[str, Any] | None:
    record = read_record(path, {**wanted, "sha256": str})
    return record if record is not None and is_whole(record) else None


def read_record(path: Path, wanted: Mapping[str, type]) -> dict[str, Any] | None:
    """A JSON object written by this project that has the `wanted` fields; None when it is damaged or missing."""
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        # a record is hashed by its value: other bytes of the same value are a damaged record
        if text != json_text(value):
            return None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not all(isinstance(value.get(key), kind) for key, kind in wanted.items()):
        return None
    return value
