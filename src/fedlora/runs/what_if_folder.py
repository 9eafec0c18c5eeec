"""The folder of a what-if: rounds that `generate` can use, each with its provenance.

It looks like a run's folder and is none: `train` and `verify` refuse it, and only another `reaggregate` replaces it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.errors import UsageError
from fedlora.files import write_json
from fedlora.paths import RunPaths
from fedlora.runs.run_folder import check_free, clear_run, read_run
from fedlora.runs.writer import RunWriter
from fedlora.types import AdapterState

PROVENANCE_NAME = "reaggregated.json"
UNFINISHED = "reaggregating"
"""The state of an interrupted what-if: the next call starts it again."""


def make_room(paths: RunPaths, *, overwrite: bool) -> None:
    """Clear the folder; UsageError when it holds a run, or a what-if that may not be replaced."""
    check_free(paths)
    if not paths.run_file.exists():
        return
    recorded = read_run(paths)
    if recorded.reaggregated_from is None:
        raise UsageError(f"{paths.root}: a run of this name exists", hint="choose another --new_name")
    if not overwrite and recorded.state != UNFINISHED:
        raise UsageError(
            f"{paths.root}: an earlier reaggregate left its adapters there",
            hint="choose another --new_name, or give --overwrite to replace them",
        )
    clear_run(paths)


def write_round(writer: RunWriter, number: int, adapter: AdapterState, provenance: Mapping[str, Any]) -> None:
    """Commit a round of one adapter and its provenance; its manifest names both."""
    writer.begin_round(number)
    write_json(writer.paths.partial_folder(number) / PROVENANCE_NAME, provenance)
    writer.commit_round(number, adapter, None, {"cohort": [], "limited": [], "quarantined": []})
