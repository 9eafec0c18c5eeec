"""The additions of a run to its base, read back from `base_delta.safetensors` of its rounds.

Every round's manifest names the chain before and after it, so reading the chain detects a round that is missing,
damaged or of another run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch

from fedlora.errors import StorageError
from fedlora.federated.base_delta import append
from fedlora.llm.adapter_files import to_safetensors
from fedlora.paths import RunPaths
from fedlora.runs.checking import find_listed_fault, read_manifest
from fedlora.runs.run_records import Manifest
from fedlora.stopping import stop_if_asked
from fedlora.types import AdapterState, BaseDelta, Export

BASE_NAME = "base_delta.safetensors"


def describe_additions(before: BaseDelta | None, after: BaseDelta | None, export: Export) -> dict[str, Any]:
    """The fields of a manifest for a method that adds to the base; empty for other methods.

    `parent_sha256` is what the round's clients trained on.
    """
    if before is None or after is None:
        return {}
    added = after.links[len(before.links) :]
    chain = {
        "version": after.links[-1].version if after.links else 0,
        "parent_sha256": before.sha256,
        "sha256": after.sha256,
        "truncation_error": added[-1].truncation_error if added else 0.0,
    }
    return {"base_delta": chain, "export": {"rank": export.rank, "relative_error": export.relative_error}}


def measure_additions(manifest: Mapping[str, Any]) -> dict[str, float]:
    """The same as numbers for the round's line in the metrics."""
    if "base_delta" not in manifest:
        return {}
    base, export = manifest["base_delta"], manifest["export"]
    return {
        "base_truncation_error": base["truncation_error"],
        "export_error": export["relative_error"],
        "export_rank": export["rank"],
    }


def increment_to_bytes(base: BaseDelta | None, round_number: int) -> bytes | None:
    """The file of what a round added; None when it added nothing."""
    if base is None or not base.links or base.links[-1].version != round_number:
        return None
    return to_safetensors(base.newest)


class BaseChain:
    """The chain of a run's rounds, read forward: a later round is read from where the last one stopped."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._number = 0
        self._base = BaseDelta()

    def up_to(self, round_number: int) -> BaseDelta | None:
        """The additions to the base up to a round; None when the run's method adds nothing.

        Raises StorageError that names the round whose link is broken.
        """
        if round_number < self._number:
            self._number, self._base = 0, BaseDelta()
        if round_number > 0 and _read_manifest(self._paths, round_number).base_delta is None:
            return None
        while self._number < round_number:
            self._base = self._read_link(self._number + 1)
            self._number += 1
        return self._base

    def _read_link(self, number: int) -> BaseDelta:
        folder, base = self._paths.round_folder(number), self._base
        record = _read_manifest(self._paths, number).base_delta
        if record is None or record.get("parent_sha256") != base.sha256:
            raise _broken(folder, number, "its manifest does not continue the chain of the rounds before it")
        if record.get("sha256") == base.sha256:
            return base
        file = folder / BASE_NAME
        if fault := find_listed_fault(folder, [file]):
            raise _broken(folder, number, fault)
        base = append(base, number, _load(file), truncation_error=record.get("truncation_error", 0.0))
        if record.get("sha256") != base.sha256:
            raise _broken(folder, number, f"{file} is not the increment that its manifest names")
        return base


def read_increment(paths: RunPaths, number: int) -> AdapterState:
    """The factors that a committed round added; StorageError when their file is damaged."""
    folder = paths.round_folder(number)
    if fault := find_listed_fault(folder, [folder / BASE_NAME]):
        raise _broken(folder, number, fault)
    return _load(folder / BASE_NAME)


def load_base(paths: RunPaths, round_number: int) -> BaseDelta | None:
    """What `BaseChain.up_to` gives, read from the first round on."""
    return BaseChain(paths).up_to(round_number)


def _read_manifest(paths: RunPaths, number: int) -> Manifest:
    folder = paths.round_folder(number)
    manifest = read_manifest(folder)
    if manifest is None:
        raise _broken(folder, number, "its manifest is missing or damaged")
    return manifest


def _load(file: Path) -> AdapterState:
    try:
        return safetensors.torch.load_file(file)
    except Exception as error:  # the reader raises many kinds
        stop_if_asked()
        raise StorageError(f"{file}: not readable ({type(error).__name__})", hint="train that round again") from None


def _broken(folder: Path, number: int, what: str) -> StorageError:
    return StorageError(
        f"{folder}: what round {number} added to the base cannot be used: {what}",
        hint="every later round depends on it: restore the folder from a copy, or give the same train command again, "
        "which trains again from the last intact round",
    )
