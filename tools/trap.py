"""Something happens to a process at its n-th write, fsync, rename, link, removal or new folder.

The calls are counted where Python makes them, so a run that computes the same meets the same points in the same
order. `torn` stops in the middle of a write: half of the bytes are in the file.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ("fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir")
NEEDS_SPACE = ("write", "mkdir", "link")


class Trap:
    """Counts points; at `point` does what `action` says: kill, full (no space from then on), wait for `gate`, or a
    signal whose exception is lost: without a trace (lose), or turned into another (turn)."""

    def __init__(self, action: str = "count", point: int = -1, where: str = "before", gate: str = "") -> None:
        self.action = action
        self.point = point
        self.where = where
        self.gate = gate
        self.passed = 0
        self.is_full = False

    def install(self) -> None:
        """Put the trap into this process, for good."""
        for name in CALLS:
            setattr(os, name, self._guarded(name, getattr(os, name)))
        fdopen, opened = os.fdopen, io.open
        os.fdopen = lambda *a, **k: self._watched(fdopen(*a, **k))  # type: ignore[assignment]
        io.open = lambda *a, **k: self._watched(opened(*a, **k))  # type: ignore[assignment]

    def _guarded(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **named: Any) -> Any:
            is_met = self._meet()
            if is_met and self.where != "after":
                self._act()
            if self.is_full and name in NEEDS_SPACE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
            result = call(*arguments, **named)
            if is_met and self.where == "after":
                self._act()
            return result

        return guarded

    def _watched(self, handle: Any) -> Any:
        return WatchedFile(handle, self) if handle.writable() else handle

    def _meet(self) -> bool:
        self.passed += 1
        return self.passed - 1 == self.point

    def _act(self) -> None:
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "full":
            self.is_full = True
        elif self.action == "wait":
            while not Path(self.gate).exists():
                time.sleep(0.01)
        elif self.action in ("lose", "turn"):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
            except SystemExit:
                if self.action == "turn":
                    raise ValueError("a library's own way to say so") from None

    def write(self, handle: Any, content: Any) -> int:
        """One write to a file: nothing, half or all of it may reach the disk."""
        is_met = self._meet()
        if is_met and self.where == "before":
            self._act()
        if is_met and self.where == "torn":
            half = len(content) // 2
            handle.write(content[:half])
            handle.flush()
            self._act()
            if not self.is_full:
                return half + handle.write(content[half:])
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = handle.write(content)
        if is_met and self.where == "after":
            handle.flush()
            self._act()
        return written


class WatchedFile:
    """An open file whose writes are counted."""

    def __init__(self, handle: Any, trap: Trap) -> None:
        self._handle = handle
        self._trap = trap

    def write(self, content: Any) -> int:
        return self._trap.write(self._handle, content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def __enter__(self) -> WatchedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()
