"""Find every file of a run that differs from its recorded hash.

Resuming reads only the files that it needs and stops at the first fault; this reads all files and lists all faults.
It finds accidents, not forgeries: someone who can change a file can also change the hashes beside it.
"""

from __future__ import annotations

from pathlib import Path

from fedlora.paths import RunPaths, client_name
from fedlora.runs.checking import (
    MANIFEST_NAME,
    UPDATE_NAME,
    find_file_faults,
    read_kept_update,
    read_manifest,
)
from fedlora.runs.metrics_log import MetricsLog
from fedlora.runs.run_records import Manifest


def find_round_faults(paths: RunPaths, number: int, config_sha256: str) -> list[str]:
    """The faults of a committed round: in its manifest, its chain, the files that the manifest names, and other
    files."""
    folder = paths.round_folder(number)
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{folder / MANIFEST_NAME} is missing or damaged"]
    faults = []
    if manifest.round != number:
        faults.append(f"{folder / MANIFEST_NAME} is of round {manifest.round}")
    if manifest.config_sha256 != config_sha256:
        faults.append(f"{folder / MANIFEST_NAME} is of a run with another configuration than run.json")
    faults += _find_parent_faults(paths, number, manifest)
    faults += find_file_faults(folder, manifest.files)
    named = {MANIFEST_NAME, *manifest.files}
    strays = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    faults += [f"{folder / name} is not named by the manifest" for name in strays if name not in named]
    faults += _find_record_faults(folder, manifest)
    return faults


def find_metrics_faults(paths: RunPaths) -> list[str]:
    """The first damaged line of metrics.jsonl, if there is one; a line that a kill cut off is damaged."""
    number = MetricsLog(paths.metrics_file).find_damaged_line()
    return [f"{paths.metrics_file}:{number} is damaged"] if number else []


def describe_open_round(folder: Path) -> str:
    """One line on a round that is not committed: which of its updates a resumed run will use."""
    entries = sorted(entry for entry in folder.iterdir() if (entry / UPDATE_NAME).is_file())
    broken = [entry.name for entry in entries if read_kept_update(entry) is None]
    whole = f"{len(entries) - len(broken)} finished updates are kept"
    return f"{whole}; {', '.join(broken)} not as written, trained again" if broken else whole


def _find_parent_faults(paths: RunPaths, number: int, manifest: Manifest) -> list[str]:
    parent = read_manifest(paths.round_folder(number - 1)) if number > 1 else None
    expected = parent.sha256 if parent else None
    if manifest.parent_sha256 == expected and (parent is not None or number == 1):
        return []
    return [f"{paths.round_folder(number)} was not made from the present round {number - 1}"]


def _find_record_faults(folder: Path, manifest: Manifest) -> list[str]:
    """Update records that disagree with the manifest about the files they both name."""
    faults = []
    for name in sorted(manifest.files):
        path = folder / name
        if path.name != UPDATE_NAME or not path.is_file():
            continue
        record = read_kept_update(path.parent)
        if record is not None and client_name(record["client_id"]) != path.parent.name:
            faults.append(f"{path} is of client {record['client_id']}")
        if record is None and not list(find_file_faults(folder, {name: manifest.files[name]})):
            faults.append(f"{path} does not describe the files beside it")
    return faults
