"""The adapter that a run starts from: drawn from its seed, or taken from another run and kept beside run.json.

The copy is the run's own, so that it resumes and is verified where the other run is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.errors import StorageError
from fedlora.federated.adapters import Shapes, make_adapter
from fedlora.files import sha256_of
from fedlora.llm.adapter_files import load_adapter
from fedlora.paths import RunPaths
from fedlora.runs.run_folder import read_run
from fedlora.types import AdapterState

FIELD = "init_from"
"""Of run.json, where the adapter was taken from another run."""


def read_start(paths: RunPaths, shapes: Shapes, config: Any) -> AdapterState:
    """The start of a run on disk; StorageError where its copy of another run's adapter is not the recorded one."""
    if not config.init_from:
        return make_adapter(shapes, config.seed)
    file, told = paths.start_file, describe_start(paths)
    if not file.is_file() or sha256_of(file) != told.get("sha256"):
        raise StorageError(
            f"{file}: {'does not match its hash in run.json' if file.is_file() else 'is missing'}",
            hint=f"restore it from a copy; it is the adapter of {told.get('of')}",
        )
    return load_adapter(file, shapes)


def describe_start(paths: RunPaths) -> Mapping[str, Any]:
    """What run.json says of an adapter that was taken from another run."""
    return dict(read_run(paths).more.get(FIELD) or {})
