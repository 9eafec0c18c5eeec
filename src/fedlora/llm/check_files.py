"""What self-checks found, kept on disk under everything that it depends on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from fedlora.errors import StorageError
from fedlora.files import write_json
from fedlora.home import checks_folder
from fedlora.llm.abilities import Abilities
from fedlora.llm.base_model import BaseModel

FORMAT = 2
"""Counted up with every change of the check, or of the code that it checks, that may change what it finds."""


def recall_check(base: BaseModel, *facts: Any) -> Abilities | None:
    """What an earlier check of this base found, under the same `facts`; None where there is none, or it is damaged."""
    path = _path(base, facts)
    if path is None:
        return None
    try:
        return Abilities.from_record(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def keep_check(base: BaseModel, can: Abilities, *facts: Any) -> None:
    """Keep what was found; a disk that is full or read-only costs the next check, not this run."""
    path = _path(base, facts)
    if path is None:
        return
    try:
        write_json(path, can.record())
    except StorageError:
        return


def _path(base: BaseModel, facts: tuple[Any, ...]) -> Path | None:
    """The file of a check; None for a model whose files are not known."""
    files = _files_of(base.model)
    if files is None:
        return None
    import transformers

    machine = getattr(torch.cpu, "get_capabilities", dict)()
    if base.device.type == "cuda":
        machine = {"name": torch.cuda.get_device_name(base.device)}
    versions = [FORMAT, torch.__version__, transformers.__version__]
    key = [versions, files, base.device.type, machine, base.dtype_name, *facts]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    return checks_folder() / f"{digest}.json"


def _files_of(model: Any) -> list[Any] | None:
    """Name, size and time of every file of a folder, or the hub's commit."""
    folder = Path(model.name_or_path)
    if model.name_or_path and folder.is_dir():
        found = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
        return [[name, status.st_size, status.st_mtime_ns] for name, status in found]
    commit = getattr(model.config, "_commit_hash", None)
    return [model.name_or_path, commit] if commit else None
