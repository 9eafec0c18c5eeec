"""How far the process is that trains a run, for who watches it from elsewhere.

The file is written in place and never flushed to the disk: it is worth nothing once its process has ended. A reader may
meet half of it, and then reads again later.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.files import json_line


class ProgressFile:
    """One file that is open as long as its process trains; a disk that refuses it is not asked again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        except OSError:
            self._descriptor = -1

    def write(self, facts: Mapping[str, Any]) -> None:
        """Replace what stands there by `facts`, JSON values."""
        content = json_line(facts).encode()
        with contextlib.suppress(OSError):
            if self._descriptor >= 0:
                os.pwrite(self._descriptor, content, 0)
                os.ftruncate(self._descriptor, len(content))

    def close(self) -> None:
        """Remove the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self.path.unlink(missing_ok=True)


def read_progress(path: Path) -> dict[str, Any] | None:
    """What stands in the file; None where there is none, or half of one."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None
