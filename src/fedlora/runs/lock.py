"""The lock of a run: one process at a time may write it, and others can see which one.

The operating system releases the lock when its holder ends, in any way, so a lock never has to be broken. A separate
file names the holder, because opening a lock file may empty it. That file may be left over from a killed process, so it
means nothing unless the lock is held.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from filelock import FileLock, Timeout

from fedlora.errors import LockedError, StorageError
from fedlora.files import make_folder, write_json
from fedlora.paths import RunPaths
from fedlora.runs.checking import read_record

PATIENCE_SECONDS = 0.2
"""How long a start waits for the lock: a process that only checks it holds it for an instant."""


@dataclass(frozen=True)
class Holder:
    """The process that works on a run; both unknown (0, "") while it has not yet said so."""

    pid: int = 0
    host: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.pid else "another process"


@contextlib.contextmanager
def hold_run(paths: RunPaths) -> Iterator[None]:
    """Hold the lock of a run and make its folder; LockedError names the process that has it already."""
    make_folder(paths.root)
    poll = PATIENCE_SECONDS / 5
    # who trains round by round may end in another thread than it began
    lock = FileLock(paths.lock_file, timeout=PATIENCE_SECONDS, poll_interval=poll, thread_local=False)
    with _storage_errors(paths):
        try:
            lock.acquire()
        except Timeout:
            raise LockedError(
                f"{paths.root}: {_read_holder(paths)} trains this run",
                hint="wait until it has ended, or choose another --exp_name",
            ) from None
    try:
        write_json(paths.holder_file, {"host": socket.gethostname(), "pid": os.getpid()})
        yield
    finally:
        paths.holder_file.unlink(missing_ok=True)
        _leave_nothing_empty(paths)
        lock.release()


def find_holder(paths: RunPaths) -> Holder | None:
    """The process that works on a run now, or None; nothing is written."""
    if not paths.lock_file.is_file():
        return None
    lock = FileLock(paths.lock_file, timeout=0)
    with _storage_errors(paths):
        try:
            lock.acquire()
        except Timeout:
            return _read_holder(paths)
    lock.release()
    return None


def _leave_nothing_empty(paths: RunPaths) -> None:
    """Remove the folder of a start that was refused before it wrote anything; the lock is still held, and filelock
    takes no lock on a file that has been removed."""
    if [entry.name for entry in paths.root.iterdir()] == [paths.lock_file.name]:
        with contextlib.suppress(OSError):
            paths.lock_file.unlink()
            paths.root.rmdir()


def _read_holder(paths: RunPaths) -> Holder:
    facts = read_record(paths.holder_file, {"pid": int, "host": str})
    return Holder(facts["pid"], facts["host"]) if facts else Holder()


@contextlib.contextmanager
def _storage_errors(paths: RunPaths) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{paths.lock_file}: {error.strerror or error}", hint="check space and permissions of the folder"
        ) from error
